"""Attention of each place to the window around it, where places outside of the map are keys of zeros.

"TiC: Exploring Vision Transformer in Convolution" (arXiv 2310.04134, its multi-head self-attention convolution). The
release has one head and no comparison is recorded; the mixer has the host's heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend
from attnctl.errors import ConfigError, require

__all__ = ["TiCMixer"]


class TiCMixer(Mixer, kind="tic"):
    """Softmax over a window of zero-padded keys; kernel: its odd side; dilation: step between the places.

    A place outside of the map has the logit 0 and the value 0, unlike neighbourhoods, whose windows stay inside.
    Prefix tokens see all and are seen by all.
    """

    def __init__(self, slot: Slot, *, kernel: int = 3, dilation: int = 1, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(
            kernel >= 1 and kernel % 2 == 1 and dilation >= 1,
            ConfigError,
            f"kernel={kernel}, dilation={dilation} were given; expected an odd side and a step of at least 1.",
        )
        self.kernel, self.dilation = kernel, dilation

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        b, heads, _, d = q.shape
        p, n, side = self.prefix, grid[0] * grid[1], self.kernel

        def around(y: Tensor) -> Tensor:
            image = y[:, :, p:].transpose(2, 3).reshape(b, -1, *grid)
            parts = F.unfold(image, side, self.dilation, self.dilation * (side // 2))
            near = parts.reshape(b, heads, -1, side * side, n).permute(0, 4, 1, 3, 2)  # [B, n, H, side^2, D]
            if p:
                near = torch.cat([y[:, None, :, :p].expand(-1, n, -1, -1, -1), near], 3)
            return near.flatten(0, 1)

        rows = q[:, :, p:].transpose(1, 2).reshape(b * n, heads, 1, d)
        out = attend(rows, around(k), around(v), None, self.scale, 0.0, self.backend)
        out = out.reshape(b, n, heads, -1).transpose(1, 2)
        if p:
            out = torch.cat([attend(q[:, :, :p], k, v, None, self.scale, 0.0, self.backend), out], 2)
        return out
