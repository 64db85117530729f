"""Attention over a sequence with another text in it: tokens and masks of two calls put together.

One call gives the sequence, of which the text's tokens are replaced by those of another call, which ran with the other
text and maybe with other tokens beside it. Either call may have a mask, over keys or over queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["swapped", "swapped_mask"]


def swapped(sequence: Tensor, text: Tensor, at: slice) -> Tensor:
    """Put text tokens [B, H, T, D] in the place of those that stand `at` a part of a sequence [B, H, N, D]."""
    return torch.cat([sequence[:, :, : at.start], text, sequence[:, :, at.stop :]], 2)


def swapped_mask(
    mask: Tensor | None,
    other: Tensor | None,
    *,
    at: slice,
    text: slice,
    seen: tuple[int, int],
    keys: int,
    asks: int,
    queries: slice | None = None,
) -> Tensor | None:
    """Put the masks of two calls together.

    Args:
        mask: Mask of the call that gives the sequence, [B, H, Nq, Nk] or what broadcasts to it.
        other: Mask of the call that gives the text.
        at: Places of the text among the sequence's keys (and queries, where all ask).
        text: Places of the text among the keys of the other call (and its queries).
        seen: A token that is no text, among the queries and the keys of the other call.
        keys: Keys of the sequence.
        asks: A token that is no text, among the sequence's queries.
        queries: The sequence's queries that ask; None for all of them, the new text's included.

    Returns:
        A mask that broadcasts over the new queries and keys, or None where all may attend to all.
    """
    if mask is None and other is None:
        return None
    mask, other = _four(mask), _four(other)
    over_text = _part(other, slice(seen[0], seen[0] + 1), text)
    sizes = (at.start, text.stop - text.start, keys - at.stop)

    def rows(part: slice) -> Tensor:
        """Return the lines of some of the sequence's queries."""
        mine = [_part(mask, part, columns) for columns in (slice(0, at.start), slice(at.stop, keys))]
        return _line([mine[0], over_text, mine[1]], sizes)

    if queries is not None:
        return rows(queries)
    if all(m is None or m.shape[2] == 1 for m in (mask, other)):
        return rows(slice(0, 1))
    # What stands beside the new text is the sequence's: of that, its own mask leaves out padding.
    over_rest = _part(other, text, slice(seen[1], seen[1] + 1))
    before, behind = (
        _both(over_rest, _part(mask, slice(asks, asks + 1), columns))
        for columns in (slice(0, at.start), slice(at.stop, keys))
    )
    middle = _line([before, _part(other, text, text), behind], sizes)
    parts = [rows(slice(0, at.start)) if sizes[0] else None, middle, rows(slice(at.stop, keys)) if sizes[2] else None]
    lines = _alike([x.expand(-1, -1, n, -1) for x, n in zip(parts, sizes, strict=True) if x is not None])
    most = [max(line.shape[a] for line in lines) for a in (0, 1)]
    return torch.cat([line.expand(*most, -1, -1) for line in lines], 2)


def _four(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _part(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """Cut queries and keys out of a mask, where it has more than one of them."""
    if mask is None:
        return None
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Let attend where both masks do; masks that broadcast to each other."""
    if a is None or b is None:
        return b if a is None else a
    a, b = _alike([a, b])
    return a + b if a.is_floating_point() else a & b


def _line(parts: list[Tensor | None], sizes: tuple[int, ...]) -> Tensor:
    """Put columns beside each other, [B, H, 1 or Nq, sum of sizes]; None for columns that all may attend to."""
    like = next((part for part in parts if part is not None), None)
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=None if like is None else like.device)
    masks = _alike([everything if part is None else part for part in parts])
    shape = [max(mask.shape[a] for mask in masks) for a in range(3)]
    return torch.cat([mask.expand(*shape, n) for mask, n in zip(masks, sizes, strict=True)], 3)


def _alike(masks: list[Tensor]) -> list[Tensor]:
    """Write boolean masks as additive ones where others are."""
    floating = next((m for m in masks if m.is_floating_point()), None)
    if floating is None:
        return masks
    zero = torch.zeros((), dtype=floating.dtype, device=floating.device)
    return [m if m.is_floating_point() else torch.where(m, zero, zero - torch.inf) for m in masks]
