"""TPG: guidance away from a prediction whose transformer blocks see their image tokens in random order.

    pred = base + w (c - p),   p: the prediction with block input := shuffled tokens in the chosen blocks

"Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnctl.core.call import CallState
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.listing import blocks_around
from attnctl.core.hosts.tokens import image_in
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About, Preset
from attnctl.errors import SiteError, UnsupportedModelError

__all__ = ["TPG"]


@dataclass(frozen=True, kw_only=True)
class TPG(Guidance):
    """Guide away from the prediction whose blocks see their image tokens in random order (arXiv 2506.10036).

    Attributes:
        seed: Seed of the permutations. They are drawn anew for every block and step from a generator of their own.
    """

    seed: int = knob(0, 0, 2**62 - 1)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal")
    about: ClassVar[About] = About(
        does="guides away from shuffled tokens",
        page="tpg",
        goal="sharpen structure",
        paper="arXiv 2506.10036",
        cite=("Rajabi et al., *Token Perturbation Guidance for Diffusion Models*, arXiv 2506.10036",),
        sites="the down blocks of a UNet",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            ("PARO", "AgentAttention", "BroadWay", "EnhanceAVideo"),
            "block",
            "the one shuffles the tokens of the block, the other goes by their places",
        ),
    )
    presets: ClassVar[tuple[Preset, ...]] = (Preset("shapes:mmdit", "TPG(scale=2.5, sites=6)"),)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if any(s.name.startswith("down_blocks.") and s.kind == "self" for s in sites):
            return select(sites, "down_blocks", kinds=("self",), what="TPG")
        raise SiteError(
            f"TPG: its paper perturbs the down blocks of UNets, and {family.name} models have none. Pass `sites=`."
        )

    def default_source(self, family: Family) -> str | None:
        return "TPG, arXiv 2506.10036: the down blocks"

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        blocks = blocks_around(sites, denoiser)
        generator = torch.Generator().manual_seed(self.seed)
        now: list[CallState] = []
        makers = {m: _shuffle(name, generator, now) for m, name in blocks.items()}

        def begin(state: CallState) -> None:
            now[:] = [state]
            generator.manual_seed(self.seed + 10_007 * state.step)  # a run draws the same whatever ran before it

        return Branch(("shuffle", self.seed, tuple(blocks.values())), blocks=makers, begin=begin)


def _shuffle(
    name: str, generator: torch.Generator, now: list[CallState]
) -> Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]:
    """Make a forward that permutes the image tokens of a block's hidden states, [B, N, C].

    Args:
        name: The block.
        generator: Draws the orders.
        now: Holds the denoiser call that is under way, which says where the image lies.
    """

    def make(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        orders: dict[int, torch.Tensor] = {}  # gradient checkpointing runs the block again, in the same order

        def shuffled(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            image = image_in(now[0], x.shape[1]) if x.ndim == 3 else None
            if image is None:
                raise UnsupportedModelError(
                    f"TPG: block {name} was called with hidden states of shape {tuple(x.shape)}, and its tokens cannot "
                    "be shuffled; expected [rows, tokens, channels]. Choose other sites."
                )
            n = x.shape[1]
            if n not in orders:
                drawn = torch.randperm(image.stop - image.start, generator=generator) + image.start
                order = torch.cat([torch.arange(image.start), drawn, torch.arange(image.stop, n)])
                # From memory that the device reads by itself, so that the copy is not waited for.
                pinned = x.device.type == "cuda" and torch.cuda.is_available()
                orders[n] = (order.pin_memory() if pinned else order).to(x.device, non_blocking=True)
            order = orders[n]
            if args:
                return forward(x[:, order], *args[1:], **kwargs)
            return forward(**{**kwargs, "hidden_states": x[:, order]})

        return shuffled

    return make
