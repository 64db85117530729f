"""Reading and writing clips: video files, folders of frames and single images, in uint8 RGB.

OpenCV reads, frame by frame, so that a long clip is never in memory whole; PyAV writes H.264 in MP4 with a comment.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from attnctl.errors import AttnctlError, ConfigError

__all__ = ["ArrayClip", "Clip", "ClipError", "FileClip", "fit", "mp4_bytes", "open_clip"]

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class ClipError(AttnctlError):
    """A video cannot be read or written."""


class Clip:
    """Frames to read, some at a time.

    Attributes:
        count: Number of frames.
        fps: Frames per second.
    """

    count: int
    fps: float

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Return some frames, uint8 RGB [n, height, width, 3], in the order asked for."""
        raise NotImplementedError


class ArrayClip(Clip):
    """Frames that are in memory: uint8 RGB [n, height, width, 3]."""

    def __init__(self, video: np.ndarray, fps: float = 8.0) -> None:
        self.video, self.count, self.fps = video, len(video), fps

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self.video[list(indices)]


class FileClip(Clip):
    """Frames of a video file, a folder of images, or one image.

    Raises:
        ClipError: Nothing is there, or nothing that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ClipError(f"There is no video {self.path}.")
        self.fps = 8.0
        self._video: cv2.VideoCapture | None = None
        self._at = 0
        if self.path.is_dir():
            self._files = sorted(p for p in self.path.iterdir() if p.suffix.lower() in _IMAGES)
        else:
            self._files = [self.path] if self.path.suffix.lower() in _IMAGES else []
        if self.path.is_dir() and not self._files:
            raise ClipError(f"The folder {self.path} holds no images ({', '.join(_IMAGES)}).")
        self.count = len(self._files) or self._open()

    def _open(self) -> int:
        """Open the video and count its frames, since containers' own counts may be wrong."""
        video = self._reopen()
        rate = video.get(cv2.CAP_PROP_FPS)
        self.fps = float(rate) if 0 < rate < 1000 else self.fps
        count = 0
        while video.grab():
            count += 1
        if not count:
            raise ClipError(f"{self.path.name} has no frame that can be read: it is no video, damaged or empty.")
        self._reopen()
        return count

    def _reopen(self) -> cv2.VideoCapture:
        self.close()
        self._video, self._at = cv2.VideoCapture(str(self.path)), 0
        return self._video

    def read(self, indices: Sequence[int]) -> np.ndarray:
        found = {i: self._image(self._files[i]) if self._files else self._frame(i) for i in sorted(set(indices))}
        sizes = sorted({f.shape[:2] for f in found.values()})
        if len(sizes) > 1:
            raise ClipError(
                f"The frames in {self.path.name} differ in size: {sizes[0]} and {sizes[1]} (rows, columns)."
            )
        return np.stack([found[i] for i in indices])

    def _frame(self, index: int) -> np.ndarray:
        video = self._video
        if video is None or self._at > index:
            video = self._reopen()
        # Seeking is not exact in many containers: walk.
        while self._at < index and video.grab():
            self._at += 1
        ok, frame = video.read()
        if not ok:
            raise ClipError(f"Frame {index} of {self.path.name} cannot be read.")
        self._at += 1
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def _image(self, path: Path) -> np.ndarray:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if image is None:
            raise ClipError(f"{path.name} is not an image that can be read.")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        """Let go of the file."""
        if self._video is not None:
            self._video.release()
            self._video = None


def open_clip(video: object, fps: float = 8.0) -> Clip:
    """Return a clip of a path, of frames in memory (array, image or list of images), or of a clip.

    Raises:
        ClipError: The file cannot be read.
        ConfigError: The frames are no video.
    """
    if isinstance(video, Clip):
        return video
    if isinstance(video, (str, Path)):
        return FileClip(video)
    if hasattr(video, "convert"):  # one PIL image
        video = [video]
    if not isinstance(video, np.ndarray):
        if not isinstance(video, Sequence):
            raise ConfigError(f"A video is a path, an array, an image or a list of images, got {type(video).__name__}.")
        parts = [np.asarray(f.convert("RGB")) if hasattr(f, "convert") else np.asarray(f) for f in video]
        sizes = sorted({p.shape for p in parts})
        if len(sizes) != 1:
            raise ConfigError(f"Frames must be of one size, and there must be one at least; got {sizes or 'none'}.")
        video = np.stack(parts)
    array = video[None] if video.ndim == 3 else video
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
        raise ConfigError(
            f"A video is uint8 RGB [frames, height, width, 3], an image, or a list of images; got {array.dtype} "
            f"{array.shape}."
        )
    return ArrayClip(array, fps)


def fit(video: np.ndarray, size: int | tuple[int, int] | None, multiple: int) -> np.ndarray:
    """Bring frames to a size that a model takes: scale, then crop about the middle.

    Args:
        video: uint8 RGB [n, height, width, 3].
        size: Length of the shorter side, or (height, width); None keeps the scale.
        multiple: Both sides become multiples of this, cropped where they are not.

    Raises:
        ConfigError: Nothing would be left.
    """
    h, w = video.shape[1:3]
    goal = (h, w) if size is None else size
    if isinstance(goal, int):
        scale = goal / min(h, w)
        goal = (round(h * scale), round(w * scale))
    height, width = (n // multiple * multiple for n in goal)
    if min(height, width) < multiple:
        raise ConfigError(f"Frames of {w}x{h} at size {size!r} leave less than one cell of {multiple} pixels.")
    scale = max(height / h, width / w) if size is not None else 1.0
    if scale != 1.0:
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        new = (max(width, round(w * scale)), max(height, round(h * scale)))
        video = np.stack([cv2.resize(f, new, interpolation=way) for f in video])
        h, w = video.shape[1:3]
    y, x = (h - height) // 2, (w - width) // 2
    return video[:, y : y + height, x : x + width]


def mp4_bytes(frames: Iterable[np.ndarray], fps: float, comment: str = "", crf: int = 14) -> bytes:
    """Encode frames as H.264 in MP4.

    Args:
        frames: uint8 RGB [height, width, 3], of one size; odd sides are padded by repeating their last line.
        fps: Frames per second.
        comment: What the file's comment says: its record.
        crf: x264's quality; smaller is better, 0 is lossless.

    Raises:
        ClipError: PyAV is not installed, or there is no frame.
    """
    try:
        import av
    except ImportError:
        raise ClipError(
            'Writing video needs PyAV: pip install "attnctl[video]" (or choose a folder of PNGs).'
        ) from None
    buffer = io.BytesIO()
    count = 0
    with av.open(buffer, "w", format="mp4") as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        for frame in _even(frames):
            if not count:
                stream.height, stream.width = frame.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            count += 1
        if not count:
            raise ClipError("There is no frame to write.")
        file.mux(stream.encode())
    return buffer.getvalue()


def _even(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        h, w = frame.shape[:2]
        yield np.ascontiguousarray(np.pad(frame, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge"))
