"""What an edit writes: windows that are done, the clip, its record, and a strip of before and after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.data.audio import SoundError, sound_of
from attnctl.data.clips import ClipError, FileClip, gif_bytes, mp4_bytes
from attnctl.data.pictures import grid
from attnctl.data.png import png_with_text
from attnctl.data.provenance import hardware, versions
from attnctl.data.specs import control_to_dict
from attnctl.errors import ConfigError
from attnctl.pipelines.editing.flow_job import FlowJob
from attnctl.pipelines.editing.job import Job
from attnctl.plans.reading import Expected, open_tensors
from attnctl.plans.writing import check_free, publish, recover

__all__ = ["Parts", "make_strip", "output_files", "parts_of", "record_of", "write"]

_STRIP = 8  # frames shown before and after
_MARK = "attnctl-edit"  # PNG text that holds the record
_RECORD = Expected("the record of an edit", ConfigError, 16 << 20)
_PART = Expected("a window of an edit that is done", ClipError)


class Parts:
    """Windows of a job that are done: in memory, or in a folder beside the output."""

    def __init__(self, job: Job | FlowJob, folder: Path | None) -> None:
        self.job = job
        self.folder = folder
        self.windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _path(self, first: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{first:06d}.safetensors"

    def has(self, first: int) -> bool:
        return first in self.windows or (self.folder is not None and self._path(first).exists())

    def put(self, first: int, before: np.ndarray, after: np.ndarray) -> None:
        from safetensors.numpy import save

        if self.folder is None:
            self.windows[first] = before, after
            return
        content = save({"before": np.ascontiguousarray(before), "after": np.ascontiguousarray(after)})
        publish({self._path(first): content}, force=True)

    def get(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the frames of a window before and after.

        Raises:
            ClipError: What an earlier run left is damaged.
        """
        if self.folder is None:
            return self.windows[first]
        path = self._path(first)
        cure = f"Delete the folder {self.folder.name}: its windows are computed again."
        shape = [len(self.job.frames(first)), self.job.height, self.job.width, 3]
        with open_tensors(path, _PART, cure=cure) as file:
            if set(file.keys()) != {"before", "after"}:
                raise ClipError(f"{path.name} is no window of an edit. {cure}")
            for side in ("before", "after"):
                part = file.get_slice(side)
                if part.get_dtype() != "U8" or list(part.get_shape()) != shape:
                    given = f"{part.get_dtype()} {list(part.get_shape())}"
                    raise ClipError(f"{path.name} is damaged: {side} is {given}, expected U8 {shape}. {cure}")
            return file.get_tensor("before").numpy(), file.get_tensor("after").numpy()

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the edited frames, one window in memory at a time."""
        for first in self.job.windows:
            yield from self.get(first)[1]

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all frames, before and after."""
        pairs = [self.get(first) for first in self.job.windows]
        return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])

    def digest(self) -> str:
        """Hash the edited frames."""
        total = hashlib.sha256()
        for frame in self.frames():
            total.update(frame.tobytes())
        return total.hexdigest()


@contextlib.contextmanager
def parts_of(files: list[Path], record: dict[str, Any], job: Job | FlowJob) -> Iterator[Parts]:
    """Give a place for windows that are done: what an earlier run of the same job left is taken up again."""
    if not files:
        yield Parts(job, None)
        return
    mark = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    folder = files[0].parent / f".{files[0].name}.{mark}.parts"
    recover(folder)  # a window that a killed run was just placing goes first: the next one's writing would undo it
    yield Parts(job, folder)  # which is there from the first window on that is done
    # Not where the run was broken off: it goes on from there. With other settings it began anew: that goes now.
    for left in folder.parent.iterdir() if folder.parent.exists() else ():
        if left.name.startswith(f".{files[0].name}.") and left.name.endswith(".parts"):
            shutil.rmtree(left, ignore_errors=True)


def output_files(out: str | Path | None, frames: int, force: bool) -> list[Path]:
    """Return the files that will be written, the result first; refuse early what is there already."""
    if out is None:
        return []
    path = Path(out)
    if path.suffix.lower() == ".png" and frames != 1:
        raise ConfigError(f"{path.name} holds one frame, and the edit has {frames}: give an .mp4 or a folder.")
    if path.suffix.lower() not in (".mp4", ".gif", ".png", ""):
        raise ConfigError(f"{path.name}: an edit is written as .mp4, .gif, .png (one frame), or into a folder.")
    if path.suffix.lower() == ".mp4":
        mp4_bytes([np.zeros((16, 16, 3), np.uint8)], 8.0)  # PyAV missing is said now, not after the work
    files = [path, path.with_suffix(".json"), path.with_name(f"{path.stem}-strip.png")]
    check_free(files, force=force)
    return files


