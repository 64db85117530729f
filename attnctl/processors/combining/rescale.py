"""Guidance rescale: the guided sum is given the spread of the prompt's prediction.

    p <- phi p std(c) / std(p) + (1 - phi) p       std over each picture; after all other guidance

"Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, eq. 15 and 16: for pipelines that
have no `guidance_rescale` of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.hosts.pipelines import guidance_rescale
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import ConflictError
from attnctl.kernels.combining import rescaled
from attnctl.processors.combining.combiner import Combining, LiveSum, Moment

__all__ = ["Rescale"]


@dataclass(frozen=True, kw_only=True)
class Rescale(Combining):
    """Give the guided sum the standard deviation of the prompt's prediction (arXiv 2305.08891).

    Attributes:
        phi: Share of the rescaled sum in the result, in [0, 1]; 0 changes nothing.

    Example:
        >>> Rescale(phi=0.5).describe()
        'Rescale(phi=0.5)'
    """

    phi: float = knob(0.7, 0.0, 1.0, shown=True)

    about: ClassVar[About] = About(
        does="gives the guided sum the spread of the prompt's prediction",
        page="combiners",
        goal="guide without burnt colours",
        title="Guidance rescale",
        paper="arXiv 2305.08891",
        cite=("Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, arXiv 2305.08891",),
        sites="no attention, but the model's predictions",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("Rescale", "model", "both rescale the same sum: give one phi"),
    )

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _LiveRescale(self)

    def finished(self, p: Tensor, c: Tensor, moment: Moment) -> Tensor:
        return rescaled(p, c, self.phi)


class _LiveRescale(LiveSum):
    def before_call(self, passes: LiveDenoiser) -> None:
        super().before_call(passes)
        if (phi := guidance_rescale(passes.pipe)) > 0:
            raise ConflictError(
                f"{self.control.describe()}: the pipeline rescales its guidance itself (guidance_rescale={phi:g}). Use "
                "one of the two."
            )

    def renormed(self) -> None:
        raise ConflictError(
            f"{self.control.describe()} would do nothing: {type(self.pipe).__name__} scales its sum to the length of "
            "the prompt's prediction itself. Leave the control out."
        )
