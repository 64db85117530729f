"""Text inside PNG files, in parts of a size that every reader opens.

Pillow refuses a part of more than 1 MiB, and with it the whole picture.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, PngImagePlugin

from attnctl.plans.reading import Expected, check_regular

__all__ = ["png_with_text", "text_of_png"]

_PART = 1 << 18  # characters: at most 1 MiB in any encoding


def png_with_text(image: Image.Image, name: str, text: str, expected: Expected) -> bytes:
    """Encode a picture as PNG with a text of any length: under a name, and what is left under "name 2", "name 3", ...

    Raises:
        AttnctlError: The expected error: the text is longer than `text_of_png` reads.
    """
    if len(text.encode()) > expected.limit:
        raise expected.error(
            f"A picture holds {expected.noun} of {expected.limit} bytes at most; this one has {len(text)}: pass "
            "smaller masks, or fewer."
        )
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for i, first in enumerate(range(0, max(1, len(text)), _PART)):
        info.add_text(_key(name, i), text[first : first + _PART], zip=True)
    image.convert("RGB").save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def text_of_png(path: Path, name: str, expected: Expected) -> str:
    """Read what `png_with_text` put into a picture.

    Raises:
        AttnctlError: The expected error: the file is no PNG, damaged, or carries no such text.
    """
    check_regular(path, expected)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            info = image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise expected.error(f"{path.name} is not a readable PNG.") from None
    parts: list[str] = []
    while isinstance(part := info.get(_key(name, len(parts))), str):
        parts.append(str(part))
    if not parts:
        raise expected.error(
            f"{path.name} carries no {expected.noun.removeprefix('a ')}; was it made or changed by another program?"
        )
    text = "".join(parts)
    if len(text) > expected.limit:
        raise expected.error(f"{path.name} holds {len(text)} characters; {expected.noun} has at most {expected.limit}.")
    return text


def _key(name: str, part: int) -> str:
    return f"{name} {part + 1}" if part else name
