"""Closed forms that put the predictions of prompt and negative prompt together: functions on tensors, no state.

u is the prediction for the negative prompt, c that for the prompt, both [B, ...]; w is the guidance scale, counted as
in u + w (c - u). Sums, norms and dots run over all axes but the first, so rows do not meet. Give float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "frequency_decoupled",
    "linear",
    "magnitude_aware",
    "orthogonal_to",
    "projected",
    "rescaled",
    "shortened",
    "tangential",
    "zero_star",
]

_TINY = 1e-30  # keeps 0 / 0 from becoming NaN, and changes no other quotient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def linear(u: Tensor, c: Tensor, w: float) -> Tensor:
    """Return u + w (c - u), classifier-free guidance."""
    return u + w * (c - u)


def rescaled(p: Tensor, c: Tensor, phi: float) -> Tensor:
    """Scale p to the standard deviation of c, as far as phi in [0, 1] says (arXiv 2305.08891, eq. 15 and 16)."""
    axes = tuple(range(1, p.ndim))
    ratio = c.std(axes, keepdim=True) / p.std(axes, keepdim=True).clamp_min(_TINY)
    return phi * p * ratio + (1 - phi) * p


def zero_star(u: Tensor, c: Tensor, w: float) -> Tensor:
    """Return a u + w (c - a u) with a = <c, u> / <u, u>, the best multiple of u (CFG-Zero*, arXiv 2503.18886)."""
    u = u * (_dot(c, u) / (_dot(u, u) + 1e-8))
    return linear(u, c, w)


def shortened(d: Tensor, norm: float) -> Tensor:
    """Scale each row of d down to a norm, where it is longer; 0 leaves it alone."""
    return d if norm == 0 else d * (norm / _dot(d, d).sqrt()).clamp(max=1.0)


def orthogonal_to(c: Tensor, d: Tensor, parallel: float) -> Tensor:
    """Keep what of d is orthogonal to c, and a share `parallel` of what is parallel to it."""
    along = _dot(d, c) / _dot(c, c).clamp_min(_TINY) * c
    return d - (1 - parallel) * along


def projected(u: Tensor, c: Tensor, w: float, *, eta: float, norm: float, difference: Tensor | None = None) -> Tensor:
    """Return u + w (d_orth + eta d_par) with d = c - u shortened to a norm (APG, arXiv 2410.02416).

    Args:
        u: Prediction for the negative prompt.
        c: Prediction for the prompt.
        w: Guidance scale.
        eta: Weight of the part of d that is parallel to c.
        norm: Greatest norm of d; 0 for no limit.
        difference: What stands for c - u, with momentum; None for c - u.
    """
    d = shortened(c - u if difference is None else difference, norm)
    return u + w * orthogonal_to(c, d, eta)


def tangential(u: Tensor, c: Tensor, w: float) -> Tensor:
    """Return u^ + w (c - u^) with u^ the projection of u on the main direction of c and u (TCFG, arXiv 2503.18137).

    The main direction is the first right singular vector of the matrix of the two rows c and u: the leading
    eigenvector of their 2 x 2 Gram matrix has the angle atan2(2 <c, u>, <c, c> - <u, u>) / 2.
    """
    cc, cu, uu = _dot(c, c), _dot(c, u), _dot(u, u)
    angle = torch.atan2(2 * cu, cc - uu) / 2
    v = angle.cos() * c + angle.sin() * u
    u = _dot(u, v) / _dot(v, v).clamp_min(_TINY) * v
    return linear(u, c, w)


def magnitude_aware(u: Tensor, c: Tensor, w: float, alpha: float) -> Tensor:
    """Return u + w' (c - u) with w' = 1 + (w - 1) exp(-alpha |c - u| / |u|): less where the two differ much."""
    d = c - u
    ratio = (_dot(d, d) / _dot(u, u).clamp_min(_TINY)).sqrt()
    return u + (1 + (w - 1) * torch.exp(-alpha * ratio)) * d


def frequency_decoupled(u: Tensor, c: Tensor, scales: Sequence[float], parallel: Sequence[float]) -> Tensor:
    """Guide each level of a Laplacian pyramid with a scale of its own (FDG, arXiv 2506.19713).

    Args:
        u: Prediction for the negative prompt [B, ..., H, W].
        c: Prediction for the prompt.
        scales: Guidance scale of each level, the finest first.
        parallel: Weight of the part of each level's difference that is parallel to c.

    Returns:
        The sum, in the shape of c; sides need not be powers of two.
    """
    levels = []
    for a, b, w, share in zip(_pyramid(u, len(scales)), _pyramid(c, len(scales)), scales, parallel, strict=True):
        levels.append(a + w * (b - a if share == 1 else orthogonal_to(b, b - a, share)))
    total = levels.pop()
    while levels:
        total = levels[-1] + _up(total, levels[-1].shape)
        levels.pop()
    return total


def _pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Cut x [B, ..., H, W] into levels of detail, the finest first; the last one is what remains."""
    parts = []
    for _ in range(levels - 1):
        small = _sized(_blurred(x), tuple(-(-n // 2) for n in x.shape[-2:]))
        parts.append(x - _up(small, x.shape))
        x = small
    return [*parts, x]


def _up(x: Tensor, shape: Sequence[int]) -> Tensor:
    return _blurred(_sized(x, tuple(shape[-2:])))


def _sized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    flat = x.flatten(0, -3)[:, None]
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).view(*x.shape[:-2], *size)


def _blurred(x: Tensor) -> Tensor:
    """Blur the last two axes with the binomial kernel (1 4 6 4 1) / 16, mirrored at the border."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    flat = x.flatten(0, -3)[:, None]
    flat = F.pad(flat, (2, 2, 2, 2), mode="reflect" if min(x.shape[-2:]) > 2 else "replicate")
    return F.conv2d(F.conv2d(flat, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5)).view(x.shape)
