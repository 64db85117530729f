"""Word maps as pictures: overlays on the image, strips over the steps, one row a word and one column a head.

In maps of points each overlay marks its point with a ring.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from attnctl.data.maps import WordMaps
from attnctl.data.pictures import PAPER, grid, overlay
from attnctl.errors import ConfigError

__all__ = ["heads_sheet", "layers_sheet", "outlined", "overlay_word", "steps_gif", "steps_sheet", "words_sheet"]

_COLUMNS = 6
_STEPS = 8
_STAGE = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\b")


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
    return _overlay(_grey(image), maps, word, _flat(maps, word, maps[word], index), alpha=alpha)


def outlined(image: Image.Image, mask: Tensor) -> Image.Image:
    """Draw the outline of a mask (bool [h, w], of any size) on a picture."""
    import cv2

    inside = cv2.resize(mask.numpy().astype(np.float32), image.size, interpolation=cv2.INTER_LINEAR) >= 0.5
    edges, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    canvas = np.array(image.convert("RGB"))
    for color, width in (((0, 0, 0), 5), ((90, 220, 255), 2)):
        cv2.drawContours(canvas, edges, -1, color, width)
    return Image.fromarray(canvas)


def words_sheet(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, title: str = ""
) -> Image.Image:
    """Lay out the image and an overlay for each word, with the lowest and highest share of each map."""
    shown = list(words) or [w for n, w in enumerate(maps.words) if maps.tokens[index][n]]
    tiles, labels, under = [image], ["image"], _grey(image)
    for word in shown:
        values = _flat(maps, word, maps[word], index)
        tiles.append(_overlay(under, maps, word, values, alpha=0.6))
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
                footer=f"{_share(maps)}, from dark (lowest in the map) to bright (highest). {_what(maps)}"
                if first + columns >= len(tiles)
                else "",
            )
        )
    return _stacked(parts)


def _share(maps: WordMaps) -> str:
    if maps.of == "points":
        ringed = any("," in label for label in maps.words)
        return f"Share of attention that {'the ringed place pays to each other' if ringed else 'goes to each place'}"
    if maps.of == "concepts":
        return "Share of the concepts, which is 1 for all together"
    return "Share of attention that goes to the word"


def _overlay(image: Image.Image, maps: WordMaps, word: str, values: Tensor, **options: Any) -> Image.Image:
    """Lay one map over the image, with a ring where a point is."""
    tile = overlay(image, values, **options)
    if maps.of == "points" and "," in word:  # class tokens and means of backbones lie nowhere
        x, y = (float(v) for v in word.split(",")[:2])
        x, y, r = x * tile.width, y * tile.height, max(tile.size) / 24
        draw = ImageDraw.Draw(tile)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(0, 0, 0), width=4)
        draw.ellipse((x - r + 1, y - r + 1, x + r - 1, y + r - 1), outline=(90, 220, 255), width=2)
    return tile


def steps_sheet(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, title: str = ""
) -> Image.Image:
    """Lay out one row a word and one column for each of up to eight steps; needs keep=("steps",)."""
    some = [maps.steps[i] for i in np.unique(np.linspace(0, len(maps.steps) - 1, _STEPS).round().astype(int))]
    names = [f"step {step + 1}" for step in some]
    rows = {w: [maps.get_map(w, step=s) for s in some] for w in _shown(maps, words, index)}
    return _table(image, maps, rows, names, index, title)


def steps_gif(
    image: Image.Image, maps: WordMaps, words: Sequence[str] = (), index: int = 0, *, seconds: float = 0.2
) -> bytes:
    """Draw a moving picture, one frame a step and one tile a word, as GIF bytes; needs keep=("steps",).

    Each word has one scale over all steps; the last step stays five times as long as the others (`seconds`).
    """
    shown = _shown(maps, words, index)
    values = {w: [_flat(maps, w, maps.get_map(w, step=s), index) for s in maps.steps] for w in shown}
    limits = {w: (min(float(v.min()) for v in vs), max(float(v.max()) for v in vs)) for w, vs in values.items()}
    frames = [
        grid(
            [_overlay(_grey(image), maps, w, values[w][n], alpha=0.7, limits=limits[w], tile=128) for w in shown],
            1,
            len(shown),
            column_labels=shown,
            title=f"step {step + 1}",
            tile=128,
        ).quantize(64)
        for n, step in enumerate(maps.steps)
    ]
    out, each = io.BytesIO(), int(1000 * seconds)
    times = [each] * (len(frames) - 1) + [5 * each]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return out.getvalue()


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


def layers_sheet(image: Image.Image, maps: WordMaps, word: str, index: int = 0, *, title: str = "") -> Image.Image:
    """Lay out one row a layer and one column a head for one word; needs keep=("heads",)."""
    counts = [layer.shape[3] for layer in maps.layers.values()]
    heads = maps.heads if maps.heads is not None else tuple(range(max(counts)))
    under, tiles, labels = _grey(image), [], []
    for site, count in zip(maps.sites, counts, strict=True):
        has = heads if maps.heads is not None else heads[:count]
        values = [_flat(maps, word, maps.get_map(word, layers=site.name, head=h), index) for h in has]
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        row = [_overlay(under, maps, word, v, alpha=0.7, limits=(low, high), tile=96) for v in values]
        tiles += [*row, *[None] * (len(heads) - len(row))]
        labels.append(f"{site.depth} {_place(site.name)}\nto {_percent(high)} %")
    return grid(
        tiles,
        len(labels),
        len(heads),
        labels,
        [f"head {h}" for h in heads],
        title=title,
        footer=f"{_share(maps)}. Left: depth, stage and highest share of each layer. Each row has one scale.",
        tile=96,
    )


def _place(name: str) -> str:
    """Name the stage of a UNet that a layer is in; nothing for others."""
    match = _STAGE.match(name)
    return "" if match is None else match[3] or f"{match[1]}.{match[2]}"


def _shown(maps: WordMaps, words: Sequence[str], index: int) -> list[str]:
    return list(words) or [w for n, w in enumerate(maps.words) if maps.tokens[index][n]]


def _table(
    image: Image.Image, maps: WordMaps, rows: dict[str, list[Tensor]], names: Sequence[str], index: int, title: str
) -> Image.Image:
    tiles = []
    for word, many in rows.items():
        values = [_flat(maps, word, m, index) for m in many]
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        tiles += [_overlay(_grey(image), maps, word, v, alpha=0.7, limits=(low, high), tile=128) for v in values]
    return grid(
        tiles,
        len(rows),
        len(names),
        list(rows),
        names,
        title=title,
        footer=f"{_share(maps)}. Each row has one scale. {_what(maps)}",
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
    steps = "1 step" if len(maps.steps) == 1 else f"{len(maps.steps)} steps"
    return f"{layers[0].upper()}{layers[1:]}, {h} x {w} at most, {steps}."


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
