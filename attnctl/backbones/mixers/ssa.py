"""Softmax attention with learned temperatures: of the length, of each query, and of each value.

"Selective Attention: Enhancing Transformer through Principled Context Control" (arXiv 2411.12892). The released files
have the temperature of the length alone, t = 1 + exp(-exp(beta)) log n; those of queries and values, 1 + tanh(f(x)),
are written from memory of the paper and not compared with anything.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend

__all__ = ["SSAMixer"]


class SSAMixer(Mixer, kind="ssa"):
    """Selective self-attention; beta is learned, one number per layer.

    beta: its start; 1.5 multiplies the logits of 64 tokens by 1.05. queries, values: whether each token also gets a
    temperature of its own, which starts at 1.
    """

    takes_mask = True

    def __init__(
        self, slot: Slot, *, beta: float = 1.5, queries: bool = False, values: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend=backend)
        dd: dict[str, Any] = {"device": slot.device, "dtype": slot.dtype}
        self.beta = nn.Parameter(torch.full((), float(beta), **dd))
        self.queries, self.values = (
            nn.Linear(slot.width or slot.dim, slot.heads, **dd) if wanted else None for wanted in (queries, values)
        )
        for layer in (self.queries, self.values):
            for p in () if layer is None else layer.parameters():
                nn.init.zeros_(p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Mix tokens."""
        q = q * (1 + torch.exp(-torch.exp(self.beta)) * math.log(q.shape[2]))
        if self.queries is not None:
            q = q * (1 + self.queries(x).tanh().transpose(1, 2)[..., None])
        if self.values is not None:
            v = v * (1 + self.values(x).tanh().transpose(1, 2)[..., None])
        return attend(q, k, v, mask, self.scale, 0.0, self.backend)
