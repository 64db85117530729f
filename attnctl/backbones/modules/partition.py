"""Partitions of a map into blocks and dilated grids, at any size: padded, with padded keys left out of the softmax.

"MaxViT: Multi-Axis Vision Transformer" (arXiv 2204.01697): block attention stays inside P x P windows, grid attention
joins the G x G tokens that lie H / G and W / G apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.backbones.modules.attend import attend, ceil_div

__all__ = ["axis_attention", "key_mask", "partition", "restore"]

Grid = tuple[int, int]


def padded_size(grid: Grid, size: Grid) -> Grid:
    """Round a map up to multiples of the partition."""
    return ceil_div(grid[0], size[0]) * size[0], ceil_div(grid[1], size[1]) * size[1]


def partition(x: Tensor, size: Grid, block: bool) -> Tensor:
    """Cut a map: [B, H, W, C] -> [B * parts, size[0] * size[1], C]; the last rows and columns are zero-padded.

    block: windows of neighbours; otherwise a grid of tokens spread evenly over the map.
    """
    b, h, w, c = x.shape
    ph, pw = padded_size((h, w), size)
    if (ph, pw) != (h, w):
        x = F.pad(x, [0, 0, 0, pw - w, 0, ph - h])
    if block:
        x = x.reshape(b, ph // size[0], size[0], pw // size[1], size[1], c).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.reshape(b, size[0], ph // size[0], size[1], pw // size[1], c).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, size[0] * size[1], c)


def restore(parts: Tensor, size: Grid, block: bool, grid: Grid) -> Tensor:
    """Undo `partition` and crop the padding: [B * parts, tokens, C] -> [B, H, W, C]."""
    ph, pw = padded_size(grid, size)
    nh, nw, c = ph // size[0], pw // size[1], parts.shape[-1]
    x = parts.reshape(-1, nh, nw, size[0], size[1], c)
    x = x.permute(0, 1, 3, 2, 4, 5) if block else x.permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, ph, pw, c)[:, : grid[0], : grid[1]]


def key_mask(grid: Grid, size: Grid, block: bool, device: torch.device) -> Tensor | None:
    """Tell the real tokens of each part, [parts, tokens], or None where nothing is padded."""
    if padded_size(grid, size) == grid:
        return None
    real = torch.ones(1, *grid, 1, dtype=torch.float32, device=device)
    return partition(real, size, block)[..., 0] > 0


def axis_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    size: Grid,
    block: bool,
    prefix: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend inside the parts of one partition.

    Shapes: q, k, v [B, H, prefix + h * w, D] -> the same. Prefix tokens see every token, and every part sees them.
    """
    b, m, _, d = q.shape

    def cut(y: Tensor) -> Tensor:
        tokens = y[:, :, prefix:].transpose(1, 2).reshape(b, *grid, m * d)
        return partition(tokens, size, block).unflatten(-1, (m, d)).transpose(1, 2)

    qs, ks, vs = cut(q), cut(k), cut(v)
    parts = qs.shape[0] // b
    real = key_mask(grid, size, block, q.device)
    mask = None if real is None else real.repeat(b, 1)[:, None, None]
    if prefix:
        ks, vs = (
            torch.cat([y[:, :, :prefix].repeat_interleave(parts, dim=0), z], dim=2) for y, z in ((k, ks), (v, vs))
        )
        mask = None if mask is None else F.pad(mask, [prefix, 0], value=True)
    out = attend(qs, ks, vs, mask, scale, 0.0, backend).transpose(1, 2).flatten(2)
    result = restore(out, size, block, grid).reshape(b, -1, m, d).transpose(1, 2)
    if prefix:
        result = torch.cat([attend(q[:, :, :prefix], k, v, None, scale, 0.0, backend), result], dim=2)
    return result
