"""Read pictures from files and from PIL: one reader for every place that takes one.

What comes out is upright, 8-bit RGB, and of a bounded size: cameras store pictures sideways and say so beside them,
some formats hold several pictures, and a file of a few bytes can claim to be as large as a city.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from attnctl.errors import AttnctlError
from attnctl.plans.reading import Expected, check_regular

__all__ = ["MOST_PIXELS", "SUFFIXES", "PictureFile", "check_pixels", "is_picture", "read_picture", "upright"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MOST_PIXELS = 1 << 26  # 8192 x 8192
_MOST_MOVING = 1 << 24  # 4096 x 4096: decoders of animations hold several pictures at once
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_MOVING = ("PNG", "WEBP", "TIFF", "GIF")  # a JPEG's second picture is a preview
_MOST_FRAMES = 100_000


def is_picture(head: bytes) -> bool:
    """Tell from the first 12 bytes of a file whether it is one of the formats that are read as pictures."""
    starts = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def check_pixels(width: int, height: int, name: str, error: type[AttnctlError], most: int = MOST_PIXELS) -> None:
    """Raise an error for a picture that no memory should be asked for."""
    if width < 1 or height < 1 or width * height > most:
        raise error(f"{name} is {width}x{height} pixels; expected 1 to {most} of them. It is not read.")


def upright(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, turned as its EXIF orientation says."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits a pixel, which PIL would cut off at 255
        deep = np.asarray(turned)
        shallow = (deep >> 8) if deep.max(initial=0) > 255 else deep
        turned = Image.fromarray(np.clip(shallow, 0, 255).astype(np.uint8))
    return turned.convert("RGB")


def read_picture(path: str | Path, error: type[AttnctlError]) -> Image.Image:
    """Read a file with one picture, upright, in RGB.

    Raises:
        AttnctlError: `error`: it is missing, no picture, damaged, too large, or holds several pictures.
    """
    with contextlib.closing(PictureFile(Path(path), error)) as file:
        if file.count > 1:
            raise error(f"{file.path.name} holds {file.count} pictures: expected one. Give it as a clip of its own.")
        return file.read(0)


class PictureFile:
    """A file of one picture or several: an animation, or pages.

    Attributes:
        count: Number of pictures.
        fps: Pictures per second, or None where the file does not say.

    Raises:
        AttnctlError: `error`: it is missing, no picture, damaged or too large.
    """

    def __init__(self, path: Path, error: type[AttnctlError]) -> None:
        self.path, self._error = path, error
        self.fps: float | None = None
        check_regular(path, Expected("a picture", error))
        with self._explained("read"):
            self._image = Image.open(path, formats=_FORMATS)
        try:
            with self._explained("read"):
                self._check()
                self.count = self._counted() if self._image.format in _MOVING else 1
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        moving = self._image.format != "TIFF" and getattr(self._image, "n_frames", 1) > 1
        check_pixels(*self._image.size, self.path.name, self._error, _MOST_MOVING if moving else MOST_PIXELS)
        if self._image.mode == "F":
            raise self._error(f"{self.path.name} holds fractional numbers: expected a picture of 8 or 16 bits.")

    def _counted(self) -> int:
        """Count the pictures by looking at each, since headers can claim any number."""
        if getattr(self._image, "n_frames", 1) == 1:
            return 1
        count, seconds = 0, 0.0
        while count < _MOST_FRAMES:
            try:
                self._image.seek(count)
                if self._image.format == "WEBP":
                    self._image.load()  # only then does it know how long it stays
            except EOFError:
                break
            self._check()  # pages differ in size, and a GIF's canvas grows with a picture that lies outside
            seconds += float(self._image.info.get("duration", 0)) / 1000
            count += 1
        if seconds > 0:
            self.fps = count / seconds
        return count

    def read(self, index: int) -> Image.Image:
        """Return one picture, upright, in RGB."""
        with self._explained(f"read at picture {index}"):
            self._image.seek(index)
            return upright(self._image)

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    @contextlib.contextmanager
    def _explained(self, deed: str) -> Iterator[None]:
        try:
            yield
        except AttnctlError:
            raise
        except Exception as error:  # decoders raise whatever comes of damaged bytes
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise self._error(
                f"{self.path.name} cannot be {deed}: it is no {', '.join(_FORMATS)} picture, or damaged ({reason})."
            ) from None
