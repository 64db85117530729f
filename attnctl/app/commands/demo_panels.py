"""How the panels of `attnctl demo` are made: pictures plain and under control, a word map, a clip, a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from attnctl.app.demo import nouns
from attnctl.app.panels import Case, Panel

__all__ = ["Made", "make", "ticks_of", "train_on_colours"]

GREEN, RED = (30, 150, 70), (200, 60, 50)
Tick = Callable[[], object]
_FRAMES, _SHOWN = 8, (0, 7)  # of the clip: how many are edited, which are shown


@dataclass(frozen=True)
class Made:
    """Hold the pairs of a panel, as `card_sheet` takes them, and the records of its pipeline calls."""

    pairs: tuple[Any, ...]
    records: tuple[Any, ...] = ()


def make(panel: Panel, tick: Tick, command: str = "") -> Made:
    """Make one panel; `tick` is called `ticks_of(panel)` times."""
    return _KINDS[panel.kind](panel, tick, command)


def ticks_of(panel: Panel) -> int:
    """Count the steps that a panel reports."""
    runs = {"pictures": 2 * len(panel.cases), "words": len(panel.cases), "clip": 2, "vision": 1}
    return runs[panel.kind] * panel.steps


@lru_cache(maxsize=1)  # panels of one model stand together; only the last model is held
def _loaded(name: str) -> Any:
    from attnctl.pipelines.models import load

    return load(name)


def _control(panel: Panel, case: Case) -> Any:
    """Read the panel's control for one prompt."""
    from attnctl.data.specs import parse_control

    objects = tuple(f"{part} on {_background(case.prompt)}" for part in _objects(case.prompt))
    words = {
        "NOUNS": repr(nouns(case.prompt)),
        "OBJECTS": repr(objects),
        "SOURCE": repr(case.prompt),
        "MORE": repr(case.more),
    }
    text = panel.control
    for word, value in words.items():
        text = text.replace(word, value)
    return parse_control(text)


def _objects(prompt: str) -> list[str]:
    return prompt.rpartition(" on ")[0].split(" and ")


def _background(prompt: str) -> str:
    return prompt.rpartition(" on ")[2]


def _call(panel: Panel, case: Case, command: str, **changes: Any) -> Any:
    from attnctl.pipelines.generate import Call

    plain = Call(
        prompts=(case.prompt,),
        seeds=(case.seed,),
        steps=panel.steps,
        guidance=panel.guidance,
        options=panel.options,
        command=command,
    )
    return replace(plain, **changes)


def _pictures(panel: Panel, tick: Tick, command: str) -> Made:
    """Make each picture plain and under control, from the same noise, and let the judge frame it."""
    from attnctl.data.card_sheets import Pair
    from attnctl.pipelines.generate import sample

    loaded, pairs, records = _loaded(panel.model), [], []
    for case in panel.cases:
        negative = case.more if panel.mark == "gone" else None
        calls = (
            _call(panel, case, command),
            _call(panel, case, command, controls=(_control(panel, case),), negative=negative),
        )
        done = [sample(loaded, call, tick) for call in calls]
        frames = [GREEN if _as_asked(panel.mark, one.images[0], case) else RED for one in done]
        pairs.append(Pair((done[0].images[0], done[1].images[0]), _caption(case), (frames[0], frames[1])))
        records += [one.record for one in done]
    return Made(tuple(pairs), tuple(records))


def _caption(case: Case) -> str:
    return f"{case.prompt}, {case.says}" if case.says else case.prompt


def _as_asked(mark: str, image: Any, case: Case) -> bool:
    """Tell whether the judge finds what a panel asks for.

    "right": all objects and nothing else; "half": the object's centre in the half that the case says; "halves": the
    first object in the left half and the second in the right; "gone": nothing of the negative prompt's object.
    """
    from attnctl.shapes import judge, parse

    seen, middle = judge(image), image.width / 2
    if mark == "right":
        return bool(seen.matches(case.prompt).right)
    if mark == "half":
        return bool(seen.things) and (seen.things[0].x < middle) == ("left" in case.says)
    if mark == "halves":
        halves = [{(f.color, f.shape) for f in seen.things if (f.x < middle) == left} for left in (True, False)]
        return all(thing.pair in half for thing, half in zip(parse(case.prompt).things, halves, strict=True))
    unwanted = parse(case.more).things[0].pair
    return unwanted not in {(f.color, f.shape) for f in seen.things}


