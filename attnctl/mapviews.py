"""Word maps as pictures: overlays on the image, strips over the steps, one row a word and one column a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.imaging import PAPER, grid, overlay
from attnctl.maps import WordMaps

__all__ = ["heads_sheet", "overlay_word", "steps_sheet", "words_sheet"]

_COLUMNS = 6
_STEPS = 8


def overlay_word(image: Image.Image, maps: WordMaps, word: str, index: int = 0, *, alpha: float = 0.6) -> Image.Image:
    """Lay the map of a word over the image that it belongs to: dark is its lowest probability, bright its highest.

    Args:
        image: The generated image.
        maps: Maps of the run that made it.
        word: One of `maps.words`.
        index: Which image of the run it is.
        alpha: How much of the map is seen, from 0 to 1.

    Raises:
        ConfigError: The word was not recorded, its image has none, or the maps are those of a video.
    """
    return overlay(_grey(image), _flat(maps, word, maps[word], index), alpha=alpha)


def words_sheet(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, title: str = ""
) -> Image.Image:
    """Lay out the image and an overlay for each word, with the lowest and highest share of each map."""
    shown = list(words) or [w for n, w in enumerate(maps.words) if maps.tokens[index][n]]
    tiles, labels, under = [image], ["image"], _grey(image)
    for word in shown:
        values = _flat(maps, word, maps[word], index)
        tiles.append(overlay(under, values, alpha=0.6))
        labels.append(f"{word}\n{_percent(float(values.min()))} to {_percent(float(values.max()))} %")
    # One letter size everywhere: full rows, the last one filled up with nothing.
    columns = min(len(tiles), _COLUMNS)
    parts: list[Image.Image] = []
    for first in range(0, len(tiles), columns):
        row: list[Image.Image | None] = [*tiles[first : first + columns]]
        names = labels[first : first + columns]
        pad = columns - len(row)
        parts.append(
            grid(
                row + [None] * pad,
                1,
                columns,
                column_labels=names + [""] * pad,
                title=title if first == 0 else "",
                footer=f"{_FOOTER} {_what(maps)}" if first + columns >= len(tiles) else "",
            )
        )
    return _stacked(parts)


_FOOTER = "Share of attention that goes to the word, from dark (lowest in the map) to bright (highest)."


def steps_sheet(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, title: str = ""
) -> Image.Image:
    """Lay out one row a word and one column for each of up to eight steps; needs keep=("steps",)."""
    some = [maps.steps[i] for i in np.unique(np.linspace(0, len(maps.steps) - 1, _STEPS).round().astype(int))]
    names = [f"step {step + 1}" for step in some]
    rows = {w: [maps.get_map(w, step=s) for s in some] for w in _shown(maps, words, index)}
    return _table(image, maps, rows, names, index, title)


def heads_sheet(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, title: str = ""
) -> Image.Image:
    """Lay out one row a word and one column a head; needs keep=("heads",).

    Raises:
        ConfigError: The layers have different numbers of heads, so that head 3 is not the same thing in all of them.
    """
    counts = {layer.shape[3] for layer in maps.layers.values()}
    if len(counts) > 1:
        raise ConfigError(
            f"The recorded layers have {' or '.join(map(str, sorted(counts)))} heads, which cannot share columns: "
            "record one stage alone, such as sites='mid'."
        )
    heads = maps.heads if maps.heads is not None else tuple(range(counts.pop()))
    rows = {w: [maps.get_map(w, head=h) for h in heads] for w in _shown(maps, words, index)}
    return _table(image, maps, rows, [f"head {h}" for h in heads], index, title)


def _shown(maps: WordMaps, words: Sequence[str], index: int) -> list[str]:
    return list(words) or [w for n, w in enumerate(maps.words) if maps.tokens[index][n]]


def _table(
    image: Image.Image, maps: WordMaps, rows: dict[str, list[Tensor]], names: Sequence[str], index: int, title: str
) -> Image.Image:
    tiles = []
    for word, many in rows.items():
        values = [_flat(maps, word, m, index) for m in many]
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        tiles += [overlay(_grey(image), v, alpha=0.7, limits=(low, high), tile=128) for v in values]
    return grid(
        tiles,
        len(rows),
        len(names),
        list(rows),
        names,
        title=title,
        footer=f"Share of attention that goes to the word. Each row has one scale. {_what(maps)}",
        tile=128,
    )


def _flat(maps: WordMaps, word: str, values: Tensor, index: int) -> Tensor:
    if not 0 <= index < maps.images:
        raise ConfigError(f"Image {index} is past the end: there are {maps.images}.")
    chosen = values[index]
    if chosen.ndim != 2:
        raise ConfigError(
            "These are maps of a video: take one frame, and lay it over its picture with imaging.overlay."
        )
    if not maps.tokens[index][maps.words.index(word)]:
        raise ConfigError(f"The prompt of image {index} has no {word!r}.")
    return chosen


def _grey(image: Image.Image) -> Image.Image:
    """Take the colours out, which would pass for those of the map."""
    return image.convert("L").convert("RGB")


def _what(maps: WordMaps) -> str:
    h, w = maps.grid
    layers = "1 layer" if len(maps.layers) == 1 else f"{maps.reduce} of {len(maps.layers)} layers"
    return f"{layers[0].upper()}{layers[1:]}, {h} x {w} at most, {len(maps.steps)} steps."


def _percent(value: float) -> str:
    return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}"


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    if len(parts) == 1:
        return parts[0]
    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet
