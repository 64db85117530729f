"""TCFG: guidance whose negative prediction is damped to the direction that it shares with the prompt's.

    p = u^ + w (c - u^),   u^ = <u, v> v,   v the first right singular vector of the 2 x n matrix of rows c and u

"TCFG: Tangential Damping Classifier-free Guidance", arXiv 2503.18137, Algorithm 1. v is computed in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnctl.data.about import About
from attnctl.kernels.combining import tangential
from attnctl.processors.combining.combiner import Combiner, Moment

__all__ = ["TCFG"]


@dataclass(frozen=True, kw_only=True)
class TCFG(Combiner):
    """Damp the negative prediction to the direction that it shares with the prompt's (arXiv 2503.18137).

    Example:
        >>> TCFG(scale=5.0).describe()
        'TCFG(scale=5.0)'
    """

    about: ClassVar[About] = About(
        does="damps the negative prediction to the direction that it shares with the prompt's",
        page="combiners",
        goal="guide without burnt colours",
        paper="arXiv 2503.18137",
        cite=("Kwon et al., *TCFG: Tangential Damping Classifier-free Guidance*, arXiv 2503.18137",),
        sites="no attention, but the model's predictions",
    )

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        return tangential(u, c, self.weight(moment))
