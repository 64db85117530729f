"""The modules of a denoiser: all of them by name, and some with another forward for the length of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["compiled_below", "modules_below", "named_below", "overridden"]

_MISSING = object()


def named_below(root: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """List a module and all modules below it, each with its first name, in the order of torch's `named_modules`.

    The recursion of torch's own function costs more than what is looked at.
    """
    names: dict[torch.nn.Module, str] = {}
    pending: list[tuple[str, torch.nn.Module]] = [("", root)]
    while pending:
        name, module = pending.pop()
        if module not in names:
            names[module] = name
            children = module._modules
            if children:
                start = f"{name}." if name else ""
                pending += [(start + key, child) for key, child in reversed(children.items()) if child is not None]
    return names


def modules_below(root: torch.nn.Module) -> list[torch.nn.Module]:
    """List a module and all modules below it, level by level: a guided step looks through them, and needs no names."""
    modules, seen = [root], {root}
    for module in modules:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


def compiled_below(root: torch.nn.Module) -> bool:
    """Tell whether a module or one below it is compiled."""
    return any(module._compiled_call_impl is not None for module in modules_below(root))


@contextlib.contextmanager
def overridden(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of some modules for the length of one pass."""
    before: list[tuple[torch.nn.Module, Any, Any]] = []
    try:
        for module, forward in forwards.items():
            # A compiled module is called through its compiled forward: set that aside too.
            before.append((module, vars(module).get("forward", _MISSING), module._compiled_call_impl))
            module._compiled_call_impl = None
            module.forward = forward
        yield
    finally:
        for module, forward, compiled in reversed(before):
            if forward is _MISSING:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
            if compiled is not None:
                module._compiled_call_impl = compiled
            else:
                vars(module).pop("_compiled_call_impl", None)
