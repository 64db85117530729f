"""Hooks of a handle on a module: not on its copies, and not compiled with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Hook"]


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
