"""Reading and writing clips: video files, folders of frames and single images, in uint8 RGB.

OpenCV reads videos, frame by frame, so that a long clip is never in memory whole, and Pillow pictures and animations;
PyAV writes H.264 in MP4 with a comment.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from attnctl.data.audio import Sound, SoundError
from attnctl.data.files import natural
from attnctl.data.picture_files import SUFFIXES, PictureFile, check_pixels, is_picture, read_picture, upright
from attnctl.errors import AttnctlError, ConfigError
from attnctl.plans.reading import Expected, check_regular

__all__ = ["ArrayClip", "Clip", "ClipError", "FileClip", "fit", "gif_bytes", "mp4_bytes", "open_clip"]

_HEAD = 1024  # bytes that tell a format
_MOST_FRAMES = 1_000_000
_CONTAINERS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\0\0\x01\xba", b"\0\0\x01\xb3",  # MPEG program and video streams
    b"FLV\x01", b"OggS", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
)  # fmt: skip
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")
_CODEC_NAMES = (
    "h264 avc1 avc3 x264 hevc hvc1 hev1 h265 x265 vp80 vp90 vp08 vp09 av01 mp4v fmp4 xvid divx dx50 mp42 mp43 div3 "
    "mjpg jpeg mpg1 mpg2 mp1v mp2v m2v1 pim1 ap4h ap4x apch apcn apcs apco ffv1 ffvh hfyu mpng png theo wmv1 wmv2 "
    "wmv3 wvc1 flv1 h263 s263 vp6f dvsd dvc dvcp avdn avdh raw i420 yv12 yuy2 uyvy rgba bgr0 cfhd svq3 "
)


class ClipError(AttnctlError):
    """A video cannot be read or written."""


_EXPECTED = Expected("a video, an image or a folder of images", ClipError)


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
    """Frames of a video file, an animation, a folder of images in natural order, or one image.

    Raises:
        ClipError: Nothing is there, or nothing that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fps = 8.0
        self._video: cv2.VideoCapture | None = None
        self._moving: PictureFile | None = None
        self._files: list[Path] = []
        self._at = 0
        if not os.path.lexists(self.path):
            raise ClipError(f"There is no video {self.path}.")
        if self.path.is_dir():
            self._files = _frames_in(self.path)
            self.count = len(self._files)
            return
        check_regular(self.path, _EXPECTED)
        head = read_head(self.path)
        if is_picture(head):
            self._moving = PictureFile(self.path, ClipError)
            self.count = self._moving.count
            self.fps = self._moving.fps or self.fps
        else:
            _check_container(self.path, head)
            self.count = self._open()

    @property
    def is_video(self) -> bool:
        """Tell whether the frames come from a video file, which may have sound."""
        return not self._files and self._moving is None

    def _open(self) -> int:
        """Open the video and count its frames, since containers' own counts may be wrong."""
        video = self._reopen()
        width, height = (int(video.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if video.isOpened():
            check_pixels(width, height, self.path.name, ClipError)
            _check_codec(self.path, int(video.get(cv2.CAP_PROP_FOURCC)))
        rate = video.get(cv2.CAP_PROP_FPS)
        self.fps = float(rate) if 0 < rate < 1000 else self.fps
        count = 0
        while count < _MOST_FRAMES and video.grab():
            count += 1
        if not count:
            raise ClipError(f"{self.path.name} has no frame that can be read: it is no video, damaged or empty.")
        self._reopen()
        return count

    def _reopen(self) -> cv2.VideoCapture:
        self.close()
        # An absolute path is never taken for an address or a pattern of names, and only FFmpeg's readers are asked.
        self._video, self._at = cv2.VideoCapture(str(self.path.resolve()), cv2.CAP_FFMPEG), 0
        return self._video

    def read(self, indices: Sequence[int]) -> np.ndarray:
        frames = {i: self._frame(i) for i in sorted(set(indices))}
        sizes = sorted({f.shape[:2] for f in frames.values()})
        if len(sizes) > 1:
            raise ClipError(
                f"The frames in {self.path.name} differ in size: {sizes[0]} and {sizes[1]} (rows, columns)."
            )
        return np.stack([frames[i] for i in indices])

    def _frame(self, index: int) -> np.ndarray:
        if self._files:
            return np.asarray(read_picture(self._files[index], ClipError))
        if self._moving is not None:
            return np.asarray(self._moving.read(index))
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

    def close(self) -> None:
        """Let go of the file."""
        if self._video is not None:
            self._video.release()
            self._video = None


def _frames_in(folder: Path) -> list[Path]:
    """List the images of a folder in natural order, without hidden ones such as the `._frame_1.png` of macOS."""
    names = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    files = sorted((p for p in names if not p.is_dir()), key=natural)
    if not files:
        raise ClipError(f"The folder {folder} holds no images ({', '.join(SUFFIXES)}).")
    for path in files:
        check_regular(path, _EXPECTED)
    return files


def read_head(path: Path) -> bytes:
    """Return the first bytes of a regular file, by which formats are told apart."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise ClipError(f"{path.name} cannot be read: {error.strerror or error}.") from None


def _check_container(path: Path, head: bytes) -> None:
    """Raise ClipError unless the first bytes are those of a video that holds its own frames.

    Playlists and scripts name other files, and would be followed to them under any ending.
    """
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        raise ClipError(f"{path.name} is a HEIF or AVIF picture, which is not read: convert it to PNG or JPEG.")
    is_video = (
        head[4:8] in boxes
        or head.startswith(_CONTAINERS)
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or any(head[first:][:1] == head[second:][:1] == b"G" for first, second in ((0, 188), (4, 196)))  # MPEG-TS
    )
    if not is_video and path.suffix.lower() in SUFFIXES:
        raise ClipError(f"{path.name} is not an image that can be read, whatever its name says: it is damaged.")
    if not is_video:
        raise ClipError(
            f"{path.name} is no video that is read: expected MP4, MOV, Matroska, WebM, AVI, MPEG, FLV, Ogg or ASF, an "
            "image, or a folder of images. It is damaged, or names other files."
        )


def _check_codec(path: Path, fourcc: int) -> None:
    name = fourcc.to_bytes(4, "little", signed=fourcc < 0).decode("latin-1").strip("\0 ").lower()
    if name and name not in _CODEC_NAMES.split():
        raise ClipError(
            f"{path.name} is compressed by {name!r}, which is not read: expected H.264, HEVC or VP9, for example."
        )


def open_clip(video: object) -> Clip:
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
        parts = [np.asarray(upright(f) if hasattr(f, "convert") else f) for f in video]
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
    return ArrayClip(array)


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


def mp4_bytes(frames: Iterable[np.ndarray], fps: float, comment: str = "", sound: Sound | None = None) -> bytes:
    """Encode frames as H.264 in MP4.

    Args:
        frames: uint8 RGB [height, width, 3], of one size; odd sides are padded by repeating their last line.
        fps: Frames per second.
        comment: What the file's comment says: its record.
        sound: What is heard meanwhile.

    Raises:
        ClipError: PyAV is not installed, or there is no frame.
        SoundError: The sound is damaged.
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
        stream.options = {"crf": "14", "preset": "medium"}
        heard = iter(()) if sound is None else sound.write_into(file)
        _advance(heard)  # streams are added before the first frame is written
        for frame in _even(frames):
            if not count:
                stream.height, stream.width = frame.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            count += 1
        if not count:
            raise ClipError("There is no frame to write.")
        file.mux(stream.encode())
        _advance(heard)
    return buffer.getvalue()


def _advance(heard: Iterator[None]) -> None:
    """Let the sound be written; a damaged one is a SoundError, whatever PyAV calls it."""
    try:
        next(heard, None)
    except AttnctlError:
        raise
    except (OSError, ValueError, ArithmeticError) as error:  # PyAV's own errors are among them
        raise SoundError(f"it is damaged ({' '.join(str(error).split())[:120]})") from None


def gif_bytes(frames: Iterable[np.ndarray], fps: float, comment: str = "") -> bytes:
    """Encode frames as a GIF that repeats: uint8 RGB [height, width, 3], each with 256 colours of its own.

    Raises:
        ClipError: There is no frame.
    """
    pictures = (Image.fromarray(frame).quantize(256, Image.Quantize.MEDIANCUT) for frame in frames)
    first, buffer = next(pictures, None), io.BytesIO()
    if first is None:
        raise ClipError("There is no frame to write.")
    options: dict[str, Any] = {"duration": max(20, round(1000 / fps)), "loop": 0, "comment": comment.encode()}
    first.save(buffer, "GIF", save_all=True, append_images=pictures, disposal=1, **options)
    return buffer.getvalue()


def _even(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        h, w = frame.shape[:2]
        yield np.ascontiguousarray(np.pad(frame, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge"))
