"""Token mixers that take the place of softmax attention between a host's projections.

A mixer sees queries, keys and values split into heads, [B, H, prefix + h * w, D], the tokens x before the projection,
[B, prefix + h * w, C], and the grid (h, w); it returns [B, H, prefix + h * w, D]. Prefix tokens (class, registers)
come first and lie outside the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnctl.backbones.modules.agent import AgentCore, agent_mix, pool_agents
from attnctl.backbones.modules.attend import attend, ceil_div, require
from attnctl.backbones.modules.partition import axis_attention
from attnctl.backbones.modules.routing import gather_windows, merge_windows, split_windows, top_windows, window_means
from attnctl.errors import ConfigError

__all__ = ["AgentMixer", "Mixer", "MultiAxisMixer", "RoutingMixer", "Slot", "join_heads", "side_conv", "split_heads"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Slot:
    """What a mixer is built for.

    dim = heads * head_dim of the host; grid: (height, width) in tokens that the host was built for; prefix: class and
    register tokens; scale: of the host's logits; device, dtype: of its weights.
    """

    dim: int
    heads: int
    grid: Grid = (1, 1)
    prefix: int = 0
    scale: float = 1.0
    device: torch.device | None = None
    dtype: torch.dtype | None = None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split channels: [B, N, C] -> [B, H, N, D]."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`: [B, H, N, D] -> [B, N, C]."""
    return x.transpose(1, 2).flatten(2)


def side_conv(conv: nn.Conv2d, v: Tensor, grid: Grid, prefix: int) -> Tensor:
    """Convolve the value map depthwise: v [B, H, prefix + h * w, D] -> the same shape, zero on prefix tokens."""
    b, m, _, d = v.shape
    tokens = join_heads(v[:, :, prefix:])
    out = conv(tokens.transpose(1, 2).reshape(b, m * d, *grid)).flatten(2).transpose(1, 2)
    out = split_heads(out, m)
    return torch.cat([torch.zeros_like(v[:, :, :prefix]), out], dim=2) if prefix else out


def zero_conv(slot: Slot, kernel: int) -> nn.Conv2d:
    """Build a depthwise convolution that starts at zero, so that it changes nothing before training."""
    dim = slot.dim
    conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, device=slot.device, dtype=slot.dtype)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class Mixer(nn.Module):
    """Base class: sizes of the slot that it fills, and the kernel to use. Options of subclasses are keyword-only."""

    def __init__(self, slot: Slot, backend: str = "auto") -> None:
        super().__init__()
        self.dim, self.heads, self.grid = slot.dim, slot.heads, slot.grid
        self.prefix, self.scale, self.backend = slot.prefix, slot.scale, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens, see the module's text for shapes."""
        raise NotImplementedError


class AgentMixer(Mixer):
    """Agent attention (arXiv 2312.08874): biases start at zero ("zero") or small ("trunc"), the convolution at zero.

    num_agents: a square number, or "all" for one agent a token of the grid.
    """

    def __init__(
        self, slot: Slot, *, num_agents: int | str = 49, init: str = "zero", dwc: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend)
        require(init in ("zero", "trunc"), ConfigError, f"init={init!r} was given; expected 'zero' or 'trunc'.")
        require(
            num_agents == "all" or isinstance(num_agents, int),
            ConfigError,
            f"num_agents={num_agents!r} was given; expected a square number or 'all'.",
        )
        count = 1 if isinstance(num_agents, str) else num_agents
        self.bias = AgentCore(
            slot.dim, slot.heads, slot.grid, count, prefix=slot.prefix, device=slot.device, dtype=slot.dtype
        )
        if num_agents == "all":
            self.bias.agent_grid = slot.grid
        if init == "zero":
            self.bias.reset_biases(0.0)
        self.dwc = zero_conv(slot, 3) if dwc else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix through agents pooled from the queries."""
        ah, aw = self.bias.agent_grid
        pooled = pool_agents(join_heads(q[:, :, self.prefix :]), grid[0], grid[1], ah, aw)
        bias_k, bias_q = self.bias.key_biases(*grid).to(q.dtype), self.bias.query_biases(*grid).to(q.dtype)
        agents = split_heads(pooled, self.heads)
        out = agent_mix(q, k, v, agents, bias_k, bias_q, self.scale, backend=self.backend)
        return out if self.dwc is None else out + side_conv(self.dwc, v, grid, self.prefix)


class RoutingMixer(Mixer):
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
        super().__init__(slot, backend)
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


class MultiAxisMixer(Mixer):
    """Block attention and grid attention side by side ("MaxViT", arXiv 2204.01697), padded and masked at any size.

    window, grid_size: sides of blocks and of the dilated grid. mode: "heads" gives the first half of the heads to
    blocks and the rest to the grid; "mean" runs both with every head and averages.
    """

    def __init__(
        self, slot: Slot, *, window: int = 7, grid_size: int = 7, mode: str = "heads", backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend)
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
