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
from PIL import Image

from attnctl.data.clips import open_clip
from attnctl.errors import ConfigError
from attnctl.pipelines.bounds import check_wholes
from attnctl.pipelines.editing.codec import check_pipeline
from attnctl.pipelines.editing.files import make_strip, output_files, parts_of, record_of, write
from attnctl.pipelines.editing.job import Job
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.source import Offload

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
    check_wholes({"start": start, "every": every, "window": window, "steps": steps, "frames": count}, ConfigError)
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
    with parts_of(files, record, job) as parts, _bar(progress, 2 * steps * len(job.windows)) as tick:
        report = ""
        for first in job.windows:
            if parts.has(first):
                for _ in range(2 * steps):
                    tick()
                continue
            before, after, report = job.run(first, call, offload, budget, folder, tick)
            parts.put(first, before, after)
        strip = make_strip(parts)
        record |= {"sha256": parts.digest(), "command": command}
        if files:
            write(files, parts, rate, record, strip, force)
        whole = parts.whole() if keep else (None, None)
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
    names = [f.name for f in dataclasses.fields(FateZero)]
    unknown = sorted(set(fields) - set(names))
    if unknown or not {"source", "target"} <= set(fields):
        raise ConfigError(
            f"edit_video needs source= (what the video shows) and target= (what it shall show); unknown: "
            f"{', '.join(unknown) or 'nothing'}. Fields of FateZero: {', '.join(names)}."
        )
    return FateZero(**fields)


@contextlib.contextmanager
def _bar(progress: bool | Callable[[], object], total: int) -> Iterator[Callable[[], object]]:
    if callable(progress):
        yield progress
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", disable=None if progress else True, leave=False) as bar:
        yield bar.update
