"""Putting a source's attention into an edit without making maps: the functions of FateZero and prompt-to-prompt.

"FateZero: Fusing Attentions for Zero-shot Text-based Video Editing", arXiv 2303.09535; "Prompt-to-Prompt Image Editing
with Cross Attention Control", arXiv 2208.01626. With A = softmax(q k^T) of the source (s) and of the edit (e):

    self     (M A_e + (1 - M) A_s) v_e = M SDPA(q_e, k_e, v_e) + (1 - M) SDPA(q_s, k_s, v_e)
    cross    (w R + (1 - w) A_e) v_e   = A_s v' + A_e v'',    R a linear map of the columns of A_s and A_e

The edit's own values stand in both terms: with the source's values it would be another method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError, unboxed
from attnctl.kernels.checks import wide_dtype

__all__ = [
    "CrossEdit",
    "Keys",
    "Split",
    "blend_latents",
    "blend_mask",
    "cross_edit",
    "fold_values",
    "frame_indices",
    "gather_frames",
    "mask_score",
    "self_fuse",
    "take_queries",
]

Keys = str | int | Sequence[str | int]


def frame_indices(keys: Keys, frames: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Name, for each row, the rows whose keys and values it attends to.

    Args:
        keys: "first", "mid", "last", "previous", a whole number d (frame i + d, at the ends the nearest), or a list of
            these, whose keys are put one after another; "self" or an empty list is ordinary attention.
        frames: Number of frames of the clip.
        rows: The clip's frame in each row, where the rows are a window of it; a frame that is not there is replaced by
            the nearest that is.

    Returns:
        A list for each row, of equal lengths; empty ones for ordinary attention.

    Raises:
        ConfigError: An unknown key.
    """
    at = list(range(frames)) if rows is None else list(rows)
    items: list[Any] = list(keys) if isinstance(keys, (list, tuple)) else [keys]
    if items == ["self"]:
        items = []
    chosen = [[_key_frame(item, i, frames, keys) for item in items] for i in at]
    nearest = {f: min(range(len(at)), key=lambda r: abs(at[r] - f)) for row in chosen for f in row}
    return [[nearest[f] for f in row] for row in chosen]


