"""FateZero: edit a video (or an image) with a text prompt, its frames riding in the batch of a 2D UNet.

"FateZero: Fusing Attentions for Zero-shot Text-based Video Editing", arXiv 2303.09535. The source is taken back to
noise by DDIM with its own prompt; the edit starts there with the target prompt, and at step k takes attention from the
inversion step T-1-k, which has the same timestep:

    self     M A_e + (1 - M) A_s, times the edit's values;  M = attention of the source to the blend words > threshold,
             or 0 everywhere without blend words; in the steps of `self_replace`
    cross    columns of A_s for the words that both prompts share, in the steps of `cross_replace`

Only the prompt's rows change. Self-attention may look at the keys and values of other frames (`keys`), in all rows.
Layers are chosen by their downsampling, not by their number of queries, and grids are carried along, so that any size
and any UNet of Stable Diffusion works. Where the released code differs by accident, a field says "official".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnctl.core.control import LiveControl
from attnctl.core.sites import Site
from attnctl.errors import ConfigError
from attnctl.processors.editing.align import window_of
from attnctl.processors.editing.engine import Editing
from attnctl.processors.editing.fusion import Keys, frame_indices
from attnctl.processors.editing.prompts import WordEdit, site_factors
from attnctl.processors.editing.source import Inversion, StoreMode

__all__ = ["FateZero", "LatentAlign"]

LatentAlign = Literal["aligned", "official"]


@dataclass(frozen=True, kw_only=True)
class FateZero(WordEdit):
    """Edit what was inverted, keeping its attention (arXiv 2303.09535).

    `attnctl.pipelines.edit_video` does the whole job. By hand: `attnctl.pipelines.invert(pipe, frames, control=...)`
    returns an `Inversion`; attach `dataclasses.replace(control, inversion=inversion)` and run the pipeline with
    `latents=inversion.noise`, one prompt a frame.

    Attributes:
        keys: Frames whose keys and values self-attention sees: "mid", "first", "last", "previous", a whole number to
            look back (-1) or ahead (1), or a list of these; "self" for each frame its own.
        keys_factor: Downsampling from which on `keys` holds; None for the layers that are edited.
        store: How the source's attention is had: "recompute", "qk" or "maps" (see `attnctl.processors.editing.source`).
        blend_attention: Whether self-attention is fused by the blend mask.
        blend_latents: Whether the latents outside the blend mask are the source's.
        blend_window: Window of the run in which they are.
        latent_align: Which of the source's latents they take: "aligned" of the same noise level; "official" of one
            level noisier, as released.
        inversion: What is edited.

    Example:
        >>> FateZero(source="a red car", target="a blue car", blend_words=["car"]).describe()
        "FateZero(source='a red car', target='a blue car', blend_words=['car'])"
    """

    keys: Keys = "mid"
    keys_factor: int | None = None
    store: StoreMode = "recompute"
    blend_attention: bool = True
    blend_latents: bool = False
    blend_window: tuple[float, float] = (0.2, 0.8)
    latent_align: LatentAlign = "aligned"
    inversion: Inversion | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("store", StoreMode)
        self._check_choice("latent_align", LatentAlign)
        window_of(self.blend_window, f"{self._label}: blend_window")
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
        if not frame_indices(self.keys, 2)[0]:
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

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return Editing(self, denoiser, pipe)
