"""Which of several kernels is the fastest on this card: timed once for a kind of call, and remembered."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

__all__ = ["fastest", "milliseconds", "size_class"]

_TIE = 0.95  # a kernel must take less than this share of the first one's time to be preferred to it
_WARM_UPS, _REPEATS = 2, 5
_FASTEST: dict[Hashable, str] = {}


def fastest(kind: Hashable, kernels: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """Return the name of the kernel that takes the least time; on a tie that is the first one.

    Args:
        kind: What the timing holds for: it is made once for each kind of call.
        kernels: Calls by name; one that raises is left out.
        device: A CUDA device. Where a graph is being captured on it nothing can be timed, and the first one is taken.
    """
    names = list(kernels)
    if len(names) == 1 or torch.cuda.is_current_stream_capturing():
        return names[0]
    if kind not in _FASTEST:
        times = {}
        for name, call in kernels.items():
            try:
                times[name] = milliseconds(call, device)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # kernels raise whatever they like; whoever takes the first one hears why
                continue
        best = min(times, key=lambda name: times[name], default=names[0])
        first = next(iter(times), names[0])
        _FASTEST[kind] = best if times and times[best] < _TIE * times[first] else first
    return _FASTEST[kind]


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call on a CUDA device, after warming up; waits for the device."""
    taken = []
    with torch.cuda.device(device), torch.no_grad():
        for i in range(_WARM_UPS + _REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= _WARM_UPS:
                taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def size_class(count: int) -> int:
    """Return the power of two that a count lies below: calls of one class share a timing."""
    return count.bit_length()
