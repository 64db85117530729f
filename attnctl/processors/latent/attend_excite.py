"""Attend-and-Excite: ask the most neglected word for attention.

    L = max_s max(0, 1 - max_ij A^s_ij)          z' = z - alpha_i grad_z L

"Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", arXiv 2301.13826. A is the
mean cross-attention at 16 x 16, shared among the text tokens by softmax(100 A) and blurred. At three steps of the run
the update is repeated until the loss has reached a level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.registry import knob
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError
from attnctl.processors.latent.guidance import LatentGuidance
from attnctl.processors.latent.losses import MapNorm, attend_excite

__all__ = ["AttendExcite"]


@dataclass(frozen=True, kw_only=True)
class AttendExcite(LatentGuidance):
    """Move the latents until every concept is attended somewhere (arXiv 2301.13826).

    Attributes:
        stop: 0.5: the first 25 of 50 steps, as published.
        thresholds: Pairs (fraction of the run, least attention): at the first step there, updates are repeated until
            every sample's loss is at most 1 - least attention.
        refine_steps: Most updates of one such refinement; 0 for none.

    Example:
        >>> AttendExcite(concepts=("cat", "dog"), refine_steps=0).describe()
        "AttendExcite(concepts=('cat', 'dog'), refine_steps=0)"
    """

    stop: float = 0.5
    map_norm: MapNorm = knob("ae", options=MapNorm)
    thresholds: tuple[tuple[float, float], ...] = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
    refine_steps: int = knob(20, 0, unit="updates")

    about: ClassVar[About] = About(
        does="moves the latents so that no noun is neglected",
        page="attend_excite",
        goal="get every object of the prompt, in its place",
        title="Attend-and-Excite",
        paper="arXiv 2301.13826",
        cite=(
            "Chefer et al., *Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion "
            "Models*, arXiv 2301.13826",
        ),
        group="Words and layout",
        needs=("the prompt", "gradients"),
    )
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "shapes:text2image",
            'AttendExcite(concepts=NOUNS, grad_transform="l2", step_size=0.5, thresholds=())',
            column=4,
            label="A&E",
        ),
        Preset("shapes:mmdit", 'AttendExcite(concepts=NOUNS, grad_transform="l2", step_size=0.5, thresholds=())'),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        form = "pairs (fraction of the run, least attention), both from 0 to 1, such as ((0.0, 0.05), (0.2, 0.5))"
        try:
            pairs = tuple((float(at), float(least)) for at, least in self.thresholds)
        except (TypeError, ValueError):
            raise ConfigError(f"{self._label}: thresholds={self.thresholds!r}: expected {form}.") from None
        if not all(0 <= value <= 1 for pair in pairs for value in pair):
            raise ConfigError(f"{self._label}: thresholds={self.thresholds!r}: expected {form}.")
        object.__setattr__(self, "thresholds", pairs)

    def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
        return attend_excite(maps)

    def level(self, state: CallState) -> float | None:
        n = state.steps or 1
        here = [1 - least for at, least in self.thresholds if state.step == math.ceil(at * n - 1e-9)]
        return max(min(here), 0.0) if here and self.refine_steps else None

    @property
    def max_refine(self) -> int:
        return self.refine_steps
