"""Counting the steps of a run by watching the scheduler.

Timesteps cannot be trusted to count (FLUX passes t / 1000, Heun repeats), so the step index is the number of
`scheduler.step` calls since `set_timesteps`. As with processors, the scheduler object's class is swapped for a subclass
made once per scheduler class: a deep copy of the scheduler keeps working, and nothing is left in `vars(scheduler)`.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

__all__ = ["Listener", "unwatch_scheduler", "watch_scheduler"]


class Listener(Protocol):
    """What a watched scheduler reports to."""

    def on_set_timesteps(self) -> None:
        """A run begins."""

    def on_scale(self, sample: Any) -> None:
        """The pipeline scales its latents for the denoiser."""

    def on_step(self, sample: Any) -> None:
        """A step ends; `sample` holds the latents that it updates."""


class _Slot:
    """Holds the listener; shared, not copied, when a pipeline deep-copies its scheduler."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return self


@functools.cache
def _watched(original: type) -> type:
    cls: Any = original

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.set_timesteps(self, *args, **kwargs)
        if self._attnctl is not None:
            self._attnctl.listener.on_set_timesteps()
        return result

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        sample = kwargs["sample"] if "sample" in kwargs else args[2] if len(args) > 2 else None
        if self._attnctl is not None:
            self._attnctl.listener.on_step(sample)
        return cls.step(self, *args, **kwargs)

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
                self._attnctl.listener.on_scale(sample)
            return cls.scale_model_input(self, sample, *args, **kwargs)

        members["scale_model_input"] = functools.wraps(cls.scale_model_input)(scale_model_input)
    # The same name, so that a pipeline saved under control records the scheduler's own class.
    return type(cls.__name__, (cls,), members)


def watch_scheduler(scheduler: Any, listener: Listener) -> None:
    """Report a scheduler's calls to a listener."""
    if not getattr(scheduler, "_attnctl_watched", False):
        original: type = type(scheduler)
        scheduler.__class__ = _watched(original)
    scheduler.__dict__["_attnctl"] = _Slot(listener)


def unwatch_scheduler(scheduler: Any) -> None:
    """Give a scheduler its own class back."""
    if getattr(scheduler, "_attnctl_watched", False):
        scheduler.__class__ = type(scheduler).__mro__[1]
        scheduler.__dict__.pop("_attnctl", None)
