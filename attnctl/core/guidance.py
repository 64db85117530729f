"""Extra guidance passes: replay what is shared, run the rest perturbed, add the difference to the prediction.

For every guidance branch the denoiser runs once more on the prompt rows, with some attention (or some blocks)
perturbed, giving p. With c the unperturbed prediction of the same rows, delta = w (c - p) is added to the prompt and
to the negative prediction; classifier-free guidance u + s (c - u) is affine, so the sum receives exactly delta.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.sites import Site

__all__ = ["Branch"]

BlockOverride = Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Branch:
    """One perturbed pass.

    Attributes:
        key: Two branches with equal keys perturb alike and share one pass.
        sites: Attention sites that `perturb` wraps.
        perturb: Outermost wrapper at those sites in the perturbed pass.
        blocks: Modules whose forward is replaced in the perturbed pass, each with the maker of its replacement.
        begin: Called before each perturbed pass, with the state of the call that it belongs to.
    """

    key: Any
    sites: tuple[Site, ...] = ()
    perturb: Wrapper | None = None
    blocks: Mapping[torch.nn.Module, BlockOverride] = field(default_factory=dict)
    begin: Callable[[CallState], None] | None = None

    @functools.cached_property
    def targets(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that this branch perturbs."""
        return tuple(s.module for s in self.sites if s.module is not None) + tuple(self.blocks)
