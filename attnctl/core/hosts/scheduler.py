"""Counting the steps of a run by watching the scheduler.

Timesteps cannot be trusted to count (FLUX passes t / 1000, Heun repeats), so the step index is the number of
`scheduler.step` calls since `set_timesteps`. As with processors, the scheduler object's class is swapped for a subclass
made once per scheduler class, and nothing is left in `vars(scheduler)`. A deep copy of the scheduler keeps working and
reports nothing: its steps (those of a preview, or of sound beside a video) are not steps of the run.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnctl.core.hosts.arguments import given_time, time_of
from attnctl.core.hosts.noise import noting_noise
from attnctl.errors import ConfigError, UnsupportedModelError, unboxed

__all__ = ["Listener", "SchedulerWatch", "call_time", "later_evaluation", "noise_time", "place_of", "step_of"]


def later_evaluation(scheduler: Any) -> bool:
    """Tell whether the scheduler's next step only completes one that began with an earlier evaluation."""
    if getattr(scheduler, "state_in_first_order", True) is False:  # Heun, KDPM2, DPM SDE
        return True
    orders, index = getattr(scheduler, "order_list", None), getattr(scheduler, "step_index", None)
    if orders is not None and index is not None:  # DPM singlestep
        return int(orders[index]) != 1
    counter = getattr(scheduler, "counter", None)
    if counter is None or not hasattr(scheduler, "prk_timesteps"):
        return False
    if scheduler.config.skip_prk_steps:  # PNDM
        return bool(counter == 1)
    return bool(counter < len(scheduler.prk_timesteps) and counter % 4 != 0)


class Listener(Protocol):
    """What a watched scheduler reports to.

    Attributes:
        hears_noise: Whether it needs to know if a step draws random numbers, which takes time to find out.
    """

    hears_noise: bool

    def claim(self) -> None:
        """A run is about to begin: refuse it, or let it."""

    def on_set_timesteps(self, *, seen: bool) -> None:
        """A run begins, or another scheduler goes on with one whose beginning was not `seen`."""

    def on_scale(self, sample: Any, scale: Callable[[Any], Any]) -> None:
        """The pipeline scales its latents for the denoiser; `scale` does the same to others."""

    def on_step(self, sample: Any, prediction: Any) -> Any:
        """A step ends; `sample` holds the latents that it updates by a prediction. Return those to update."""

    def on_stepped(self, result: Any, drew: bool) -> Any:
        """A step has ended, and drew random numbers or not; return its result, with other latents if a control asks."""


