"""Pictures for people: labelled grids, before/after pairs and heat maps over an image.

Small images are enlarged by whole factors with nearest-neighbour sampling: every pixel stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnctl.data.files import slug
from attnctl.errors import ConfigError

__all__ = ["blank_figure", "enlarge", "film_strip", "grid", "overlay", "pair", "slug", "wrapped", "written"]

Color = tuple[int, int, int]

PAPER: Color = (255, 255, 255)
INK: Color = (32, 32, 32)
FAINT: Color = (105, 105, 105)
_TILE = 192  # pixels a small image is enlarged to, at least
_GAP = 12
_EDGE = 4


def enlarge(image: Image.Image, tile: int = _TILE) -> Image.Image:
    """Enlarge a small image by a whole factor until its longer side reaches `tile`."""
    factor = max(1, -(-tile // max(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def blank_figure(width: float, height: float) -> Any:
    """Make an empty figure of matplotlib, in inches, without its global state.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("This picture is drawn by matplotlib: pip install 'attnctl[plot]'.") from None
    return Figure(figsize=(width, height), layout="constrained")


def film_strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Lay the frames of a video side by side, eight in a row, without gaps."""
    if not frames:
        raise ConfigError("A film strip needs at least one frame.")
    (width, height), columns = frames[0].size, 8
    rows = -(-len(frames) // columns)
    strip = Image.new("RGB", (min(columns, len(frames)) * width, rows * height), PAPER)
    for i, frame in enumerate(frames):
        strip.paste(frame, (i % columns * width, i // columns * height))
    return strip


def grid(
    images: Sequence[Image.Image | None],
    rows: int,
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    title: str = "",
    footer: str = "",
    frames: Sequence[Color | None] = (),
    tile: int = _TILE,
) -> Image.Image:
    """Lay images out row by row, with labels on the left and on top.

    Args:
        images: The images in reading order; None leaves a cell empty.
        frames: One colour per image, drawn around it; None draws nothing.
        tile: Images smaller than this are enlarged by a whole factor.

    Raises:
        ConfigError: the numbers of images, labels or frames do not fit the grid.
    """
    _check(images, rows, columns, row_labels, column_labels, frames)
    tiles = [None if image is None else enlarge(image, tile) for image in images]
    shown = [t for t in tiles if t is not None]
    width, height = max(t.width for t in shown), max(t.height for t in shown)
    unit = max(14, min(width, height) // 12)  # letter size follows the tiles
    small, large = ImageFont.load_default(unit), ImageFont.load_default(round(unit * 1.25))

    across = columns * (width + _GAP) - _GAP
    left = round(width * 0.8) if any(row_labels) else 0
    rows_text = [wrapped(text, small, left - unit) for text in row_labels]
    columns_text = [wrapped(text, small, width) for text in column_labels]
    title_text, footer_text = wrapped(title, large, left + across), wrapped(footer, small, left + across)
    tops = [_height(title_text, large), max((_height(t, small) for t in columns_text), default=0)]
    top = sum(t + _GAP for t in tops if t)
    bottom = _height(footer_text, small)
    size = (left + across + 2 * _GAP, top + rows * (height + _GAP) + bottom + (2 * _GAP if bottom else _GAP))

    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    written(draw, (_GAP, _GAP), title_text, large, INK)
    for i, text in enumerate(columns_text):
        x = _GAP + left + i * (width + _GAP) + width / 2
        written(draw, (x, top - _height(text, small)), text, small, INK, anchor="ma", align="center")
    for i, text in enumerate(rows_text):
        y = _GAP + top + i * (height + _GAP) + (height - _height(text, small)) / 2
        written(draw, (_GAP, y), text, small, INK)
    for i, tile_image in enumerate(tiles):
        if tile_image is None:
            continue
        x = _GAP + left + (i % columns) * (width + _GAP)
        y = _GAP + top + (i // columns) * (height + _GAP)
        sheet.paste(tile_image, (x, y))
        if frames and frames[i] is not None:
            box = (x - _EDGE, y - _EDGE, x + tile_image.width + _EDGE - 1, y + tile_image.height + _EDGE - 1)
            draw.rectangle(box, outline=frames[i], width=_EDGE)
    written(draw, (_GAP, size[1] - bottom - _GAP), footer_text, small, FAINT)
    return sheet


def pair(
    before: Image.Image, after: Image.Image, labels: tuple[str, str] = ("before", "after"), *, title: str = ""
) -> Image.Image:
    """Lay two images side by side."""
    return grid([before, after], 1, 2, column_labels=labels, title=title)


def overlay(
    image: Image.Image,
    heat: Any,
    *,
    alpha: float = 0.55,
    limits: tuple[float, float] | None = None,
    tile: int = _TILE,
) -> Image.Image:
    """Lay a heat map over an image: dark is low, bright is high.

    Args:
        heat: A map [y, x] of any size, as an array or a tensor; it is enlarged smoothly to the image.
        alpha: How much of the heat map is seen, from 0 to 1.
        limits: The values that become the darkest and the brightest colour; the map's own range by default.

    Raises:
        ConfigError: the map is not two-dimensional and finite, or `alpha` is out of range.
    """
    import cv2

    values = np.asarray(heat.detach().float().cpu() if hasattr(heat, "detach") else heat, dtype=np.float32)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ConfigError(f"A heat map is a finite array [y, x], got shape {values.shape}.")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is the share of the heat map and lies in [0, 1], got {alpha}.")
    low, high = limits or (float(values.min()), float(values.max()))
    base = np.asarray(enlarge(image, tile), dtype=np.float32)
    smooth = cv2.resize(values, (base.shape[1], base.shape[0]), interpolation=cv2.INTER_CUBIC)
    level = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)
    colors = cv2.applyColorMap(np.round(level * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    mixed = (1 - alpha) * base + alpha * colors.astype(np.float32)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def _check(
    images: Sequence[Any],
    rows: int,
    columns: int,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    frames: Sequence[Any],
) -> None:
    if rows < 1 or columns < 1 or len(images) != rows * columns:
        raise ConfigError(f"{len(images)} images do not fill a grid of {rows} rows and {columns} columns.")
    if all(image is None for image in images):
        raise ConfigError("A grid needs at least one image.")
    for name, given, expected in (
        ("row labels", row_labels, rows),
        ("column labels", column_labels, columns),
        ("frames", frames, rows * columns),
    ):
        if given and len(given) != expected:
            raise ConfigError(f"Expected {expected} {name}, got {len(given)}.")


def wrapped(text: str, font: Any, width: float) -> str:
    """Break a text into lines that fit into `width` pixels."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
            while font.getlength(line) > width > 0 and len(line) > 1:  # a word longer than the line
                cut = max(1, int(len(line) * width / font.getlength(line)))
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return "\n".join(lines)


def _height(text: str, font: Any) -> int:
    return round(len(text.split("\n")) * font.size * 1.3) if text else 0


def written(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, font: Any, fill: Color, **options: Any
) -> None:
    """Write text of one or more lines at a place, in pixels from the left and the top; nothing where it is empty."""
    if text:
        draw.multiline_text(at, text, fill=fill, font=font, spacing=font.size * 0.15, **options)
