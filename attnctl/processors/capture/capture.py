"""Capture: record how much attention each image token pays to each word of the prompt, without changing anything.

The maps are those of "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (arXiv 2210.04885) and
"Prompt-to-Prompt" (arXiv 2208.01626), section 3: the softmax probabilities of image queries on text keys, here exact
for every word, in cross-attention and in the joint attention of SD3 and FLUX (image rows, text columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.published import Default
from attnctl.core.live import LiveControl
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import SiteError
from attnctl.processors.capture.concept_keys import KeyConceptRecorder
from attnctl.processors.capture.concepts import CONCEPT_SITES, StreamConceptRecorder, concept_path, concept_sites
from attnctl.processors.capture.fields import CaptureFields
from attnctl.processors.capture.points import PointRecorder
from attnctl.processors.capture.recorder import Recorder
from attnctl.processors.capture.refine import RefiningRecorder, partners

__all__ = ["Capture"]


@dataclass(frozen=True, kw_only=True)
class Capture(CaptureFields):
    """Record word maps; the pipeline's output stays bit for bit what it is without. Read them off `handle.maps`.

    Attributes:
        words: Words, phrases ("black bear"), occurrences ("cat#2") or places of text tokens (whole numbers); a tuple
            of tuples gives each prompt of a batch its own. None for all words of the prompt.
        points: Places of the image instead of words: pairs (x, y) in shares of width and height from the top left,
            each from 0 to 1, or (x, y, frame) of a video. The map shows what the token there attends to: every token of
            the image (self- and joint attention), or its own place in every frame (temporal attention).
        concepts: Words or phrases that need not be in the prompt, two or more (SD3, FLUX, Qwen-Image, CogVideoX,
            and wherever cross-attention reads the text). The map shows how much each place of the image is like each of
            them: shares of these concepts, which sum to 1, so that all else in the image, such as the background,
            needs a concept of its own (ConceptAttention, arXiv 2502.04320).
        sites: Selector of cross- and joint-attention sites; None for all of them. With points: of self-, joint, dual or
            temporal ones; None for all self- and joint attention. With concepts: joint blocks, None for the
            paper's; or cross-attention, None for all of it.
        reduce: "mean", "sum" or "max" over steps, heads and layers; "none" for the mean, with steps and heads kept;
            "ema" for the mean over heads and layers and a running mean over the steps, with the factor `decay`.
        decay: Share of the running mean that is kept at each step with reduce="ema", from 0 to below 1.
        keep: Axes that are kept apart while recording: "steps", "heads" or both. Layers are always kept apart; without
            "steps" the memory does not grow with the steps of the run.
        refine: How often each word map is multiplied by the self-attention of its block, so that places that attend to
            each other share their words: S^k A (IR-Diffusion, arXiv 2411.19261, takes 1 to 4); 0 for the plain maps.
        heads: Heads to record, or None for all.
        rows: "cond" for the maps of the prompt, "uncond" for those of the negative prompt.
        reference: Number of a reference picture, from 0, whose tokens are read instead of the image's, to show where in
            it the words are (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit and others whose calls show where it is).
        prompt: The prompt, if the pipeline is called with embeddings: text, or one text per sample; without weights
            such as "(cat)1.5", which are not tokenised.
        budget: Most bytes that the maps may take; more is an error in the first call of the denoiser.
        device: Where the maps are kept, or None for where attention runs.
        store: "float16" halves the memory of steps that are kept apart; sums are float32 always.
    """

    about: ClassVar[About] = About(
        does="records word maps and changes nothing",
        page="maps",
        goal="see where an image attends",
        title="Word maps",
        cite=(
            "Tang et al., *What the DAAM: Interpreting Stable Diffusion Using Cross Attention*, arXiv 2210.04885",
            "Helbling et al., *ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features*, "
            "arXiv 2502.04320",
        ),
        group="Words and layout",
        offered=False,
        sites="every cross- and joint attention; of points, every self- and joint attention",
        needs=("the prompt",),
    )
    published: ClassVar[Mapping[str, Default]] = CONCEPT_SITES

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        """Choose the sites to record: those where image tokens read text or, for points, each other.

        Raises:
            SiteError: There are none, or temporal and spatial ones were selected together.
            UnsupportedModelError: Concepts were asked for, and the family has no text stream that is known.
        """
        if self.concepts is not None:
            return concept_path(sites, concept_sites(sites, self.sites, family), family)
        if self.points is None:
            text = super().resolve(sites, family)
            names = {s.name for s in (*text, *partners(text, sites).values())} if self.refine else None
            return text if names is None else tuple(s for s in sites if s.name in names)
        if self.sites is None:
            return self.default_sites(sites, family)
        chosen = select(sites, self.sites, kinds=(*_LOOKING, "temporal"), what="Capture of points")
        temporal = [s.kind == "temporal" for s in chosen]
        if any(temporal) and not all(temporal):
            raise SiteError(
                "Capture of points: the selected sites attend over frames in part and over places in part, whose maps "
                f"do not add up. Use one Capture for each, such as sites='temporal' (first: {chosen[0].name})."
            )
        return chosen

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        """Choose every site whose image tokens read text; for points, each other."""
        wanted, what = (self.kinds, "Capture") if self.points is None else (_LOOKING, "Capture of points")
        kinds = [k for k in wanted if k != "dual" and any(s.kind == k for s in sites)]
        if not kinds and self.points is None:
            raise SiteError(
                "Capture: this model has no cross- or joint attention, so nothing in its image reads words. Use points "
                f"instead ({', '.join(sorted({s.kind for s in sites}))} attention is what it has)."
            )
        return select(sites, kinds or list(wanted), kinds=wanted, what=what)

    def default_source(self, family: Family) -> str | None:
        if self.concepts is not None:
            return super().default_source(family)
        return None if self.points is not None else "DAAM, arXiv 2210.04885: every cross-attention layer"

    def needs_prompt(self) -> bool:
        return self.prompt is None and self.points is None and self.concepts is None

    def wants_block_input(self) -> bool:
        return self.concepts is not None

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        if self.concepts is not None:
            chosen = concept_sites(find_sites(denoiser), self.sites, family_of(denoiser))
            if chosen[0].kind == "cross":
                return KeyConceptRecorder(self, chosen, pipe, denoiser)
            return StreamConceptRecorder(self, sites, chosen, pipe, denoiser)
        if self.points is not None:
            return PointRecorder(self, sites, pipe)
        return (RefiningRecorder if self.refine else Recorder)(self, sites, pipe)


_LOOKING = ("self", "joint", "dual")
