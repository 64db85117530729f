"""Neighbourhood attention at the cost of its window, on any device, differentiable.

Queries are taken in tiles, rectangles of the grid. The keys that a tile sees are copied side by side, and torch's dense
kernel runs on the copy: without a mask where the whole tile shares one window. Tiles of one kind run together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import sdpa
from attnctl.kernels.checks import Memory, as_bias, room
from attnctl.kernels.neighborhood.axes import Axis
from attnctl.kernels.neighborhood.tiles import Work, tiles

__all__ = ["neighborhood"]

_CACHE_BYTES = 1 << 20


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[Axis],
    *,
    image: slice | None = None,
    scale: float | None = None,
    words: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute neighbourhood attention; tokens beside the grid attend to all and are attended to by all.

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, Hk, N, D]; Hk divides H.
        v: Values [B, Hk, N, Dv].
        axes: What `axes_of` made of the grid and the window.
        image: Where the grid's tokens lie, row by row; None for all. The others are text, or class tokens.
        scale: Factor on q k^T, 1 / sqrt(D) if None.
        words: Which of the others are attended to, bool [B or 1, T]; None for all.
        bias: Added to the logits by the number of places from query to key along each axis, [H, 2 w - 1, ...]: entry
            w - 1 is the query's own place.

    Returns:
        [B, H, N, Dv]; bit for bit torch's attention where every query sees everything.

    Raises:
        ConfigError: The grid has another number of tokens than `image`.
    """
    axes, total = tuple(axes), q.shape[2]
    image = slice(0, total) if image is None else image
    n = image.stop - image.start
    if math.prod(a.length for a in axes) != n or k.shape[2] != total:
        raise ConfigError(
            f"a grid of {' x '.join(str(a.length) for a in axes)} was given with {n} of {total} queries and "
            f"{k.shape[2]} keys: a neighbourhood is for self-attention over the tokens of a grid."
        )
    shown = None if words is None else _with_grid(words, image, total)[:, None, None]
    if bias is None and all(a.full for a in axes):
        return sdpa.run(q, k, v, shown, scale)
    others = [slice(0, image.start), slice(image.stop, total)]
    texts = [s for s in others if s.stop > s.start]
    pair = None
    if texts:
        pair = torch.cat([k[:, :, s] for s in texts], 2), torch.cat([v[:, :, s] for s in texts], 2)
    on_grid = (q[:, :, image], k[:, :, image], v[:, :, image])
    rows = _rows(*on_grid, axes, pair, scale, words, bias)
    if not texts:
        return rows
    done = [sdpa.run(q[:, :, s], k, v, shown, scale) for s in texts]
    parts = done[:1] * bool(image.start) + [rows] + done[-1:] * (image.stop < total)
    return torch.cat(parts, 2)


def _with_grid(words: Tensor, image: slice, total: int) -> Tensor:
    """Return which keys of the whole sequence are attended to, [B or 1, N]."""
    grid = words.new_ones(len(words), image.stop - image.start)
    return torch.cat([words[:, : image.start], grid, words[:, image.start :]], 1)[:, :total]


