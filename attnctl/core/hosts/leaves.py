"""What a host's modules return: nested outputs, the tensors in them, and what names say of these."""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from attnctl.core.hosts.arguments import Rows, cut_tensor

__all__ = ["Leaf", "is_not_by_rows", "keep_more", "leaves", "mapped", "thin"]

_NOT_ROWS = re.compile(r"rope|rotary|time_proj|time_embed")
_NORM = re.compile(r"norm\w*$")
_ROW = re.compile(r"(.+)\.\d+$")
_STAGE = re.compile(r"[^.]+\.\d+\.(?=.*\.\d+\.)")


class Leaf:
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
        tensor = self._spare if self.tensor is None else self.tensor  # both count the writes to one memory
        return self.written or (tensor is not None and tensor._version != self._version)

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


def is_not_by_rows(name: str) -> bool:
    """Tell whether outputs of a module do not follow the batch even when their first axis fits."""
    return _NOT_ROWS.search(name) is not None


def _row_of(name: str) -> str:
    """Return the name of the row that a module stands in, "" where it stands in none."""
    match = _ROW.match(name)
    return match[1] if match else ""


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, or what stands for them, of a nested output."""
    if isinstance(value, (torch.Tensor, Leaf)):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the tensors, or what stands for them, of a nested output."""
    if isinstance(value, (torch.Tensor, Leaf)):
        return function(value)
    if isinstance(value, dict):
        return type(value)(**{k: mapped(v, function) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, function) for v in value)
    return value


def thin(store: dict[torch.nn.Module, Any], names: Mapping[torch.nn.Module, str], target: str) -> None:
    """Give up what the host holds but hardly reads, and what is quickly computed again.

    Args:
        store: Outputs of the modules that have finished, in order.
        names: The modules' names.
        target: Name of the first module that is computed again, which begins now.
    """
    block, first = target.rpartition(".")[0], target.partition(".")[0]
    rows = {m: _row_of(names[m]) for m in store}
    earlier = [_size(output) for m, output in store.items() if rows[m] and not names[m].startswith(f"{block}.")]
    for module in [m for m in store if block and names[m].rpartition(".")[0] == block]:
        # Norms of the block of the target are as large as its input, and the first half of an MLP is larger.
        if _NORM.search(names[module]) or (earlier and _size(store[module]) > earlier[-1]):
            del store[module]
    # What came before an output of the target's own row has been read; where rows take turns, the last has not.
    last = max((i for i, m in enumerate(store) if rows[m] == first), default=0)
    for module, output in list(store.items())[:last]:
        row = rows[module]
        inside = [out for m, out in store.items() if m is not module and rows[m] == row]
        # A host that holds what stands inside of a row reads it again.
        if row in ("", first) or "." in row or any(leaf.tensor is not None for leaf in leaves(inside)):
            continue
        for leaf in leaves(output):
            leaf.loosen()
    if _has_read(store, names, target):
        for module, output in store.items():
            if rows[module] == first and isinstance(output, Leaf):  # UNets return more where they come back to it
                output.loosen()


def _has_read(store: Mapping[torch.nn.Module, Any], names: Mapping[torch.nn.Module, str], target: str) -> bool:
    """Tell whether the block or stage that the target stands in has read what those before it have made."""
    block, stage = target.rpartition(".")[0], _STAGE.match(target)
    for module in store:
        name = names[module]
        if stage is not None and name.startswith(stage[0]) and _row_of(name):
            return True  # a part of the stage has run, and passes on what it has made
        joins = isinstance(module, torch.nn.Linear) and module.in_features > module.out_features
        if joins and block and name.rpartition(".")[0] == block:
            return True  # the block has joined what it was given with what it skips to
    return False


def _size(output: Any) -> int:
    """Count the numbers in the tensors of an output."""
    return sum(leaf.shape.numel() for leaf in leaves(output))


def keep_more(
    store: Mapping[torch.nn.Module, Any],
    names: Mapping[torch.nn.Module, str],
    needed: Mapping[torch.nn.Module, list[bool]],
) -> None:
    """Hold more outputs, where a prediction has read one that was given up.

    Embedders' outputs come first, without those as large as the states that the blocks pass on; then all of them; then
    what stands inside of rows too.

    Args:
        store: Outputs of modules, in order.
        names: The modules' names.
        needed: For each tensor of each output, whether it is held.
    """
    modules = list(store)
    rows = {m: _row_of(names[m]) for m in modules}
    inside = {m for m, after in itertools.pairwise(modules) if rows[m] and rows[m] == rows[after]}
    hollow = [(m, i, leaf) for m in modules for i, leaf in enumerate(leaves(store[m])) if not needed[m][i]]
    states = max((_size(leaf) for m in modules if rows[m] for leaf in leaves(store[m])), default=0)
    embedders = [(m, i, leaf) for m, i, leaf in hollow if m not in inside]
    others = [(m, i, leaf) for m, i, leaf in embedders if _size(leaf) != states]
    for module, i, leaf in others or embedders or hollow:
        needed[module][i] = True
        leaf.restore()