def _words(panel: Panel, tick: Tick, command: str) -> Made:
    """Lay the map of a noun over the picture that attended to it, with the outline of the map's mask."""
    from attnctl.data.card_sheets import Pair
    from attnctl.data.map_pictures import outlined, overlay_word
    from attnctl.pipelines.generate import sample

    loaded, pairs, records = _loaded(panel.model), [], []
    for case in panel.cases:
        done = sample(loaded, _call(panel, case, command, controls=(_control(panel, case),)), tick)
        image, (maps,) = done.images[0], done.maps
        mask = maps.mask(case.more, size=(image.height, image.width))[0]
        pairs.append(Pair((image, outlined(overlay_word(image, maps, case.more), mask)), _caption(case)))
        records.append(done.record)
    return Made(tuple(pairs), tuple(records))


def _clip(panel: Panel, tick: Tick, command: str) -> Made:
    """Edit a rendered clip, and show its first and its last frame."""
    import numpy as np
    from PIL import Image

    from attnctl.data.card_sheets import Pair
    from attnctl.pipelines import edit_video
    from attnctl.shapes import judge, parse
    from attnctl.shapes.motion import FRAMES, render_clip, sample_clip

    (case,) = panel.cases
    clip = sample_clip(np.random.default_rng(case.seed))
    video = render_clip(clip)[:: FRAMES // _FRAMES]
    edited = edit_video(
        _loaded(panel.model).pipe,
        video,
        _control(panel, case),
        steps=panel.steps,
        guidance_scale=panel.guidance,
        window=_FRAMES,
        progress=tick,
    ).frames
    assert edited is not None  # it is kept unless a file is written instead
    pairs = []
    for i in _SHOWN:
        things = {(f.color, f.shape) for f in judge(edited[i]).things}
        frame = GREEN if parse(case.more).things[0].pair in things else RED
        images = Image.fromarray(video[i]), Image.fromarray(edited[i])
        pairs.append(Pair(images, f"frame {i + 1}: {case.prompt} becomes {case.more}", (None, frame)))
    return Made(tuple(pairs))


def _vision(panel: Panel, tick: Tick, command: str) -> Made:
    """Train a transformer with other attention to name colours, and show where its class token looks."""
    import numpy as np
    from PIL import Image

    from attnctl.data.card_sheets import Pair
    from attnctl.data.pictures import overlay
    from attnctl.shapes.scenes import COLORS

    model, classes = train_on_colours("agent", epochs=panel.steps, tick=tick), tuple(COLORS)
    pairs = []
    for case in panel.cases:
        pixels, tensors, labels, _ = colour_scenes(1, case.seed)
        answers, maps = looks(model, tensors)
        image = Image.fromarray(np.asarray(pixels[0]))
        said = classes[int(answers[0])]
        frame = GREEN if answers[0] == labels[0] else RED
        pairs.append(Pair((image, overlay(image, maps[0])), f"Which colour? The model says {said}.", (None, frame)))
    return Made(tuple(pairs))


def colour_scenes(n: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Draw scenes of one object: pixels [n, 64, 64, 3], tensors [n, 3, 32, 32] in -1..1, colours, and object masks."""
    import numpy as np
    import torch

    from attnctl.shapes.scenes import BACKGROUNDS, COLORS, render, sample

    rng = np.random.default_rng(seed)
    scenes = [sample(rng) for _ in range(n)]
    pixels = np.stack([render(scene) for scene in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([list(COLORS).index(scene.things[0].color) for scene in scenes])
    grounds = np.array([BACKGROUNDS[scene.background] for scene in scenes])[:, None, None]
    objects = np.abs(pixels.astype(int) - grounds).sum(-1) > _APART
    return pixels, torch.nn.functional.avg_pool2d(images, 2), labels, objects


def train_on_colours(swap: str | None, *, seed: int = 0, epochs: int = 8, tick: Tick = lambda: None) -> Any:
    """Train a small vision transformer of timm, its attention swapped or its own, to name an object's colour."""
    import timm
    import torch

    import attnctl
    from attnctl.pipelines.vision.fitting import fit

    _, images, labels, _ = colour_scenes(_TRAIN, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=6
        )
        if swap is not None:
            attnctl.swap(model, swap, num_agents=4)
        fit(model, images, labels, torch.nn.functional.cross_entropy, epochs=epochs, seed=seed, quiet=True, done=tick)
    return model


def looks(model: Any, images: Any) -> tuple[Any, Any]:
    """Return the answers [n] and the class token's attention in the last block [n, 8, 8]."""
    import torch

    import attnctl
    from attnctl.processors import Capture

    with attnctl.control(model, Capture(words=("class",), sites=-1)) as handle, torch.no_grad():
        answers = model(images).argmax(dim=1)
        return answers, handle.maps["class"]


_TRAIN = 768  # scenes
_APART = 60  # summed difference of RGB from the background that counts as object
_KINDS: dict[str, Callable[[Panel, Tick, str], Made]] = {
    "pictures": _pictures,
    "words": _words,
    "clip": _clip,
    "vision": _vision,
}
