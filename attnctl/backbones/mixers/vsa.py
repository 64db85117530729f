"""Window attention whose keys and values come from a window of predicted size and place, one per head.

"VSA: Learning Varied-Size Window Attention in Vision Transformers" (arXiv 2204.08446, equations 4 to 6).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.partition import padded_size, partition, restore
from attnctl.errors import ConfigError, require

__all__ = ["VSAMixer"]


class VSAMixer(Mixer, kind="vsa"):
    """Varied-size window attention; the windows start as plain, unshifted ones, with the positions that a Swin has.

    window: side; the host's where it has windows of its own, 7 elsewhere. Padding of the map at the bottom and right
    counts as keys of zeros, as in the release. Prefix tokens see all and are seen by all.
    """

    def __init__(self, slot: Slot, *, window: int | None = None, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        side = window if window is not None else slot.window or min(7, *slot.grid)
        require(side >= 1, ConfigError, f"window={window} was given; expected at least 1.")
        self.window = side
        dd: dict[str, Any] = {"device": slot.device, "dtype": slot.dtype}
        self.offsets, self.sizes = (nn.Conv2d(slot.width or slot.dim, 2 * slot.heads, 1, **dd) for _ in range(2))
        for p in (*self.offsets.parameters(), *self.sizes.parameters()):
            nn.init.zeros_(p)
        table = torch.zeros((2 * side - 1) ** 2, slot.heads, **dd)
        if slot.positions is not None and len(slot.positions) == len(table):
            table = slot.positions.detach().clone()
        self.relative_position_bias_table = nn.Parameter(table)

    def places(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute where each place of the padded map takes its keys from.

        x: tokens of the grid [B, h * w, C]. Returns [B * H, H', W', 2]: x and y from -1 to 1 over the padded map.
        """
        side, (h, w) = self.window, grid
        ph, pw = padded_size(grid, (side, side))
        image = F.pad(x.transpose(1, 2).unflatten(2, grid), [0, pw - w, 0, ph - h])
        pooled = F.leaky_relu(F.avg_pool2d(image, side, side))
        moved, grown = (
            conv(pooled).reshape(-1, 2, ph // side, pw // side).float() for conv in (self.offsets, self.sizes)
        )
        # The release divides by how many whole windows the unpadded map has.
        steps = moved.new_tensor([max(1, w // side), max(1, h // side)]).reshape(1, 2, 1, 1)
        moved = moved / steps
        axes = []
        for i, length in enumerate((pw, ph)):
            at = torch.arange(length, device=x.device, dtype=torch.float32)
            inside = at % side - (side - 1) / 2
            unit = 2 / max(1, length - 1)
            centre = (at - inside) * unit - 1

            def spread(y: Tensor, i: int = i) -> Tensor:
                return y[:, i].repeat_interleave(side, -2).repeat_interleave(side, -1)

            shape = (1, 1, -1) if i == 0 else (1, -1, 1)
            apart = unit * inside.reshape(shape) * (1 + spread(grown))
            axes.append(centre.reshape(shape) + apart + spread(moved))
        return torch.stack(axes, dim=-1)

    def bias(self) -> Tensor:
        """Lay the table out between the places of a window, [1, H, side * side, side * side]."""
        side = self.window
        at = torch.arange(side * side, device=self.relative_position_bias_table.device)
        y, x = at // side, at % side
        index = (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        b, heads = q.shape[:2]
        p, size = self.prefix, (self.window, self.window)
        ph, pw = padded_size(grid, size)
        where = self.places(x[:, p:], grid)

        def sampled(y: Tensor) -> Tensor:
            image = y[:, :, p:].transpose(2, 3).reshape(b * heads, -1, *grid)
            image = F.pad(image, [0, pw - grid[1], 0, ph - grid[0]]).float()
            out = F.grid_sample(image, where, mode="bilinear", padding_mode="zeros", align_corners=True)
            return out.to(y.dtype).reshape(b, -1, ph, pw).permute(0, 2, 3, 1)

        tokens = q[:, :, p:].transpose(1, 2).flatten(2).unflatten(1, grid)
        parts = [partition(y, size, True).unflatten(-1, (heads, -1)) for y in (tokens, sampled(k), sampled(v))]
        qs, ks, vs = (y.transpose(1, 2) for y in parts)
        bias = self.bias().to(q.dtype)
        if p:
            count = qs.shape[0] // b
            ks, vs = (torch.cat([y[:, :, :p].repeat_interleave(count, 0), z], 2) for y, z in ((k, ks), (v, vs)))
            bias = F.pad(bias, [p, 0])
        out = restore(
            attend(qs, ks, vs, bias, self.scale, 0.0, self.backend).transpose(1, 2).flatten(2), size, True, grid
        )
        result = out.reshape(b, -1, heads, v.shape[-1]).transpose(1, 2)
        if p:
            result = torch.cat([attend(q[:, :, :p], k, v, None, self.scale, 0.0, self.backend), result], dim=2)
        return result
