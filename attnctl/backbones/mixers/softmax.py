"""Variants of softmax attention that keep a host's projections: mixtures of heads, sigmoid weights, neighbourhoods.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), "Theory, Analysis, and Best Practices for
Sigmoid Self-Attention" (arXiv 2409.04431), "Neighborhood Attention Transformer" (arXiv 2204.07143).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend, require
from attnctl.errors import ConfigError

__all__ = ["MoHMixer", "NeighborhoodMixer", "SigmoidMixer", "balance", "neighborhood_mask", "sigmoid_attention"]


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


def neighborhood_mask(grid: Grid, kernel: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """Compute which tokens each token sees: boolean [h * w, h * w].

    Every token sees kernel x kernel tokens, dilation apart, centred on it where the map allows and shifted inwards
    at the borders.
    """

    def axis(n: int) -> Tensor:
        place = torch.arange(n, device=device)
        group, step = place % dilation, place // dilation  # tokens see those of their group, a dilation apart
        count = (n - group + dilation - 1) // dilation
        size = count.clamp(max=kernel)
        start = (step - kernel // 2).clamp(min=0).minimum(count - size)[:, None]
        return (group[:, None] == group) & (step >= start) & (step < start + size[:, None])

    rows, columns = axis(grid[0]), axis(grid[1])
    n = grid[0] * grid[1]
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(n, n)


class SigmoidMixer(Mixer, kind="sigmoid"):
    """Sigmoid attention; its bias, one a head, starts at -log(tokens)."""

    def __init__(self, slot: Slot, *, bias: float | None = None, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        start = -math.log(slot.prefix + slot.grid[0] * slot.grid[1]) if bias is None else bias
        self.bias = nn.Parameter(torch.full((slot.heads,), start, device=slot.device, dtype=slot.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return sigmoid_attention(q, k, v, self.scale, self.bias)


class NeighborhoodMixer(Mixer, kind="neighborhood"):
    """Neighbourhood attention: each token sees kernel x kernel tokens; prefix tokens see all and are seen by all.

    kernel: odd. dilation: step between the tokens seen.
    """

    def __init__(self, slot: Slot, *, kernel: int = 7, dilation: int = 1, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(kernel >= 1 and kernel % 2 == 1, ConfigError, f"kernel={kernel} was given; expected an odd number.")
        require(dilation >= 1, ConfigError, f"dilation={dilation} was given; expected at least 1.")
        self.kernel, self.dilation = kernel, dilation
        self._masks: dict[tuple[Grid, torch.device], Tensor] = {}

    def _mask(self, grid: Grid, device: torch.device) -> Tensor:
        if (grid, device) not in self._masks:
            if torch.compiler.is_compiling():
                return self._new_mask(grid, device)  # it belongs to the graph, and must not stay on this module
            with torch.inference_mode(False):  # training may follow, and cannot save a tensor made in inference mode
                self._masks = {(grid, device): self._new_mask(grid, device)}
        return self._masks[grid, device]

    def _new_mask(self, grid: Grid, device: torch.device) -> Tensor:
        mask = neighborhood_mask(grid, self.kernel, self.dilation, device)
        return nn.functional.pad(mask, [self.prefix, 0, self.prefix, 0], value=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens."""
        return attend(q, k, v, self._mask(grid, q.device)[None, None], self.scale, 0.0, self.backend)


def balance(model: nn.Module) -> Tensor:
    """Average the load-balance losses of a model's mixtures of heads in the last training step, 0 where it has none.

    Add 0.01 times this to the loss (arXiv 2410.11842, section 3.3).
    """
    losses = [m.balance for m in model.modules() if isinstance(m, MoHMixer) and m.balance is not None]
    return torch.stack(losses).mean() if losses else torch.zeros(())


class MoHMixer(Mixer, kind="moh"):
    """A mixture of heads: each token weighs the shared heads and its best routed heads; equal to softmax at first.

    shared: heads that every token uses. topk: routed heads that a token uses, all of the others if None.
    The routers start at zero: then every head in use has weight 1, and ties fall to the first heads.
    `balance` holds the load-balance loss of the last training step.
    """

    takes_mask = True

    def __init__(self, slot: Slot, *, shared: int = 1, topk: int | None = None, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        heads = slot.heads
        require(
            0 <= shared < heads,
            ConfigError,
            f"shared={shared} was given; the host has {heads} heads, one must be routed.",
        )
        self.shared, self.routed = shared, heads - shared
        self.topk = self.routed if topk is None else topk
        require(
            1 <= self.topk <= self.routed,
            ConfigError,
            f"topk={topk} was given; {heads} heads less {shared} shared leave {self.routed} to route.",
        )
        dims = {"route": self.routed} | ({"share": shared, "split": 2} if shared else {})
        self.gates = nn.ModuleDict(
            {
                k: nn.Linear(slot.width or slot.dim, n, bias=False, device=slot.device, dtype=slot.dtype)
                for k, n in dims.items()
            }
        )
        for gate in self.gates.values():
            nn.init.zeros_(gate.weight)  # type: ignore[arg-type]
        self.balance: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Mix tokens, then weigh the heads of each."""
        out = attend(q, k, v, mask, self.scale, 0.0, self.backend)
        return out * self.head_weights(x).transpose(1, 2).unsqueeze(-1).to(out.dtype)

    def head_weights(self, x: Tensor) -> Tensor:
        """Compute the weight of every head for every token: [B, N, C] -> [B, N, H], shared heads first."""
        gates = self.gates["route"](x).float().softmax(dim=-1)
        index = gates.topk(self.topk, dim=-1).indices
        mask = torch.zeros_like(gates).scatter(-1, index, 1.0)
        self.balance = None  # a kept graph would stop copies of the model
        if self.training:
            self.balance = (gates.mean(dim=(0, 1)) * mask.mean(dim=(0, 1))).mean() * self.routed**2
        kept = gates * mask
        routed = kept / kept.sum(dim=-1, keepdim=True) * self.topk
        if not self.shared:
            return routed
        first = self.gates["share"](x).float().softmax(dim=-1) * self.shared
        split = 2 * self.gates["split"](x).float().softmax(dim=-1)
        return torch.cat([first * split[..., :1], routed * split[..., 1:]], dim=-1)
