"""SLG and TPG: guidance away from a prediction with whole transformer blocks skipped, or fed shuffled tokens.

SLG   block output := block input     skip-layer guidance, Stability AI's SD3.5 reference; for video also STG,
                                      "Spatiotemporal Skip Guidance", arXiv 2411.18664
TPG   block input := shuffled tokens  "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036
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
from attnctl.core.sites import Site, select
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError

__all__ = ["SLG", "TPG"]

_TOKENS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True, kw_only=True)
class _BlockGuidance(Guidance):
    """Base of guidance that replaces the forward of the blocks around the selected attention sites."""

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal")

    def blocks(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> dict[torch.nn.Module, str]:
        """Name the transformer block around each site."""
        return {denoiser.get_submodule(s.name.rpartition(".")[0]): s.name.rpartition(".")[0] for s in sites}


@dataclass(frozen=True, kw_only=True)
class SLG(_BlockGuidance):
    """Guide away from the prediction that skips some transformer blocks.

    The published setting for SD3.5 medium is blocks 7, 8 and 9 at scale 2.8 from 1 % to 20 % of the run.

    Example:
        >>> SLG(sites=["transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"]).scale
        2.8
    """

    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        blocks = [s for s in sites if s.kind == "joint"]
        if "SD3Transformer2DModel" in family.classes and len(blocks) == 24:
            return select(sites, [f"transformer_blocks.{i}" for i in (7, 8, 9)], kinds=("joint",), what="SLG")
        return super().default_sites(sites, family)

    def default_source(self, family: Family) -> str | None:
        if "SD3Transformer2DModel" in family.classes:
            return "Stability AI's SD3.5 medium reference: blocks 7, 8, 9"
        return super().default_source(family)

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        blocks = self.blocks(sites, denoiser)
        return Branch(("skip", tuple(blocks.values())), blocks={m: _skip(n) for m, n in blocks.items()})


@dataclass(frozen=True, kw_only=True)
class TPG(_BlockGuidance):
    """Guide away from the prediction whose blocks see their image tokens in random order (arXiv 2506.10036).

    Attributes:
        seed: Seed of the permutations. They are drawn anew for every block and step from a generator of their own.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**62:
            raise ConfigError(f"TPG: seed={self.seed!r:.40} must be a whole number, 0 or more, below 2**62.")

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if any(s.name.startswith("down_blocks.") and s.kind == "self" for s in sites):
            return select(sites, "down_blocks", kinds=("self",), what="TPG")
        raise SiteError(
            f"TPG: its paper perturbs the down blocks of UNets, and {family.name} models have none. Pass `sites=`."
        )

    def default_source(self, family: Family) -> str | None:
        return "TPG, arXiv 2506.10036: the down blocks"

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        blocks = self.blocks(sites, denoiser)
        generator = torch.Generator().manual_seed(self.seed)
        makers = {m: _shuffle(generator) for m in blocks}

        def begin(state: CallState) -> None:
            generator.manual_seed(self.seed + 10_007 * state.step)  # a run draws the same whatever ran before it

        return Branch(("shuffle", self.seed, tuple(blocks.values())), blocks=makers, begin=begin)


def _arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the token tensors that a block was called with, hidden states first."""
    found = [*args[:2], *(kwargs[n] for n in _TOKENS if kwargs.get(n) is not None)]
    return [t for t in found if isinstance(t, torch.Tensor) and t.ndim >= 3]


def _skip(name: str) -> Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]:
    """Make a forward that returns a block's inputs in the places where the block returns its outputs."""
    order: list[int | None] = []
    single = [False]

    def learn(output: Any, inputs: list[torch.Tensor]) -> None:
        single[0] = isinstance(output, torch.Tensor)
        for part in [output] if single[0] else output:
            if part is None:
                order.append(None)
                continue
            fits = [i for i, t in enumerate(inputs) if t.shape == part.shape and i not in order]
            if not fits or (len(fits) > 1 and fits[0] == 0 and len(inputs) > 1 and not single[0]):
                raise UnsupportedModelError(
                    f"SLG: block {name} cannot be skipped: its outputs cannot be matched with its inputs "
                    f"(shapes {[tuple(t.shape) for t in inputs]})."
                )
            order.append(fits[0])

    def make(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skipped(*args: Any, **kwargs: Any) -> Any:
            inputs = _arguments(module, args, kwargs)
            if not order:  # the first time, the block runs once to show where its outputs go
                learn(forward(*args, **kwargs), inputs)
            parts = tuple(None if i is None else inputs[i] for i in order)
            return parts[0] if single[0] else parts

        return skipped

    return make


def _shuffle(generator: torch.Generator) -> Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]:
    """Make a forward that permutes the tokens of a block's hidden states, [B, N, C]."""

    def make(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        orders: dict[int, torch.Tensor] = {}  # gradient checkpointing runs the block again, in the same order

        def shuffled(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            n = x.shape[1]
            if n not in orders:
                orders[n] = torch.randperm(n, generator=generator)
            order = orders[n].to(x.device)
            if args:
                return forward(x[:, order], *args[1:], **kwargs)
            return forward(**{**kwargs, "hidden_states": x[:, order]})

        return shuffled

    return make
