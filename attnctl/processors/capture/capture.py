"""Capture: record how much attention each image token pays to each word of the prompt, without changing anything.

The maps are those of "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (arXiv 2210.04885) and
"Prompt-to-Prompt" (arXiv 2208.01626), section 3: the softmax probabilities of image queries on text keys, here exact
for every word, in cross-attention and in the joint attention of SD3 and FLUX (image rows, text columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from attnctl.core.control import Control, LiveControl
from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.sites import Site, select
from attnctl.data.maps import Reduce
from attnctl.errors import ConfigError, SiteError
from attnctl.processors.capture.concepts import ConceptRecorder, concept_path, concept_sites
from attnctl.processors.capture.points import PointRecorder
from attnctl.processors.capture.recorder import Recorder
from attnctl.processors.capture.refine import RefiningRecorder, partners

__all__ = ["Capture"]

Axis = Literal["steps", "heads"]
Half = Literal["cond", "uncond"]
Store = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class Capture(Control):
    """Record word maps; the pipeline's output stays bit for bit what it is without. Read them off `handle.maps`.

    Attributes:
        words: Words, phrases ("black bear"), occurrences ("cat#2") or places of text tokens (whole numbers); a tuple
            of tuples gives each prompt of a batch its own. None for all words of the prompt.
        points: Places of the image instead of words: pairs (x, y) in shares of width and height from the top left,
            each from 0 to 1, or (x, y, frame) of a video. Recorded is what the token there attends to: every token of
            the image (self- and joint attention), or its own place in every frame (temporal attention).
        concepts: Words or phrases that need not stand in the prompt, two or more (SD3, FLUX.1). Recorded is how much
            each place of the image is like each of them: shares of these concepts, which sum to 1, so that what else
            is in the image, such as the background, wants a concept of its own (ConceptAttention, arXiv 2502.04320).
        sites: Selector of cross- and joint-attention sites; None for all of them. With points: of self-, joint, dual or
            temporal ones; None for all self- and joint attention. With concepts: double blocks; None for the paper's.
        reduce: "mean", "sum" or "max" over steps, heads and layers; "none" for the mean, with steps and heads kept;
            "ema" for the mean over heads and layers and a running one over the steps, which forgets by `decay`.
        decay: What is kept of the running mean at each step with reduce="ema", from 0 to below 1.
        keep: What is kept apart while recording: "steps", "heads" or both. Layers are always kept apart; without
            "steps" the memory does not grow with the steps of the run.
        refine: How often each word map is multiplied by the self-attention of its block, so that places which look at
            each other share their words: S^k A (IR-Diffusion, arXiv 2411.19261, takes 1 to 4); 0 for the plain maps.
        heads: Heads to record, or None for all.
        rows: "cond" for the maps of the prompt, "uncond" for those of the negative prompt.
        prompt: The prompt, where the pipeline is called with embeddings: text, or one text a sample.
        budget: Most bytes that the maps may take; more is an error in the first call of the denoiser.
        device: Where the maps are kept, or None for where attention runs.
        store: "float16" halves the memory of steps that are kept apart; sums are float32 always.
    """

    words: Sequence[Any] | None = None
    points: Sequence[tuple[float, ...]] | None = None
    concepts: Sequence[str] | None = None
    reduce: Literal["mean", "sum", "max", "none", "ema"] = "mean"
    decay: float = 0.9
    keep: Sequence[Axis] = ()
    refine: int = 0
    heads: Sequence[int] | None = None
    rows: Half = "cond"
    prompt: str | Sequence[str] | None = None
    budget: int = 2 << 30
    device: str | None = None
    store: Store = "float32"

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in (*get_args(Reduce), "none", "ema"):
            raise ConfigError(f"Capture: reduce={self.reduce!r} is unknown. Choose one of mean, sum, max, none, ema.")
        self._check_number("decay", 0.0, 1.0)
        if self.decay == 1.0:
            raise ConfigError("Capture: decay=1.0 would keep the first step alone: give a number below 1.")
        self._check_choice("rows", Half)
        self._check_choice("store", Store)
        keep = (self.keep,) if isinstance(self.keep, str) else tuple(self.keep)
        for axis in keep:
            if axis not in get_args(Axis):
                raise ConfigError(
                    f"Capture: keep={axis!r} is unknown. Choose from steps, heads (layers are kept apart always)."
                )
        object.__setattr__(self, "keep", get_args(Axis) if self.reduce == "none" else keep)
        if self.reduce == "ema" and "steps" in self.keep:
            raise ConfigError(
                'Capture: reduce="ema" runs over the steps, which keep=("steps",) keeps apart: choose one.'
            )
        if self.store == "float16" and "steps" not in self.keep:
            raise ConfigError('Capture: store="float16" is for steps that are kept apart: add keep=("steps",).')
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise ConfigError(f"Capture: budget={self.budget!r} is not a number of bytes, 1 or more.")
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or self.refine < 0:
            raise ConfigError(f"Capture: refine={self.refine!r} is not a number of times, 0 or more.")
        if self.refine and self.points is not None:
            raise ConfigError("Capture: refine is for word maps; maps of points are self-attention themselves.")
        self._check_heads()
        self._check_words()
        self._check_points()
        self._check_concepts()
        self._check_device()

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        heads = tuple(self.heads) if isinstance(self.heads, Sequence) and not isinstance(self.heads, str) else ()
        whole = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads)
        if not heads or not whole or len(set(heads)) < len(heads):
            raise ConfigError(f"Capture: heads={self.heads!r}: give different head numbers, such as (0, 3), or None.")
        object.__setattr__(self, "heads", heads)

    def _check_words(self) -> None:
        if self.words is None:
            return
        if isinstance(self.words, (str, int)) or not self.words:
            raise ConfigError(
                f"Capture: words={self.words!r}: give a tuple of words, such as ('cat', 'dog'), or None for all."
            )
        nested = [not isinstance(w, (str, int)) and isinstance(w, Sequence) for w in self.words]
        if any(nested) and not (all(nested) and all(self.words)):
            raise ConfigError(
                f"Capture: words={self.words!r} mixes words and lists of words, or holds an empty list: give words, or "
                "one list of words a prompt."
            )
        for word in [w for part in self.words for w in part] if any(nested) else self.words:
            if isinstance(word, bool) or not isinstance(word, (str, int)):
                raise ConfigError(f"Capture: {word!r} in words is neither a word nor the place of a text token.")
        object.__setattr__(self, "words", tuple(tuple(w) for w in self.words) if any(nested) else tuple(self.words))

    def _check_points(self) -> None:
        if self.points is None:
            return
        if self.words is not None:
            raise ConfigError("Capture: words and points were both given: use one Capture for each.")
        form = "points as shares of width and height, such as ((0.5, 0.25), (0.9, 0.5)), or with a frame (0.5, 0.25, 3)"
        many = self.points if isinstance(self.points, (tuple, list)) else ()
        points = tuple(tuple(p) if isinstance(p, (tuple, list)) else () for p in many)
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for p in points for v in p)
        if not points or not numbers or {len(p) for p in points} not in ({2}, {3}):
            raise ConfigError(f"Capture: points={self.points!r}: give {form}.")
        for x, y, *frame in points:
            if not (0 <= x <= 1 and 0 <= y <= 1) or any(f < 0 or f != int(f) for f in frame):
                raise ConfigError(f"Capture: the point {(x, y, *frame)} lies outside the image: give {form}.")
        if len(set(points)) < len(points):
            raise ConfigError(f"Capture: points={self.points!r} names a point twice.")
        object.__setattr__(self, "points", points)

    def _check_concepts(self) -> None:
        if self.concepts is None:
            return
        if self.words is not None or self.points is not None:
            raise ConfigError("Capture: concepts were given beside words or points: use one Capture for each.")
        many = self.concepts if isinstance(self.concepts, (tuple, list)) else ()
        if len(many) < 2 or not all(isinstance(c, str) and c.strip() for c in many):
            raise ConfigError(
                f"Capture: concepts={self.concepts!r}: give two or more words or phrases, such as ('cat', 'sky'): each "
                "map is a share of them all, which of one alone is 1 everywhere."
            )
        if len(set(many)) < len(many):
            raise ConfigError(f"Capture: concepts={self.concepts!r} names a concept twice.")
        if self.refine or "heads" in self.keep:
            raise ConfigError("Capture: maps of concepts join all heads: leave out refine, and heads of keep=.")
        object.__setattr__(self, "concepts", tuple(many))

    def _check_device(self) -> None:
        if self.device is None:
            return
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError):
            raise ConfigError(f"Capture: device={self.device!r} is unknown: give one such as 'cpu' or None.") from None

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        """Choose the sites to record: those where image tokens read text or, for points, each other.

        Raises:
            SiteError: There are none, or temporal and spatial ones were selected together.
            UnsupportedModelError: Concepts were asked for, and the family has no text stream that is known.
        """
        if self.concepts is not None:
            return concept_path(sites, concept_sites(sites, self.sites, family))
        if self.points is None:
            text = super().resolve(sites, family)
            own = {s.name for s in (*text, *partners(text, sites).values())} if self.refine else None
            return text if own is None else tuple(s for s in sites if s.name in own)
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
            return None if family.concepts is None else family.concepts.source
        return None if self.points is not None else "DAAM, arXiv 2210.04885: every cross-attention layer"

    def needs_prompt(self) -> bool:
        return self.prompt is None and self.points is None and self.concepts is None

    def wants_block_input(self) -> bool:
        return self.concepts is not None

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        if self.concepts is not None:
            chosen = concept_sites(find_sites(denoiser), self.sites, family_of(denoiser))
            return ConceptRecorder(self, sites, chosen, pipe, denoiser)
        if self.points is not None:
            return PointRecorder(self, sites, pipe)
        return (RefiningRecorder if self.refine else Recorder)(self, sites, pipe)


_LOOKING = ("self", "joint", "dual")