def _key_frame(item: str | int, i: int, frames: int, keys: Keys) -> int:
    named = {"first": 0, "last": frames - 1, "mid": (frames - 1) // 2, "middle": (frames - 1) // 2}
    if isinstance(item, str) and item in named:
        return named[item]
    offset = {"previous": -1, "self": 0}.get(item) if isinstance(item, str) else unboxed(item)
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ConfigError(
            f"keys={keys!r}: {item!r} is unknown. Choose first, mid, last, previous, self, a whole number of frames to "
            "look back (-1) or ahead (1), or a list of these."
        )
    return min(max(i + offset, 0), frames - 1)


def gather_frames(x: Tensor, indices: Sequence[Sequence[int]]) -> Tensor:
    """Give every frame the keys (or values) of the frames that it attends to, one after another.

    Shapes: x [r f, H, N, D], r times the f frames -> [r f, H, N * len(indices[0]), D]; x itself for empty indices.
    """
    if not indices[0]:
        return x
    f = len(indices)
    frames = x.unflatten(0, (-1, f))
    # Slices, because a list of places would be copied to the device at every call.
    parts = [torch.cat([frames[:, row[c] : row[c] + 1] for row in indices], 1) for c in range(len(indices[0]))]
    return torch.cat(parts, dim=3).flatten(0, 1)


@dataclass(frozen=True)
class Split:
    """Which queries of each frame follow the edit and which the source, so that each is attended with once.

    Frames of one batch need equally many, so where masks differ in size the smaller ones are filled up with queries
    of the other kind, whose outputs nobody takes.

    Attributes:
        own: [f, No]; queries that follow the edit.
        source: [f, Ns]; queries that follow the source.
        back: [f, N]; where each query's output lies in those of `own`, followed by those of `source`.
    """

    own: Tensor
    source: Tensor
    back: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Split:
        """Sort the queries by a mask, [f, N] bool."""
        return cls.each([mask])[0]

    @classmethod
    def each(cls, masks: Sequence[Tensor]) -> list[Split]:
        """Sort by several masks; wait for the device once, for how many queries there are of each kind."""
        counts = [mask.sum(1) for mask in masks]
        bounds = torch.stack([torch.stack((c.min(), c.max())) for c in counts]).tolist()
        splits = []
        for mask, (least, most) in zip(masks, bounds, strict=True):
            order = mask.argsort(dim=1, descending=True, stable=True)
            rank = order.argsort(dim=1)
            splits.append(cls(order[:, :most], order[:, least:], torch.where(mask, rank, rank + most - least)))
        return splits


def take_queries(x: Tensor, at: Tensor | None) -> Tensor:
    """Take some queries of each frame: x [f, H, N, D], at [f, n] -> [f, H, n, D]; x itself for None."""
    return x if at is None else x.take_along_dim(at[:, None, :, None], 2)


def self_fuse(attend: Callable[[bool, Tensor | None], Tensor], split: Split | None) -> Tensor:
    """Fuse self-attention outputs: M SDPA(edit) + (1 - M) SDPA(source), both with the edit's values.

    Args:
        attend: Called with whose map, and which queries [f, n] (None: all): gives the edit's own output for True, the
            source's map times the edit's values for False, [f, H, n, D].
        split: M; None takes the source's map everywhere.
    """
    if split is None:
        return attend(False, None)
    sides = ((True, split.own), (False, split.source))
    return take_queries(torch.cat([attend(is_edit, at) for is_edit, at in sides if at.shape[1]], 2), split.back)


@dataclass(frozen=True)
class CrossEdit:
    """How target columns are made of source columns: R = eq * (A_s @ take + new * A_e).

    Attributes:
        take: [L source, L target]; the share of each source token in each target token.
        new: [L]; 1 for target tokens that keep the edit's own map.
        weight: [L]; the equalizer.
    """

    take: Tensor
    new: Tensor
    weight: Tensor

    @classmethod
    def replace(cls, matrix: Tensor, weight: Tensor) -> CrossEdit:
        """Take source columns by a matrix (prompt-to-prompt's word swap)."""
        return cls(matrix, torch.zeros(matrix.shape[1]), weight)

    @classmethod
    def refine(cls, mapper: Tensor, mask: Tensor, weight: Tensor) -> CrossEdit:
        """Take the source columns that an alignment names; new tokens keep the edit's map."""
        length = mapper.shape[0]
        take = torch.zeros(length, length)
        take[mapper.clamp_min(0), torch.arange(length)] = mask
        return cls(take, 1 - mask, weight)

    def to(self, like: Tensor) -> CrossEdit:
        """Move to the device of a tensor, in its wide dtype."""
        wide = wide_dtype(like.dtype)
        return CrossEdit(*(x.to(like.device, wide) for x in (self.take, self.new, self.weight)))


def cross_edit(source: Tensor, edit: Tensor, how: CrossEdit, follow: Tensor) -> Tensor:
    """Edit explicit cross-attention maps: w R + (1 - w) A_e.

    Args:
        source: A_s [..., L].
        edit: A_e [..., L].
        how: The column map R.
        follow: w [L].

    Returns:
        [..., L]; rows need not sum to one where the equalizer is not 1.
    """
    result = (source @ how.take + how.new * edit) * how.weight
    return follow * result + (1 - follow) * edit


def fold_values(v: Tensor, how: CrossEdit, follow: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a cross edit into values: (w R + (1 - w) A_e) v = A_s v' + A_e v''.

    Shapes: v [f, H, L, D]; follow [L] -> v' and v'', like v.
    """
    wide = v.to(how.take.dtype)
    share = (follow * how.weight)[:, None]
    from_source = how.take @ (share * wide)
    from_edit = (how.new[:, None] * share + (1 - follow)[:, None]) * wide
    return from_source.to(v.dtype), from_edit.to(v.dtype)


def mask_score(columns: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Pool, resize and normalise attention to the blend words: what a threshold is held against.

    Max pooling over 3 x 3, nearest resizing, division by each frame's maximum.
    Shapes: columns [f, h w] -> [f, *size], in 0..1.
    """
    x = F.max_pool2d(columns.unflatten(1, grid)[:, None], 3, stride=1, padding=1)
    x = F.interpolate(x, size=size)[:, 0]
    return x / x.amax((1, 2), keepdim=True)


def blend_mask(columns: Tensor, grid: tuple[int, int], size: tuple[int, int], threshold: float) -> Tensor:
    """Say where the edit's attention rules: bool [f, *size], `mask_score` above the threshold."""
    return mask_score(columns, grid, size) > threshold


def blend_latents(x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Keep the source's latents outside the mask. Shapes: x, source [f, C, h, w]; mask [f, h, w]."""
    return torch.where(mask[:, None], x, source.to(x))
