"""Variants of softmax attention that keep a host's projections: sigmoid weights, neighbourhoods.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (arXiv 2409.04431), "Neighborhood Attention
Transformer" (arXiv 2204.07143).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import axes_of

__all__ = ["NeighborhoodMixer", "SigmoidMixer", "sigmoid_attention"]


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Compute sigmoid(s q k^T + b) v in blocks of queries. Shapes: q, k, v [B, H, N, D]; bias [H].

    The blocks do not depend on B: an exported model takes any number of images.
    """
    kt = k.float().transpose(-2, -1)
    step = max(1, 2**22 // max(1, q.shape[1] * k.shape[2]))
    blocks = [
        ((q[:, :, i : i + step].float() * scale) @ kt + bias.float().reshape(1, -1, 1, 1)).sigmoid() @ v.float()
        for i in range(0, q.shape[2], step)
    ]
    return torch.cat(blocks, dim=2).to(v.dtype)


class SigmoidMixer(Mixer, kind="sigmoid"):
    """Sigmoid attention; its bias, one a head, starts at -log(tokens).

    bias: another start. learn_bias: whether it is trained; the release keeps it fixed. qk_norm: a layer norm of queries
    and keys per head, which keeps logits small in training. temperature: logits are multiplied by its exponential.
    """

    def __init__(
        self, slot: Slot, *, bias: float | None = None, learn_bias: bool = True, qk_norm: bool = False,
        temperature: float = 0.0, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(slot, backend=backend)
        start = -math.log(slot.prefix + slot.grid[0] * slot.grid[1]) if bias is None else bias
        value = torch.full((slot.heads,), start, device=slot.device, dtype=slot.dtype)
        self.bias = nn.Parameter(value, requires_grad=learn_bias)
        self.scale *= math.exp(temperature)
        d = slot.dim // slot.heads
        self.q_norm, self.k_norm = (
            nn.LayerNorm(d, device=slot.device, dtype=slot.dtype) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return sigmoid_attention(self.q_norm(q), self.k_norm(k), v, self.scale, self.bias)


class NeighborhoodMixer(Mixer, kind="neighborhood"):
    """Neighbourhood attention: each token sees a window around it; prefix tokens see all and are seen by all.

    kernel: side of the window, or (height, width); even ones reach one token further up and left. stride: tokens that
    share one window, up to the window. dilation: step between the tokens seen. causal: whether a token sees none behind
    itself, per axis or for both. A map smaller than the window is seen whole. The cost is that of the window.
    """

    def __init__(
        self,
        slot: Slot,
        *,
        kernel: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(slot, backend=backend)
        self.window = (kernel, stride, dilation, causal)
        axes_of(slot.grid, *self.window, shrink=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        axes = axes_of(grid, *self.window, shrink=True)
        return neighborhood(q, k, v, axes, image=slice(self.prefix, q.shape[2]), scale=self.scale)
