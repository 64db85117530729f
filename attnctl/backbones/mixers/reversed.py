"""Attention turned round: each token sends its value along its row of softmax instead of gathering by it.

"Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention" (arXiv 2304.03282). Written from
memory of the paper and a third party's port, without the messages that layers pass on; the official code was never
released.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot

__all__ = ["ReversedMixer"]


class ReversedMixer(Mixer, kind="reversed"):
    """Reversed attention, A^T (p v): columns of weights sum to p, the share that a token sends through each head.

    select: whether p is learned, a softmax over heads of the token, times their number; it starts at 1. It starts as
    nothing like softmax: train the model.
    """

    def __init__(self, slot: Slot, *, select: bool = True, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        dd: dict[str, Any] = {"device": slot.device, "dtype": slot.dtype}
        self.select = nn.Linear(slot.width or slot.dim, slot.heads, **dd) if select else None
        for p in () if self.select is None else self.select.parameters():
            nn.init.zeros_(p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        if self.select is not None:
            share = self.select(x).float().softmax(-1) * self.heads
            v = v * share.to(v.dtype).transpose(1, 2)[..., None]
        weights = (q.float() @ k.float().transpose(-2, -1) * self.scale).softmax(-1)
        return (weights.transpose(-2, -1) @ v.float()).to(v.dtype)
