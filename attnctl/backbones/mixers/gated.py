"""Softmax attention whose heads, or channels, each token gates behind the values.

"Gated Attention for Large Language Models" (arXiv 2505.06708, position G1): softmax(q k^T s) v * sigmoid(W x + b).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot, split_heads
from attnctl.backbones.modules.attend import attend
from attnctl.errors import ConfigError, require

__all__ = ["GatedMixer"]


class GatedMixer(Mixer, kind="gated"):
    """Gated attention; per: "head" for one number per head and token, "channel" for one per channel.

    start: "exact" doubles a sigmoid that starts at a half, so that the host computes what it did; "paper" takes the
    sigmoid itself, with the bias 4 (0.982) at first.
    """

    takes_mask = True

    def __init__(self, slot: Slot, *, per: str = "head", start: str = "exact", backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(per in ("head", "channel"), ConfigError, f"per={per!r} was given; expected 'head' or 'channel'.")
        require(start in ("exact", "paper"), ConfigError, f"start={start!r} was given; expected 'exact' or 'paper'.")
        size = slot.heads if per == "head" else slot.dim
        self.factor = 2.0 if start == "exact" else 1.0
        self.gate = nn.Linear(slot.width or slot.dim, size, device=slot.device, dtype=slot.dtype)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 0.0 if start == "exact" else 4.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Mix tokens and gate what each gets."""
        gates = self.factor * torch.sigmoid(self.gate(x))  # [B, N, H] or [B, N, H * D]
        return attend(q, k, v, mask, self.scale, 0.0, self.backend) * split_heads(gates, self.heads)
