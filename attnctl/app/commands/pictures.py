"""What the commands that make pictures share: which controls they take, files for what is made, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnctl.app.commands.common import UsageError, say, table

__all__ = ["check_controls", "picture_row", "pictures_table", "write_pictures", "write_video"]


def check_controls(controls: tuple[Any, ...], pictures: int) -> None:
    """Refuse controls that can do nothing here.

    Raises:
        UsageError: They record maps, edit a picture that exists, or act between pictures where a call makes one.
    """
    from attnctl.processors import Capture, FateZero, FlowEdit, Inject, ShareAttention

    for control in controls:
        name = type(control).__name__
        if isinstance(control, Capture):
            raise UsageError("Capture changes no image, and this command writes no maps: use `attnctl maps`.")
        if isinstance(control, (FateZero, FlowEdit, Inject)):
            raise UsageError(f"{name} edits a picture that exists: use `attnctl edit --method {name.lower()}`.")
        if isinstance(control, ShareAttention) and control.several and pictures < 2:
            raise UsageError(
                f"{name} acts between the pictures of one batch, and each call makes one here: give several prompts or "
                "--num 2, and --batch 2, or more."
            )


def write_pictures(done: Any, paths: Sequence[Path], fps: float, force: bool) -> list[dict[str, Any]]:
    """Write each picture of a call with its record, and its video where it is one; return a row for each."""
    from attnctl.data.record import save_image

    rows = []
    for i, (image, path) in enumerate(zip(done.images, paths, strict=True)):
        save_image(image, path, replace(done.record, shows=(i,)), force=force)
        rows.append(picture_row(path, done.record, i))
        if done.videos:
            rows[-1] |= write_video(done.videos[i], path, fps, force)
    return rows


def picture_row(path: Path, record: Any, i: int) -> dict[str, Any]:
    return {
        "path": str(path),
        "prompt": record.prompts[i],
        "seed": record.seeds[i],
        "sha256": record.sha256[i],
    }


def write_video(frames: tuple[Any, ...], strip: Path, fps: float, force: bool) -> dict[str, str]:
    """Write a video beside its film strip, whose record is that of both."""
    import importlib.util

    import numpy as np

    from attnctl.data.clips import mp4_bytes
    from attnctl.plans.writing import publish

    if importlib.util.find_spec("av") is None:
        say('The film strip is written; an MP4 beside it needs PyAV: pip install "attnctl[video]".')
        return {}
    path = strip.with_suffix(".mp4")
    publish({path: mp4_bytes((np.asarray(frame.convert("RGB")) for frame in frames), fps)}, force=force)
    return {"video": str(path)}


def pictures_table(images: list[dict[str, Any]]) -> str:
    names = [name for name in ("path", "seed", "identical", "prompt") if name in images[0]]
    words = {True: "yes", False: "no"}
    rows = [[words[row[n]] if isinstance(row[n], bool) else row[n] for n in names] for row in images]
    return table(names, rows)
