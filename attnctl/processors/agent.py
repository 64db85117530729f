"""Agent attention for Stable Diffusion: self-attention through a few agent tokens, with and without token merging.

"Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874 (AgentSD, without training):

    V_A = softmax(s A k^T) v          agents gather from all tokens, s = d^-1/2
    O   = softmax(s^0.3 q A^T) V_A + 0.075 v

for queries, keys and values of merged tokens and agents A that are the queries of tokens merged much further. Both are
fused attention with few keys or few queries; no map is made. Merging averages and projections are affine, so merging
the projected tokens here equals projecting merged ones, as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.listing import unet_halvings
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import SiteError, UnsupportedModelError
from attnctl.kernels import plain as plain_attention
from attnctl.kernels.dispatch import Plain
from attnctl.kernels.merging import match_tokens, merged_count, pool_cells

__all__ = ["AgentAttention", "agent_attention"]

Metric = Literal["block", "norm"]


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    plain: Plain = plain_attention,
) -> Tensor:
    """Attend through agents (arXiv 2312.08874, the form for Stable Diffusion).

    Args:
        q: Queries [B, H, N, D].
        agents: Agent queries [B, H, A, D].
        k: Keys [B, H, M, D].
        v: Values [B, H, M, D]; M = N where the shortcut is used.
        scale: s, 1 / sqrt(D) if None.
        k_scale2: Power of s in the second softmax.
        k_shortcut: Share of the values that is added.
        plain: The kernel.

    Returns:
        Output [B, H, N, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gathered = plain(agents, k, v, None, scale)
    out = plain(q, agents, gathered, None, scale**k_scale2)
    return torch.add(out, v, alpha=k_shortcut) if k_shortcut else out


@dataclass(frozen=True, kw_only=True)
class AgentAttention(Control):
    """Make self-attention of Stable Diffusion UNets cheaper at full resolution (arXiv 2312.08874).

    Published course over 50 steps: agents until step 20, token merging alone after that.

    Attributes:
        ratio: Share of the tokens merged away, 0 to 1; 0 merges none and takes the mean of each cell as agents.
        agent_ratio: Share merged away for the agents; 0.95 in cells of 4 x 4 leaves one agent per cell.
        cell: Side of a cell while agents act; one token of each cell stays.
        late_cell: Side of a cell after the agents have stopped.
        agents_stop: Fraction of the run at which agents stop.
        k_scale2: Power of the logit scale in the second softmax.
        k_shortcut: Share of the values added to the output.
        max_downsample: Act where the grid is at most so many times smaller than the latents: 1, 2, 4 or 8.
        use_rand: Whether the token of each cell is drawn at every step and site; if not, it is the first one. As
            published, with an odd number of rows it is the first one.
        seed: Seed of these draws, which have a generator of their own.
        metric: Values by which tokens are compared: "block", the input of the transformer block (published), or
            "norm", the input of its attention, which needs no hook on the block.

    Example:
        >>> AgentAttention(ratio=0.3).describe()
        'AgentAttention(ratio=0.3)'
    """

    ratio: float = knob(0.4, 0.0, 1.0, shown=True)
    agent_ratio: float = knob(0.95, 0.0, 1.0, shown=True)
    cell: int = knob(4, 2)
    late_cell: int = knob(2, 2)
    agents_stop: float = knob(0.4, 0.0, 1.0)
    k_scale2: float = knob(0.3, 0.0)
    k_shortcut: float = knob(0.075, -math.inf)
    max_downsample: int = knob(1, options=(1, 2, 4, 8))
    use_rand: bool = True
    seed: int = knob(0, 0, 2**32 - 1)
    metric: Metric = knob("block", options=Metric)

    kinds: ClassVar[tuple[str, ...]] = ("self",)
    about: ClassVar[About] = About(
        does="self-attention of large latents through few agent tokens",
        page="agent",
        goal="compute less",
        paper="arXiv 2312.08874",
        cite=("Han et al., *Agent Attention: On the Integration of Softmax and Linear Attention*, arXiv 2312.08874",),
        group="Speed",
        sites="self-attention at the size of the latents",
        needs=("the input of the transformer block",),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("AgentAttention", "site", "tokens that are merged already have no grid to merge on"),
    )

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if not family.unet:
            raise UnsupportedModelError(
                f"{self._label}: {family.name} models rotate their queries and keys by position or hold text among "
                "the image tokens, where merged tokens have no meaning. Use it with Stable Diffusion UNets."
            )
        return super().resolve(sites, family)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        stages = [s.name.split(".")[:2] for s in sites if s.name.startswith(("down_blocks.", "up_blocks."))]
        levels = 1 + max((int(index) for _, index in stages), default=0)
        allowed = int(math.log2(self.max_downsample))
        halvings = {s.name: unet_halvings(s.name, levels) for s in sites if s.kind == "self"}
        chosen = tuple(s for s in sites if (n := halvings.get(s.name)) is not None and n <= allowed)
        if not chosen:
            least = min((n for n in halvings.values() if n is not None), default=0)
            raise SiteError(
                f"{self._label}: this model has no self-attention at {self.max_downsample} times smaller than the "
                f"latents or larger. Its largest is at max_downsample={2**least}."
            )
        return chosen

    def default_source(self, family: Family) -> str | None:
        return f"AgentSD, arXiv 2312.08874: self-attention at most {self.max_downsample} times below the latents"

    def in_window(self, state: CallState) -> bool:
        return (self.ratio > 0 or state.progress < self.agents_stop) and super().in_window(state)

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.start < self.agents_stop < self.stop

    def wants_block_input(self) -> bool:
        return self.ratio > 0 and self.metric == "block"

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        return self._attend

    def _attend(self, call: AttnCall, proceed: Proceed) -> Tensor:
        grid = call.grid
        if call.index > 0:
            return proceed(call)
        if call.image is not None and call.image != slice(0, call.q.shape[2]):
            raise UnsupportedModelError(
                f"{self._label}: {call.site.name} attends to others beside the image's tokens (earlier frames, "
                "reference images), which cannot be merged with them."
            )
        if call.mask is not None or grid is None:
            what = "has an attention mask" if grid is not None else f"has {call.q.shape[2]} tokens on an unknown grid"
            raise UnsupportedModelError(f"{self._label}: {call.site.name} {what}, so its tokens cannot be merged.")
        size, n, heads = (grid[1], grid[2]), call.q.shape[2], call.q.shape[1]
        early = call.state.progress < self.agents_stop
        side = self.cell if early else self.late_cell

        def tokens(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(2)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (heads, -1)).transpose(1, 2)

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            return proceed(call.with_(q=q, k=k, v=v, mask=mask, scale=scale))

        if self.ratio == 0:
            agents = pool_cells(tokens(call.q), size, (side, side))
            if 2 * agents.shape[1] >= n:
                return proceed(call)
            return self._through(call, call.q, split(agents), call.k, call.v, plain)
        partners = match_tokens(self._compared(call), size, (side, side), self._choice(call, size, side))
        merge = partners.merge(merged_count(n, self.ratio, len(partners.src)))
        q, k, v = (split(merge(tokens(x))) for x in (call.q, call.k, call.v))
        fewer = merged_count(n, self.agent_ratio, len(partners.src))
        if early and 2 * (n - fewer) < q.shape[2]:
            out = self._through(call, q, split(partners.merge(fewer)(tokens(call.q))), k, v, plain)
        else:
            out = plain(q, k, v, None, call.scale)
        return split(merge.undo(tokens(out)))

    def _through(self, call: AttnCall, q: Tensor, agents: Tensor, k: Tensor, v: Tensor, plain: Plain) -> Tensor:
        return agent_attention(
            q, agents, k, v, scale=call.scale, k_scale2=self.k_scale2, k_shortcut=self.k_shortcut, plain=plain
        )

    def _compared(self, call: AttnCall) -> Tensor:
        tokens = call.hidden if self.metric == "norm" else call.block_input
        if tokens is None or tokens.ndim != 3 or tokens.shape[1] != call.q.shape[2]:
            raise UnsupportedModelError(
                f"{self._label}: the tokens that {call.site.name} should be compared by (metric={self.metric!r}) did "
                "not come by; gradient checkpointing and compiled blocks hide the block's input. Use metric='norm', or "
                "ratio=0."
            )
        return tokens

    def _choice(self, call: AttnCall, size: tuple[int, int], side: int) -> Tensor | None:
        """Draw the token of each cell: the same in the base pass and in a perturbed pass of the step."""
        even = call.state.scratch.setdefault("AgentAttention: even rows", call.state.rows.total % 2 == 0)
        if not self.use_rand or not even:
            return None
        generator = torch.Generator().manual_seed((self.seed * 10_007 + call.state.step) * 1_009 + call.site.depth)
        return torch.randint(side * side, (size[0] // side, size[1] // side), generator=generator)
