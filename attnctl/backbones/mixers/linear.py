"""Linear attention that keeps a host's projections: InLine, MALA and RALA. No map of N x N weights exists.

"Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590), "Rectifying Magnitude Neglect in
Linear Attention" (arXiv 2507.00698), "Breaking the Low-Rank Dilemma of Linear Attention" (arXiv 2411.07635). The rotary
embeddings and gates of the last two belong to their own backbones and are left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot, join_heads, side_conv, split_heads, zero_conv

__all__ = ["InLineMixer", "MALAMixer", "RALAMixer", "inline", "mala", "rala"]


def inline(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute q (k^T v) s / n + (1 - s q mean(k)^T) mean(v): weights that sum to one, some negative.

    Shapes: q [B, H, N, D], k, v [B, H, Nk, D] -> [B, H, N, D]. Sums in float32.
    """
    qf, kf, vf = q.float(), k.float(), v.float()
    k_mean, v_mean = kf.mean(dim=2, keepdim=True), vf.mean(dim=2, keepdim=True)
    mixed = qf @ (kf.transpose(-2, -1) @ vf) * (scale / k.shape[2])
    return (mixed + (1 - scale * (qf * k_mean).sum(dim=-1, keepdim=True)) * v_mean).to(v.dtype)


def mala(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float = 1e-6) -> Tensor:
    """Compute (1 + 1 / z) q (k^T v) s / n - z mean(v) with z = s q mean(k)^T and positive features ELU + 1.

    Shapes: as in `inline`. The weights of a query sum to one, and its magnitude sharpens them.
    """
    qf, kf, vf = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
    z = scale * (qf * kf.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    mixed = qf @ (kf.transpose(-2, -1) @ vf) * (scale / k.shape[2])
    return ((1 + 1 / (z + eps)) * mixed - z * vf.mean(dim=2, keepdim=True)).to(v.dtype)


def rala(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float = 1e-6) -> Tensor:
    """Compute q (k_r^T v) / (n q mean(k_r)^T), where k_r = k weighed by n softmax(s mean(q) k^T), features ELU + 1.

    Shapes: as in `inline`. The weights raise the rank of the summed keys; those of a query sum to one.
    """
    qf, kf, vf = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
    n = k.shape[2]
    alpha = (scale * qf.mean(dim=2, keepdim=True) @ kf.transpose(-2, -1)).softmax(dim=-1) * n
    kf = kf * alpha.transpose(-2, -1)
    z = (qf * kf.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    return (qf @ (kf.transpose(-2, -1) @ vf) / n / (z + eps)).to(v.dtype)


class InLineMixer(Mixer, kind="inline"):
    """InLine attention; local=True adds a 3x3 convolution of the values whose weights come from the mean token."""

    def __init__(self, slot: Slot, *, local: bool = True, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        self.residual: nn.Sequential | None = None
        if local:
            dd: dict[str, Any] = {"groups": slot.heads, "device": slot.device, "dtype": slot.dtype}
            self.residual = nn.Sequential(
                nn.Conv1d(slot.dim, slot.dim, 1, **dd),
                nn.GELU(),
                nn.Conv1d(slot.dim, 9 * slot.dim, 1, **dd),
            )
            for p in self.residual[2].parameters():
                nn.init.zeros_(p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        out = inline(q, k, v, self.scale)
        if self.residual is None:
            return out
        b, m, _, d = v.shape
        weight = self.residual(join_heads(q).mean(dim=1).unsqueeze(-1) if x.shape[-1] != m * d else _mean(x))
        tokens = join_heads(v[:, :, self.prefix :]).transpose(1, 2).reshape(1, b * m * d, *grid)
        local = F.conv2d(tokens, weight.reshape(b * m * d, 1, 3, 3), padding=1, groups=b * m * d)
        local = split_heads(local.reshape(b, m * d, -1).transpose(1, 2), m)
        return out + (torch.cat([torch.zeros_like(v[:, :, : self.prefix]), local], dim=2) if self.prefix else local)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=1).unsqueeze(-1)


class _SideMixer(Mixer):
    """A linear mixer with a depthwise convolution of the values that starts at zero (lepe: its kernel, 0 for none)."""

    def __init__(self, slot: Slot, *, lepe: int = 5, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        self.lepe = zero_conv(slot, lepe) if lepe else None

    def _side(self, out: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return out if self.lepe is None else out + side_conv(self.lepe, v, grid, self.prefix)


class MALAMixer(_SideMixer, kind="mala"):
    """Magnitude-aware linear attention, without rotary embedding and gate."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return self._side(mala(q, k, v, self.scale), v, grid)


class RALAMixer(_SideMixer, kind="rala"):
    """Rank-augmented linear attention, without rotary embedding and gate."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return self._side(rala(q, k, v, self.scale), v, grid)
