"""`attnctl maps`: an image, and where it attended to each word of its prompt, or to what, or where it is like what."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say
from attnctl.app.commands.map_rows import maps_table, mask_files, picture_bytes, point_of, word_rows
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free, publish

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Maps"]


@dataclass(frozen=True, kw_only=True)
class Maps(Common):
    """Show where images attend to the words of the prompt, or what they are like where."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """What to show; with --image, what it shows."""

    image: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """A picture that exists: it is noised and looked at once, and nothing is made. With --point or --concept it needs
    no prompt."""

    strength: Annotated[float, tyro.conf.arg(metavar="X")] = 0.3
    """Noise level at which --image is looked at, up to 1 for noise alone."""

    word: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="WORD")] = ()
    """A word or phrase of the prompt, "cat#2" for the second cat, or the place of a token; several times for several.
    All words of the prompt if none is given."""

    point: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="X,Y")] = ()
    """Show what a place of the image attends to instead, such as 0.5,0.25 for the middle of the upper half (shares of
    width and height); several times for several."""

    concept: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="WORD")] = ()
    """Show where the image is like a word or phrase that need not stand in the prompt (SD3, FLUX, shapes:mmdit);
    several times, the background among them: the maps are shares of all."""

    model: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "shapes:text2image"
    """`shapes:text2image` (shipped), a hub id, or a local folder."""

    segment: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """Find what an expression names in --image, a picture or a clip: "the red circle"; several times for several.
    Writes masks, boxes and points."""

    sites: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SELECTOR")] = ()
    """Attention layers by name, glob, stage ("mid", "up.1") or depth; all that read text if none is given."""

    heads: bool = False
    """Also draw one column for each head."""

    gif: bool = False
    """Also draw the steps as a moving picture."""

    regions: bool = False
    """Also write where each map is high (Otsu's threshold): boxes and COCO masks in pixels."""

    masks: bool = False
    """Also write where each map is high as a picture per word, white inside and black outside, for `edit --mask`."""

    negative_words: bool = False
    """Show the words of the negative prompt instead."""

    control: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CONTROL")] = ()
    """A method to act meanwhile, such as 'PAG(scale=3.0, sites="mid")'."""

    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Seed of the first image; image i has seed + i."""

    num: Annotated[int, tyro.conf.arg(metavar="INT")] = 1
    """Images."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Denoising steps."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: the pipeline's)")] = None
    """Classifier-free guidance scale."""

    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """What not to show."""

    height: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Height in pixels."""

    width: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Width in pixels."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    fetch: bool = False
    """Let plans that a control names be fetched from the Hub, if they are not here."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Path = Path("out")
    """Folder for one folder an image."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Make images, or look at one that exists, and write its maps."""
        self._check()
        importing()
        if self.segment:
            return self._find()

        from attnctl.data.specs import parse_control
        from attnctl.errors import ConfigError

        try:
            controls = tuple(parse_control(text) for text in self.control)
            captures = self._captures()
        except ConfigError as error:
            raise UsageError(str(error)) from None
        images, model = self._make(controls, captures, command) if self.image is None else self._look(captures)
        return Result({"model": model, "prompt": self.prompt, "images": images}, maps_table(images))

    def _check(self) -> None:
        from attnctl.pipelines.bounds import check_pixels_asked, check_wholes

        if self.segment:
            self._check_segment()
            return
        if not self.prompt.strip() and (self.image is None or not (self.point or self.concept)):
            raise UsageError("Give a --prompt that is not empty.")
        names = ("num", "seed", "steps", "height", "width")
        check_wholes({name: getattr(self, name) for name in names}, UsageError, "--")
        check_pixels_asked(self.width, self.height, UsageError)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is a finite number, got {self.guidance}.")
        if self.negative_words and not (self.negative or "").strip():
            raise UsageError("--negative-words shows the words of --negative: give one.")
        if self.point and (self.word or self.negative_words):
            raise UsageError("--point shows what places attend to: leave out --word and --negative-words.")
        if self.concept and (self.word or self.point or self.negative_words or self.heads):
            raise UsageError(
                "--concept shows what the image is like: leave out --word, --point, --negative-words and --heads."
            )
        if self.image is not None:
            self._check_image()

    def _check_segment(self) -> None:
        """Refuse options that have no part in the search for what expressions name."""
        options = {
            "--prompt": self.prompt,
            "--word": self.word,
            "--point": self.point,
            "--concept": self.concept,
            "--heads": self.heads,
            "--regions": self.regions or self.masks,
            "--width or --height": self.width or self.height,
        }
        if self.image is None:
            raise UsageError("--segment finds what an expression names in a picture or a clip: give it with --image.")
        if given := [name for name, was in options.items() if was]:
            raise UsageError(f"--segment takes its words from the expression: leave out {', '.join(given)}.")
        self._check_look()

    def _check_image(self) -> None:
        """Refuse what `_check_look` does, and a file that is no picture."""
        self._check_look()
        self._opened()

    def _check_look(self) -> None:
        """Refuse options that say how an image is made, and a noise level out of range."""
        options = {
            "--num": self.num != 1,
            "--steps": self.steps is not None,
            "--guidance": self.guidance is not None,
            "--negative": self.negative is not None or self.negative_words,
            "--gif": self.gif,
            "--control": bool(self.control),
        }
        if given := [name for name, was in options.items() if was]:
            raise UsageError(f"--image looks at a picture that is there, once: leave out {', '.join(given)}.")
        if not 0.02 <= self.strength <= 1:
            raise UsageError(f"--strength is a noise level from 0.02 to 1, got {self.strength:g}.")

    def _opened(self) -> Image.Image:
        """Read the picture, at --width and --height where they were given."""
        from PIL import Image

        from attnctl.data.picture_files import check_pixels, read_picture

        assert self.image is not None
        image = read_picture(self.image, UsageError)
        check_pixels(self.width or image.width, self.height or image.height, "The picture at that size", UsageError)
        return image.resize((self.width or image.width, self.height or image.height), Image.Resampling.LANCZOS)

    def _make(self, controls: Any, captures: Any, command: str) -> tuple[list[dict[str, Any]], str]:
        """Generate image by image, each with its maps; return a row for each, and the name of the model."""
        from attnctl.pipelines.generate import Call, fitted
        from attnctl.pipelines.stepping import step_bar

        seeds = range(self.seed, self.seed + self.num)
        folders = [below(self.out, f"{slug(self.prompt)}-maps-{seed}") for seed in seeds]
        self._check_free(folders, _FILES)
        loaded = self._load()
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []
        usual = Call(
            prompts=(self.prompt,),
            seeds=(self.seed,),
            steps=self.steps,
            guidance=self.guidance,
            negative=self.negative,
            width=self.width,
            height=self.height,
            controls=(*controls, *captures),
            command=command,
        )
        call = fitted(loaded.pipe, usual, say)
        with step_bar(loaded.pipe, self.steps, self.num, "maps") as bar:
            for i, (seed, folder) in enumerate(zip(seeds, folders, strict=True)):
                bar.describe(f"picture {i + 1} of {self.num}")
                rows.append(self._write(folder, loaded, replace(call, seeds=(seed,)), bar.update))
        say(f"{len(rows)} image(s) in {time.perf_counter() - started:.1f} s")
        return rows, loaded.name

    def _look(self, captures: Any) -> tuple[list[dict[str, Any]], str]:
        """Look at the picture that exists with each capture: maps from the first, heads from the second."""
        assert self.image is not None
        folder = below(self.out, f"{slug(self.image.stem)}-maps")
        self._check_free([folder], _FILES_OF_A_LOOK)

        from attnctl.data.map_pictures import heads_sheet, words_sheet
        from attnctl.pipelines import image_maps

        image = self._opened()
        loaded = self._load()
        started = time.perf_counter()
        say(f"Looking at {self.image.name}")
        looks = [
            image_maps(loaded.pipe, image, self.prompt, capture, strength=self.strength, seed=self.seed)
            for capture in captures
        ]
        about = {**looks[0].about, "model": loaded.name, "revision": loaded.revision, "image": self.image.name}
        maps, title = replace(looks[0], about=about), self.prompt or self.image.name
        content = {folder / "words.png": picture_bytes(words_sheet(image, maps, title=title))}
        if self.heads:
            content[folder / "heads.png"] = picture_bytes(heads_sheet(image, looks[1], title=title))
        row = self._publish(folder, content, maps, image, self.seed)
        say(f"1 picture in {time.perf_counter() - started:.1f} s")
        return [row], self.model

    def _find(self) -> Result:
        """Find what the expressions name in the picture or clip, and write it."""
        from attnctl.app.commands.referring import find

        assert self.image is not None
        look = {"strength": self.strength, "seed": self.seed, "sites": self._selector()}
        return find(self.image, self.segment, self.out, self._load, look, model=self.model, force=self.force)

    def _selector(self) -> Any:
        return tuple(int(s) if s.lstrip("-").isdigit() else s for s in self.sites) or None

    def _check_free(self, folders: list[Path], names: tuple[str, ...]) -> None:
        wanted = {"heads.png": self.heads, "steps.gif": self.gif, "regions.json": self.regions}
        names = tuple(name for name in names if wanted.get(name, True))
        check_free([folder / name for folder in folders for name in names], force=self.force)

    def _load(self) -> Any:
        from attnctl.pipelines.models import device_and_dtype, load

        device, dtype = device_and_dtype(self.device, self.dtype)
        say(f"Loading {self.model} ({device}, {dtype})")
        return load(self.model, revision=self.revision, device=device, dtype=dtype)

    def _captures(self) -> tuple[Any, ...]:
        """Make what records: steps apart, and for --heads once more with the heads apart."""
        from attnctl.processors import Capture

        words = tuple(int(w) if w.isdigit() else w for w in self.word) or None
        sites = self._selector()
        points, concepts = tuple(map(point_of, self.point)) or None, self.concept or None
        rows: Any = "uncond" if self.negative_words else "cond"
        # What is looked at once has no steps to keep.
        first: tuple[str, ...] = ("steps",) if self.image is None else ()
        axes: tuple[Any, ...] = (first, ("heads",)) if self.heads else (first,)
        what: dict[str, Any] = {"words": words, "points": points, "concepts": concepts}
        return tuple(Capture(**what, sites=sites, rows=rows, keep=keep) for keep in axes)

    def _write(self, folder: Path, loaded: Any, call: Any, update: Any) -> dict[str, Any]:
        """Generate one image and write it with its maps; return its row."""
        from attnctl.data.map_pictures import heads_sheet, steps_gif, steps_sheet, words_sheet
        from attnctl.data.record import png_bytes, save_image
        from attnctl.pipelines.generate import sample

        done = sample(loaded, call, update)
        image, record = done.images[0], done.record
        about = {key: record.to_dict()[key] for key in ("model", "revision", "seeds", "steps", "guidance", "negative")}
        maps = replace(done.maps[0], about={**about, "image": "image.png"})
        title = f"{self.negative if self.negative_words else self.prompt}  (seed {call.seeds[0]})"
        sheets = {
            "words.png": words_sheet(image, maps, title=title),
            "steps.png": steps_sheet(image, maps, title=title),
        }
        if self.heads:
            sheets["heads.png"] = heads_sheet(image, done.maps[1], title=title)
        save_image(image, folder / "image.png", record, force=self.force)
        content = {folder / name: png_bytes(sheet, record) for name, sheet in sheets.items()}
        if self.gif:
            content[folder / "steps.gif"] = steps_gif(image, maps)
        row = self._publish(folder, content, maps, image, call.seeds[0])
        return {**row, "files": ["image.png", *row["files"]]}

    def _publish(
        self, folder: Path, content: dict[Path, bytes], maps: Any, image: Image.Image, seed: int
    ) -> dict[str, Any]:
        """Write pictures, regions and maps; return the row of the folder."""
        from attnctl.data.map_files import describe, save
        from attnctl.data.map_regions import regions

        where = regions(maps, height_width=(image.height, image.width)) if self.regions or self.masks else []
        if self.masks:
            content |= mask_files(folder, where)
        if self.regions:
            text = json.dumps({"height": image.height, "width": image.width, "regions": where}, indent=1) + "\n"
            content[folder / "regions.json"] = text.encode()
        publish(content, force=self.force)
        save(maps, folder / "maps.safetensors", force=self.force)
        what = describe(maps)
        return {
            "folder": str(folder),
            "seed": seed,
            "files": [*(path.name for path in content), "maps.safetensors"],
            **{key: what[key] for key in ("grid", "normalisation", "reduce")},
            "layers": [layer["name"] for layer in what["layers"]],
            "words": word_rows(maps),
        }


_FILES = (
    "image.png",
    "image.json",
    "words.png",
    "steps.png",
    "heads.png",
    "steps.gif",
    "regions.json",
    "maps.safetensors",
    "maps.json",
)
_FILES_OF_A_LOOK = ("words.png", "heads.png", "regions.json", "maps.safetensors", "maps.json")
