"""Counting the steps of a run by watching the scheduler.

Timesteps cannot be trusted to count (FLUX passes t / 1000, Heun repeats), so the step index is the number of
`scheduler.step` calls since `set_timesteps`. As with processors, the scheduler object's class is swapped for a subclass
made once per scheduler class: a deep copy of the scheduler keeps working, and nothing is left in `vars(scheduler)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attnctl.core.hosts.noise import noting_noise

__all__ = ["Listener", "SchedulerWatch", "later_evaluation"]


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
    """What a watched scheduler reports to."""

    def on_set_timesteps(self) -> None:
        """A run begins."""

    def on_scale(self, sample: Any, scale: Callable[[Any], Any]) -> None:
        """The pipeline scales its latents for the denoiser; `scale` does the same to others."""

    def on_step(self, sample: Any) -> Any:
        """A step ends; `sample` holds the latents that it updates. Return those that it shall update."""

    def on_stepped(self, result: Any, drew: bool) -> Any:
        """A step has ended, and drew random numbers or not; return its result, with other latents if a control asks."""


class _Slot:
    """Holds the listener; shared, not copied, when a pipeline deep-copies its scheduler."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return self


@functools.cache
def _watched(original: type) -> type:
    cls: Any = original
    place = list(inspect.signature(cls.step).parameters).index("sample") - 1

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.set_timesteps(self, *args, **kwargs)
        if self._attnctl is not None:
            self._attnctl.listener.on_set_timesteps()
        return result

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._attnctl is None:
            return cls.step(self, *args, **kwargs)
        listener = self._attnctl.listener
        if "sample" in kwargs:
            kwargs = kwargs | {"sample": listener.on_step(kwargs["sample"])}
        elif len(args) > place:
            args = (*args[:place], listener.on_step(args[place]), *args[place + 1 :])
        result, drew = noting_noise(functools.partial(cls.step, self, *args, **kwargs), kwargs.get("generator"))
        return listener.on_stepped(result, drew)

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
            if isinstance(sample, torch.Tensor) and self._attnctl is not None:
                scale = functools.partial(_scale, cls, self, args, kwargs)
                self._attnctl.listener.on_scale(sample, scale)
            return cls.scale_model_input(self, sample, *args, **kwargs)

        members["scale_model_input"] = functools.wraps(cls.scale_model_input)(scale_model_input)
    # The same name, so that a pipeline saved under control records the scheduler's own class.
    return type(cls.__name__, (cls,), members)


def _scale(cls: Any, scheduler: Any, args: Any, kwargs: Any, sample: Any) -> Any:
    return cls.scale_model_input(scheduler, sample, *args, **kwargs)


def _watch(scheduler: Any, listener: Listener) -> None:
    """Report a scheduler's calls to a listener."""
    if not getattr(scheduler, "_attnctl_watched", False):
        original: type = type(scheduler)
        scheduler.__class__ = _watched(original)
    scheduler.__dict__["_attnctl"] = _Slot(listener)


def _unwatch(scheduler: Any) -> None:
    """Give a scheduler its own class back."""
    if getattr(scheduler, "_attnctl_watched", False):
        scheduler.__class__ = type(scheduler).__mro__[1]
        scheduler.__dict__.pop("_attnctl", None)


class SchedulerWatch:
    """Watches the scheduler of a pipeline, and the next one where the user gives the pipeline another.

    Args:
        pipe: The pipeline, or None.
        listener: What hears of the scheduler's calls.

    Attributes:
        current: The scheduler that is watched, or None.
    """

    def __init__(self, pipe: Any, listener: Listener) -> None:
        self.pipe, self.listener = pipe, listener
        self.current: Any = None

    def follow(self) -> None:
        """Watch the scheduler that the pipeline has now."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None or scheduler is self.current:
            return
        former, self.current = self.current, scheduler
        _watch(scheduler, self.listener)
        if former is not None:  # nobody has noticed the set_timesteps of the new one
            _unwatch(former)
            self.listener.on_set_timesteps()

    def release(self) -> None:
        """Give the pipeline's schedulers their own classes back."""
        if self.current is not None:
            _unwatch(self.current)
            self.current = None
        latest = getattr(self.pipe, "scheduler", None)
        if latest is not None and getattr(latest, "_attnctl", None) is None:
            _unwatch(latest)  # made of a watched class, and given to the pipeline after the last run
