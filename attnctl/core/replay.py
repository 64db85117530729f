"""Replay: the part of a base pass that a perturbed pass need not compute again.

The perturbed pass equals the base pass until the first perturbed module. `Prefix` finds, once, the largest modules that
finish before it; the base pass keeps their outputs, and the perturbed pass takes them instead of computing them again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from attnctl.core.call import Rows
from attnctl.core.hosts.arguments import cut_tensor
from attnctl.core.hosts.caches import hooks_of

__all__ = ["Prefix"]

# Outputs of these modules do not follow the batch even when their first axis fits.
_NOT_ROWS = re.compile(r"rope|rotary|time_proj|time_embed")


class Prefix:
    """The part of a base pass that perturbed passes need not repeat.

    The first base pass is watched module by module; later ones keep only the outputs of the chosen modules.
    """

    def __init__(self, denoiser: torch.nn.Module, targets: Iterable[torch.nn.Module]) -> None:
        self.denoiser = denoiser
        self.targets = set(targets)
        self.chosen: dict[torch.nn.Module, str] | None = None
        self.store: dict[torch.nn.Module, Any] = {}
        self._handles: list[Any] = []
        self._reached = False
        self._paused = False
        self._calls: dict[torch.nn.Module, int] = {}

    @staticmethod
    def refusal(denoiser: torch.nn.Module) -> str | None:
        """Say why outputs cannot be replayed in this denoiser, or return None."""
        if torch.is_inference_mode_enabled():
            return "inference mode keeps no version counters"
        if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
            return "gradient checkpointing runs modules twice"
        for module in denoiser.modules():
            if module._compiled_call_impl is not None:
                return "compiled blocks cannot be watched"
            if hooks_of(module):
                return "diffusers hooks (caches, group offloading) need every block to run"
        return None

    def watch(self) -> None:
        """Install hooks for one base pass."""
        self.release()
        self._reached = False
        self._calls = {}
        if self.chosen is None:
            for name, module in self.denoiser.named_modules():
                if module is self.denoiser:
                    continue
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._learn(name)))
        else:
            for module in self.chosen:
                self._handles.append(module.register_forward_hook(self._keep))

    def unwatch(self) -> None:
        """Remove the hooks; after the first pass, settle which modules to replay."""
        for handle in self._handles:
            handle.remove()
        learning = self.chosen is None and bool(self._handles)
        self._handles = []
        if learning and not self._reached:
            self.store = {}  # nothing perturbed has run: the perturbed pass shows whether that is an error
        elif learning:
            self.chosen = {m: n for m, (n, _, _) in self.store.items() if self._calls[m] == 1}
            self.store = {m: (out, versions) for m, (_, out, versions) in self.store.items() if m in self.chosen}

    def release(self) -> None:
        """Remove hooks and drop stored tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.store = [], {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing of what runs meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if self._paused:
            return
        self._calls[module] = self._calls.get(module, 0) + 1
        if module in self.targets:
            self._reached = True

    def _learn(self, name: str) -> Callable[..., None]:
        def finished(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._paused or self._reached or _NOT_ROWS.search(name) or next(module.parameters(), None) is None:
                return
            # A finished parent stands for its children.
            for child in module.modules():
                self.store.pop(child, None)
            self.store[module] = (name, output, _versions(output))

        return finished

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._paused:
            self.store[module] = (output, _versions(output))

    def stubs(self, rows: Rows, frames: int) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Return, for each module of the prefix, a forward that gives the prompt rows of its stored output.

        A module whose output has no rows to take, or was written to in place since, is left out for good.
        """
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, (output, versions) in self.store.items():
            if versions != _versions(output) or not _has_rows(output, rows.total):
                if self.chosen is not None:
                    self.chosen.pop(module, None)
                continue
            forwards[module] = _replay(_take(output, rows))
        return forwards


def _replay(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(t._version for t in _leaves(output))


def _has_rows(output: Any, total: int) -> bool:
    leaves = list(_leaves(output))
    return bool(leaves) and all(t.ndim > 0 and t.shape[0] % total == 0 for t in leaves)


def _take(output: Any, rows: Rows) -> Any:
    if rows.cond == slice(0, rows.total):
        return output
    if isinstance(output, torch.Tensor):
        return cut_tensor(output, rows.cond, rows.total, (output.shape[0] // rows.total,))
    if isinstance(output, dict):
        return type(output)(**{k: _take(v, rows) for k, v in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(_take(v, rows) for v in output)
    return output
