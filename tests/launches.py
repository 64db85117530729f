"""Count what a call would ask of a device: kernels launched and bytes alive, on meta tensors, which compute nothing."""

from __future__ import annotations

import collections
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    "view", "_unsafe_view", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "detach",
    "alias", "t", "split", "unbind", "as_strided", "diagonal", "unfold", "split_with_sizes", "lift_fresh", "empty",
    "new_empty", "empty_like", "reshape", "_reshape_alias", "movedim",
}  # fmt: skip


class Count(TorchDispatchMode):
    """Count launches, which are all operations that are no views, and the bytes that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.alive = self.peak = 0
        self.names: collections.Counter[str] = collections.Counter()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in _VIEWS:
            self.launches += 1
            self.names[name] += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += self._sizes[key]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
