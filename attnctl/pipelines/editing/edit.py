"""Edit a video, a folder of frames or an image with a text prompt: read, invert, edit, write.

    edited = edit_video(pipe, "jeep.mp4", source="a silver jeep on a road", target="a silver car on a road")

A clip longer than `window` frames goes through the model in windows. Frames that every frame looks at (`keys="mid"`,
"first", "last") ride along in each window, so that a window computes exactly what the whole clip would, and memory does
not grow with the clip. Windows that are done lie beside the output until all are, and a run that was broken off goes
on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctl.core.attach import attach
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.data.clips import Clip, fit, open_clip
from attnctl.errors import ConfigError
from attnctl.pipelines.editing.codec import check_pipeline, decode, encode, latent_factor
from attnctl.pipelines.editing.files import make_strip, output_files, parts_of, record_of, write
from attnctl.pipelines.editing.inversion import ddim_of, estimate_bytes, invert, running_on
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.fusion import frame_indices
from attnctl.processors.editing.source import Offload, check_room

__all__ = ["Edited", "edit_video"]


@dataclass(frozen=True)
class Edited:
    """What `edit_video` made.

    Attributes:
        frames: The edit, uint8 RGB [n, height, width, 3]; None where it was only written.
        source: The source as the model saw it, brought to size; None likewise.
        fps: Frames per second.
        strip: Frames of the source above frames of the edit.
        record: How it was made.
        report: Which control acted where, and what it kept.
        path: The file or folder written, or None.
    """

    frames: np.ndarray | None
    source: np.ndarray | None
    fps: float
    strip: Image.Image
    record: dict[str, Any]
    report: str
    path: Path | None


def edit_video(
    pipe: Any,
    video: Any,
    control: FateZero | None = None,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    start: int = 0,
    count: int | None = None,
    every: int = 1,
    size: int | tuple[int, int] | None = None,
    window: int = 8,
    fps: float | None = None,
    offload: Offload = "none",
    budget: int | None = None,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    keep: bool = True,
    progress: bool | Callable[[], object] = True,
    model: str = "",
    command: str = "",
    **fields: Any,
) -> Edited:
    """Edit a clip with a text prompt (FateZero, arXiv 2303.09535).

    Args:
        pipe: A Stable Diffusion pipeline (SD 1, SD 2, SDXL).
        video: A video file, a folder of frames, an image, or frames as an array or a list of images.
        control: The edit; or give its fields here: source, target, cross_replace, blend_words, ...
        steps: Steps of the inversion and of the edit.
        guidance_scale: Classifier-free guidance of the edit.
        negative_prompt: What not to show.
        start: First frame.
        count: Most frames; None for all.
        every: Take every m-th frame.
        size: Shorter side, or (height, width), that frames are brought to; None keeps theirs.
        window: Most frames that go through the model at once, besides the frames that all look at.
        fps: Frames per second of the output; None for the source's, divided by `every`.
        offload: Where stored attention goes: "none", "cpu", "disk" (stores "qk" and "maps").
        budget: Most bytes to store.
        folder: Where "disk" makes its temporary folder.
        out: An .mp4 to write, a .png for one frame, or a folder of PNGs; with a JSON record and a before/after strip.
        force: Overwrite what is there.
        keep: Return the frames; False where a long clip is only written.
        progress: A bar on stderr, none, or a function to call after every step.
        model: The model's name, for the record.
        command: The command line, for the record.
        **fields: Fields of `FateZero`.

    Returns:
        The edit.

    Raises:
        ClipError: The video cannot be read or written.
        ConfigError: Words, sizes or steps do not fit; nothing has run yet.
        FileExists: An output is there and `force` is not set.
        MemoryBudgetError: What would be stored does not fit; nothing has run yet.
        UnsupportedModelError: The model or its scheduler cannot be edited.
    """
    edit = _edit_of(control, fields)
    numbers = {"start": start, "every": every, "window": window, "steps": steps, "count": 1 if count is None else count}
    for name, value in numbers.items():
        least = 0 if name == "start" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: give a whole number from {least} on.")
    _check_finite("guidance_scale", guidance_scale)
    _check_finite("fps", 1.0 if fps is None else fps, 0.0)
    check_pipeline(pipe)
    clip = open_clip(video)
    chosen = range(start, clip.count, every)[:count]
    if not chosen:
        raise ConfigError(f"start={start}, count={count}, every={every} leave no frame of {clip.count}.")
    job = Job(pipe, clip, chosen, edit, steps, size, window)
    job.check(offload, budget, folder)
    files = output_files(out, len(chosen), force)
    rate = float(fps or clip.fps / every)
    call = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    record = record_of(pipe, job, call, rate, model)
    with parts_of(files, record) as parts, _bar(progress, 2 * steps * len(job.windows)) as tick:
        report = ""
        for first in job.windows:
            if parts.has(first):
                for _ in range(2 * steps):
                    tick()
                continue
            before, after, report = job.run(first, call, offload, budget, folder, tick)
            parts.put(first, before, after)
        strip = make_strip(parts, job)
        record |= {"sha256": parts.digest(job), "command": command}
        if files:
            write(files, parts, job, rate, record, strip, force)
        whole = parts.whole(job) if keep else (None, None)
    return Edited(whole[1], whole[0], rate, strip, record, report, next(iter(files), None))


def _check_finite(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse now what would make no picture, or what no record or video could hold after all the work."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= least:
        raise ConfigError(f"{name}={value!r}: give a finite number{'' if least < 0 else f' above {least:g}'}.")


def _edit_of(control: FateZero | None, fields: dict[str, Any]) -> FateZero:
    if control is not None:
        if not isinstance(control, FateZero) or fields:
            what = f"{control!r:.80} and {sorted(fields)}" if fields else f"{control!r:.80}"
            raise ConfigError(f"Give a FateZero control or its fields, not {what}.")
        return dataclasses.replace(control, inversion=None)
    known = [f.name for f in dataclasses.fields(FateZero)]
    unknown = sorted(set(fields) - set(known))
    if unknown or not {"source", "target"} <= set(fields):
        raise ConfigError(
            f"edit_video needs source= (what the video shows) and target= (what it shall show); unknown: "
            f"{', '.join(unknown) or 'nothing'}. Fields of FateZero: {', '.join(known)}."
        )
    return FateZero(**fields)


class Job:
    """One clip on its way through the model, window by window."""

    def __init__(
        self, pipe: Any, clip: Clip, chosen: range, edit: FateZero, steps: int, size: Any, window: int
    ) -> None:
        self.pipe, self.clip, self.chosen, self.edit, self.steps = pipe, clip, chosen, edit, steps
        self.size, self.window = size, window
        self.windows = range(0, len(chosen), window)
        self.ddim = ddim_of(pipe.scheduler)
        self.factor = latent_factor(pipe)

    def frames(self, first: int) -> range:
        """Return the frames of a window, counted in the clip as chosen."""
        return range(first, min(first + self.window, len(self.chosen)))

    def rows(self, first: int) -> list[int]:
        """Return the frames that go through the model with a window: its own and those that they look at."""
        total, own = len(self.chosen), self.frames(first)
        looked = frame_indices(self.edit.keys, total)
        return sorted({*own, *(f for i in own for f in looked[i])})

    def read(self, rows: list[int]) -> np.ndarray:
        """Read frames, brought to size."""
        return fit(self.clip.read([self.chosen[i] for i in rows]), self.size, self.factor)

    def check(self, offload: Offload, budget: int | None, folder: str | Path | None) -> None:
        """Refuse what cannot run, before anything runs."""
        self.edit.resolve(find_sites(self.pipe.unet), family_of(self.pipe.unet))
        self.edit.plan(self.pipe)
        height, width = self.read([0]).shape[1:3]
        self.height, self.width = height, width
        rows = max(len(self.rows(first)) for first in self.windows)
        h, w = height // self.factor, width // self.factor
        self.bytes = estimate_bytes(self.pipe.unet, self.edit, rows, h, w, self.steps)[self.edit.store]
        device = next(self.pipe.unet.parameters()).device
        check_room(self.bytes, offload if self.edit.store != "recompute" else "none", device, budget, folder)

    def run(
        self, first: int, call: dict[str, Any], offload: Offload, budget: Any, folder: Any, tick: Callable[[], object]
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Invert and edit one window; return its source frames, its edited frames and the report."""
        rows, pipe, n = self.rows(first), self.pipe, len(self.rows(first))
        source = self.read(rows)
        inversion = invert(
            pipe,
            encode(pipe, source),
            control=self.edit,
            steps=self.steps,
            offload=offload,
            folder=folder,
            budget=budget,
            rows=rows,
            total=len(self.chosen),
            step=tick,
        )
        with (
            inversion,
            torch.no_grad(),
            running_on(pipe, self.ddim, tick) as options,
            attach(pipe, dataclasses.replace(self.edit, inversion=inversion)) as handle,
        ):
            latents = pipe(
                prompt=[self.edit.target] * n,
                negative_prompt=[call["negative_prompt"]] * n,
                guidance_scale=call["guidance_scale"],
                latents=inversion.noise,
                num_inference_steps=self.steps,
                height=self.height,
                width=self.width,
                output_type="latent",
                return_dict=False,
                **options,
            )[0]
            report = handle.report() + f"\nsource: {self.edit.store}, {inversion.nbytes / 2**20:.2f} MiB a window"
        own = [rows.index(i) for i in self.frames(first)]
        return source[own], decode(pipe, latents[own]), report


@contextlib.contextmanager
def _bar(progress: bool | Callable[[], object], total: int) -> Iterator[Callable[[], object]]:
    if callable(progress):
        yield progress
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", disable=None if progress else True, leave=False) as bar:
        yield bar.update
