"""Linear attention that keeps a host's projections: InLine, MALA and RALA. No map of N x N weights exists.

"Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590), "Rectifying Magnitude Neglect in
Linear Attention" (arXiv 2507.00698), "Breaking the Low-Rank Dilemma of Linear Attention" (arXiv 2411.07635). The rotary
positions and gates of the last two are options.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot, join_heads, side_conv, split_heads, zero_conv
from attnctl.backbones.modules.inline import inline, local_convolution, local_kernels
from attnctl.backbones.modules.rank_linear import mala, rala, rotation
from attnctl.errors import ConfigError, require

__all__ = ["InLineMixer", "MALAMixer", "RALAMixer", "inline", "mala", "rala"]


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


class InLineMixer(Mixer, kind="inline"):
    """InLine attention; local=True adds a 3x3 convolution of the values whose weights come from the mean token.

    kernel: what queries and keys go through first: "identity", "relu", "leakyrelu" or "exp" (of a fifth).
    """

    def __init__(self, slot: Slot, *, local: bool = True, kernel: str = "identity", backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(kernel in _KERNELS, ConfigError, f"kernel={kernel!r} was given; expected one of {', '.join(_KERNELS)}.")
        self.kernel = kernel
        self.residual: nn.Sequential | None = None
        if local:
            self.residual = local_kernels(slot.dim, slot.heads, device=slot.device, dtype=slot.dtype)
            for p in self.residual[2].parameters():
                nn.init.zeros_(p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        feature = _KERNELS[self.kernel]
        out = inline(feature(q), feature(k), v, self.scale)
        if self.residual is None:
            return out
        _, m, _, d = v.shape
        weight = self.residual(join_heads(q).mean(dim=1).unsqueeze(-1) if x.shape[-1] != m * d else _mean(x))
        local = split_heads(local_convolution(join_heads(v[:, :, self.prefix :]), weight, *grid), m)
        return out + (torch.cat([torch.zeros_like(v[:, :, : self.prefix]), local], dim=2) if self.prefix else local)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=1).unsqueeze(-1)


class _RankMixer(Mixer):
    """A linear mixer with a depthwise convolution of the values that starts at zero (lepe: its kernel, 0 for none).

    rope: turn queries and keys by their place, behind the sums that normalise them; prefix tokens stay as they are.
    gate: multiply what comes out by a linear layer of the tokens, which starts at 1.
    """

    def __init__(
        self, slot: Slot, *, lepe: int = 5, rope: bool = False, gate: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend=backend)
        d = slot.dim // slot.heads
        require(
            not rope or d % 4 == 0, ConfigError, f"rope=True was given; heads of {d} channels are no multiple of 4."
        )
        self.lepe = zero_conv(slot, lepe) if lepe else None
        self.rope = rope
        self.gate = None
        if gate:
            self.gate = nn.Linear(slot.width or slot.dim, slot.dim, device=slot.device, dtype=slot.dtype)
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def _mix(self, form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        turn: tuple[Tensor, Tensor] | tuple[()] = ()
        if self.rope:
            sin, cos = rotation(grid[0], grid[1], q.shape[-1], q)
            p = self.prefix
            turn = F.pad(sin, [0, 0, p, 0]), F.pad(cos, [0, 0, p, 0], value=1.0)
        out = form(q, k, v, self.scale, *turn)
        if self.lepe is not None:
            out = out + side_conv(self.lepe, v, grid, self.prefix)
        return out if self.gate is None else out * split_heads(self.gate(x), self.heads)


class MALAMixer(_RankMixer, kind="mala"):
    """Magnitude-aware linear attention; rope and gate are its backbone's, off unless asked for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return self._mix(mala, q, k, v, x, grid)


class RALAMixer(_RankMixer, kind="rala"):
    """Rank-augmented linear attention; rope and gate are its backbone's, off unless asked for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return self._mix(rala, q, k, v, x, grid)
