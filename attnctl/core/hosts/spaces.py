"""What a prediction is about: noise, velocity or the clean image, and the way from one to another.

The latents of a step are x = a x0 + b eps. A model predicts eps, x0, or a velocity: b and a exchanged on the circle
(v = a eps - b x0 with a^2 + b^2 = 1), or along the straight path of flow matching (v = eps - x0 with a = 1 - b). Each
of the others is then k x + m times the prediction, with numbers k and m of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnctl.core.hosts.scheduler import place_of
from attnctl.errors import UnsupportedModelError

__all__ = ["Space", "Way", "level_of", "way_to"]

Space = Literal["model", "x0", "eps"]
_WINDOW = "Use another space, or give the control a window (start, stop) without this step."


@dataclass(frozen=True)
class Way:
    """The way from a model's prediction to another space: k x + m times the prediction.

    Attributes:
        k: Factor of the latents x.
        m: Factor of the prediction.
        x: The latents of the step, as the scheduler has them; None where k is 0.
    """

    k: float = 0.0
    m: float = 1.0
    x: Tensor | None = None

    def there(self, prediction: Tensor) -> Tensor:
        """Turn a prediction into the other space."""
        return self.m * prediction if self.x is None else self.k * self.x.to(prediction) + self.m * prediction

    def back(self, value: Tensor) -> Tensor:
        """Turn a value of the other space into a prediction of the model."""
        if self.m == 0:  # pure noise, of which every prediction says the same
            raise UnsupportedModelError(f"The model's prediction says nothing of the noise at this step. {_WINDOW}")
        return value / self.m if self.x is None else (value - self.k * self.x.to(value)) / self.m


def way_to(space: Space, scheduler: Any, timestep: float | None, x: Tensor) -> Way:
    """Find the way from a model's prediction to another space, at the step that is under way.

    Args:
        space: "model" for the prediction itself, "x0" for the clean image, "eps" for the noise.
        scheduler: The scheduler of the run.
        timestep: The timestep that the denoiser is called with.
        x: The latents, as the scheduler has them.

    Raises:
        UnsupportedModelError: The scheduler does not tell its noise level or what its model predicts.
    """
    if space == "model":
        return Way()
    level = level_of(scheduler, timestep)
    if level is None:
        name = "a guider or a bare model" if scheduler is None else type(scheduler).__name__
        raise UnsupportedModelError(
            f'space="{space}" needs the noise level of the step and what the model predicts, which {name} does not '
            'tell. Use space="model".'
        )
    a, b, kind = level
    n = math.hypot(a, b)
    if kind == "flow":
        k, m = 1.0, -b
    elif kind == "epsilon" and a:
        k, m = 1 / a, -b / a
    elif kind == "v_prediction":
        k, m = a / n**2, -b / n
    elif kind == "sample":
        k, m = 0.0, 1.0
    else:
        raise UnsupportedModelError(
            f'space="{space}" is not known for a model that predicts {kind!r} at noise level {b:g}. Use space="model".'
        )
    if space == "eps":
        if b == 0:
            raise UnsupportedModelError(f'space="{space}": there is no noise in this step\'s latents. {_WINDOW}')
        k, m = (1 - a * k) / b, -a * m / b
    return Way(k, m, x)


def level_of(scheduler: Any, timestep: float | None) -> tuple[float, float, str] | None:
    """Return a and b of x = a x0 + b eps at the step that is under way, and what the model predicts.

    Args:
        scheduler: The scheduler of the run, or None.
        timestep: The timestep that the denoiser is called with.

    Returns:
        None where the scheduler does not tell.
    """
    place = None if scheduler is None else place_of(scheduler, timestep)
    if place is None:
        return None
    place, config = min(place, len(scheduler.timesteps) - 1), scheduler.config
    kind = str(config.get("prediction_type", "flow"))
    kind = "flow" if kind in ("flow_prediction", "flow") else kind
    sigmas = getattr(scheduler, "sigmas", None)
    if "EDM" in type(scheduler).__name__ or config.get("timestep_type") == "continuous":
        return None  # they hand on what their own preconditioning has made of the prediction
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t") and sigmas is not None:  # DPM-Solver, UniPC, DEIS
        a, b = scheduler._sigma_to_alpha_sigma_t(sigmas[place])
        return float(a), float(b), kind
    if hasattr(scheduler, "is_scale_input_called") and sigmas is not None:  # Euler and its kin: x = x0 + sigma eps
        return 1.0, float(sigmas[place]), kind
    if hasattr(scheduler, "alphas_cumprod"):
        share = float(scheduler.alphas_cumprod[int(scheduler.timesteps[place])])
        return math.sqrt(share), math.sqrt(1 - share), kind
    if sigmas is not None and kind == "flow":
        return 1 - float(sigmas[place]), float(sigmas[place]), kind
    return None
