"""Sheets of cards: under each title a line of figures and a few pairs of pictures, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from attnctl.data.pictures import FAINT, INK, PAPER, Color, enlarge, wrapped, written
from attnctl.errors import ConfigError

__all__ = ["Card", "Pair", "card_sheet"]

_TILE = 128
_GAP, _GUTTER, _EDGE = 10, 36, 4
_TITLE, _TEXT, _SMALL = 19, 15, 13


@dataclass(frozen=True)
class Pair:
    """Hold two pictures of one caption, and the colours of their frames; None draws none."""

    images: tuple[Image.Image, Image.Image]
    caption: str
    frames: tuple[Color | None, Color | None] = (None, None)


@dataclass(frozen=True)
class Card:
    """Hold a title, a line of figures, the names of the pictures of a pair, and the pairs."""

    title: str
    text: str
    names: tuple[str, str]
    pairs: tuple[Pair, ...]


def card_sheet(cards: Sequence[Card], *, footer: str = "") -> Image.Image:
    """Lay cards out, two in a row; every card has room for as many pairs as the largest.

    Raises:
        ConfigError: there is no card, or one without a pair.
    """
    if not cards or not all(card.pairs for card in cards):
        raise ConfigError(f"A sheet needs cards with pairs of pictures, got {len(cards)} cards.")
    columns = 2
    title, text, small = (ImageFont.load_default(size) for size in (_TITLE, _TEXT, _SMALL))
    most = max(len(card.pairs) for card in cards)
    width = most * 2 * (_TILE + _GAP) - _GAP
    across = columns * (width + _GUTTER) - _GUTTER
    lines = {
        "title": max(_lines(card.title, title, width) for card in cards),
        "text": max(_lines(card.text, text, width) for card in cards),
        "caption": max(_lines(p.caption, small, 2 * _TILE + _GAP) for card in cards for p in card.pairs),
    }
    height = round(1.3 * (lines["title"] * _TITLE + lines["text"] * _TEXT + (lines["caption"] + 1) * _SMALL))
    height += _TILE + 3 * _GAP
    under = wrapped(footer, text, across)
    rows = -(-len(cards) // columns)
    bottom = round(1.3 * _TEXT * len(under.split("\n"))) + _GAP if footer else 0
    size = (across + 2 * _GUTTER, rows * (height + _GUTTER) + bottom + _GUTTER)

    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, card in enumerate(cards):
        x, y = _GUTTER + i % columns * (width + _GUTTER), _GUTTER + i // columns * (height + _GUTTER)
        written(draw, (x, y), wrapped(card.title, title, width), title, INK)
        y += round(1.3 * lines["title"] * _TITLE)
        written(draw, (x, y), wrapped(card.text, text, width), text, FAINT)
        y += round(1.3 * lines["text"] * _TEXT) + _GAP // 2
        for j, pair in enumerate(card.pairs):
            _pair(sheet, draw, pair, card.names, (x + j * 2 * (_TILE + _GAP), y), lines["caption"], small)
    written(draw, (_GUTTER, size[1] - bottom - _GAP), under, text, FAINT)
    return sheet


def _pair(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    pair: Pair,
    names: tuple[str, str],
    at: tuple[int, int],
    captions: int,
    small: Any,
) -> None:
    (x, y), wide = at, 2 * _TILE + _GAP
    caption = wrapped(pair.caption, small, wide)
    y += round(1.3 * captions * _SMALL)
    written(draw, (x, y - round(1.3 * _SMALL * len(caption.split("\n")))), caption, small, INK)
    y += _GAP // 2
    for k, (image, frame) in enumerate(zip(pair.images, pair.frames, strict=True)):
        tile = enlarge(image, _TILE).resize((_TILE, _TILE))
        left = x + k * (_TILE + _GAP)
        sheet.paste(tile, (left, y))
        if frame is not None:
            draw.rectangle((left - 1, y - 1, left + _TILE, y + _TILE), outline=frame, width=_EDGE)
        written(draw, (left + _TILE / 2, y + _TILE + 3), names[k], small, FAINT, anchor="ma")


def _lines(text: str, font: Any, width: float) -> int:
    return len(wrapped(text, font, width).split("\n")) if text else 0
