"""Reading attention where it reaches torch's fused kernel: with the values as a leaf that gradients run to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnctl.errors import UnsupportedModelError

__all__ = ["AtKernel"]


class _Ended(Exception):
    """Ends a run behind the kernel."""


class AtKernel(TorchFunctionMode):
    """Run code up to its first fused attention and stop behind it.

    Attributes:
        leaf: The values, [B, keys, H * D], to which gradients run.
        mixed: The result, [B, queries, H * D].

    heads: H. batch: B; a batch that is B times as many parts has the parts of one image side by side.
    Raises: UnsupportedModelError where no fused attention ran.
    """

    leaf: Tensor
    mixed: Tensor

    def __init__(self, heads: int, batch: int) -> None:
        super().__init__()
        self.heads, self.batch = heads, batch

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._attend(*args, **(kwargs or {}))
        raise _Ended

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        super().__exit__(kind, error, trace)
        if kind is None:
            raise UnsupportedModelError("This attention did not reach torch's fused kernel, where it is read.")
        return kind is _Ended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        if value.ndim == 4 and value.shape[1] < self.heads:  # grouped queries share the values of a head
            value = value.repeat_interleave(self.heads // value.shape[1], dim=1)
            key = key.repeat_interleave(self.heads // key.shape[1], dim=1)
        tokens, width = value.shape[-2:]
        by_head = value.detach().reshape(-1, self.heads, tokens, width).transpose(1, 2)
        self.leaf = by_head.reshape(self.batch, -1, self.heads * width).clone().requires_grad_()
        back = self.leaf.reshape(-1, tokens, self.heads, width).transpose(1, 2).reshape(value.shape)
        out = F.scaled_dot_product_attention(query, key, back, *args, **kwargs)
        out = out.reshape(-1, self.heads, *out.shape[-2:]).transpose(1, 2)
        self.mixed = out.reshape(self.batch, -1, self.heads * width)
