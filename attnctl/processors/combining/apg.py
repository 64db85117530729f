"""APG: guidance without most of what only makes the prediction longer.

    d = c - u;  d <- d + beta d_before;  d <- d min(1, r / |d|);  p = u + w (d_orth + eta d_par)

d_par is the part of d that is parallel to c. "Eliminating Oversaturation and Artifacts of High Guidance Scales in
Diffusion Models", arXiv 2410.02416, Algorithm 1, there in the space of clean images and as c + (w - 1) times the same.
Counted from u, as here and in diffusers' guider, eta = 0 keeps u's own length. With `fill_steps` the run begins with
plain guidance while the momentum fills (HunyuanImage 2.1: 5 steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.kernels.combining import linear, projected
from attnctl.processors.combining.combiner import Combiner, Moment

__all__ = ["APG"]


@dataclass(frozen=True, kw_only=True)
class APG(Combiner):
    """Guide with the part of c - u that is orthogonal to c, shortened and with momentum (arXiv 2410.02416).

    Attributes:
        eta: Weight of the part that is parallel to c; 1 keeps it.
        norm: Greatest norm r of c - u for each picture, 0 for no limit. The paper's are for 4 x 128 x 128 latents in
            the space of clean images: 15 for SDXL, 7.5 for SD3. It grows with the root of the number of latents.
        momentum: beta; each step adds beta times the difference of the step before, which contains the earlier ones. A
            value below 0 guides less where the direction stays the same (the paper's: -0.5 for SDXL); 0 for none.
        fill_steps: Steps at the beginning with u + s (c - u) at the pipeline's own scale, while the momentum fills.

    Example:
        >>> APG(scale=10.0, eta=0.2).describe()
        'APG(scale=10.0, eta=0.2)'
    """

    eta: float = knob(0.0, -math.inf, span=(0.0, 1.0, 0.05), shown=True)
    norm: float = knob(15.0, 0.0, span=(0.0, 30.0, 0.5), shown=True)
    momentum: float = knob(-0.5, -1.0, 1.0, shown=True)
    fill_steps: int = knob(0, 0, unit="steps", last=True)

    about: ClassVar[About] = About(
        does="guides with what is orthogonal to the prompt's prediction, which keeps colours at high scales",
        page="combiners",
        goal="guide without burnt colours",
        paper="arXiv 2410.02416",
        cite=(
            "Sadat et al., *Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models*, "
            "arXiv 2410.02416",
        ),
        sites="no attention, but the model's predictions",
    )

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.fill_steps > 0

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        d = c - u
        if self.momentum and (before := moment.memory.get("difference")) is not None and before.shape == d.shape:
            d = d + self.momentum * before
        if self.momentum:
            moment.memory["difference"] = d
        if moment.step < self.fill_steps:
            return linear(u, c, moment.weight(None, self.describe()))
        return projected(u, c, self.weight(moment), eta=self.eta, norm=self.norm, difference=d)