class _Slot:
    """Holds the watch of one scheduler. A copy of the scheduler shares it, and is known by not being the owner."""

    def __init__(self, watch: SchedulerWatch, scheduler: Any) -> None:
        self.watch, self.owner = watch, id(scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return self


def _watch_of(scheduler: Any) -> SchedulerWatch | None:
    slot: _Slot | None = scheduler._attnctl
    return slot.watch if slot is not None and slot.owner == id(scheduler) else None


def _check_steps(steps: Any) -> None:
    """Raise ConfigError for a number of steps that no run has; schedulers divide by it, or run none in silence."""
    steps = unboxed(steps)
    if isinstance(steps, (int, float)) and (steps < 1 or steps % 1 != 0):
        raise ConfigError(f"num_inference_steps={steps} was given; expected a whole number of steps, 1 or more.")


@functools.cache
def _watched(original: type) -> type:
    cls: Any = original
    names = list(inspect.signature(cls.step).parameters)[1:]
    place = names.index("sample") if "sample" in names else 2  # a user's own may take any arguments: as in all others

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _watch_of(self)
        if watch is not None:
            watch.listener.claim()
            _check_steps(kwargs.get("num_inference_steps", args[0] if args else None))
        result = cls.set_timesteps(self, *args, **kwargs)
        if watch is not None:
            watch.current = self
            watch.listener.on_set_timesteps(seen=True)
        return result

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _watch_of(self)
        if watch is None or watch.current is not self:
            return cls.step(self, *args, **kwargs)
        prediction = kwargs.get("model_output", args[0] if args else None)
        if "sample" in kwargs:
            kwargs = kwargs | {"sample": watch.listener.on_step(kwargs["sample"], prediction)}
        elif len(args) > place:
            args = (*args[:place], watch.listener.on_step(args[place], prediction), *args[place + 1 :])
        if not watch.listener.hears_noise:
            return watch.listener.on_stepped(cls.step(self, *args, **kwargs), False)
        result, drew = noting_noise(functools.partial(cls.step, self, *args, **kwargs), kwargs.get("generator"))
        return watch.listener.on_stepped(result, drew)

    members: dict[str, Any] = {
        # Pipelines inspect both signatures to decide what to pass.
        "set_timesteps": functools.wraps(cls.set_timesteps)(set_timesteps),
        "step": functools.wraps(cls.step)(step),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_attnctl_watched": True,
        "_attnctl": None,  # type(pipe.scheduler).from_config(...) makes a scheduler that nobody watches yet
    }
    if hasattr(cls, "scale_model_input"):

        def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            watch = _watch_of(self)
            if isinstance(sample, torch.Tensor) and watch is not None and watch.current is self:
                watch.listener.on_scale(sample, functools.partial(_scale, cls, self, args, kwargs))
            return cls.scale_model_input(self, sample, *args, **kwargs)

        members["scale_model_input"] = functools.wraps(cls.scale_model_input)(scale_model_input)
    else:  # Bria's pipeline compares classes, and calls it on every class but that of flow matching
        members["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    # The same name, so that a pipeline saved under control records the scheduler's own class.
    return type(cls.__name__, (cls,), members)


def _scale(cls: Any, scheduler: Any, args: Any, kwargs: Any, sample: Any) -> Any:
    return cls.scale_model_input(scheduler, sample, *args, **kwargs)


def _unwatch(scheduler: Any) -> None:
    """Give a scheduler its own class back."""
    if getattr(scheduler, "_attnctl_watched", False):
        scheduler.__class__ = type(scheduler).__mro__[1]
        scheduler.__dict__.pop("_attnctl", None)


class SchedulerWatch:
    """Watches the schedulers of the pipelines that run a denoiser, each pipeline's own.

    Args:
        pipe: The pipeline, or None; it may be set to another that takes its turn.
        listener: What hears of the scheduler's calls.

    Attributes:
        current: The scheduler of the run that is under way, or None.
    """

    def __init__(self, pipe: Any, listener: Listener) -> None:
        self.pipe, self.listener = pipe, listener
        self.current: Any = None
        self._of: dict[int, tuple[Any, Any]] = {}
        """Pipeline and scheduler, by the pipeline's id."""

    def follow(self) -> None:
        """Watch the scheduler that the pipeline has now."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None or scheduler is self.current:
            return
        _, former = self._of.get(id(self.pipe), (None, None))
        self._of[id(self.pipe)] = self.pipe, scheduler
        if former is not None and all(former is not other for _, other in self._of.values()):
            _unwatch(former)
        if not getattr(scheduler, "_attnctl_watched", False):
            original: Any = type(scheduler)
            scheduler.__class__ = _watched(original)
        scheduler.__dict__["_attnctl"] = _Slot(self, scheduler)
        begun, self.current = self.current is not None, scheduler
        if begun:  # nobody has noticed the set_timesteps of the new one
            self.listener.on_set_timesteps(seen=False)

    def release(self) -> None:
        """Give all schedulers their own classes back."""
        latest = getattr(self.pipe, "scheduler", None)
        for scheduler in [scheduler for _, scheduler in self._of.values()]:
            _unwatch(scheduler)
        if latest is not None and getattr(latest, "_attnctl", None) is None:
            _unwatch(latest)  # made of a watched class, and given to the pipeline after the last run
        self._of, self.current = {}, None


# The timesteps of each run, read from the device once.
_LISTS: Any = WeakIdKeyDictionary()


def times_of(scheduler: Any) -> list[float]:
    """Return the scheduler's timesteps as numbers."""
    times = scheduler.timesteps
    if not isinstance(times, torch.Tensor) or times.device.type == "cpu" or times.is_inference():
        return [float(t) for t in times]
    version, numbers = _LISTS.get(times, (None, []))
    if version != times._version:
        numbers = times.tolist()
        _LISTS[times] = times._version, numbers
    return numbers


def call_time(scheduler: Any, bound: Mapping[str, Any]) -> float | None:
    """Return the timestep that a denoiser is called with, or None; an entry of the scheduler's costs no wait."""
    given, times = given_time(bound), getattr(scheduler, "timesteps", None)
    if isinstance(given, torch.Tensor) and isinstance(times, torch.Tensor) and given.device.type != "cpu":
        base = given._base
        one = given.numel() > 0 and not any(n > 1 and by for n, by in zip(given.shape, given.stride(), strict=True))
        if base is not None and one and base is (times if times._base is None else times._base):
            return times_of(scheduler)[(given.storage_offset() - times.storage_offset()) // max(times.stride(0), 1)]
    return time_of(bound)


def place_of(scheduler: Any, timestep: float | Callable[[], float | None] | None) -> int | None:
    """Find which entry of a scheduler's timesteps its next step takes; None where nothing tells.

    Args:
        scheduler: The scheduler.
        timestep: The timestep that the denoiser is called with, as it is or divided by 1000, or what reads it.
    """
    for name in ("step_index", "begin_index"):
        if isinstance(index := getattr(scheduler, name, None), int):
            return index
    timestep = timestep() if callable(timestep) else timestep
    if timestep is None:
        return None
    times = times_of(scheduler)
    gap = min((abs(a - b) for a, b in itertools.pairwise(times) if a != b), default=1.0)
    for value in (timestep, 1000 * timestep):
        best = min(range(len(times)), key=lambda i: abs(times[i] - value))
        if abs(times[best] - value) < gap / 2:
            counter = getattr(scheduler, "counter", best)  # PNDM takes some timesteps twice
            return counter if counter < len(times) and times[counter] == times[best] else best
    return None


def step_of(scheduler: Any, steps: int, timestep: float | None, run: Any) -> int:
    """Find the step of a run whose beginning nobody has seen.

    Args:
        scheduler: Its scheduler.
        steps: The length of the run.
        timestep: The timestep that the denoiser is called with.
        run: The timesteps of the run where the pipeline keeps a list of them; else they are the scheduler's last.

    Raises:
        UnsupportedModelError: Nothing tells.
    """
    place = place_of(scheduler, timestep)
    if place is None:
        raise UnsupportedModelError(
            f"Controls were attached in the middle of a run of {steps} steps, and timestep {timestep} is not among "
            f"those of {type(scheduler).__name__}: the step is not known. Attach before the pipeline is called."
        )
    first = len(scheduler.timesteps) - steps
    if isinstance(run, (torch.Tensor, list, tuple)) and len(run) == steps:  # it may begin and end anywhere
        times = times_of(scheduler)
        first = times.index(float(run[0])) if float(run[0]) in times else first
    return min(max(place - first, 0), steps - 1)


def noise_time(scheduler: Any, timestep: float | None) -> float | None:
    """Return the noise level of a denoiser call as a time from 0 (image) to 1000 (noise), or None if unknown.

    Args:
        scheduler: The scheduler, whose own timesteps and sigmas count.
        timestep: The timestep that the denoiser is called with, which some scale or turn round.
    """
    place = place_of(scheduler, timestep)
    if place is None:
        return timestep
    place, config = min(place, len(scheduler.timesteps) - 1), scheduler.config
    if config.get("timestep_type") == "continuous" or "EDM" in type(scheduler).__name__:  # a logarithm of sigma
        sigma = float(scheduler.sigmas[place])
        return 1000 * sigma / (1 + sigma)
    return times_of(scheduler)[place] * 1000 / config.get("num_train_timesteps", 1000)
