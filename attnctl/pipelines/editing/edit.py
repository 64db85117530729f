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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.sizes import largest
from attnctl.data.clips import Clip, ClipError, open_clip
from attnctl.data.picture_files import read_picture, upright
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError, UnsupportedModelError, nearest
from attnctl.pipelines.bounds import check_wholes
from attnctl.pipelines.editing.codec import check_pipeline
from attnctl.pipelines.editing.defaults import Defaults, defaults_of
from attnctl.pipelines.editing.files import Parts, make_strip, output_files, parts_of, record_of, write
from attnctl.pipelines.editing.flow_job import FlowJob
from attnctl.pipelines.editing.job import Job
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.flow_edit import FlowEdit
from attnctl.processors.editing.inject import Inject
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
    control: FateZero | Inject | FlowEdit | None = None,
    *,
    method: str = "fatezero",
    solver: str = "fireflow",
    noise: str | None = None,
    mask: Any = None,
    check: bool = False,
    announce: Callable[[str], object] = lambda text: None,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    start: int = 0,
    count: int | None = None,
    every: int = 1,
    size: int | tuple[int, int] | None = None,
    window: int | None = None,
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
    """Edit a clip or a picture with a text prompt, by FateZero (arXiv 2303.09535), injection or FlowEdit.

    Args:
        pipe: A pipeline of a Stable Diffusion UNet (SD 1, SD 2, SDXL), or of a transformer (SD3, FLUX, Qwen-Image,
            PixArt, Sana, Wan, LTX-Video, CogVideoX, HunyuanVideo, Mochi).
        video: A video file, a folder of frames, an image, or frames as an array or a list of images.
        control: The edit; or give its fields here: source, target, cross_replace, blend_words, ...
        method: Whose fields they are: "fatezero", "inject" or "flowedit". Fields that are not given are the family's
            (`attnctl.pipelines.editing.defaults`).
        solver: On transformers, what inverts: "fireflow", "rf_solver", "euler", "uniinv" or "rf_inversion".
        noise: On transformers, where the inverted source's noise begins: "own", what the model sees in it; or "drawn",
            for sources as flat as drawings, which have none of their own. None for the family's.
        mask: A picture of the frames' size, in which what is white may change; or an array of bool [height, width], or
            one per frame [frames, height, width].
        check: On transformers, measure the inversion's own reconstruction, for the report.
        options: On transformers, further arguments of the pipeline's call, such as max_sequence_length.
        announce: Called with what the run will cost, in words, before it begins.
        steps: Steps of the inversion and of the edit; None for the family's.
        guidance_scale: Guidance of the edit; None for the family's.
        negative_prompt: What not to show.
        start: First frame.
        count: Most frames; None for all.
        every: Take every m-th frame.
        size: Shorter side, or (height, width), that frames are brought to; None keeps theirs.
        window: Most frames that go through the model at once, besides the frames that all look at; None for 8 on UNets,
            for all on transformers of videos. There windows are edited apart.
        fps: Frames per second of the output; None for the source's, divided by `every`.
        offload: Where stored attention goes: "none", "cpu", "disk" (stores "qk" and "maps").
        budget: Most bytes to store.
        folder: Where "disk" makes its temporary folder.
        out: An .mp4 (with the source's sound) or a .gif to write, a .png for one frame, or a folder of PNGs; with a
            JSON record and a before/after strip.
        force: Overwrite what is there.
        keep: Return the frames; False where a long clip is only written.
        progress: A bar on stderr, none, or a function to call after every step.
        model: The model's name, for the record.
        command: The command line, for the record.
        **fields: Fields of the control.

    Returns:
        The edit.

    Raises:
        ClipError: The video cannot be read or written.
        ConfigError: Words, sizes or steps do not fit; nothing has run yet.
        FileExists: An output is there and `force` is not set.
        MemoryBudgetError: What would be stored does not fit; nothing has run yet.
        UnsupportedModelError: The model or its scheduler cannot be edited.
    """
    wholes = {"start": start, "every": every, "window": window, "steps": steps, "frames": count}
    edit, usual, steps, scale = _settled(pipe, control, method, fields, wholes, guidance_scale, fps)
    clip = open_clip(video)
    chosen = range(start, clip.count, every)[:count]
    if not chosen:
        raise ConfigError(f"start={start}, count={count}, every={every} leave no frame of {clip.count}.")
    noise = noise or ("own" if solver == "rf_inversion" else usual.noise)
    job = _job_of(pipe, clip, chosen, edit, steps, size, window, solver, noise, mask, check, options)
    job.check(offload, budget, folder)
    announce(f"{_size_in_words(job, clip)}\n{job.costs_in_words()}")
    files = output_files(out, len(chosen), force)
    rate = float(fps or clip.fps / every)
    call = {"guidance_scale": scale, "negative_prompt": negative_prompt}
    record = record_of(pipe, job, call, rate, model)
    with parts_of(files, record, job) as parts, _bar(progress, job, parts) as tick:
        if there := sum(map(parts.has, job.windows)):
            announce(f"{there} of {len(job.windows)} window(s) are taken over from a run that was broken off")
        report = ""
        for first in job.windows:
            if not parts.has(first):
                before, after, report = job.run(first, call, offload, budget, folder, tick)
                parts.put(first, before, after)
        strip = make_strip(parts)
        record |= {"sha256": parts.digest(), "command": command}
        if files:
            write(files, parts, rate, record, strip, force, announce)
        whole = parts.whole() if keep else (None, None)
    return Edited(whole[1], whole[0], rate, strip, record, report, next(iter(files), None))


