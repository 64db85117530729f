"""CFG++: guidance between the two predictions, and noise that is put back from the negative one.

    p = u + lambda (c - u),   x' = a' x0(p) + b' eps(u)     in place of a' x0(p) + b' eps(p)

"CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", arXiv 2406.08070, Algorithm 2. The
scheduler makes its step with p; the noise that it has put back, b' eps(p), is then exchanged. b' is read off the step:
x' must be a sum of x0(p) and eps(p), which only a deterministic step of first order gives (DDIM with eta 0, Euler).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.hosts.arguments import time_of
from attnctl.core.hosts.spaces import Space, way_to
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.combining import linear
from attnctl.processors.combining.combiner import Combiner, LiveSum, Moment

__all__ = ["CFGPlusPlus", "renoised"]

_LOOSE = 1e-3
_SPACES: tuple[Space, Space] = ("x0", "eps")


def renoised(after: Tensor, x0: Tensor, eps: Tensor, other: Tensor) -> Tensor | None:
    """Exchange the noise in a scheduler's step.

    Args:
        after: What the step returned [B, ...], a' x0 + b' eps.
        x0: The clean image that the step has used.
        eps: The noise that it has used.
        other: The noise to put in its place.

    Returns:
        a' x0 + b' other; None where `after` is no sum of x0 and eps.
    """
    basis = torch.stack([x0.flatten(), eps.flatten()], 1).double()
    target = after.flatten().double()
    weights = torch.linalg.solve(basis.T @ basis, basis.T @ target)
    if (basis @ weights - target).norm() > _LOOSE * target.norm():
        return None
    return after + (weights[1] * (other - eps).double()).to(after.dtype)


@dataclass(frozen=True, kw_only=True)
class CFGPlusPlus(Combiner):
    """Guide between the two predictions, and put noise back from the negative one (arXiv 2406.08070).

    The scheduler must take deterministic steps of first order: DDIM with eta 0, or Euler.

    Attributes:
        scale: lambda in [0, 1]; the paper's 0.6 is about CFG at 7.5.

    Example:
        >>> CFGPlusPlus(scale=0.8).describe()
        'CFGPlusPlus(scale=0.8)'
    """

    scale: float = knob(0.6, 0.0, 1.0, shown=True)

    about: ClassVar[About] = About(
        does="guides between the two predictions, and puts noise back from the negative one",
        page="combiners",
        goal="guide without burnt colours",
        title="CFG++",
        paper="arXiv 2406.08070",
        cite=(
            "Chung et al., *CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models*, "
            "arXiv 2406.08070",
        ),
        sites="no attention, but the model's predictions",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            ("LatentGuidance", "FateZero", "PromptToPrompt"),
            "model",
            "both change the latents of a scheduler's step, and only a step as it was made can be given other noise",
        ),
    )

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        return linear(u, c, self.weight(moment))

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _LivePlusPlus(self)


class _LivePlusPlus(LiveSum):
    """Exchanges the noise after each step of the scheduler."""

    changes_latents = True

    def before_call(self, passes: LiveDenoiser) -> None:
        super().before_call(passes)
        self.time = time_of(passes.state.bound)
        scheduler = getattr(passes.pipe, "scheduler", None)
        if scheduler is None:
            raise self._refusal("a guider or a bare model does not show its scheduler's steps")

    def begin_run(self) -> None:
        super().begin_run()
        self.step: tuple[Tensor, Tensor, Tensor] | None = None
        """x0 and eps of the sum, and eps of the negative prediction, from the scheduler's step to its result."""

    def stepping(self, latents: Tensor) -> Tensor:
        latents = super().stepping(latents)
        if self.summed is not None:
            passes, u, *_ = self.summed
            handed = passes.latents.prediction
            if handed.shape != u.shape or latents.shape != u.shape:
                raise self._refusal(
                    f"its latents {tuple(latents.shape)}, what it is handed {tuple(handed.shape)} and the predictions "
                    f"{tuple(u.shape)} do not fit"
                )
            x0, eps = (way_to(space, self.pipe.scheduler, self.time, latents) for space in _SPACES)
            self.step = x0.there(handed), eps.there(handed), eps.there(u)
        return latents

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        parts, self.step, self.summed = self.step, None, None
        if parts is None:
            return latents
        changed = renoised(latents, *parts)
        if changed is None:
            raise self._refusal("its step is not the sum of clean image and noise that a first-order step makes")
        return changed

    def noise_added(self) -> None:
        raise self._refusal("its step adds fresh noise")

    def _refusal(self, reason: str) -> UnsupportedModelError:
        name = type(getattr(self.pipe, "scheduler", None)).__name__
        return UnsupportedModelError(
            f"{self.control.describe()} exchanges the noise of a deterministic step of first order, and {name} takes "
            f"none: {reason}. Use DDIMScheduler (eta=0) or EulerDiscreteScheduler."
        )
