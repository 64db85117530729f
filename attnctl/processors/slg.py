"""SLG: guidance away from a prediction with whole transformer blocks skipped.

    pred = base + w (c - p),   p: the prediction with block output := block input in the chosen blocks

Skip-layer guidance, Stability AI's SD3.5 reference; for video also STG, "Spatiotemporal Skip Guidance for Enhanced
Video Diffusion Sampling", arXiv 2411.18664.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.listing import blocks_around
from attnctl.core.hosts.published import Default
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import UnsupportedModelError

__all__ = ["SLG"]

_TOKENS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True, kw_only=True)
class SLG(Guidance):
    """Guide away from the prediction that skips some transformer blocks.

    The published setting for SD3.5 medium is blocks 7, 8 and 9 at scale 2.8 from 1 % to 20 % of the run.

    Example:
        >>> SLG(sites=["transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"]).scale
        2.8
    """

    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal")
    about: ClassVar[About] = About(
        does="guides away from skipped blocks",
        page="slg",
        goal="sharpen structure",
        paper="SD3.5 reference; for video arXiv 2411.18664",
        cite=("Hyung et al., *Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling*, arXiv 2411.18664",),
    )
    published: ClassVar[Mapping[str, Default]] = {
        "Stable Diffusion 3, 3.5": Default(
            sites=("transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"),
            blocks=24,
            source="Stability AI's SD3.5 medium reference: blocks 7, 8, 9",
        )
    }

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        blocks = blocks_around(sites, denoiser)
        return Branch(("skip", tuple(blocks.values())), blocks={m: _skip(n) for m, n in blocks.items()})


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
