"""Fit weights of one image size to another: axis biases, learned positions, relative position tables.

The rules are those of the authors' loader of Agent Attention (arXiv 2312.08874): axis biases linearly along their
axis, block biases unchanged, tables and positions bicubically or bilinearly on their grid.
"""

import math

import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

__all__ = ["fit_axis", "fit_weight", "pad_to"]


@register_notrace_function
def pad_to(x: Tensor, size: int) -> Tensor:
    """Pad [B, C, H, W] at the bottom and right to multiples of size."""
    h, w = (-x.shape[2]) % size, (-x.shape[3]) % size
    return F.pad(x, [0, w, 0, h]) if h + w > 0 else x


_AXIS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


def fit_axis(bias: Tensor, axis: int, size: int) -> Tensor:
    """Resize one axis of a bias linearly (align_corners False)."""
    moved = bias.movedim(axis, -1)
    flat = moved.reshape(1, -1, moved.shape[-1]).float()
    new = F.interpolate(flat, [size], mode="linear", align_corners=False).to(bias.dtype)
    return new.reshape([*moved.shape[:-1], size]).movedim(-1, axis).contiguous()


def fit_weight(name: str, weight: Tensor, want: Tensor) -> Tensor:
    """Resize a weight to the shape that a model of another image size wants; what cannot be fitted comes back as is.

    Shapes: `ah_bias` [1, H, A, h, 1], `aw_bias` [1, H, A, 1, w], `ha_bias` [1, H, h, 1, A], `wa_bias` [1, H, 1, w, A],
    `pos_embed` [1, N, C] of a square grid, `relative_position_bias_table` [(2w - 1)^2, H].
    """
    if weight.shape == want.shape:
        return weight
    kind = name.rpartition(".")[2]
    axis = _AXIS.get(kind)
    if axis is not None and weight.ndim == want.ndim == 5:
        others = [i for i in range(5) if i != axis]
        if all(weight.shape[i] == want.shape[i] for i in others):
            return fit_axis(weight, axis, want.shape[axis])
    if kind == "pos_embed" and weight.ndim == want.ndim == 3 and weight.shape[2] == want.shape[2]:
        return _fit_square(weight[0].T.unsqueeze(0), want.shape[1], "bilinear")[0].T.unsqueeze(0).contiguous()
    if kind == "relative_position_bias_table" and weight.shape[1] == want.shape[1]:
        return _fit_square(weight.T.unsqueeze(0), want.shape[0], "bicubic")[0].T.contiguous()
    return weight


def _fit_square(x: Tensor, n: int, mode: str) -> Tensor:
    old, new = math.isqrt(x.shape[-1]), math.isqrt(n)
    if old * old != x.shape[-1] or new * new != n:
        return x
    grid = x.reshape(1, x.shape[1], old, old).float()
    return F.interpolate(grid, [new, new], mode=mode, align_corners=False).flatten(2).to(x.dtype)
