"""Reference pictures of a denoiser call: their tokens lie beside the image's (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit).

Where they lie is read from the call: position ids number the pictures in their first column, shapes list them in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from attnctl.core.hosts.readings import read_once
from attnctl.core.sites import Grid

__all__ = ["references_of"]


def references_of(state: Any) -> tuple[tuple[int, Grid], ...]:
    """List the reference pictures of a call: tokens from the image's first to theirs (below 0: before it), and grids.

    Args:
        state: The denoiser call.

    Returns:
        What the call tells of; () where it has none, or tells of none.
    """
    counts = None if state.tokens is None else state.tokens.counts
    if counts is None:
        return ()
    pictures = _numbered(state.bound) or _listed(state.bound)
    starts = [0, *itertools.accumulate(math.prod(grid) for grid in pictures)]
    if counts.before not in starts or starts[-1] != counts.stream:
        return ()
    image = range(counts.before, counts.before + counts.image)
    return tuple((n - counts.before, g) for n, g in zip(starts, pictures, strict=False) if n not in image)


def _numbered(bound: Mapping[str, Any]) -> list[Grid]:
    ids = bound.get("img_ids")
    return [] if not isinstance(ids, torch.Tensor) or ids.is_meta else read_once(ids, "pictures", _pictures)


def _pictures(ids: torch.Tensor) -> list[Grid]:
    """Measure each run of tokens whose first column, the number of the picture, stays the same."""
    ids = ids[0] if ids.ndim == 3 else ids
    _, counts = torch.unique_consecutive(ids[:, 0], return_counts=True)
    sizes = ((run.amax(0) - run.amin(0) + 1).long().tolist() for run in ids.split(counts.tolist()))
    return [(1, size[1], size[2]) for size in sizes]


def _listed(bound: Mapping[str, Any]) -> list[Grid]:
    shapes = bound.get("img_shapes") or []
    first = shapes[0] if shapes and isinstance(shapes[0], list) else shapes
    return [(int(f), int(h), int(w)) for f, h, w in first]
