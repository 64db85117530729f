"""What edits do to clips on the shipped video transformer, judged: `python benchmarks/video_edit_effects.py`.

Rendered clips of one moving object are edited with `shapes:videodit` (Wan's classes): another colour, another shape,
another background. Beside FateZero stand the inversion without fusion, SDEdit and FlowEdit on the same clips, each at
its best of some settings on tuning clips; "own noise" is FateZero on an inversion that begins with what noise the model
sees in the clip, in place of drawn noise. Figures come from other clips, with 95 % bootstrap intervals over clips. The
marks are those of `fatezero_effects.py`. Each edited clip is kept in `--work`, and a run that was broken off goes on
from there. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fatezero_effects import Task, marks, merit
from judged import interval, kept

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.core.hosts.autoencoders import Coder
from attnctl.core.hosts.paths import PathScheduler, Route, base_of
from attnctl.pipelines import edit_video
from attnctl.pipelines.editing.flow_inversion import call_of, invert_flow
from attnctl.pipelines.editing.running import running_on
from attnctl.processors import FateZero
from attnctl.shapes.motion import clip_caption, render_clip, sample_clip
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES
from attnctl.shapes.training.videodit import DIT_FRAMES

KINDS = ("colour", "shape", "background")
TUNING_SEED, REPORT_SEED = 83_000, 870_000
PERCENT = ("success", "object")
GUIDANCE = 2.0  # what the model's card found best
_HALF = {"cross_replace": 0.5, "self_replace": 0.5}
_INSIDE = {"blend": True, "blend_attention": False, "blend_latents": True, "blend_window": (0.0, 1.0)}
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "FateZero": (_HALF, _HALF | _INSIDE),
    "no fusion": ({"cross_replace": 0.0, "self_replace": 0.0},),
    "SDEdit": ({"strength": 0.5}, {"strength": 0.7}),
    "FlowEdit": ({"guidance": 3.0, "strength": 0.66}, {"guidance": 3.0, "strength": 0.5}),
    "own noise": (_HALF | {"noise": "own"},),
}


def tasks(kind: str, n: int, seed: int) -> list[tuple[Task, str, str]]:
    """Draw clips of one object and another attribute for each; with both prompts, which tell the motion."""
    rng, found = np.random.default_rng(seed + KINDS.index(kind)), []
    while len(found) < n:
        clip = sample_clip(rng)
        if len(clip.scene.things) != 1:
            continue
        thing, back = clip.scene.things[0], clip.scene.background
        new = {"colour": thing.color, "shape": thing.shape, "background": back}
        choices = {"colour": COLORS, "shape": SHAPES, "background": BACKGROUNDS}[kind]
        new[kind] = str(rng.choice([c for c in choices if c != new[kind]]))
        source = clip_caption(clip)
        moves = source.removeprefix(f"a {thing.color} {thing.shape}").removesuffix(f" on {back}")
        target = f"a {new['colour']} {new['shape']}{moves} on {new['background']}"
        plain = [f"a {thing.color} {thing.shape} on {back}", f"a {new['colour']} {new['shape']} on {new['background']}"]
        task = Task(kind, clip, render_clip(clip, DIT_FRAMES), *plain, thing.shape)
        found.append((task, source, target))
    return found


class Study:
    """The shipped model, and a folder of what is judged."""

    def __init__(self, work: Path, steps: int) -> None:
        self.pipe, self.work, self.steps = attnctl.load_shapes("videodit"), work, steps
        self.coder = Coder(self.pipe)
        self._inverted: tuple[Any, Any, Any] | None = None

    def inverted(self, task: Task, source: str, noise: str) -> tuple[Any, Any]:
        """Invert a clip, or return the last one's inversion."""
        key = (source, task.clip, noise)
        if self._inverted is None or self._inverted[0] != key:
            coded = self.coder.encode(task.video)
            edit = FateZero(source=source, target=source, blend_words=[task.word])
            made = invert_flow(self.pipe, coded, source, edit=edit, steps=self.steps, noise=noise)
            self._inverted = key, coded, made
        return self._inverted[1:]

    def fused(self, task: Task, source: str, target: str, noise: str = "drawn", **fields: Any) -> np.ndarray:
        """Edit by FateZero; windows of zero leave the inversion alone."""
        coded, inversion = self.inverted(task, source, noise)
        words = [task.word] if fields.pop("blend", False) else None
        control = FateZero(source=source, target=target, blend_words=words, inversion=inversion, **fields)
        call = call_of(self.pipe, target, coded, inversion.noise, self.steps, GUIDANCE)
        with torch.no_grad(), running_on(self.pipe, inversion.way_back()) as more, attnctl.control(self.pipe, control):
            return _pixels(self.pipe(**call | more | {"output_type": "np"})[0])

    def sdedit(self, task: Task, source: str, target: str, strength: float) -> np.ndarray:
        """Noise the clip and denoise it with the target prompt."""
        coded = self.coder.encode(task.video)
        path = PathScheduler(base_of(self.pipe.scheduler), Route(first=self.steps - round(self.steps * strength)))
        path.set_timesteps(self.steps)
        level = path.levels[0]
        noise = torch.randn(coded.latents.shape, generator=torch.Generator().manual_seed(0))
        start = (1 - level) * coded.latents + level * noise
        call = call_of(self.pipe, target, coded, start, self.steps, GUIDANCE)
        with torch.no_grad(), running_on(self.pipe, path) as more:
            return _pixels(self.pipe(**call | more | {"output_type": "np"})[0])

    def flowedit(self, task: Task, source: str, target: str, **fields: Any) -> np.ndarray:
        """Edit by FlowEdit."""
        scale = fields.pop("guidance")
        fields |= {"method": "flowedit", "source": source, "target": target, "source_scale": 1.0}
        done = edit_video(self.pipe, task.video, steps=self.steps, guidance_scale=scale, progress=False, **fields)
        assert done.frames is not None
        return done.frames

    def one(self, method: str, setting: dict[str, Any], drawn: tuple[Task, str, str]) -> dict[str, float]:
        """Edit and judge one clip, or read what was judged before."""
        task, source, target = drawn
        runs: dict[str, Callable[..., np.ndarray]] = {"SDEdit": self.sdedit, "FlowEdit": self.flowedit}
        run = runs.get(method, self.fused)
        label = f"{method} {sorted(setting.items())} {source} {target} {task.clip} {self.steps}"
        made: dict[str, float] = kept(self.work, label, lambda: marks(task, run(task, source, target, **setting)))
        print(f"{method:10} {target:52} {made}", file=sys.stderr, flush=True)
        return made

    def best(self, kind: str, method: str, tuning: Sequence[Any]) -> dict[str, Any]:
        """Choose a method's setting on the tuning clips."""
        if len(SETTINGS[method]) == 1:
            return SETTINGS[method][0]
        found = []
        for setting in SETTINGS[method]:
            rows = [self.one(method, setting, t) for t in tuning]
            found.append(merit(kind, {m: [r[m] for r in rows] for m in rows[0]}))
        return SETTINGS[method][int(np.argmax(found))]

    def kind(self, kind: str, n: int, tune: int, methods: Sequence[str]) -> dict[str, Any]:
        """Tune each method on some clips, report on others."""
        tuning, report = tasks(kind, tune, TUNING_SEED), tasks(kind, n, REPORT_SEED)
        chosen = {m: self.best(kind, m, tuning) for m in methods}
        raw: dict[str, dict[str, np.ndarray]] = {}
        rows: dict[str, list[dict[str, float]]] = {m: [] for m in methods}
        for drawn in report:
            for method in methods:
                rows[method].append(self.one(method, chosen[method], drawn))
        for method in methods:
            raw[method] = {m: np.array([r[m] for r in rows[method]]) for m in rows[method][0]}
        result: dict[str, Any] = {}
        for method in methods:
            spread = {m: interval(v, percent=m in PERCENT) for m, v in raw[method].items()}
            result[method] = {"setting": chosen[method], **spread}
            result[method]["FateZero_minus_this"] = {
                m: interval(raw["FateZero"][m] - v, percent=m in PERCENT) for m, v in raw[method].items()
            }
            shown = "  ".join(f"{m} {v[0]} [{v[1]}, {v[2]}]" for m, v in spread.items())
            print(f"{kind:10} {method:10} {shown}  {chosen[method]}", file=sys.stderr, flush=True)
        return result


def _pixels(made: Any) -> np.ndarray:
    return (np.clip(np.asarray(made)[-1], 0, 1) * 255).round().astype(np.uint8)


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for what is done (default: one that is removed)")
    parser.add_argument("-n", type=int, default=8, help="clips of each kind in the report")
    parser.add_argument("--tune", type=int, default=2, help="clips of each setting tried")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--methods", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = ["FateZero", *(m for m in options.methods if m != "FateZero")]
    with tempfile.TemporaryDirectory() as folder:
        it = Study(options.work or Path(folder), options.steps)
        found = {kind: it.kind(kind, options.n, options.tune, methods) for kind in options.kinds}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result = {"model": "videodit", "clips": options.n, "tuning_clips": options.tune, "steps": options.steps}
    print(json.dumps(result | {"kinds": found, "versions": versions, "machine": platform.machine()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
