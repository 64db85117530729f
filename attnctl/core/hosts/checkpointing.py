"""Gradient checkpointing of diffusers' blocks, which run a second time after their pass is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from attnctl.core.hosts.modules import named_below

__all__ = ["Checkpointing"]


class Checkpointing:
    """Has gradient checkpointing run blocks again under what they ran under first.

    The blocks of a checkpointed denoiser run a second time during backward, when the pass is over and its controls are
    switched off. Each checkpoint therefore takes along what `snapshot` returns when its block runs first.
    """

    def __init__(
        self, denoiser: torch.nn.Module, snapshot: Callable[[], Callable[[], contextlib.AbstractContextManager[Any]]]
    ) -> None:
        self._held = [
            (module, vars(module)["_gradient_checkpointing_func"])
            for module in named_below(denoiser)
            if getattr(module, "gradient_checkpointing", False)
            and vars(module).get("_gradient_checkpointing_func") is not None
        ]
        for module, function in self._held:
            vars(module)["_gradient_checkpointing_func"] = _snapshoting(function, snapshot)

    def remove(self) -> None:
        """Give the modules their own functions back."""
        for module, function in self._held:
            vars(module)["_gradient_checkpointing_func"] = function
        self._held = []


def _snapshoting(function: Callable[..., Any], snapshot: Callable[[], Any]) -> Callable[..., Any]:
    def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = snapshot()

        def run(*args: Any, **kwargs: Any) -> Any:
            with again():
                return block(*args, **kwargs)

        return function(run, *args, **kwargs)

    return checkpoint
