"""Replay: the part of a base pass that a perturbed pass need not compute again.

The perturbed pass equals the base pass until the first perturbed module. `Prefix` finds, once, the largest modules that
finish before it; the base pass keeps their outputs, and the perturbed pass takes them instead of computing them again.

Of a row of blocks only the last output is read by what is computed again: the others feed blocks that are not computed.
What the host still holds when the first perturbed module begins (skip connections, the last output) is kept; the rest
is replaced by tensors of one NaN in the same shape, which would show in the prediction if anything read them.
The first pass holds everything until its prediction has shown that; if NaN shows, all is kept from then on.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from attnctl.core.call import Rows
from attnctl.core.hosts.arguments import cut_tensor
from attnctl.core.hosts.caches import hooks_below

__all__ = ["Prefix"]

# Outputs of these modules do not follow the batch even when their first axis fits.
_NOT_ROWS = re.compile(r"rope|rotary|time_proj|time_embed")


class _Leaf:
    """One tensor of a module's output: held, held as long as the host holds it (`loose`), or known by its shape."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._version = tensor._version
        self._loose: weakref.ref[torch.Tensor] | None = None
        self._spare: torch.Tensor | None = None
        self.written = False

    def loosen(self) -> None:
        """Hold the tensor no longer than the host does."""
        if self.tensor is not None:
            self.written |= self.tensor._version != self._version
            # The same memory by another object: the first pass may find out that it is read after all.
            self._loose, self._spare, self.tensor = weakref.ref(self.tensor), self.tensor.detach(), None

    def settle(self) -> None:
        """Keep the tensor if the host still holds it: what is computed from now on may read it."""
        if self._loose is not None:
            self.tensor = self._loose()

    def restore(self) -> None:
        """Hold the tensor again, whether or not the host does."""
        self.tensor = self._spare if self.tensor is None else self.tensor

    def changed(self) -> bool:
        """Tell whether the host has written into the tensor since."""
        held = self._spare if self.tensor is None else self.tensor  # both count the writes to one memory
        return self.written or (held is not None and held._version != self._version)

    def take(self, rows: Rows) -> torch.Tensor:
        """Return the prompt rows of the tensor, or of one NaN in its shape."""
        each = self.shape[0] // rows.total
        if self.tensor is None:
            fill = torch.nan if self.dtype.is_floating_point else 0
            one = torch.full((), fill, dtype=self.dtype, device=self.device)
            return one.expand(rows.prompts * each, *self.shape[1:])
        if rows.cond == slice(0, rows.total):
            return self.tensor
        return cut_tensor(self.tensor, rows.cond, rows.total, (each,))


class Prefix:
    """The part of a base pass that perturbed passes need not repeat.

    The first base pass is watched module by module; later ones keep only the outputs of the chosen modules.
    """

    def __init__(self, denoiser: torch.nn.Module, targets: Iterable[torch.nn.Module]) -> None:
        self.denoiser = denoiser
        self.targets = set(targets)
        self.chosen: dict[torch.nn.Module, str] | None = None
        self.store: dict[torch.nn.Module, Any] = {}
        """The outputs of the current base pass, nested as they came, a `_Leaf` for each tensor."""
        self.proven = False
        """Whether a prediction has shown that nothing reads what is not kept."""
        self._needed: dict[torch.nn.Module, list[bool]] = {}
        self._names: dict[torch.nn.Module, str] = {}
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
        if any(module._compiled_call_impl is not None for module in denoiser.modules()):
            return "compiled blocks cannot be watched"
        if hooks_below(denoiser):
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
            self.store = {m: output for m, output in self.store.items() if self._calls[m] == 1}
            self.chosen = {m: self._names[m] for m in self.store}
            self._needed = {m: [leaf.tensor is not None for leaf in _leaves(out)] for m, out in self.store.items()}

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
        if module in self.targets and not self._reached:
            self._reached = True
            for output in self.store.values():
                for leaf in _leaves(output):
                    leaf.settle()

    def _learn(self, name: str) -> Callable[..., None]:
        def finished(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._paused or self._reached or _NOT_ROWS.search(name) or next(module.parameters(), None) is None:
                return
            # A finished parent stands for its children.
            for child in module.modules():
                self.store.pop(child, None)
            for earlier in self.store.values():
                for leaf in _leaves(earlier):
                    leaf.loosen()
            self.store[module], self._names[module] = _map(output, _Leaf), name

        return finished

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._paused:
            return
        self.store[module] = _map(output, _Leaf)
        leaves = list(_leaves(self.store[module]))
        needed = self._needed[module]
        for leaf, wanted in zip(leaves, needed if len(needed) == len(leaves) else [True] * len(leaves), strict=True):
            leaf.tensor = leaf.tensor if wanted else None

    def stubs(self, rows: Rows) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Return, for each module of the prefix, a forward that gives the prompt rows of its stored output.

        A module whose output has no rows to take, or was written to in place since, is left out for good.
        """
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, output in self.store.items():
            leaves = list(_leaves(output))
            rowless = not leaves or any(not leaf.shape or leaf.shape[0] % rows.total for leaf in leaves)
            if rowless or any(leaf.changed() for leaf in leaves):
                self.proven = False  # it is computed again, and might read what was not kept
                if self.chosen is not None:
                    self.chosen.pop(module, None)
                continue
            forwards[module] = _replay(_map(output, lambda leaf: leaf.take(rows)))
        return forwards

    def prove(self, prediction: Any) -> bool:
        """Tell whether a prediction reads nothing that was not kept; from now on keep all if it does."""
        if self.proven:
            return True
        self.proven = True
        hollow = any(not all(needed) for needed in self._needed.values())
        if not hollow or all(bool(torch.isfinite(t).all()) for t in _leaves(prediction)):
            return True
        self._needed = {m: [True] * len(needed) for m, needed in self._needed.items()}
        for output in self.store.values():
            for leaf in _leaves(output):
                leaf.restore()
        return False


def _replay(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, or what stands for them, of a nested output."""
    if isinstance(value, (torch.Tensor, _Leaf)):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the tensors, or what stands for them, of a nested output."""
    if isinstance(value, (torch.Tensor, _Leaf)):
        return function(value)
    if isinstance(value, dict):
        return type(value)(**{k: _map(v, function) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function) for v in value)
    return value
