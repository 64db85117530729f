"""What every kernel shares: checks of shapes, grouped heads, masks, memory.

Tensors are [B, H, N, D] throughout; a mask is boolean (True = attend) or an additive float bias and
broadcasts to [B, H, Nq, Nk].
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from attnctl.errors import ConfigError

__all__ = [
    "Memory",
    "as_bias",
    "check_call",
    "check_mask",
    "chunk_rows",
    "current",
    "full",
    "masked_softmax",
    "pick",
    "read_later",
    "repeat_heads",
    "room",
    "rows_of",
    "send",
    "token_slice",
    "wide_dtype",
]

# Largest block of logits held at once on a CPU. The row cap keeps even short sequences from forming their whole map.
_MAX_ELEMENTS = 2**23
_MAX_ROWS = 256
# On other devices every block costs launches: it may take this share of the memory, which is assumed where unknown.
_SHARE = 12
# So many blocks may be alive at once: logits, their softmax, and what is made of it.
_ALIVE = 3
_ASSUMED_MEMORY = 80 << 30


def check_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """Check the shapes of one attention call and return its mask with four dimensions.

    Shapes: q [B, H, Nq, D]; k [B, Hk, Nk, D]; v [B, Hk, Nk, Dv]; Hk divides H.
    Raises: ConfigError naming the shapes that were given and those that were expected.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        given = ", ".join(f"{name} {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ConfigError(f"{given} were given; expected torch tensors, which torch.from_numpy makes of arrays.")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise ConfigError(f"q {q.dtype}, k {k.dtype}, v {v.dtype} were given; expected floating point numbers.")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ConfigError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} were given; expected four "
            "dimensions [batch, heads, tokens, channels]. Split the heads first."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not belong together; expected "
            "q [B, H, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv]."
        )
    if q.shape[1] % k.shape[1]:
        raise ConfigError(
            f"{q.shape[1]} query heads and {k.shape[1]} key heads were given; grouped heads need a number of "
            "key heads that divides the number of query heads."
        )
    if mask is None:
        return None
    return check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """Return a mask with four dimensions, or raise ConfigError unless it broadcasts to `full`."""
    if not isinstance(mask, Tensor):
        raise ConfigError(f"mask {type(mask).__name__} was given; expected a torch tensor, boolean or additive.")
    mask4 = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
    if mask4.dim() != 4 or any(have not in (1, want) for have, want in zip(mask4.shape, full, strict=True)):
        raise ConfigError(
            f"a mask of shape {tuple(mask.shape)} was given; expected one that broadcasts to "
            f"[B, H, Nq, Nk] = {list(full)}. A mask over keys has the shape [B, 1, 1, Nk]."
        )
    return mask4


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat grouped key or value heads so that every query head has its own.

    Shapes: x [B, Hk, N, D] -> [B, heads, N, D]; x itself when there is nothing to repeat.
    """
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def full(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as a tensor of another one's device and dtype; a copy of a number would wait for the device."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to the device that computes, without waiting for what it is doing."""
    return x.to(device, dtype or x.dtype, non_blocking=device.type != "cpu")


def read_later(x: Tensor) -> Callable[[], Tensor]:
    """Copy a small tensor to the machine's memory without waiting for it.

    Returns:
        What gives the copy. It waits for the work up to this call alone, not for what was given to the device since.
    """
    if x.device.type != "cuda":
        return lambda: x
    copy = x.to("cpu", non_blocking=True)
    if not torch.cuda.is_available():  # a device that only pretends
        return lambda: copy
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))

    def read() -> Tensor:
        event.synchronize()
        return copy

    return read


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for softmax and sums: float32, or float64 where the input has it."""
    return torch.promote_types(dtype, torch.float32)


def as_bias(mask: Tensor, dtype: torch.dtype, blocked: float = float("-inf")) -> Tensor:
    """Turn a mask into an additive bias: 0 where a boolean mask is True, `blocked` where it is False."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, blocked)


def pick(x: Tensor, indices: Sequence[int], dim: int) -> Tensor:
    """Take entries along a dimension, as indexing by a list does; but no index is copied to the device."""
    return torch.stack([x.select(dim, i) for i in indices], dim)


def rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """Cut query rows out of a four-dimensional mask; a mask over keys alone passes unchanged."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def part_of(mask: Tensor | None, q: Tensor, k: Tensor, rows: slice, keys: slice | Tensor) -> Tensor | None:
    """Cut some query rows and keys out of the mask of a call."""
    if mask is None:
        return None
    mask = check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    mask = mask if mask.shape[-1] == 1 else mask[..., keys]
    return rows_of(mask, rows)


def chunk_rows(batch: int, heads: int, keys: int, device: torch.device, *, alive: float = _ALIVE) -> int:
    """Return how many query rows fit into one bounded block of float32 logits on a device.

    `alive`: Blocks of that size that the caller holds at once; fewer of them may be larger, but not on a CPU, whose
    cache bounds the block.
    """
    a_row = max(1, batch * heads * keys)
    if device.type == "cpu":
        return min(_MAX_ROWS, max(1, _MAX_ELEMENTS // a_row))
    return max(1, int(_ALIVE * room(device) / (alive * 4 * a_row)))


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device the current one, on which Triton and others launch whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def room(device: torch.device) -> int:
    """Return how many bytes a kernel may take at once on a device that is no CPU."""
    real = device.type == "cuda" and torch.cuda.is_available()
    return (torch.cuda.get_device_properties(device).total_memory if real else _ASSUMED_MEMORY) // _SHARE


def masked_softmax(logits: Tensor) -> Tensor:
    """Take the softmax over the last dimension; a row with nothing to attend to becomes zero, as in SDPA."""
    # Filled before the softmax and after it: otherwise the backward pass multiplies 0 by NaN.
    dead = logits.detach().amax(dim=-1, keepdim=True).isneginf()
    return logits.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)


def token_slice(part: slice, n: int, name: str) -> slice:
    """Return a slice with plain ends, or raise ConfigError if it is empty, strided or beyond n tokens."""
    start, stop = part.start or 0, n if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start < stop <= n:
        raise ConfigError(
            f"{name}={part} was given for {n} tokens; expected slice(first, end), 0 <= first < end <= {n}."
        )
    return slice(start, stop)


class Memory:
    """Hold one piece of memory under each name, used again and again within one call.

    A CPU spends longer on getting new pages from the system, and on giving them back, than on filling them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory of a shape, in the dtype and on the device of `like`, with whatever stands in it."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = like.new_empty(size)
        return self._kept[name][:size].view(shape)
