"""What an edit of an inverted source is asked to do: the fields of `FateZero`, and what they need at each step.

They stand apart from `FateZero` so that its engine can read them: `FateZero` makes the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.errors import ConfigError
from attnctl.processors.editing.fusion import Keys, frame_indices
from attnctl.processors.editing.prompts import WordEdit, site_factors
from attnctl.processors.editing.source import Inversion, StoreMode

__all__ = ["LatentAlign", "SourceEdit"]

LatentAlign = Literal["aligned", "official"]


@dataclass(frozen=True, kw_only=True)
class SourceEdit(WordEdit, abstract=True):
    """Hold and check the fields of a `FateZero`, whose docstring describes them."""

    keys: Keys = "mid"
    keys_factor: int | None = None
    store: StoreMode = knob("recompute", options=StoreMode)
    blend_attention: bool = True
    blend_latents: bool = False
    blend_window: tuple[float, float] = knob((0.2, 0.8), kind="window")
    latent_align: LatentAlign = knob("aligned", options=LatentAlign)
    inversion: Inversion | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        frame_indices(self.keys, 2)
        if self.blend_latents and self.blend_words is None:
            raise ConfigError(f"{self._label}: blend_latents needs blend_words, which say where the edit is.")

    def needs_prompt(self) -> bool:
        return self.inversion is not None

    def describe(self) -> str:
        return super().describe() if self.inversion is None else replace(self, inversion=None).describe()

    def resolve(self, sites: Sequence[Site], family: Any) -> tuple[Site, ...]:
        names = {s.name for s in (*super().resolve(sites, family), *self.keyed(sites, family))}
        return tuple(s for s in sites if s.name in names)

    def keyed(self, sites: Sequence[Site], family: Any) -> tuple[Site, ...]:
        """Return the self-attention sites at which `keys` holds."""
        if not family.unet or not frame_indices(self.keys, 2)[0]:
            return ()
        if self.keys_factor is None:
            return tuple(s for s in self.groups(sites, family)[0] if s.kind == "self")
        factors = site_factors(sites)
        return tuple(s for s in sites if s.kind == "self" and factors[s.name] >= self.keys_factor)

    def needed(self, step: int, steps: int, follow: Tensor) -> tuple[bool, bool, bool]:
        """Tell what an editing step takes from the source: self-attention, cross-attention, the blend mask."""
        if not self.in_window_at(step, steps):
            return False, False, False
        fused = step in self.self_window(steps)
        mask = self.blend_words is not None and ((fused and self.blend_attention) or self.blends_at(step, steps))
        return fused, bool(follow[step].any()), mask

    def blends_at(self, step: int, steps: int) -> bool:
        """Tell whether latents are blended after an editing step."""
        start, end = self.blend_window
        return self.blend_latents and int(start * steps) < step + 1 < int(end * steps)
