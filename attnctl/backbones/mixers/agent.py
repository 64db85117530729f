"""Agent attention between a host's projections."""

from __future__ import annotations

from torch import Tensor

from attnctl.backbones.mixers.base import Grid, Mixer, Slot, join_heads, side_conv, split_heads, zero_conv
from attnctl.backbones.modules.agent import AgentCore, agent_mix, pool_agents
from attnctl.errors import ConfigError, require

__all__ = ["AgentMixer"]


class AgentMixer(Mixer, kind="agent"):
    """Agent attention (arXiv 2312.08874): biases start at zero ("zero") or small ("trunc"), the convolution at zero.

    num_agents: a square number, or "all" for one agent a token of the grid.
    """

    def __init__(
        self, slot: Slot, *, num_agents: int | str = 49, init: str = "zero", dwc: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__(slot, backend=backend)
        require(init in ("zero", "trunc"), ConfigError, f"init={init!r} was given; expected 'zero' or 'trunc'.")
        require(
            num_agents == "all" or (isinstance(num_agents, int) and num_agents >= 1),
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
