"""MaG: guidance that is weaker where the two predictions differ much.

    p = u + w' (c - u),   w' = 1 + (w - 1) exp(-alpha |c - u| / |u|)

Magnitude-aware guidance, as diffusers' guider `MagnitudeAwareGuidance` computes it. |c - u| / |u| is large in the first
steps, where plain guidance overshoots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.kernels.combining import magnitude_aware
from attnctl.processors.combining.combiner import Combiner, Moment

__all__ = ["MaG"]


@dataclass(frozen=True, kw_only=True)
class MaG(Combiner):
    """Guide less where prompt and negative prompt differ much (magnitude-aware guidance).

    Attributes:
        alpha: How fast the weight falls with |c - u| / |u|; 0 is plain guidance.

    Example:
        >>> MaG(scale=10.0).describe()
        'MaG(scale=10.0)'
    """

    alpha: float = knob(8.0, 0.0, span=(0.0, 20.0, 0.5), shown=True)

    about: ClassVar[About] = About(
        does="guides less where the predictions for prompt and negative prompt differ much",
        page="combiners",
        goal="guide without burnt colours",
        paper="diffusers' `MagnitudeAwareGuidance`",
        sites="no attention, but the model's predictions",
    )

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        return magnitude_aware(u, c, self.weight(moment), self.alpha)
