"""Measure motion in videos by optical flow: how much there is, how smooth it is, how well frames explain each other.

OpenCV and NumPy only, on one thread, so that figures repeat. `dynamic` and `temporal_flicker` follow VBench (Huang et
al., arXiv 2311.17982), which estimates flow by RAFT; here it is DIS, so thresholds carry over approximately only and
the share of dynamic videos should be reported as "dynamic_degree_dis". A static video with grain moves by about 0.1
pixel: take motion below `NO_MOTION` as none. Report `temporal_flicker` with the motion: a standing picture has the
best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from attnctl.errors import ConfigError, nearest

__all__ = [
    "METHODS",
    "NO_MOTION",
    "Flow",
    "VideoFigures",
    "dynamic",
    "flow",
    "measure",
    "temporal_flicker",
    "warp_error",
]

METHODS = ("dis", "farneback")
NO_MOTION = 0.2  # pixels per frame

_TOP = 0.05


@dataclass(frozen=True, slots=True)
class Flow:
    """Hold the flow of a video, forward and backward, float32 [frames - 1, height, width, 2], in pixels (x, y)."""

    forward: np.ndarray
    backward: np.ndarray

    @property
    def pace(self) -> np.ndarray:
        """Return the forward flow's magnitude, [frames - 1, height, width]."""
        return np.linalg.norm(self.forward, axis=-1)

    @property
    def motion_mean(self) -> float:
        """Return the mean magnitude, pixels per frame."""
        return float(self.pace.mean())

    @property
    def motion_top5(self) -> float:
        """Return the mean magnitude of the fastest twentieth of the pixels (VBench's statistic)."""
        return float(_top(self.pace).mean())

    @property
    def accel(self) -> float:
        """Return the mean change of flow from pair to pair, relative to the motion: jerkiness; 0 for two frames."""
        if len(self.forward) < 2:
            return 0.0
        change = np.linalg.norm(np.diff(self.forward, axis=0), axis=-1).mean()
        return float(change / (self.motion_mean + 1e-3))


@dataclass(frozen=True, slots=True)
class VideoFigures:
    """Hold what `measure` finds.

    Attributes:
        motion_mean: mean flow magnitude, pixels per frame.
        motion_top5: the same for the fastest twentieth of the pixels.
        dynamic: does it move enough to count as dynamic.
        temporal_flicker: 1 minus the mean absolute change from frame to frame, 0..1.
        warp_error: mean square difference, 0..1, between a frame and the next one warped back; NaN if undefined.
        occluded: share of the pixels for which forward and backward flow disagree or leave the picture.
        flow_accel: jerkiness, 0 for steady motion.
    """

    motion_mean: float
    motion_top5: float
    dynamic: bool
    temporal_flicker: float
    warp_error: float
    occluded: float
    flow_accel: float


def flow(frames: np.ndarray | Sequence[object], method: str = "dis") -> Flow:
    """Estimate the flow between consecutive frames, both ways.

    Args:
        frames: uint8 RGB [n, height, width, 3] or a list of PIL images, n >= 2.
        method: "dis" (medium preset) or "farneback".

    Raises:
        ConfigError: another type, size or method.
    """
    video = _check(frames)
    if method not in METHODS:
        raise ConfigError(f"Unknown flow {method!r}; known: {', '.join(METHODS)}." + nearest(method, METHODS))
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in video]
    flows: Any = cv2  # its stubs know neither DIS nor that the first guess of the flow may be None
    with _one_thread():
        dis = flows.DISOpticalFlow_create(flows.DISOPTICAL_FLOW_PRESET_MEDIUM)

        def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            if method == "dis":
                return dis.calc(a, b, None)
            return flows.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)

        pairs = list(pairwise(grey))
        return Flow(np.stack([between(a, b) for a, b in pairs]), np.stack([between(b, a) for a, b in pairs]))


def dynamic(frames: np.ndarray | Sequence[object], fps: float = 8.0, method: str = "dis") -> bool:
    """Tell whether a video moves enough, as VBench's dynamic degree does (with another flow).

    Args:
        frames: uint8 RGB [n, height, width, 3] or a list of PIL images.
        fps: frames per second; more than 8 are thinned out.
        method: "dis" or "farneback".

    Raises:
        ConfigError: another type, size or method, or `fps` is not positive.
    """
    if not fps > 0:
        raise ConfigError(f"fps must be positive, got {fps}.")
    video = _check(frames)[:: max(1, round(fps / 8))]
    if len(video) < 2:
        raise ConfigError(f"At {fps:g} frames per second, {len(frames)} frames leave fewer than two to compare.")
    return _dynamic(flow(video, method).pace, len(video), fps)


