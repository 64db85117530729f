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

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.registry import knob
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError, choice, number
from attnctl.processors.latent.guidance import LatentGuidance
from attnctl.processors.latent.losses import Binarise, binarise, retention, segregation, take

__all__ = ["AStar", "layout_masks"]

Mask: TypeAlias = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class AStar(LatentGuidance):
    """Segregate the attention of concepts and retain it from step to step (arXiv 2306.14544).

    Attributes:
        seg: Weight of the segregation loss.
        ret: Weight of the retention loss, from the second step on, or from the first with `masks`.
        masks: A layout: for each concept a mask of any size (bool or 0 to 1, rows first, as array, tensor or nested
            tuples), or None for a concept that is free. In the retention loss a mask replaces the map of the step
            before.
        binarise: Threshold above which a place of the map of the step before is active: a fraction of the way from its
            minimum to its maximum, "mean" or "otsu".

    Example:
        >>> AStar(concepts=("cat", "dog"), seg=2.0).describe()
        "AStar(concepts=('cat', 'dog'), seg=2.0)"
    """

    seg: float = knob(1.0, 0.0, span=(0.0, 5.0, 0.1), shown=True)
    ret: float = knob(1.0, 0.0, span=(0.0, 5.0, 0.1), shown=True)
    masks: Any = None
    binarise: Binarise | float = knob(0.5, kind="free", values="above 0, below 1; 'mean', 'otsu'")

    about: ClassVar[About] = About(
        does="moves the latents so that each noun keeps a place of its own",
        page="astar",
        goal="get every object of the prompt, in its place",
        title="A-STAR",
        paper="arXiv 2306.14544",
        cite=(
            "Agarwal et al., *A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis*, "
            "arXiv 2306.14544",
        ),
        group="Words and layout",
        needs=("the prompt", "gradients"),
    )
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "shapes:text2image",
            'AStar(concepts=NOUNS, grad_transform="l2", step_size=1.0, stop=0.1)',
            column=3,
            label="A-STAR",
        ),
        Preset("shapes:mmdit", 'AStar(concepts=NOUNS, grad_transform="l2", step_size=1.0, stop=0.1)'),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"{self._label}: binarise"
        if isinstance(self.binarise, str):
            choice(self.binarise, what, get_args(Binarise))
        else:
            object.__setattr__(self, "binarise", number(self.binarise, what, above=0.0, below=1.0))
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
            total = total + self.ret * retention(take(maps, bound), drawn[None])
        if free and before is not None:
            total = total + self.ret * retention(take(maps, free), take(before, free))
        return total

    def remember(self, maps: Tensor, memory: dict[str, Any]) -> None:
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
    layout: list[Mask | None] = []
    for place, mask in enumerate(masks):
        if mask is None:
            layout.append(None)
            continue
        try:
            array = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask, dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"{label}: mask {place} is not an array of numbers.") from None
        if array.ndim != 2 or array.size == 0:
            raise ConfigError(
                f"{label}: mask {place} has shape {array.shape}; expected rows and columns, such as 64 x 64."
            )
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ConfigError(f"{label}: mask {place} must hold values from 0 to 1.")
        if array.max() < 0.5:
            raise ConfigError(f"{label}: mask {place} is empty: it names no place. Give None for a free concept.")
        layout.append(tuple(tuple(float(v) for v in row) for row in array))
    return tuple(layout)
