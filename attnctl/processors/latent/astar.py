"""A-STAR: keep the attention of different words apart, and keep what each word has once taken.

    z' = z - alpha_i grad_z [ seg L_seg + ret L_ret ]

    L_seg = sum_{m > n} sum min(A^m, A^n) / sum (A^m + A^n)                      eq. 2, segregation
    L_ret = sum_m 1 - sum min(A^m, B^m) / sum (A^m + B^m)                        eq. 3, retention

"A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", arXiv 2306.14544. A^m is the
cross-attention map of concept m, B^m the active pixels of the same concept's map one step earlier, or a layout that
the user draws. The paper states no step size, threshold, smoothing or normalisation: the defaults here are those of
Attend-and-Excite, from which the method descends, with each map divided by its maximum, which makes the two losses
comparable.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.errors import ConfigError
from attnctl.processors.latent.guidance import LatentGuidance
from attnctl.processors.latent.losses import Binarise, binarise, retention, segregation

__all__ = ["AStar", "layout_masks"]

Mask: TypeAlias = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class AStar(LatentGuidance):
    """Segregate the attention of concepts and retain it from step to step (arXiv 2306.14544).

    Attributes:
        seg: Weight of the segregation loss.
        ret: Weight of the retention loss, from the second step on, or from the first with `masks`.
        masks: A layout: for each concept a mask of any size (bool or 0 to 1, rows first, as array, tensor or nested
            tuples), or None for a concept that is free. A mask takes the place of the step before in the retention
            loss.
        binarise: What counts as active in the map of the step before: a fraction of the way from its minimum to its
            maximum, "mean" or "otsu".

    Example:
        >>> AStar(concepts=("cat", "dog"), seg=2.0).describe()
        "AStar(concepts=('cat', 'dog'), seg=2.0)"
    """

    seg: float = 1.0
    ret: float = 1.0
    masks: Any = None
    binarise: Binarise | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("seg", 0.0, math.inf)
        self._check_number("ret", 0.0, math.inf)
        if isinstance(self.binarise, str):
            self._check_choice("binarise", Binarise)
        elif isinstance(self.binarise, bool) or not 0 < self.binarise < 1:
            options = ", ".join(map(repr, get_args(Binarise)))
            raise ConfigError(
                f"{self._label}: binarise={self.binarise!r}: give a fraction between 0 and 1, or {options}."
            )
        if self.masks is not None:
            object.__setattr__(self, "masks", _checked_masks(self._label, self.masks, self.count))
        if self.count == 1 and self.seg > 0:
            warnings.warn(
                f"attnctl: {self._label} has one concept, so there is nothing to segregate; "
                f"{'only retention acts' if self.ret > 0 else 'it does nothing'}.",
                stacklevel=3,
            )

    def acts(self, state: CallState) -> bool:
        return super().acts(state) and (self.seg > 0 or self.ret > 0)

    def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
        total = self.seg * segregation(maps)
        before = memory.get("active")
        if self.masks is None:
            return total if before is None or self.ret == 0 else total + self.ret * retention(maps, before)
        drawn = memory.get("drawn")
        if drawn is None:
            drawn = memory["drawn"] = layout_masks(self.masks, *maps.shape[-2:]).to(maps.device)
        free = [c for c, mask in enumerate(self.masks) if mask is None]
        bound = [c for c, mask in enumerate(self.masks) if mask is not None]
        if bound:
            total = total + self.ret * retention(maps[:, bound], drawn[None])
        if free and before is not None:
            total = total + self.ret * retention(maps[:, free], before[:, free])
        return total

    def snapshot(self, maps: Tensor, memory: dict[str, Any]) -> None:
        memory["active"] = binarise(maps, self.binarise)

    def describe(self) -> str:
        if self.masks is None:
            return super().describe()
        sizes = ["None" if m is None else f"{len(m)}x{len(m[0])}" for m in self.masks]
        shown = [part for part in super().describe()[len(self._label) + 1 : -1].split(", masks=")[:1] if part]
        later = "" if self.binarise == 0.5 else f", binarise={self.binarise!r}"
        return f"{self._label}({', '.join([*shown, 'masks=(' + ', '.join(sizes) + ')'])}{later})"


def layout_masks(masks: Sequence[Mask | None], h: int, w: int) -> Tensor:
    """Resample the masks of a layout to a token grid: [drawn masks, h, w] of 0 and 1.

    A token belongs to a mask that covers half of it; a mask too small for that keeps the token that it covers most.
    """
    rows = []
    for mask in masks:
        if mask is not None:
            fine = torch.tensor(mask, dtype=torch.float32)[None, None]
            share = F.interpolate(fine, (h, w), mode="area")[0, 0]
            rows.append((share >= share.max().clamp_max(0.5)).float())
    return torch.stack(rows) if rows else torch.empty(0, h, w)


def _checked_masks(label: str, masks: Any, concepts: int) -> tuple[Mask | None, ...]:
    """Turn a layout into nested tuples, which a frozen control can hold and a record can keep."""
    if isinstance(masks, (str, bytes)) or not hasattr(masks, "__len__"):
        raise ConfigError(f"{label}: masks={masks!r:.60}: give one mask a concept, or None for a free concept.")
    if len(masks) != concepts:
        raise ConfigError(
            f"{label}: {len(masks)} masks were given for {concepts} concepts; give one for each, or None."
        )
    kept: list[Mask | None] = []
    for number, mask in enumerate(masks):
        if mask is None:
            kept.append(None)
            continue
        try:
            array = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask, dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"{label}: mask {number} is not an array of numbers.") from None
        if array.ndim != 2 or array.size == 0:
            raise ConfigError(
                f"{label}: mask {number} has shape {array.shape}; expected rows and columns, such as 64 x 64."
            )
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ConfigError(f"{label}: mask {number} must hold values from 0 to 1.")
        if array.max() < 0.5:
            raise ConfigError(f"{label}: mask {number} is empty: it names no place. Give None for a free concept.")
        kept.append(tuple(tuple(float(v) for v in row) for row in array))
    return tuple(kept)