def temporal_flicker(frames: np.ndarray | Sequence[object]) -> float:
    """Return 1 minus the mean absolute change from frame to frame, 0..1 (VBench's temporal flickering).

    Raises:
        ConfigError: another type or size.
    """
    video = _check(frames).astype(np.float32)
    return float(1 - np.abs(np.diff(video, axis=0)).mean() / 255)


def warp_error(frames: np.ndarray | Sequence[object], found: Flow | None = None) -> tuple[float, float]:
    """Warp each next frame back by the flow and compare, where forward and backward flow agree.

    Args:
        frames: uint8 RGB [n, height, width, 3] or a list of PIL images.
        found: the flow of these frames (default: DIS).

    Returns:
        The mean square difference, colours in 0..1 (NaN where no pixel of any pair can be compared), and the share of
        pixels that were left out.

    Raises:
        ConfigError: another type or size, or a flow of other frames.
    """
    video = _check(frames)
    found = flow(video) if found is None else found
    if found.forward.shape != (len(video) - 1, *video.shape[1:3], 2):
        raise ConfigError(f"The flow {found.forward.shape} does not belong to frames {video.shape}.")
    rows, columns = video.shape[1:3]
    x, y = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    errors, left_out = [], []
    for i, (f, g) in enumerate(zip(found.forward, found.backward, strict=True)):
        to_x, to_y = x + f[..., 0], y + f[..., 1]
        with _one_thread():
            back = cv2.remap(g, to_x, to_y, cv2.INTER_LINEAR)
            warped = cv2.remap(video[i + 1].astype(np.float32) / 255, to_x, to_y, cv2.INTER_LINEAR)
        apart = ((f + back) ** 2).sum(-1)
        mask = apart <= 0.01 * ((f**2).sum(-1) + (back**2).sum(-1)) + 0.5
        mask &= (to_x >= 0) & (to_x <= columns - 1) & (to_y >= 0) & (to_y <= rows - 1)
        left_out.append(1 - mask.mean())
        if mask.any():
            errors.append(((video[i].astype(np.float32) / 255 - warped) ** 2).mean(-1)[mask].mean())
    return (float(np.mean(errors)) if errors else math.nan), float(np.mean(left_out))


def measure(frames: np.ndarray | Sequence[object], fps: float = 8.0, method: str = "dis") -> VideoFigures:
    """Measure a video: motion, flicker, warp error and jerkiness.

    Args:
        frames: uint8 RGB [n, height, width, 3] or a list of PIL images, n >= 2.
        fps: frames per second, which `dynamic` depends on.
        method: "dis" or "farneback".

    Raises:
        ConfigError: another type, size or method, or `fps` is not positive.
    """
    video = _check(frames)
    flows = flow(video, method)
    error, occluded = warp_error(video, flows)
    return VideoFigures(
        motion_mean=flows.motion_mean,
        motion_top5=flows.motion_top5,
        dynamic=dynamic(video, fps, method),
        temporal_flicker=temporal_flicker(video),
        warp_error=error,
        occluded=occluded,
        flow_accel=flows.accel,
    )


def _dynamic(pace: np.ndarray, frames: int, fps: float) -> bool:
    threshold = max(1.0, 8 / fps) * 6 * min(pace.shape[1:]) / 256
    moving = int((_top(pace).mean(-1) > threshold).sum())
    return moving >= round(4 * frames / 16)


def _top(pace: np.ndarray) -> np.ndarray:
    """Return the largest twentieth of the magnitudes of each pair, [pairs, floor(height * width / 20)]."""
    flat = pace.reshape(len(pace), -1)
    n = max(1, int(_TOP * flat.shape[1]))
    return np.partition(flat, flat.shape[1] - n, axis=1)[:, -n:]


def _check(frames: np.ndarray | Sequence[object]) -> np.ndarray:
    if isinstance(frames, np.ndarray):
        video = frames
    else:
        parts = [np.asarray(f) for f in frames]
        if not parts or any(p.shape != parts[0].shape for p in parts):
            raise ConfigError(f"Frames must be of one size, got {sorted({p.shape for p in parts})}.")
        video = np.stack(parts)
    if (
        video.ndim != 4
        or video.shape[-1] != 3
        or video.dtype != np.uint8
        or len(video) < 2
        or min(video.shape[1:3]) < 16
    ):
        raise ConfigError(
            f"A video is uint8 RGB [frames, height, width, 3], two frames or more of 16x16 or more; got {video.dtype} "
            f"{video.shape}."
        )
    return video


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let OpenCV work on one thread, so that its sums come out the same each time, and give it back what it had."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
