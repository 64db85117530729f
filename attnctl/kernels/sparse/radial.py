"""The blocks of Radial attention: tokens see ever less of a frame, the farther it is away in time.

"Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", arXiv 2506.19852, section
4.
Two frames d apart, g = bit_length(d), P2 = 2^bit_length(P) for P tokens in a frame: tokens at the places a and a' see
each other if |a - a'| <= width, where

    width = P for d <= 1, else max(P2 / 2^g decay, block)

and where P2 / 2^g is below 128, only distances d that 128 2^g / P2 divides are kept at all. A block is computed if more
than 60 % of its key columns that are seen by anybody are seen by more than a third of its rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["radial_blocks"]

_WHOLE = 128  # tokens below which frames are left out rather than made narrower
_ROWS, _COLUMNS = 1 / 3, 0.6


@lru_cache(maxsize=16)
def radial_blocks(frames: int, tokens: int, block: int, decay: float, sink: bool) -> Tensor:
    """Return which blocks of a video's map to compute, bool [blocks, blocks].

    Args:
        frames: Frames of the video.
        tokens: Tokens in a frame.
        block: Tokens in a block, whatever frame they belong to.
        decay: Factor on the width.
        sink: Whether all of the first frame is seen from everywhere.
    """
    count = -(-frames * tokens // block)
    rows = -(-tokens // block) * block
    room = 2 * rows // block + 1  # blocks that a frame may reach into, wherever it begins
    mask = torch.zeros(count + room, count + room, dtype=torch.bool)
    parts: dict[tuple[int, int, float], Tensor] = {}
    for i in range(frames):
        for j in range(frames):
            width = float(tokens) if sink and j == 0 else _width(abs(i - j), tokens, block, decay)
            if width < 0:
                continue
            at = i * tokens % block, j * tokens % block
            if (*at, width) not in parts:
                parts[(*at, width)] = _frame_pair(tokens, block, rows, width, *at)
            part = parts[(*at, width)]
            top, left = i * tokens // block, j * tokens // block
            mask[top : top + part.shape[0], left : left + part.shape[1]] |= part
    mask = mask[:count, :count]
    # No row may be empty: a token sees its own block at least.
    return mask | torch.eye(count, dtype=torch.bool)


def _width(apart: int, tokens: int, block: int, decay: float) -> float:
    """Return how far tokens of two frames see each other, or -1 for not at all."""
    reach = 2 ** tokens.bit_length() / 2 ** apart.bit_length()
    if reach < _WHOLE and apart % int(_WHOLE / reach):
        return -1.0
    return float(tokens) if apart <= 1 else max(reach * decay, float(block))


def _frame_pair(tokens: int, block: int, rows: int, width: float, down: int, right: int) -> Tensor:
    """Return the blocks of one pair of frames, the first of which begins `down` rows into its block, bool [R, C]."""
    # Seen rows are counted, not looked up: place a' is seen from max(0, a' - w) to min(P, a' + w + 1).
    columns = torch.arange(tokens, dtype=torch.float64)
    first = (columns - int(width)).clamp(min=0) + down
    last = (columns + int(width) + 1).clamp(max=tokens) + down
    edges = torch.arange((down + rows) // block + 1, dtype=torch.float64) * block
    top, bottom = edges[:-1, None], edges[1:, None]
    share = (torch.minimum(last, bottom) - torch.maximum(first, top)).clamp(min=0) / block
    share = F.pad(share, (right, (right + rows) // block * block - right - tokens))[
        :, : (right + rows) // block * block
    ]
    share = share.unflatten(1, (-1, block))
    return (share > _ROWS).sum(-1) / ((share > 0).sum(-1) + 1e-9) > _COLUMNS
