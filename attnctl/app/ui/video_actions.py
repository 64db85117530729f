"""What the page does with videos, without a page: one plain and under control, and one edited."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from attnctl.app.commands.common import UsageError
from attnctl.app.ui.actions import Compared, Step, keep_bytes
from attnctl.app.ui.models import Models
from attnctl.data.files import slug
from attnctl.data.pictures import enlarge, grid
from attnctl.data.provenance import command_line
from attnctl.data.record import png_bytes
from attnctl.errors import JudgeError
from attnctl.pipelines.bounds import check_whole

__all__ = ["EditAsk", "EditMade", "edit", "film", "frames_sheet", "preview", "sample_clip", "video_marks"]

FPS = 8.0
_SHOWN = 8  # frames side by side
_WINDOW = 8  # frames that go through the model at once
_SIDE = 256  # pixels that a small video is enlarged to, by a whole factor


@dataclass(frozen=True, kw_only=True)
class EditAsk:
    """Say how to edit a video.

    Attributes:
        blend: Words of the source outside which it is kept, with commas.
        size: Pixels that the shorter side is brought to.
        frames: Most frames.

    Raises:
        UsageError: nothing was uploaded, or a number is out of range.
    """

    model: str
    video: str | None
    source: str
    target: str
    mode: Literal["refine", "replace"] = "refine"
    cross_replace: float = 0.8
    self_replace: float = 0.8
    blend: str = ""
    steps: int = 10
    guidance: float = 4.0
    frames: int = 8
    size: int = 64

    def __post_init__(self) -> None:
        if not self.video:
            raise UsageError("There is no video: upload one, or click the example below.")
        for name in ("source", "target"):
            if not str(getattr(self, name) or "").strip():
                raise UsageError(f"The {name} prompt is empty: say what the video {_SAYS[name]}.")
        for name in ("steps", "frames", "size"):
            check_whole(name, getattr(self, name), UsageError, name.capitalize())
        if not math.isfinite(self.guidance):
            raise UsageError(f"Guidance is a finite number, got {self.guidance}.")

    def command(self) -> list[str]:
        """Write the command that does the same."""
        words = ["attnctl", "edit", str(self.video), "--model", self.model]
        words += ["--source", self.source, "--target", self.target, "--mode", self.mode]
        for flag in ("cross_replace", "self_replace", "steps", "guidance", "frames", "size"):
            words += [f"--{flag.replace('_', '-')}", f"{getattr(self, flag):g}"]
        for word in _split(self.blend):
            words += ["--blend", word]
        return words

    @property
    def ticks(self) -> int:
        """Count the steps of the inversions and of the edits, where the clip has all frames asked for."""
        return 2 * self.steps * -(-self.frames // _WINDOW)


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


def film(folder: Path, stem: str, frames: Sequence[Image.Image], record: Any, fps: float = FPS) -> str | None:
    """Write a video as MP4 with its record as comment, and return its path; None where PyAV is not installed."""
    arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
    return _mp4(folder, f"{slug(stem)}.mp4", arrays, fps, json.dumps(record.to_dict()))


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
    """Edit an uploaded video with a prompt (FateZero).

    Raises:
        AttnctlError: the file is no video, a word is not in its prompt, or the model cannot edit.
    """
    from attnctl.data.clips import FileClip
    from attnctl.pipelines import edit_video
    from attnctl.processors import FateZero

    control = FateZero(
        source=ask.source,
        target=ask.target,
        mode=ask.mode,
        cross_replace=ask.cross_replace,
        self_replace=ask.self_replace,
        blend_words=_split(ask.blend) or None,
    )
    clip = FileClip(str(ask.video))
    ending = "png" if min(clip.count, ask.frames) == 1 else "mp4" if _has_av() else ""
    out = Path(tempfile.mkdtemp(dir=folder)) / f"{slug(ask.target)}.{ending}".rstrip(".")
    loaded = models.get(ask.model)
    done = edit_video(
        loaded.pipe,
        clip,
        control,
        steps=ask.steps,
        guidance_scale=ask.guidance,
        count=ask.frames,
        size=ask.size,
        window=_WINDOW,
        out=out,
        model=loaded.name,
        command=command_line(ask.command()),
        progress=step,
    )
    assert done.source is not None
    assert done.frames is not None
    before, after = (
        preview(folder, [Image.fromarray(f) for f in frames], done.fps) for frames in (done.source, done.frames)
    )
    files = tuple(str(p) for p in (out, out.with_suffix(".json")) if p.is_file())
    strip = str(out.with_name(f"{out.stem}-strip.png"))
    return EditMade(before, after, strip, files, done.report, shlex.join(ask.command()))


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _has_av() -> bool:
    return importlib.util.find_spec("av") is not None


def _mp4(folder: Path, name: str, frames: Sequence[np.ndarray], fps: float, comment: str = "") -> str | None:
    from attnctl.data.clips import mp4_bytes

    return keep_bytes(folder, name, mp4_bytes(frames, fps, comment)) if _has_av() else None
