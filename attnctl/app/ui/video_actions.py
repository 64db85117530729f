"""What the page does with videos, without a page: one plain and under control, and one edited."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.app.commands.common import UsageError
from attnctl.app.ui.actions import Compared, Step, keep_bytes
from attnctl.app.ui.models import Models
from attnctl.data.files import natural, slug
from attnctl.data.picture_files import SUFFIXES
from attnctl.data.pictures import enlarge, grid
from attnctl.data.provenance import command_line
from attnctl.data.record import png_bytes
from attnctl.errors import JudgeError
from attnctl.pipelines.bounds import check_whole

__all__ = [
    "EDIT_METHODS",
    "EditAsk",
    "EditMade",
    "edit",
    "film",
    "frames_sheet",
    "preview",
    "sample_clip",
    "video_marks",
]

FPS = 8.0
_SHOWN = 8  # frames side by side
_WINDOW = 8  # frames that go through the model at once
_SIDE = 256  # pixels that a small video is enlarged to, by a whole factor


@dataclass(frozen=True, kw_only=True)
class EditAsk:
    """Say how to edit a clip or a picture; what is None is the model family's own.

    Attributes:
        files: A video, an animation or a picture, or several pictures: the frames, in the order of their names.
        method: Which of `EDIT_METHODS`.
        share: Share of the steps that edit (flowedit), or in which the source is injected (inject).
        blend: Words of the source outside which it is kept, with commas.
        mask: A picture in which what is white may change.
        size: Pixels that the shorter side is brought to.
        frames: Most frames.

    Raises:
        UsageError: nothing was uploaded, or a number is out of range.
    """

    model: str
    files: str | Sequence[str] | None
    source: str
    target: str
    method: str = "fatezero"
    mode: str = "refine"
    cross_replace: float | None = None
    self_replace: float | None = None
    share: float | None = None
    blend: str = ""
    mask: str | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = 8
    size: int | None = 64

    def __post_init__(self) -> None:
        files = [self.files] if isinstance(self.files, str) else list(self.files or ())
        object.__setattr__(self, "files", tuple(files))
        if not files:
            raise UsageError("There is no video and no picture: upload one, or click the example below.")
        for name in ("source", "target"):
            if not str(getattr(self, name) or "").strip():
                raise UsageError(f"The {name} prompt is empty: say what the video {_SAYS[name]}.")
        for name in ("steps", "frames", "size"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), UsageError, name.capitalize())
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"Guidance is a finite number, got {self.guidance}.")
        if self.method not in EDIT_METHODS:
            raise UsageError(f"There is no method {self.method!r}: choose one of {', '.join(EDIT_METHODS)}.")
        for name, methods in _OF_METHODS.items():
            if getattr(self, name) not in (None, "") and self.method not in methods:
                raise UsageError(f"{name} is for {' and '.join(methods)}: leave it empty, or choose another method.")

    @property
    def options(self) -> dict[str, Any]:
        """Return the fields of the edit that were said."""
        named: dict[str, Any] = {}
        if self.method == "fatezero":
            named = {"mode": self.mode, "cross_replace": self.cross_replace, "self_replace": self.self_replace}
            named["blend_words"] = _split(self.blend) or None
        elif self.method == "flowedit":
            named["strength"] = self.share
        else:
            named["stop"] = self.share
        return {name: value for name, value in named.items() if value is not None}

    def command(self, path: str) -> list[str]:
        """Write the command that does the same with a file or folder."""
        words = ["attnctl", "edit", path, "--model", self.model, "--method", self.method]
        words += ["--source", self.source, "--target", self.target]
        words += ["--mode", self.mode] if self.method == "fatezero" else []
        flags = {"cross_replace": self.cross_replace, "self_replace": self.self_replace, "steps": self.steps}
        flags |= {"guidance": self.guidance, "frames": self.frames, "size": self.size}
        flags |= {"strength" if self.method == "flowedit" else "inject": self.share}
        for flag, value in flags.items():
            words += [] if value is None else [f"--{flag.replace('_', '-')}", f"{value:g}"]
        for word in _split(self.blend):
            words += ["--blend", word]
        return words + (["--mask", str(self.mask)] if self.mask else [])

    def ticks(self, models: Models) -> int | None:
        """Count the steps of a UNet's inversions and edits, where the clip has all frames asked for; else None."""
        if self.steps is None or self.frames is None or not _is_unet(models.get(self.model).pipe):
            return None
        return 2 * self.steps * -(-self.frames // _WINDOW)


EDIT_METHODS = ("fatezero", "flowedit", "inject")
_OF_METHODS = {
    **dict.fromkeys(("cross_replace", "self_replace", "blend", "mask"), ("fatezero",)),
    "share": ("flowedit", "inject"),
}
_SAYS = {"source": "shows", "target": "shall show"}


@dataclass(frozen=True)
class EditMade:
    """Hold an edit: paths of both previews, the strip and the result, what the control says, and the command."""

    before: str | None
    after: str | None
    strip: str
    files: tuple[str, ...]
    report: str
    command: str


def video_marks(done: Compared, prompt: str) -> tuple[list[str], list[list[str]]]:
    """Tabulate what the judge finds, and the motion: a header, and a row for each video."""
    from attnctl.app.commands.demo_video import MARKS, judged

    rows = []
    for name, run, seconds in done.runs:
        try:
            flags = judged(run.videos[0], prompt)
        except JudgeError:
            return ["", "seconds"], [[n, f"{s:.1f}"] for n, _, s in done.runs]
        marks = ["yes" if flags[mark] else "no" for mark in MARKS]
        rows.append([name, *marks, f"{flags['motion']:.2f}", f"{seconds:.1f}"])
    return ["", *MARKS.values(), "motion, px a frame", "seconds"], rows


def frames_sheet(done: Compared) -> bytes:
    """Lay frames of each video out side by side, at most eight, as a PNG with all records."""
    count = len(done.plain.videos[0])
    shown = sorted({round(i * (count - 1) / max(1, _SHOWN - 1)) for i in range(_SHOWN)})
    tiles = [run.videos[0][i] for _, run, _ in done.runs for i in shown]
    labels = [name for name, _, _ in done.runs]
    sheet = grid(tiles, len(labels), len(shown), labels, [f"frame {i}" for i in shown], tile=128)
    return png_bytes(sheet, [run.record for _, run, _ in done.runs])


def film(folder: Path, stem: str, frames: Sequence[Image.Image], record: Any) -> str | None:
    """Write a video as MP4 with its record as comment, and return its path; None where PyAV is not installed."""
    arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
    return _mp4(folder, f"{slug(stem)}.mp4", arrays, FPS, json.dumps(record.to_dict()))


def preview(folder: Path, frames: Sequence[Image.Image], fps: float = FPS) -> str | None:
    """Write a video for the page, small ones enlarged by a whole factor; None where PyAV is not installed."""
    return _mp4(folder, "preview.mp4", [np.asarray(enlarge(frame, _SIDE)) for frame in frames], fps)


def sample_clip(folder: Path) -> str | None:
    """Draw a red circle that moves to the right, as MP4; None where PyAV is not installed."""
    from attnctl.shapes.motion import Clip, render_clip
    from attnctl.shapes.scenes import Scene, Thing

    clip = Clip(Scene((Thing("circle", "red", 20.0, 32.0, 13.0),), "gray"), ((1.6, 0.0),))
    return _mp4(folder, "red-circle.mp4", list(render_clip(clip)), FPS)


def edit(models: Models, ask: EditAsk, folder: Path, step: Step = lambda: None) -> EditMade:
    """Edit an uploaded video, animation or pictures with a prompt.

    Raises:
        AttnctlError: the file is no video, a word is not in its prompt, or the model cannot edit.
    """
    from attnctl.data.clips import FileClip
    from attnctl.pipelines import edit_video

    work = Path(tempfile.mkdtemp(dir=folder))
    path = _input_of(ask, work)
    clip = FileClip(path)
    ending = "png" if min(clip.count, ask.frames or clip.count) == 1 else "mp4" if _has_av() else ""
    out = work / f"{slug(ask.target)}.{ending}".rstrip(".")
    loaded = models.get(ask.model)
    words = ask.command(path)
    done = edit_video(
        loaded.pipe,
        clip,
        method=ask.method,
        source=ask.source,
        target=ask.target,
        mask=ask.mask,
        steps=ask.steps,
        guidance_scale=ask.guidance,
        count=ask.frames,
        size=ask.size,
        window=_WINDOW if _is_unet(loaded.pipe) else None,
        out=out,
        model=loaded.name,
        command=command_line(words),
        progress=step,
        **ask.options,
    )
    assert done.source is not None
    assert done.frames is not None
    before, after = (
        preview(folder, [Image.fromarray(f) for f in frames], done.fps) for frames in (done.source, done.frames)
    )
    files = tuple(str(p) for p in (out, out.with_suffix(".json")) if p.is_file())
    strip = str(out.with_name(f"{out.stem}-strip.png"))
    return EditMade(before, after, strip, files, done.report, shlex.join(words))


def _input_of(ask: EditAsk, work: Path) -> str:
    """Return the path of what was uploaded; several pictures become a folder, in the natural order of their names."""
    files = [Path(f) for f in ask.files or ()]
    if len(files) == 1:
        return str(files[0])
    inside = work / "frames"
    inside.mkdir()
    for i, path in enumerate(sorted(files, key=natural)):
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path.name} is no picture: upload one video, or pictures alone ({', '.join(SUFFIXES)}).")
        shutil.copyfile(path, inside / f"{i:05d}{path.suffix.lower()}")
    return str(inside)


def _is_unet(pipe: Any) -> bool:
    return getattr(pipe, "unet", None) is not None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _has_av() -> bool:
    return importlib.util.find_spec("av") is not None


def _mp4(folder: Path, name: str, frames: Sequence[np.ndarray], fps: float, comment: str = "") -> str | None:
    from attnctl.data.clips import mp4_bytes

    return keep_bytes(folder, name, mp4_bytes(frames, fps, comment)) if _has_av() else None
