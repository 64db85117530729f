"""Reading attention where weights meet values: with the values as a leaf that gradients run to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnctl.errors import UnsupportedModelError

__all__ = ["AtKernel", "AtSum"]

_PRODUCTS = ("__matmul__", "matmul", "bmm")


class _Ended(Exception):
    """Ends a run behind the kernel."""


class AtKernel(TorchFunctionMode):
    """Run code up to where its weights have met the values, and stop there.

    That is torch's fused kernel, or the first product with what a softmax has become: heads may have been mixed,
    gates applied or another softmax subtracted in between, all of which leaves attention linear in its values.

    Attributes:
        leaf: The values, [B, keys, H * D], to which gradients run.
        mixed: The result, [B, queries, H * D].

    heads: H. batch: B; a batch that is B times as many parts has the parts of one image side by side. rounds: How
    often weights meet values in a call, each time for as many of the heads, the next fed by the ones before.
    heads_first: Whether heads come ahead of the parts of an image.
    Raises: UnsupportedModelError where no attention was met.
    """

    leaf: Tensor
    mixed: Tensor

    def __init__(self, heads: int, batch: int, rounds: int = 1, heads_first: bool = False) -> None:
        super().__init__()
        self.heads, self.batch, self.rounds, self.heads_first = heads, batch, rounds, heads_first
        self._weights: dict[int, Tensor] = {}  # what softmaxes have become, by identity, which holding them keeps
        self._parts: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        weighs = [torch.is_tensor(a) and id(a) in self._weights for a in args]
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and sum(weighs) == 1:
            self._written_out(args[0], args[1], weights_first=weighs[0])
        out = func(*args, **kwargs)
        if torch.is_tensor(out) and (name == "softmax" or any(weighs)):
            self._weights[id(out)] = out
        return out

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        super().__exit__(kind, error, trace)
        if kind is None:
            raise UnsupportedModelError("This attention met no softmax weights, where it is read.")
        return kind is _Ended

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        heads = self.heads // self.rounds
        if value.ndim == 4 and value.shape[1] < heads:  # grouped queries share the values of a head
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
        shape = value.shape

        def mix(values: Tensor) -> Tensor:
            if self._turned(value):
                values = values.unflatten(0, (-1, shape[2])).transpose(1, 2)
            return self._by_head(F.scaled_dot_product_attention(query, key, values.reshape(shape), *args, **kwargs))

        self._take(value, mix)

    def _written_out(self, first: Tensor, second: Tensor, weights_first: bool) -> None:
        weights, value = (first, second) if weights_first else (second.mT, first.mT)
        weights = self._by_head(weights).detach()
        self._take(value, lambda values: weights @ values)

    def _take(self, value: Tensor, mix: Callable[[Tensor], Tensor]) -> None:
        """Note one round; end the run after the last."""
        self._parts.append((self._by_head(value).detach(), mix))
        if len(self._parts) < self.rounds:
            return
        values = torch.cat([v for v, _ in self._parts], dim=1)
        tokens, width = values.shape[-2:]
        self.leaf = values.transpose(1, 2).reshape(self.batch, -1, self.heads * width).clone().requires_grad_()
        back = self.leaf.reshape(-1, tokens, self.heads, width).transpose(1, 2)
        chunks = back.chunk(self.rounds, dim=1)
        out = torch.cat([mix(v) for (_, mix), v in zip(self._parts, chunks, strict=True)], dim=1)
        self.mixed = out.transpose(1, 2).reshape(self.batch, -1, self.heads * out.shape[-1])
        raise _Ended

    def _by_head(self, x: Tensor) -> Tensor:
        """Bring [B, H, parts, N, D], [B, parts, H, N, D], [B, H, N, D] or [B * H, N, D] to [B * parts, H, N, D]."""
        if self._turned(x):
            return x.transpose(1, 2).flatten(0, 1)
        return x.reshape(-1, self.heads // self.rounds, *x.shape[-2:])

    def _turned(self, x: Tensor) -> bool:
        return self.heads_first and x.ndim == 5


class AtSum(TorchFunctionMode):
    """Run linear attention with the values as a leaf in the product where they are summed up with their keys.

    What a class appends to its values, such as the ones that give a sum of weights, is no part of the leaf.

    Attributes:
        leaf: The values, [B, keys, H * D], to which gradients run.

    width: Channels D of a head.
    Raises: UnsupportedModelError where no product was met.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.leaf = torch.empty(0)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS and not self.leaf.requires_grad:
            keys, values = args
            part = values[..., : self.width].detach()
            self.leaf = part.transpose(1, 2).flatten(2).clone().requires_grad_()
            back = self.leaf.unflatten(2, (-1, self.width)).transpose(1, 2)
            args = keys.detach(), torch.cat([back, values[..., self.width :].detach()], dim=-1)
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if not self.leaf.requires_grad:
            raise UnsupportedModelError("This attention met no product of keys and values, where it is read.")
