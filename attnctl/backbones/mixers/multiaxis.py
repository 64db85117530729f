"""Block and grid attention side by side between a host's projections."""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.partition import axis_attention
from attnctl.errors import ConfigError, require

__all__ = ["MultiAxisMixer"]


class MultiAxisMixer(Mixer, kind="multiaxis"):
    """Block attention and grid attention side by side ("MaxViT", arXiv 2204.01697), padded and masked at any size.

    window, grid_size: sides of blocks and of the dilated grid. mode: "heads" gives the first half of the heads to
    blocks and the rest to the grid; "mean" runs both with every head and averages.
    """

    def __init__(
        self, slot: Slot, *, window: int = 7, grid_size: int = 7, mode: str = "heads", backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend=backend)
        require(mode in ("heads", "mean"), ConfigError, f"mode={mode!r} was given; expected 'heads' or 'mean'.")
        require(
            window >= 1 and grid_size >= 1,
            ConfigError,
            f"window={window}, grid_size={grid_size} were given; expected at least 1.",
        )
        require(
            mode == "mean" or slot.heads >= 2,
            ConfigError,
            f"mode='heads' splits the heads between two axes, but the host has {slot.heads}. Set mode='mean'.",
        )
        self.window, self.grid_size, self.mode = window, grid_size, mode

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix along both axes."""
        half = self.heads // 2 if self.mode == "heads" else self.heads
        first, second = slice(0, half), slice(half, None) if self.mode == "heads" else slice(None)
        parts = []
        for heads, size, block in ((first, self.window, True), (second, self.grid_size, False)):
            qs, ks, vs = q[:, heads], k[:, heads], v[:, heads]
            parts.append(axis_attention(qs, ks, vs, grid, (size, size), block, self.prefix, self.scale, self.backend))
        return torch.cat(parts, dim=1) if self.mode == "heads" else (parts[0] + parts[1]) / 2
