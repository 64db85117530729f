"""What `attnctl maps` reads and prints: points, where each map is highest, its table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.commands.common import table
from attnctl.data.files import slug

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["maps_table", "mask_files", "picture_bytes", "point_of", "word_rows"]


def picture_bytes(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def mask_files(folder: Path, where: list[dict[str, Any]]) -> dict[Path, bytes]:
    """Draw the region of each word as a picture of its own, white inside; return the files and their content."""
    from attnctl.data.map_regions import from_rle
    from attnctl.data.segments import mask_picture

    return {
        folder / f"mask-{slug(region['word'])}.png": picture_bytes(mask_picture(from_rle(region["segmentation"])))
        for region in where
    }


def point_of(text: str) -> tuple[float, ...]:
    """Read "x,y" or "x,y,frame"."""
    from attnctl.errors import ConfigError

    try:
        x, y, *frame = text.split(",")
        return (float(x), float(y), *map(int, frame))
    except ValueError:
        raise ConfigError(f"--point {text!r}: expected x,y as shares of the image, such as 0.5,0.25.") from None


def word_rows(maps: Any) -> list[dict[str, Any]]:
    """Say where the map of each word is highest, and how high."""
    return [
        {"word": word, "tokens": list(maps.tokens[0][n]), **_peak(maps[word][0])} for n, word in enumerate(maps.words)
    ]


def _peak(values: Any) -> dict[str, Any]:
    """Find a map's highest value and its place, in shares of the image from the top left."""
    h, w = values.shape
    place = int(values.argmax())
    return {
        "mean": round(float(values.mean()), 6),
        "peak": round(float(values.max()), 6),
        "peak_x": round((place % w + 0.5) / w, 4),
        "peak_y": round((place // w + 0.5) / h, 4),
    }


def maps_table(images: list[dict[str, Any]]) -> str:
    """Lay the maps of all images out as a table, and name their files."""
    rows = [
        (one["seed"], w["word"], f"{w['mean']:.4f}", f"{w['peak']:.4f}", f"{w['peak_x']:.0%} {w['peak_y']:.0%}")
        for one in images
        for w in one["words"]
    ]
    head = ("seed", "word", "mean", "highest", "at (from left, top)")
    return f"{table(head, rows)}\n\n" + "\n".join(f"{one['folder']}: {', '.join(one['files'])}" for one in images)
