"""Guidance in an interval of the run, and the prompt's prediction outside of it.

    p = the guided sum where low <= step / steps < high,   p = c elsewhere

"Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", arXiv
2404.07724, Section 3, there by noise level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnctl.core.call import CallState
from attnctl.core.registry import Conflict, knob
from attnctl.data.about import About
from attnctl.errors import ConfigError
from attnctl.processors.combining.combiner import Combining

__all__ = ["GuidanceInterval"]


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval(Combining):
    """Guide in an interval of the run alone (arXiv 2404.07724).

    Other guidance has windows of its own: this one is about classifier-free guidance and the rules in its place.

    Attributes:
        interval: First and last fraction of the run between which guidance acts, the last excluded. Outside the
            control's `start` and `stop` the pipeline guides as always.

    Example:
        >>> GuidanceInterval(interval=(0.1, 0.7)).describe()
        'GuidanceInterval(interval=(0.1, 0.7))'
    """

    interval: tuple[float, float] = knob((0.2, 0.8), kind="window", shown=True)

    about: ClassVar[About] = About(
        does="guides in an interval of the run, and takes the prompt's prediction outside",
        page="combiners",
        goal="guide without burnt colours",
        title="Guidance interval",
        paper="arXiv 2404.07724",
        cite=(
            "Kynkäänniemi et al., *Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in "
            "Diffusion Models*, arXiv 2404.07724",
        ),
        sites="no attention, but the model's predictions",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("GuidanceInterval", "model", "both say when the run is guided: give one interval"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.interval, tuple) or len(self.interval) != 2:
            raise ConfigError(f"{self._label}: interval={self.interval!r}: give two fractions, such as (0.2, 0.8).")

    def needs_steps(self) -> bool:
        return True

    def guides(self, state: CallState) -> bool:
        low, high = self.interval
        return low <= state.progress < high

    def leaves(self, state: CallState) -> bool:
        return self.guides(state)
