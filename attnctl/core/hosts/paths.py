"""A scheduler that leads a pipeline along the path between an image and noise, in either direction, by any rule.

Pipelines run unmodified: they call `set_timesteps` and then, per evaluation of the denoiser, `step`. What a model
predicts is turned into the velocity eps - x_0 whatever it was trained for. Models of another noise than flow matching
walk the same path: with x = alpha x_0 + sigma eps and alpha^2 + sigma^2 = 1, the point x / (alpha + sigma) lies on the
straight path at the level s = sigma / (alpha + sigma), and Euler's rule there is DDIM (arXiv 2010.02502).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import UnsupportedModelError
from attnctl.kernels.checks import wide_dtype
from attnctl.kernels.flow import Rule, Walk, evaluations, flow_edit, toward, walk

__all__ = ["Bend", "PathScheduler", "Route", "base_of"]

_STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "Consistency", "VQDiffusion", "UnCLIP", "AMUSEd", "SCM")


def base_of(scheduler: Any) -> Any:
    """Make the scheduler whose noise levels a path follows: flow matching by Euler, or DDIM of the same noise.

    Raises:
        UnsupportedModelError: The scheduler adds noise at its steps, or has a noise that cannot be run backwards.
    """
    import diffusers

    name, config = type(scheduler).__name__, dict(scheduler.config)
    sde = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling")
    if sde or any(part in name for part in _STOCHASTIC):
        raise UnsupportedModelError(
            f"{name} adds fresh noise at every step (or jumps), so no inversion leads back through it. Set another "
            "scheduler of the same model first, FlowMatchEulerDiscreteScheduler or DDIMScheduler."
        )
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return type(scheduler).from_config(scheduler.config)
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction" or "FlowMatch" in name
    if flow:
        shift = float(config.get("flow_shift", config.get("shift")) or 1.0)
        options = {k: config[k] for k in ("use_dynamic_shifting", "time_shift_type") if k in config}
        return diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)), shift=shift, **options
        )
    if name.startswith("CogVideoX"):
        return diffusers.CogVideoXDDIMScheduler.from_config(scheduler.config)
    if not hasattr(scheduler, "alphas_cumprod") or "beta_schedule" not in config:
        raise UnsupportedModelError(
            f"{name} runs neither on the noise of flow matching nor on that of DDIM, so attnctl cannot invert it. Set "
            "FlowMatchEulerDiscreteScheduler or DDIMScheduler, whichever the model was trained for."
        )
    copied = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    spacing = config.get("timestep_spacing")
    return diffusers.DDIMScheduler(
        **{n: config[n] for n in (*copied, "rescale_betas_zero_snr") if n in config},
        clip_sample=False,
        set_alpha_to_one=bool(config.get("set_alpha_to_one", False)),
        steps_offset=int(config.get("steps_offset", 1)),
        timestep_spacing=spacing if spacing in ("leading", "trailing") else "leading",
    )


@dataclass(frozen=True)
class Bend:
    """How a path is bent towards a known end (RF-Inversion).

    Attributes:
        end: Noise on the way up, clean latents on the way down.
        strength: gamma or eta.
        steps: How many of the first steps are bent; None for all.
    """

    end: Tensor
    strength: float
    steps: int | None = None


@dataclass(frozen=True)
class Route:
    """Which way a path is gone.

    Attributes:
        rule: The rule of its steps.
        up: Whether it leads to noise.
        bend: What bends it, or None.
        first: How many of the steps at the noisy end are left out (FlowEdit's n - n_max).
        pairs: Draws noise for FlowEdit, whose points are pairs [source; edit]; None for an ordinary path.
        average: FlowEdit's n_avg.
        plain: FlowEdit's n_min.
    """

    rule: Rule = "euler"
    up: bool = False
    bend: Bend | None = None
    first: int = 0
    pairs: Callable[[Tensor], Tensor] | None = None
    average: int = 1
    plain: int = 0

    def levels(self, grid: Sequence[float]) -> list[float]:
        """Order the levels of a run, which fall, as they are reached."""
        levels = list(grid[self.first :])
        return levels[::-1] if self.up else levels

    @property
    def walked(self) -> Rule:
        """Name the rule of the steps in this direction: what UniInv has inverted, Euler's rule denoises."""
        return "euler" if self.rule == "uniinv" and not self.up else self.rule

    def evaluations(self, levels: Sequence[float]) -> list[float]:
        """List the levels at which the denoiser is called."""
        if self.pairs is None:
            return evaluations(self.walked, levels)
        steps, edited = len(levels) - 1, len(levels) - 1 - self.plain
        return [levels[i] for i in range(steps) for _ in range(self.average if i < edited else 1)]

    def begin(self, x: Tensor, levels: Sequence[float], note: Callable[[int, Tensor], None]) -> Walk:
        """Begin the walk."""
        if self.pairs is None:
            return walk(self.walked, x, levels, note)
        source, draw = x[: len(x) // 2], self.pairs
        return flow_edit(source, levels, lambda: draw(source), self.average, self.plain)


class PathScheduler:
    """Leads a pipeline along a path.

    Args:
        base: What `base_of` returns: it knows the noise levels of a run.
        route: Which way.
        note: Called with the number and the latents of each level that is reached, the first included.

    Attributes:
        levels: The noise levels of the run, in the order in which they are reached; 0 clean, 1 noise.
        at: The noise level of each evaluation of the denoiser.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, base: Any, route: Route, note: Callable[[int, Tensor], None] = lambda i, x: None) -> None:
        self.base, self.route, self.note = base, route, note
        self.config = base.config
        self.flow = hasattr(base, "sigma_min")
        self.inverted = bool(base.config.get("invert_sigmas", False))
        self.kind = "flow" if self.flow else str(base.config.prediction_type)
        self.levels: list[float] = []
        self.at: list[float] = []
        self.timesteps = self.sigmas = torch.empty(0)
        self._restart()

    def _restart(self) -> None:
        self._walk: Walk | None = None
        self._point: Tensor | None = None
        self._given: Tensor | None = None
        self.step_index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accept what pipelines say of image to image; a path begins at its beginning."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the latents, which no path scales."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Find the noise levels of a run of so many steps."""
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps} if self.flow else {}
        self.base.set_timesteps(num_inference_steps, device=device, **{k: v for k, v in given.items() if v is not None})
        if self.flow:
            grid = [1 - float(s) if self.inverted else float(s) for s in self.base.sigmas.double()]
        else:
            alphas = self.base.alphas_cumprod
            last = float(self.base.final_alpha_cumprod)
            grid = [_level(a) for a in (*(float(alphas[int(t)]) for t in self.base.timesteps), last)]
        self.levels = self.route.levels(grid)
        self.at = self.route.evaluations(self.levels)
        times = [self._time(level) for level in self.at]
        self.timesteps = torch.tensor(times, device=device, dtype=torch.float32 if self.flow else torch.int64)
        self.sigmas = torch.tensor([*self.at, self.levels[-1]], dtype=torch.float32)
        self._restart()

    def _time(self, level: float) -> float:
        """Return the timestep that the model was trained to see at a level."""
        if self.flow:
            return 1000.0 * (1 - level if self.inverted else level) * self.config.num_train_timesteps / 1000
        share = math.sqrt((1 - level) ** 2 + level**2)
        alpha = ((1 - level) / share) ** 2
        return int((self.base.alphas_cumprod.double() - alpha).abs().argmin())

    def _scale(self, level: float) -> float:
        """Return what latents are multiplied by to lie on the straight path."""
        return 1.0 if self.flow else math.sqrt((1 - level) ** 2 + level**2)

    def velocity(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        """Turn a prediction at the latents x into the velocity eps - x_0."""
        if self.flow:
            return -output if self.inverted else output
        share = self._scale(level)
        alpha, sigma = (1 - level) / share, level / share
        if self.kind == "v_prediction":
            return (sigma * x + alpha * output) - (alpha * x - sigma * output)
        if (alpha if self.kind == "epsilon" else sigma) < 1e-4:
            raise UnsupportedModelError(
                f"A model that predicts {self.kind!r} says nothing at noise level {level:.3g}, so the path cannot be "
                "followed there. Use a scheduler without rescaled betas (rescale_betas_zero_snr=False)."
            )
        if self.kind == "epsilon":
            return output - (x - sigma * output) / alpha
        return (x - alpha * output) / sigma - output

    def first(self, sample: Tensor) -> Tensor:
        """Begin the run; return the latents at which the denoiser is to be called first."""
        level = self.levels[0]
        start = sample.to(wide_dtype(sample.dtype)) * (1.0 if self.route.pairs else self._scale(level))

        def note(i: int, x: Tensor) -> None:
            self.note(i, x / self._scale(self.levels[i]))

        self._walk = self.route.begin(start, self.levels, note)
        self._point, level = next(self._walk)
        self._given = (self._point / self._scale(level)).to(sample.dtype)
        return self._given

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **more: Any) -> Any:
        """Take a prediction; return the latents at which the denoiser is to be called next, at last the end."""
        if self._walk is None:
            self.first(sample)
        assert self._walk is not None
        assert self._point is not None
        level, wide = self.at[self.step_index], wide_dtype(sample.dtype)
        x = sample.to(wide)
        v = self.velocity(model_output.to(wide), x, level)
        point = self._point
        added = None
        if self._given is None or sample.shape != self._given.shape or not torch.equal(sample, self._given):
            added = x * self._scale(level) - point  # a control has changed the latents meanwhile
            point = point + added
        bend = self.route.bend
        if bend is not None and (bend.steps is None or self.step_index < bend.steps):
            v = toward(v, point, bend.end.to(point), level, bend.strength, noise=self.route.up)
        try:
            self._point, level = self._walk.send((v, added))
        except StopIteration as end:
            self._point, level = end.value, self.levels[-1]
        assert self._point is not None
        self._given = (self._point / self._scale(level)).to(sample.dtype)
        self.step_index += 1
        return _Step(self._given) if return_dict else (self._given,)

    def mixed(self, x: Tensor, a: float, y: Tensor, b: float, level: float) -> Tensor:
        """Return latents at a level between those at the levels a and b."""
        share = (level - a) / (b - a)
        straight = (1 - share) * self._scale(a) * x + share * self._scale(b) * y
        return straight / self._scale(level)

    def back(self, note: Callable[[int, Tensor], None] = lambda i, x: None) -> PathScheduler:
        """Make the scheduler of the way back."""
        return PathScheduler(self.base, replace(self.route, up=not self.route.up, bend=None), note)


@dataclass
class _Step:
    """What a step returns."""

    prev_sample: Tensor


def _level(alpha_squared: float) -> float:
    alpha, sigma = math.sqrt(alpha_squared), math.sqrt(max(0.0, 1 - alpha_squared))
    return sigma / (alpha + sigma)
