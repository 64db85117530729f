"""What was read off tensors on a device. Reading waits for the device, so each tensor is read once.

Pipelines pass the same tensors to the denoiser in every step. A reading holds as long as its tensor lives and nothing
is written into it; no tensor is kept alive for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["read_once", "version_of"]

T = TypeVar("T")
_READINGS: dict[int, tuple[weakref.ref[Tensor], int, dict[str, Any]]] = {}


def read_once(x: Tensor, what: str, read: Callable[[Tensor], T]) -> T:
    """Return `read(x)`, which is called once for a tensor and for what is read off it."""
    key = id(x)
    version = version_of(x)
    entry = _READINGS.get(key)
    if entry is None or entry[0]() is not x or entry[1] != version:
        entry = weakref.ref(x, lambda _: _READINGS.pop(key, None)), version, {}
        _READINGS[key] = entry
    readings = entry[2]
    if what not in readings:
        readings[what] = read(x)
    value: T = readings[what]
    return value


def version_of(x: Tensor) -> int:
    """Return how often something was written into a tensor; 0 for tensors of inference mode, which do not count."""
    return 0 if x.is_inference() else x._version
