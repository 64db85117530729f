"""Softmax attention as a kernel regression, with a line in place of the constant that it fits at each query.

"Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention for Test-Time Regression"
(arXiv 2510.01450), written from memory of the paper and not compared with its code. With p = softmax(s q k^T) and
z_j = k_j - q: S = sum_j p_j z_j z_j^T + ridge I, r = S^-1 sum_j p_j z_j, weights p_j (1 - z_j r), divided by their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.errors import ConfigError, require

__all__ = ["LocalLinearMixer", "local_linear_weights"]


def local_linear_weights(q: Tensor, k: Tensor, scale: float, ridge: float) -> Tensor:
    """Compute the weights of a local linear regression: q, k [B, H, N, D] -> [B, H, N, N]; they sum to 1.

    Some may be negative. The sums are in float32, and the costs N^2 D and N D^3.
    """
    q, k = q.float(), k.float()
    p = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    d, mean = q.shape[-1], p @ k
    second = (p @ (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)).unflatten(-1, (d, d))
    cross = mean.unsqueeze(-1) * q.unsqueeze(-2)
    around = second - cross - cross.transpose(-2, -1) + q.unsqueeze(-1) * q.unsqueeze(-2)
    slope = torch.linalg.solve(around + ridge * torch.eye(d, dtype=q.dtype, device=q.device), mean - q)
    weights = p * (1 + (q * slope).sum(-1, keepdim=True) - slope @ k.transpose(-2, -1))
    return weights / weights.sum(-1, keepdim=True)


class LocalLinearMixer(Mixer, kind="local_linear"):
    """Local linear attention; ridge: what is added to the covariance of the keys, large for softmax itself."""

    def __init__(self, slot: Slot, *, ridge: float = 1.0, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(ridge > 0, ConfigError, f"ridge={ridge} was given; expected a number above 0.")
        self.ridge = float(ridge)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return (local_linear_weights(q, k, self.scale, self.ridge) @ v.float()).to(v.dtype)
