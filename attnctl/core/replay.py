"""Replay: the part of a base pass that a perturbed pass need not compute again.

The perturbed pass equals the base pass until the first perturbed module. `Prefix` finds, once, the largest modules that
finish before it; the base pass keeps their outputs, and the perturbed pass takes them instead of computing them again.

Of a row of blocks only the last output is read by what is computed again: the others feed blocks that are not computed.
What the host still holds when the first perturbed module begins (skip connections, the last output) is kept; the rest
is replaced by tensors of one NaN in the same shape, which would show in the prediction if anything read them. So is the
end of a row that another row follows, which the host may hold in a variable that it no longer reads. The first pass
holds everything until its prediction has shown that. If NaN shows, outputs of embedders are kept (a host may have
joined them), first those that are not the states that the blocks pass on, then all; if it still shows, nothing is given
up.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from attnctl.core.hosts.arguments import Rows
from attnctl.core.hosts.leaves import Leaf, is_not_by_rows, keep_more, leaves, mapped, thin
from attnctl.core.hosts.modules import named_below

__all__ = ["Prefix"]


class Prefix:
    """The part of a base pass that perturbed passes need not repeat.

    The first base pass is watched module by module; later ones keep only the outputs of the chosen modules.
    """

    def __init__(self, denoiser: torch.nn.Module, targets: Iterable[torch.nn.Module]) -> None:
        self.denoiser = denoiser
        self.targets = set(targets)
        self.chosen: dict[torch.nn.Module, str] | None = None
        self.store: dict[torch.nn.Module, Any] = {}
        """The outputs of the current base pass, nested as they came, a `Leaf` for each tensor."""
        self.proven = False
        """Whether a prediction has shown that nothing reads what is not kept."""
        self._needed: dict[torch.nn.Module, list[bool]] = {}
        self._names: dict[torch.nn.Module, str] = {}
        self._handles: list[Any] = []
        self.paused = False
        """Whether a further pass runs, of which nothing is noted."""
        self._reached = False
        self._calls: dict[torch.nn.Module, int] = {}

    def watch(self) -> None:
        """Install hooks for one base pass."""
        self.release()
        self._reached = False
        self._calls = {}
        if self.chosen is None:
            self._names = named_below(self.denoiser)
            for module in self._names:
                if module is not self.denoiser:
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                    self._handles.append(module.register_forward_hook(self._learn))
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
            self._needed = {m: [leaf.tensor is not None for leaf in leaves(out)] for m, out in self.store.items()}

    def release(self) -> None:
        """Remove hooks and drop stored tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.store = [], {}

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if self.paused:
            return
        self._calls[module] = self._calls.get(module, 0) + 1
        if module in self.targets and not self._reached:
            self._reached = True
            for output in self.store.values():
                for leaf in leaves(output):
                    leaf.settle()
            thin(self.store, self._names, self._names[module])

    def _learn(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.paused or self._reached or is_not_by_rows(self._names[module]):
            return
        if next(module.parameters(), None) is None:
            return
        # A finished parent stands for its children.
        for child in named_below(module):
            self.store.pop(child, None)
        for earlier in self.store.values():
            for leaf in leaves(earlier):
                leaf.loosen()
        self.store[module] = mapped(output, Leaf)

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.paused:
            return
        self.store[module] = mapped(output, Leaf)
        items = list(leaves(self.store[module]))
        needed = self._needed[module]
        for leaf, wanted in zip(items, needed if len(needed) == len(items) else [True] * len(items), strict=True):
            leaf.tensor = leaf.tensor if wanted else None

    def stubs(self, rows: Rows) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Return, for each module of the prefix, a forward that gives the prompt rows of its stored output.

        A module whose output has no rows to take, or was written to in place since, is left out for good.
        """
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, output in self.store.items():
            items = list(leaves(output))
            rowless = not items or any(not leaf.shape or leaf.shape[0] % rows.total for leaf in items)
            if rowless or any(leaf.changed() for leaf in items):
                self.proven = False  # it is computed again, and might read what was not kept
                if self.chosen is not None:
                    self.chosen.pop(module, None)
                continue
            forwards[module] = functools.partial(_given, mapped(output, operator.methodcaller("take", rows)))
        return forwards

    def prove(self, prediction: Any) -> bool:
        """Tell whether a prediction reads nothing that was not kept; if it does, keep more: it is to be made again."""
        hollow = not self.proven and any(not all(needed) for needed in self._needed.values())
        self.proven = not hollow or all(bool(torch.isfinite(t).all()) for t in leaves(prediction))
        if not self.proven:
            keep_more(self.store, self._names, self._needed)
        return self.proven


def _given(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