def _size_in_words(job: Job | FlowJob, clip: Clip) -> str:
    """Say what becomes of the frames' size."""
    height, width = clip.read([job.chosen[0]]).shape[1:3]
    text = f"{len(job.chosen)} frame(s) of {width}x{height}"
    if (height, width) == (job.height, job.width):
        return f"{text}, as they are"
    most = None if job.size is None else largest(job.pipe)
    limit = "" if most is None else f", {most} at most"
    cut = f"both sides multiples of {job.multiple} pixels{limit}, what is over is cut off evenly"
    return f"{text} become {job.width}x{job.height}: {cut}"


def _is_flow(pipe: Any) -> bool:
    """Tell whether a pipeline runs a transformer, which is edited along its flow."""
    return getattr(pipe, "unet", None) is None and getattr(pipe, "transformer", None) is not None


def _settled(
    pipe: Any,
    control: Any,
    method: str,
    fields: dict[str, Any],
    wholes: dict[str, int | None],
    guidance: float | None,
    fps: float | None,
) -> tuple[FateZero | Inject | FlowEdit, Defaults, int, float]:
    """Check what was given, and fill in what the family of models has by default: the edit, these, steps, guidance."""
    check_wholes(wholes, ConfigError)
    _check_finite("guidance_scale", 1.0 if guidance is None else guidance)
    _check_finite("fps", 1.0 if fps is None else fps, 0.0)
    if not _is_flow(pipe):
        check_pipeline(pipe)
    edit, usual = _edit_of(pipe, control, method, fields)
    scale = float(usual.guidance if guidance is None else guidance)
    if isinstance(edit, FlowEdit):  # the pipeline guides the target's rows, the control brings the source's to theirs
        edit = dataclasses.replace(edit, target_scale=scale)
    return edit, usual, wholes["steps"] or usual.steps, scale


def _job_of(
    pipe: Any,
    clip: Clip,
    chosen: range,
    edit: FateZero | Inject | FlowEdit,
    steps: int,
    size: Any,
    window: int | None,
    solver: str,
    noise: str,
    mask: Any,
    check: bool,
    options: Mapping[str, Any] | None,
) -> Job | FlowJob:
    region = None if mask is None else _mask_of(mask)
    if _is_flow(pipe):
        return FlowJob(pipe, clip, chosen, edit, steps, size, window, solver, noise, region, check, options)
    if not isinstance(edit, FateZero):
        raise UnsupportedModelError(
            f"{type(edit).__name__} edits along the flow of a transformer; {type(pipe).__name__} is a UNet's. Use "
            'method="fatezero".'
        )
    said = {"solver": solver != "fireflow", "noise": noise != "own", "check": check, "options": options}
    given = [name for name, on in said.items() if on]
    if given:
        raise ConfigError(
            f"{' and '.join(given)}: for transformers, which are inverted along their flow; {type(pipe).__name__} has "
            "a UNet, which DDIM inverts. Leave it out."
        )
    return Job(pipe, clip, chosen, edit, steps, size, window or 8, region)


