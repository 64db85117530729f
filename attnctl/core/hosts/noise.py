"""Whether a scheduler adds noise of its own at its steps, which differs from row to row of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_noisy", "noting_noise"]

_NOISY = ("Ancestral", "SDE", "DDPM", "LCM", "TCD")


def is_noisy(scheduler: Any) -> bool:
    """Tell whether a scheduler adds noise, as far as its class and settings say; `eta` is an argument of its steps."""
    config: Any = getattr(scheduler, "config", {})
    settings = "sde" in str(config.get("algorithm_type", "")) or bool(config.get("stochastic_sampling"))
    return settings or any(part in type(scheduler).__name__ for part in _NOISY)


def noting_noise(step: Callable[[], Any], generator: Any) -> tuple[Any, bool]:
    """Run a step, and tell whether it drew random numbers: from the generators it was given, or from torch's own."""
    before = _states(generator)
    result = step()
    return result, any(not torch.equal(a, b) for a, b in zip(before, _states(generator), strict=True))


def _states(generator: Any) -> list[torch.Tensor]:
    given = generator if isinstance(generator, (list, tuple)) else [generator]
    states = [torch.get_rng_state(), *(g.get_state() for g in given if isinstance(g, torch.Generator))]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states
