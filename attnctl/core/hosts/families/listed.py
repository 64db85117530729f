"""How the tokens of Z-Image lie: its calls bring a list with one picture per row, or with several (Z-Image Omni)."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnctl.core.hosts.families.row import Bound, Tokens
from attnctl.core.sites import Grid

__all__: list[str] = []

_MULTIPLE = 32  # every part of the sequence is padded to a multiple of it


def grid(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off the picture [C, F, H, W] that is denoised: the last of a row's."""
    first = bound["x"][0]
    return _size(first[-1] if isinstance(first, (list, tuple)) else first, bound)


def tokens(model: torch.nn.Module, bound: Bound) -> Tokens | None:
    """Count the tokens; None where rows of several pictures differ in what stands in front of the last one.

    With one picture a row the text stands behind it. With a list of pictures a row has the text's parts first, then the
    pictures, then what a second encoder has seen in them.
    """
    if not isinstance(bound["x"][0], (list, tuple)):
        n = math.prod(_size(bound["x"][0], bound))
        return Tokens(n, after=_padded(n) - n)
    rows = [_lengths(bound, row) for row in range(len(bound["x"]))]
    captions, pictures, seen = rows[0]
    if any(row != rows[0] for row in rows):
        return None
    length = pictures[-1]
    before = sum(map(_padded, pictures[:-1]))
    words = None if len(captions) == 1 else 0
    return Tokens(length, before, _padded(length) - length, text=words, side="first", last=seen)


def _lengths(bound: Bound, row: int) -> tuple[list[int], list[int], int]:
    """Count the tokens of a row's captions, of its pictures, and of what a second encoder has seen, with padding."""
    captions = [_padded(len(part)) for part in bound["cap_feats"][row]]
    pictures = [_MULTIPLE if x is None else math.prod(_size(x, bound)) for x in bound["x"][row]]
    seen: Any = (bound.get("siglip_feats") or [None] * (row + 1))[row] or ()
    return captions, pictures, sum(_MULTIPLE if x is None else _padded(x.shape[0] * x.shape[1]) for x in seen)


def _size(picture: torch.Tensor, bound: Bound) -> Grid:
    _, f, h, w = picture.shape
    p = int(bound.get("patch_size") or 2)
    return f // int(bound.get("f_patch_size") or 1), h // p, w // p


def _padded(n: int) -> int:
    return math.ceil(n / _MULTIPLE) * _MULTIPLE
