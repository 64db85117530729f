"""Bi-level routing attention between a host's projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot, join_heads, side_conv, split_heads, zero_conv
from attnctl.backbones.modules.attend import attend, ceil_div
from attnctl.backbones.modules.routing import gather_windows, merge_windows, split_windows, top_windows, window_means
from attnctl.errors import ConfigError, require

__all__ = ["RoutingMixer"]


class RoutingMixer(Mixer, kind="bra"):
    """Bi-level routing attention (arXiv 2303.08810) with exact padding; prefix tokens see all and are seen by all.

    window_size: side of a window in tokens. topk: windows that each window attends to, None = all of them. lepe:
    kernel of a depthwise convolution of the values, which starts at zero; 0 for none. scale: "head" keeps the host's
    logits, "dim" divides them by the root of all channels, as BiFormer does.
    """

    def __init__(
        self,
        slot: Slot,
        *,
        topk: int | None = 4,
        window_size: int = 7,
        lepe: int = 5,
        scale: str = "head",
        backend: str = "auto",
    ) -> None:
        super().__init__(slot, backend=backend)
        require(scale in ("head", "dim"), ConfigError, f"scale={scale!r} was given; expected 'head' or 'dim'.")
        if scale == "dim":
            self.scale = slot.dim**-0.5
        require(window_size >= 1, ConfigError, f"window_size={window_size} was given; expected at least 1.")
        require(topk is None or topk >= 1, ConfigError, f"topk={topk} was given; expected at least 1, or None for all.")
        self._check_topk(topk, window_size, slot.grid)
        self.topk, self.window = topk, window_size
        self.lepe = zero_conv(slot, lepe) if lepe else None

    @staticmethod
    def _check_topk(topk: int | None, size: int, grid: Grid) -> None:
        windows = ceil_div(grid[0], size) * ceil_div(grid[1], size)
        if topk is not None and topk > windows:
            raise ConfigError(
                f"topk={topk} was given, but a grid of {grid[0]}x{grid[1]} tokens holds {windows} windows of "
                f"{size}x{size}. Lower topk or window_size, or set topk=None for all windows."
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix within routed windows."""
        (h, w), p, size = grid, self.prefix, self.window
        self._check_topk(self.topk, size, grid)
        ph, pw = ceil_div(h, size) * size, ceil_div(w, size) * size
        windows = (ph // size) * (pw // size)
        topk = self.topk or windows
        if topk == windows:
            out = attend(q, k, v, None, self.scale, 0.0, self.backend)
        else:
            out = self._routed(q, k, v, grid, (ph, pw), topk)
        return out if self.lepe is None else out + side_conv(self.lepe, v, grid, p)

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, padded: Grid, topk: int) -> Tensor:
        (h, w), (ph, pw), p, size = grid, padded, self.prefix, self.window
        b, m = q.shape[0], q.shape[1]
        pad = [0, 0, 0, pw - w, 0, ph - h]

        def windowed(y: Tensor) -> Tensor:
            tokens = join_heads(y[:, :, p:]).reshape(b, h, w, -1)
            return split_windows(nn.functional.pad(tokens, pad), size, size)

        real = nn.functional.pad(torch.ones(1, h, w, 1, dtype=q.dtype, device=q.device), pad)
        real = split_windows(real, size, size)
        qw, kw, vw = windowed(q), windowed(k), windowed(v)
        means = window_means(qw, real).detach(), window_means(kw, real).detach()
        _, index = top_windows(*means, topk, self.dim**-0.5)
        n = qw.shape[1]
        kv = gather_windows(torch.cat([kw, vw], dim=-1), index).flatten(0, 1)
        ks, vs = (split_heads(y, m) for y in kv.split(self.dim, dim=-1))
        mask = None
        if padded != grid:
            mask = gather_windows(real.expand(b, -1, -1, -1), index).reshape(b * n, 1, 1, -1) > 0
        if p:
            first = (y[:, :, :p].repeat_interleave(n, dim=0) for y in (k, v))
            ks, vs = (torch.cat([f, y], dim=2) for f, y in zip(first, (ks, vs), strict=True))
            if mask is not None:
                mask = nn.functional.pad(mask, [p, 0], value=True)
        out = attend(split_heads(qw.flatten(0, 1), m), ks, vs, mask, self.scale, 0.0, self.backend)
        tokens = merge_windows(join_heads(out).reshape(b, n, size * size, -1), size, size, ph, pw)[:, :h, :w]
        result = split_heads(tokens.reshape(b, h * w, -1), m)
        if p:
            first_out = attend(q[:, :, :p], k, v, None, self.scale, 0.0, self.backend)
            result = torch.cat([first_out, result], dim=2)
        return result
