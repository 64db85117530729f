"""FDG: a guidance scale for fine detail and another for the rest.

    p = the sum of levels u_i + w_i (d_orth,i + rho_i d_par,i),   d_i = c_i - u_i on level i of a Laplacian pyramid

"Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG Scales", arXiv 2506.19713, Algorithm 2.
Levels run from fine to coarse; the scale of detail is the greater one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnctl.core.hosts.packing import as_image, as_tokens
from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.errors import ConfigError, number
from attnctl.kernels.combining import frequency_decoupled
from attnctl.processors.combining.combiner import Combiner, Moment

__all__ = ["FDG"]


@dataclass(frozen=True, kw_only=True)
class FDG(Combiner):
    """Guide fine detail and coarse structure with scales of their own (arXiv 2506.19713).

    Attributes:
        scale: Factor by which all `scales` are multiplied; None for 1.
        scales: Guidance scale of each level, the finest first; each level halves the sides.
        parallel: Weight of the part of each level's difference that is parallel to c, likewise; 1 keeps it.

    Example:
        >>> FDG(scales=(8.0, 3.0)).describe()
        'FDG(scales=(8.0, 3.0))'
    """

    scales: tuple[float, ...] = knob((10.0, 5.0), kind="free", values="two numbers or more", shown=True)
    parallel: tuple[float, ...] | None = knob(None, kind="free", values="as many numbers")

    about: ClassVar[About] = About(
        does="guides fine detail and coarse structure with scales of their own",
        page="combiners",
        goal="guide without burnt colours",
        paper="arXiv 2506.19713",
        cite=(
            "Sadat et al., *Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG Scales*, "
            "arXiv 2506.19713",
        ),
        sites="no attention, but the model's predictions",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scales", "parallel"):
            value = getattr(self, name)
            if name == "parallel" and value is None:
                continue
            if not isinstance(value, (tuple, list)) or len(value) < 2:
                raise ConfigError(f"{self._label}: {name}={value!r}: give a number for each of two levels or more.")
            checked = tuple(number(v, f"{self._label}: {name}", -math.inf) for v in value)
            object.__setattr__(self, name, checked)
        if self.parallel is not None and len(self.parallel) != len(self.scales):
            raise ConfigError(
                f"{self._label}: {len(self.scales)} scales and {len(self.parallel)} parallel weights: give one of each "
                "for every level."
            )

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        times = 1.0 if self.scale is None else self.scale
        parallel = self.parallel or (1.0,) * len(self.scales)
        a, b = (as_image(x, moment.state, self.describe()) for x in (u, c))
        p = frequency_decoupled(a, b, [times * w for w in self.scales], parallel)
        return as_tokens(p, c.shape, moment.state)
