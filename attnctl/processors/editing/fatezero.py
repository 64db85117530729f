"""FateZero: edit a video (or an image) with a text prompt, in UNets of images and in transformers.

"FateZero: Fusing Attentions for Zero-shot Text-based Video Editing", arXiv 2303.09535. The source is taken back to
noise by DDIM with its own prompt; the edit starts there with the target prompt, and at step k takes attention from the
inversion step T-1-k, which has the same timestep:

    self     M A_e + (1 - M) A_s, times the edit's values;  M = attention of the source to the blend words > threshold,
             or 0 everywhere without blend words; in the steps of `self_replace`
    cross    columns of A_s for the words that both prompts share, in the steps of `cross_replace`

Only the prompt's rows change. Self-attention may look at the keys and values of other frames (`keys`), in all rows.
In UNets the frames ride in the batch. Layers are chosen by their downsampling, not by their number of queries, and
grids are carried along, so that any size and any UNet of Stable Diffusion works. Where the released code differs by
accident, a field says "official". In transformers the source is inverted along its flow (`attnctl.kernels.flow`), rides
as a row beside the edit, and a joint softmax is fused in parts: `attnctl.processors.editing.joint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnctl.core.hosts.families import family_of
from attnctl.core.live import LiveControl
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.processors.editing.beside import RowEditing
from attnctl.processors.editing.engine import Editing
from attnctl.processors.editing.source_edit import LatentAlign, SourceEdit

__all__ = ["FateZero", "LatentAlign"]


@dataclass(frozen=True, kw_only=True)
class FateZero(SourceEdit):
    """Edit what was inverted, keeping its attention (arXiv 2303.09535).

    `attnctl.pipelines.edit_video` does the whole job. By hand: `attnctl.pipelines.invert(pipe, frames, control=...)`
    returns an `Inversion`; attach `dataclasses.replace(control, inversion=inversion)` and run the pipeline with
    `latents=inversion.noise`, one prompt a frame; on a transformer with `pipe.scheduler = inversion.way_back()` and one
    prompt.

    Attributes:
        keys: Frames whose keys and values self-attention reads: "mid", "first", "last", "previous", a whole number of
            frames back (-1) or ahead (1), or a list of these; "self" for each frame its own.
            Transformers attend to all frames already.
        keys_factor: Layers at this downsampling or coarser use `keys`; None for the layers that are edited.
        store: Where the source's attention comes from: "recompute" runs the source again, "qk" and "maps" keep it.
        blend_attention: Whether self-attention is fused by the blend mask.
        blend_latents: Whether the latents outside the blend mask are the source's.
        blend_window: Window of the run in which latents are blended.
        latent_align: Source latents that are blended in: "aligned", those of the same noise level; "official", those
            of one level noisier, as released.
        inversion: The inverted source, as `attnctl.pipelines.invert` makes it.

    Example:
        >>> FateZero(source="a red car", target="a blue car", blend_words=["car"]).describe()
        "FateZero(source='a red car', target='a blue car', blend_words=['car'])"
    """

    about: ClassVar[About] = About(
        does="edits a video with a prompt, by the attention of its inversion",
        page="fatezero",
        goal="edit a video or an image with a prompt",
        paper="arXiv 2303.09535",
        cite=("Qi et al., *FateZero: Fusing Attentions for Zero-shot Text-based Video Editing*, arXiv 2303.09535",),
        group="Editing",
        offered=False,
        sites="self- and cross-attention at half of the latents' side and below",
        needs=("the prompt", "an inversion of the source"),
    )

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return Editing(self, denoiser, pipe) if family_of(denoiser).unet else RowEditing(self, denoiser, pipe)