def _check_finite(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse now what would make no picture, or what no record or video could hold after all the work."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= least:
        raise ConfigError(f"{name}={value!r}: give a finite number{'' if least < 0 else f' above {least:g}'}.")


_METHODS: dict[str, type[FateZero] | type[Inject] | type[FlowEdit]] = {
    "fatezero": FateZero,
    "inject": Inject,
    "flowedit": FlowEdit,
}


def _edit_of(
    pipe: Any, control: Any, method: str, fields: dict[str, Any]
) -> tuple[FateZero | Inject | FlowEdit, Defaults]:
    """Return the edit that was given or described, and the defaults of its method in the pipeline's family."""
    denoiser = getattr(pipe, "unet", None)
    family = family_of(pipe.transformer if denoiser is None else denoiser).name
    if control is not None:
        if not isinstance(control, (FateZero, Inject, FlowEdit)) or fields:
            what = f"{control!r:.80} and {sorted(fields)}" if fields else f"{control!r:.80}"
            raise ConfigError(f"Give a FateZero, Inject or FlowEdit control or its fields, not {what}.")
        usual = defaults_of(pipe, family, type(control).__name__)
        if isinstance(control, (FateZero, Inject)):
            return dataclasses.replace(control, inversion=None), usual
        return control, usual
    if method not in _METHODS:
        raise ConfigError(
            f"method={method!r} is unknown. Choose one of {', '.join(_METHODS)}." + nearest(method, _METHODS)
        )
    cls = _METHODS[method]
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(names))
    if unknown or not {"source", "target"} <= set(fields):
        raise ConfigError(
            f"edit_video needs source= (what the video shows) and target= (what it shall show); unknown: "
            f"{', '.join(unknown) or 'nothing'}. Fields of {cls.__name__}: {', '.join(names)}."
        )
    usual = defaults_of(pipe, family, cls.__name__)
    return cls(**{**usual.fields, **fields}), usual


def _mask_of(mask: Any) -> np.ndarray:
    """Return a mask as bool, [height, width] or [frames, height, width]."""
    if isinstance(mask, (str, Path)):
        path = Path(mask)
        if path.is_dir():
            raise ConfigError(f"The mask {path.name} is a folder: give one picture, or an array with a mask per frame.")
        mask = read_picture(path, ClipError)
    if isinstance(mask, Image.Image):
        mask = np.asarray(upright(mask).convert("L")) > 127
    if not isinstance(mask, np.ndarray) or mask.ndim not in (2, 3) or (mask.ndim == 3 and mask.shape[-1] in (3, 4)):
        given = f"an array {mask.shape}" if isinstance(mask, np.ndarray) else f"{mask!r:.60}"
        raise ConfigError(
            f"mask={given}: give a picture, an array of bool [height, width], or one per frame [frames, height, width]."
        )
    if mask.dtype != bool and not set(np.unique(mask)) <= {0, 1}:  # gray levels: white is what is above the middle
        return mask > (127 if mask.dtype == np.uint8 else 0.5)
    return mask.astype(bool)


@contextlib.contextmanager
def _bar(progress: bool | Callable[[], object], job: Job | FlowJob, parts: Parts) -> Iterator[Callable[[], object]]:
    """Show the steps of all windows, or call a function after each; those of an earlier run count as done."""
    done, total = job.ticks * sum(map(parts.has, job.windows)), job.ticks * len(job.windows)
    if callable(progress):
        for _ in range(done):
            progress()
        yield progress
        return
    with Progress(total, "step", "edit", done=done, quiet=not progress) as shown:
        yield shown.update