def write(
    files: list[Path],
    parts: Parts,
    fps: float,
    record: dict[str, Any],
    strip: Image.Image,
    force: bool,
    announce: Callable[[str], object],
) -> None:
    """Write the edit, its record and its strip, all or none."""
    text = json.dumps(record, allow_nan=False)
    path, beside, picture = files
    made = {beside: json.dumps(record, indent=2, allow_nan=False).encode() + b"\n", picture: _png(strip, text)}
    if path.suffix.lower() == ".mp4":
        made = {path: _with_sound(parts, fps, text, announce), **made}
    elif path.suffix.lower() == ".gif":
        made = {path: gif_bytes(parts.frames(), fps, text), **made}
    elif path.suffix.lower() == ".png":
        made = {path: _png(Image.fromarray(next(parts.frames())), text), **made}
    else:
        for i, frame in enumerate(parts.frames()):
            made[path / f"{i:05d}.png"] = _png(Image.fromarray(frame), text)
    publish(made, force=force)
    if path.is_dir():
        _remove_older(path, len(parts.job.chosen))


def _with_sound(parts: Parts, fps: float, text: str, announce: Callable[[str], object]) -> bytes:
    """Encode the edit as MP4 with what is heard in the source meanwhile; say where it has to go without."""
    clip, chosen = parts.job.clip, parts.job.chosen
    try:
        sound = None
        if isinstance(clip, FileClip) and clip.is_video:
            begin, seconds = chosen.start / clip.fps, len(chosen) * chosen.step / clip.fps
            sound = sound_of(clip.path, begin, begin + seconds)
            if sound is not None and abs(len(chosen) / fps - seconds) > 0.02 * seconds:
                raise SoundError(f"{seconds:.1f} s of it would be heard with {len(chosen) / fps:.1f} s of pictures")
        made = mp4_bytes(parts.frames(), fps, text, sound=sound)
    except SoundError as error:
        announce(f"The source's sound is left out: {error}.")
        return mp4_bytes(parts.frames(), fps, text)
    if sound is not None:
        announce(f"The source's sound is taken over, {sound.begin:.2f} s to {sound.end:.2f} s.")
    return made


def _remove_older(folder: Path, count: int) -> None:
    """Remove the frames that a longer edit left in a folder: they would pass for the end of this one."""
    for left in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        ours = False
        with contextlib.suppress(OSError), Image.open(left) as image:
            ours = _MARK in image.info
        if ours and int(left.stem) >= count:
            left.unlink()


def _png(image: Image.Image, text: str) -> bytes:
    return png_with_text(image, _MARK, text, _RECORD)


def make_strip(parts: Parts) -> Image.Image:
    """Lay some frames of the source over the same frames of the edit."""
    job, n = parts.job, len(parts.job.chosen)
    shown = sorted({round(i * (n - 1) / max(1, min(n, _STRIP) - 1)) for i in range(min(n, _STRIP))})
    pairs = [(i, parts.get(i // job.window * job.window)) for i in shown]
    images: list[Image.Image | None] = [
        Image.fromarray(pair[side][i % job.window]) for side in (0, 1) for i, pair in pairs
    ]
    labels = [f"before\n{job.edit.source}", f"after\n{job.edit.target}"]
    return grid(images, 2, len(shown), labels, [f"frame {job.chosen[i]}" for i in shown], tile=96)


def record_of(pipe: Any, job: Job | FlowJob, call: dict[str, Any], fps: float, model: str) -> dict[str, Any]:
    """Say how the edit is made; machine paths stay out of it."""
    device = str(next(job.denoiser.parameters()).device)
    flow: dict[str, Any] = {}
    if isinstance(job, FlowJob):
        flow = {"solver": job.solver, "noise": job.noise, "costs": job.costs, "options": job.options}
    mask = None if job.mask is None else hashlib.sha256(np.packbits(job.mask).tobytes()).hexdigest()
    full = job.clip.read([job.chosen[0]]).shape[1:3]
    sample = job.read([0]) if len(job.chosen) == 1 else job.read([0, len(job.chosen) - 1])
    return {
        "schema": 1,
        "kind": "edit",
        "input": job.clip.path.name if isinstance(job.clip, FileClip) else "frames",
        "input_ends_sha256": hashlib.sha256(sample.tobytes()).hexdigest(),
        "frames": [job.chosen.start, len(job.chosen), job.chosen.step],
        "input_size": [full[1], full[0]],
        "width": job.width,
        "height": job.height,
        "fps": fps,
        "control": control_to_dict(job.edit),
        "steps": job.steps,
        **call,
        **flow,
        "mask_sha256": mask,
        "window": job.window,
        "store_bytes": job.bytes,
        "model": model or str(getattr(pipe, "name_or_path", "") or type(pipe).__name__).rsplit("/", 1)[-1],
        "pipeline": type(pipe).__name__,
        "scheduler": type(job.ddim).__name__,
        "scheduler_replaced": None if job.ddim is pipe.scheduler else type(pipe.scheduler).__name__,
        "dtype": str(next(job.denoiser.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "hardware": hardware(device),
        "versions": versions(),
    }
