"""CFG-Zero*: classifier-free guidance whose negative prediction is scaled to fit, and a first step that stays.

    p = a u + w (c - a u),   a = <c, u> / <u, u>       for each picture; the first predictions of a run are 0

"CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", arXiv 2503.18886, eq. 6 and Section 4.2.
In flow matching a prediction of 0 leaves the latents where they are. The authors leave out the first 4 % of the steps
(1 of 28); diffusers' guider, and the default here, one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.core.hosts.spaces import Way
from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.kernels.combining import zero_star
from attnctl.processors.combining.combiner import Combiner, Moment

__all__ = ["CFGZeroStar"]


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(Combiner):
    """Scale the negative prediction to fit the prompt's, and predict 0 in the first steps (arXiv 2503.18886).

    Attributes:
        zero_init_steps: Steps at the beginning of a run whose prediction is 0, whatever the window.

    Example:
        >>> CFGZeroStar(scale=5.0).describe()
        'CFGZeroStar(scale=5.0)'
    """

    zero_init_steps: int = knob(1, 0, unit="steps", span=(0, 4, 1), shown=True)

    about: ClassVar[About] = About(
        does="scales the negative prediction to fit before it guides, and skips the first step",
        page="combiners",
        goal="guide without burnt colours",
        title="CFG-Zero*",
        paper="arXiv 2503.18886",
        cite=(
            "Fan et al., *CFG-Zero\\*: Improved Classifier-Free Guidance for Flow Matching Models*, arXiv 2503.18886",
        ),
        sites="no attention, but the model's predictions",
    )

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.zero_init_steps > 0

    def total(self, u: Tensor, c: Tensor, way: Way, moment: Moment) -> Tensor:
        if moment.step < self.zero_init_steps:
            return torch.zeros_like(c)
        return super().total(u, c, way, moment)

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        return zero_star(u, c, self.weight(moment))
