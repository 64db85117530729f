"""Attention of a joint sequence with another text in it: keys, values and masks of two calls put together.

The image's part is taken from one call, the text's from another that ran with the other text. Either call may have a
mask of its own, over keys or over queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["joined", "joined_mask"]


def joined(text: Tensor, image: Tensor, text_first: bool) -> Tensor:
    """Join text and image tokens [B, H, T, D] and [B, H, N, D] in the order of the host's sequence."""
    return torch.cat([text, image] if text_first else [image, text], 2)


def joined_mask(
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    *,
    image: tuple[slice, slice],
    text: tuple[slice, slice],
    other: tuple[int, int],
    tokens: int,
    text_first: bool,
) -> Tensor | None:
    """Join the masks of two calls, for the image's queries, and the text's where there are any.

    Args:
        image_mask: Mask of the call that the image is taken from, [B, H, Nq, Nk] or what broadcasts to it.
        text_mask: Mask of the call that the text is taken from.
        image: Places of the image among the queries and the keys of the first call.
        text: Places of the text among the queries (empty for none) and the keys of the second call.
        other: Place of an image token of the second call among its queries and its keys.
        tokens: Image tokens N.
        text_first: Whether the text stands before the image.

    Returns:
        A mask that broadcasts to [B, H, N + T, N + T], or None where all may attend to all.
    """
    if image_mask is None and text_mask is None:
        return None
    first, second = _four(image_mask), _four(text_mask)
    length = text[1].stop - text[1].start
    queries = text[0].stop - text[0].start
    shared = all(m is None or m.shape[2] == 1 for m in (first, second))
    lines = [
        _line(_part(first, image[0], image[1]), _part(second, _one(other[0]), text[1]), tokens, length, text_first)
    ]
    if queries and not shared:
        over_image = _part(second, text[0], _one(other[1]))
        lines.append(_line(over_image, _part(second, text[0], text[1]), tokens, length, text_first))
        lines = [_full(lines[0], tokens), _full(lines[1], queries)]
        lines = lines[::-1] if text_first else lines
    lines = _alike(lines)
    rows = [max(line.shape[a] for line in lines) for a in (0, 1)]
    return torch.cat([line.expand(*rows, -1, -1) for line in lines], 2)


def _four(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _one(at: int) -> slice:
    return slice(at, at + 1)


def _part(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """Cut queries and keys out of a mask, where it has more than one of them."""
    if mask is None:
        return None
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def _line(over_image: Tensor | None, over_text: Tensor | None, tokens: int, length: int, text_first: bool) -> Tensor:
    """Put the columns of image and text together, [B, H, 1 or Nq, N + T]."""
    like = over_image if over_image is not None else over_text
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=None if like is None else like.device)
    parts = _alike([everything if part is None else part for part in (over_image, over_text)])
    shape = [max(part.shape[a] for part in parts) for a in range(3)]
    sized = [part.expand(*shape, n) for part, n in zip(parts, (tokens, length), strict=True)]
    return torch.cat(sized[::-1] if text_first else sized, 3)


def _full(line: Tensor, rows: int) -> Tensor:
    return line.expand(-1, -1, rows, -1)


def _alike(masks: list[Tensor]) -> list[Tensor]:
    """Write boolean masks as additive ones where others are."""
    floating = next((m for m in masks if m.is_floating_point()), None)
    if floating is None:
        return masks
    zero = torch.zeros((), dtype=floating.dtype, device=floating.device)
    return [m if m.is_floating_point() else torch.where(m.to(floating.device), zero, zero - torch.inf) for m in masks]