def _rows(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], texts: tuple[Tensor, Tensor] | None,
    scale: float | None, words: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute the grid's own rows, [B, H, n, Dv]."""
    works, back = tiles(axes, q.device, apart=bias is not None)
    text = 0 if texts is None else texts[0].shape[2]
    masks = [_mask(work, words, bias, text, q.dtype) for work in works]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    if q.device.type == "cpu" and not (differentiable or torch.compiler.is_compiling()):
        return _by_head(q, k, v, works, masks, back, texts, scale)
    done = []
    for work, mask in zip(works, masks, strict=True):
        size = work.keys.shape[1] * max(q.shape[-1], v.shape[-1]) * q.element_size() * q.shape[1]
        # A GPU takes as much as its memory allows. On a CPU the pieces do not depend on the batch, for exported models.
        some = max(1, (8 * _CACHE_BYTES if q.device.type == "cpu" else room(q.device) // (4 * len(q))) // size)
        for rows, columns in zip(work.queries.split(some), work.keys.split(some), strict=True):
            done.append(_attend(q, k, v, rows, columns, texts, mask, scale))
    return torch.cat(done, 2).index_select(2, back)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, texts: tuple[Tensor, Tensor] | None,
    mask: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute some tiles of one kind, [B, H, T Nq, Dv]: tiles lie along the batch axis."""
    count, heads = len(rows), q.shape[1]

    def taken(x: Tensor, tokens: Tensor, text: Tensor | None) -> Tensor:
        tiles = x.index_select(2, tokens.flatten()).unflatten(2, tokens.shape).transpose(1, 2)
        if text is not None:
            tiles = torch.cat([tiles, text[:, None].expand(-1, count, -1, -1, -1)], 3)
        return tiles.flatten(0, 1)

    keys, values = (taken(x, columns, None if texts is None else texts[i]) for i, x in enumerate((k, v)))
    if mask is not None and len(mask) > 1:
        mask = mask.repeat_interleave(count, 0)
    out = sdpa.run(taken(q, rows, None), keys, values, mask, scale)
    return out.unflatten(0, (-1, count)).transpose(1, 2).reshape(-1, heads, rows.numel(), v.shape[-1])


def _by_head(
    q: Tensor, k: Tensor, v: Tensor, works: tuple[Work, ...], masks: list[Tensor | None], back: Tensor,
    texts: tuple[Tensor, Tensor] | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute one head after the other, in memory that the next one takes over; copies stay in a core's cache."""
    memory, heads, width = Memory(), q.shape[1], v.shape[-1]
    shared, text = heads // k.shape[1], 0 if texts is None else texts[0].shape[2]
    out = v.new_empty(*q.shape[:3], width)
    results = v.new_empty(q.shape[2], width)
    for b in range(len(q)):
        for h in range(heads):
            query, key, value = q[b, h], k[b, h // shared], v[b, h // shared]
            at = 0
            for work, given in zip(works, masks, strict=True):
                mask = given
                if mask is not None:
                    mask = mask[b % len(mask), h % mask.shape[1]][None, None]
                nq, nk = work.queries.shape[1], work.keys.shape[1] + text
                some = max(1, _CACHE_BYTES // (nk * max(width, q.shape[-1]) * q.element_size()))
                for rows, columns in zip(work.queries.split(some), work.keys.split(some), strict=True):
                    part = _copied("queries", query, rows, None, memory)
                    pair = None if texts is None else (texts[0][b, h // shared], texts[1][b, h // shared])
                    keys = _copied("keys", key, columns, None if pair is None else pair[0], memory)
                    values = _copied("values", value, columns, None if pair is None else pair[1], memory)
                    place = results[at : at + rows.numel()].view(len(rows), 1, nq, width)
                    place.copy_(sdpa.run(part, keys, values, mask, scale))
                    at += rows.numel()
            torch.index_select(results, 0, back, out=out[b, h])
    return out


def _copied(name: str, x: Tensor, tokens: Tensor, text: Tensor | None, memory: Memory) -> Tensor:
    """Copy the tokens of some tiles side by side, and the text behind those of each, [T, 1, tokens, D]."""
    (count, inside), width = tokens.shape, x.shape[-1]
    if text is None:
        place = memory.take(name, (count * inside, width), x)
        return torch.index_select(x, 0, tokens.view(-1), out=place).view(count, 1, inside, width)
    place = memory.take(name, (count, 1, inside + len(text), width), x)
    for i in range(count):
        torch.index_select(x, 0, tokens[i], out=place[i, 0, :inside])
    place[:, 0, inside:] = text
    return place


def _mask(work: Work, words: Tensor | None, bias: Tensor | None, text: int, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the logits of a tile, [B or 1, H or 1, Nq, Nk + T], or None for nothing."""
    if work.seen is None and words is None and bias is None:
        return None
    rows, columns = work.queries.shape[1], work.keys.shape[1]
    device = work.queries.device
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device) if work.seen is None else work.seen
    near = as_bias(seen, dtype)[None, None]
    if bias is not None and work.apart is not None:
        reach = [size // 2 for size in bias.shape[1:]]
        places = [(work.apart[i] + r).clamp(0, 2 * r) for i, r in enumerate(reach)]
        index: list[Any] = [slice(None), *places]
        near = near + bias[tuple(index)].to(dtype)
    if not text:
        return near
    far = near.new_zeros(1, text) if words is None else as_bias(words, dtype)
    far = far[:, None, None].expand(-1, near.shape[1], rows, -1)
    return torch.cat([near.expand(len(far), -1, -1, -1), far], -1)
