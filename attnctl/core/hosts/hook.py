"""Hooks of a handle on a module: whose they are, and where they would not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnctl.core.hosts.listing import denoisers_of
from attnctl.errors import ConflictError, UnsupportedModelError

__all__ = ["Hook", "check_hookable", "hooked_by"]


class Hook:
    """A hook of a handle on a module. A deep copy of the module is not under control: there the hook does nothing."""

    def __init__(self, handle: Any, function: Callable[..., Any] | None) -> None:
        self.handle, self.function = handle, function

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None, None)

    def __call__(self, *args: Any) -> Any:
        if self.function is None:
            return None
        if torch.compiler.is_compiling():
            return _uncompiled(self.function, *args)
        return self.function(*args)


@torch.compiler.disable(
    reason="hooks of attnctl cannot run inside a model that is compiled as a whole with fullgraph=True. Compile its "
    "blocks instead: model.compile_repeated_blocks(fullgraph=True)"
)
def _uncompiled(hook: Callable[..., Any], *args: Any) -> Any:
    """Run a hook of a bare model that was compiled as a whole while it was under control."""
    return hook(*args)


def hooked_by(target: Any) -> Any:
    """Return the handle whose hooks are on a pipeline, denoiser or backbone, or None."""
    for module in denoisers_of(target).values():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook) and hook.handle is not None:
                return hook.handle
    return None


def check_hookable(module: torch.nn.Module) -> None:
    """Raise unless hooks on a model would run, and nobody else's controls are on it."""
    name = type(module).__name__
    if hooked_by(module) is not None:
        raise ConflictError(
            f"This {name} is under control already: pass all controls to one control() call, or detach the other "
            "handle first (attnctl.handle_of(pipe).detach())."
        )
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise UnsupportedModelError(
            f"{name} is compiled as a whole, so hooks on it would not run. Compile its blocks instead "
            "(model.compile_repeated_blocks(fullgraph=True))."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{name} is a TorchScript module, whose attention cannot be reached. Load it as is."
        )
