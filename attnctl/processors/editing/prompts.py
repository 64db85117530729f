"""What prompt-to-prompt edits share: two prompts, and which of their tokens exchange attention when.

"Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626. `WordEdit` holds the fields;
`WordEdit.plan` reads the prompts with a pipeline's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.words import find_words
from attnctl.core.registry import Bounds, Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError, number, window
from attnctl.processors.editing.align import (
    Tail,
    equalizer_row,
    follow_table,
    prompt_ids,
    refine_map,
    replace_matrix,
    word_tokens,
)
from attnctl.processors.editing.fusion import CrossEdit
from attnctl.processors.editing.places import transformer_groups

__all__ = ["TextMass", "WordEdit", "WordMode", "WordPlan", "site_factors"]

WordMode = Literal["refine", "replace"]
TextMass = Literal["source", "edit"]
_DEFAULT = "default_"
_FACTORS = (1, 2, 4, 8, 16)
_WINDOW = Bounds(kind="window")


@dataclass(frozen=True)
class WordPlan:
    """Two prompts read with one tokenizer.

    Attributes:
        how: How the target's cross-attention is made of the source's.
        default: Window (start, end) in which target tokens follow the source.
        words: Windows of single target words, by their tokens.
        blend: Source tokens of the blend words.
        blend_target: Target tokens of the blend words.
        length: Token slots.
    """

    how: CrossEdit
    default: tuple[float, float]
    words: Mapping[tuple[int, ...], tuple[float, float]]
    blend: tuple[int, ...]
    blend_target: tuple[int, ...]
    length: int

    def follow(self, steps: int) -> torch.Tensor:
        """Return w for every step of a run, [steps + 1, L] of zeros and ones."""
        return follow_table(steps, self.default, self.words, self.length)


@dataclass(frozen=True, kw_only=True)
class WordEdit(Control, abstract=True):
    """Base of the controls that edit by changing a prompt.

    Attributes:
        source: The prompt that describes the source.
        target: The prompt that describes the result.
        mode: "refine" aligns the prompts token by token, and new tokens keep their own attention; "replace" gives the
            words of the target the places of the source's words, for prompts with the same number of words.
        cross_replace: Window of the run in which cross-attention follows the source: an end b or (start, end), as
            fractions; or windows by word of the target, others under "default_".
        self_replace: The same for self-attention.
        blend_words: Words of the source outside which the source is kept, or a pair (words of the source, words of
            the target); None for everywhere.
        blend_threshold: Attention above this share of its maximum counts as inside; at 0 all is inside, at 1 nothing.
        equalizer: Weights of words of the target, above 1 for more of them.
        factor: Layers at this downsampling of the latents or coarser are edited; None for 2, and for 1 in models whose
            latents have at most 32 x 32 cells. Transformers have one resolution: all of their layers are edited.
        mask_factor: Downsampling of the layers whose attention to the blend words gives the mask; None for 4, or the
            nearest below that the model has.
        replace_tail: In mode "replace", "official" aligns tokens after the last changed word by position, as released.
        text_mass: In joint attention, the share of attention that goes to the text: "source" takes the source's (inside
            the blend words the edit's), "edit" the edit's.
    """

    source: str
    target: str
    mode: WordMode = knob("refine", options=WordMode)
    cross_replace: float | Sequence[float] | Mapping[str, float | Sequence[float]] = knob(
        0.8, kind="free", values="0 to 1, or a pair of them; or these by word"
    )
    self_replace: float | Sequence[float] = knob(0.8, kind="window")
    blend_words: Sequence[str] | Sequence[Sequence[str]] | None = None
    blend_threshold: float = knob(0.3, 0.0)
    equalizer: Mapping[str, float] | None = None
    factor: int | None = knob(None, options=_FACTORS)
    mask_factor: int | None = knob(None, options=_FACTORS)
    replace_tail: Tail = knob("aligned", options=Tail)
    text_mass: TextMass = knob("source", options=TextMass)

    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint", "dual")
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("WordEdit", "model", "each takes the attention of a source of its own"),
        Conflict("AgentAttention", "site", "merged tokens have no counterpart in the source's attention"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "target"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{self._label}: {name}={getattr(self, name)!r} is not a prompt: give a text.")
        windows = {w: _WINDOW.checked(v, f"{self._label}: cross_replace[{w!r}]") for w, v in self._windows.items()}
        several = isinstance(self.cross_replace, Mapping)
        object.__setattr__(self, "cross_replace", windows if several else windows[_DEFAULT])
        if self.equalizer is not None:
            if not isinstance(self.equalizer, Mapping):
                raise ConfigError(f"{self._label}: equalizer={self.equalizer!r:.60}: give weights by word, or None.")
            weights = {w: number(v, f"{self._label}: the weight of {w!r}") for w, v in self.equalizer.items()}
            object.__setattr__(self, "equalizer", weights)
        _ = self.blend_sides

    @property
    def _windows(self) -> dict[str, Any]:
        given = self.cross_replace
        return dict(given) if isinstance(given, Mapping) else {_DEFAULT: given}

    @property
    def blend_sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the blend words of the source and of the target."""
        words: Any = self.blend_words
        if words is None:
            return (), ()
        if isinstance(words, str):
            raise ConfigError(f"{self._label}: blend_words={words!r}: give a list of words, such as [{words!r}].")
        words = words if isinstance(words, Sequence) else ()
        if words and all(isinstance(w, str) for w in words):
            return tuple(words), ()
        if len(words) == 2 and all(isinstance(w, (list, tuple)) for w in words) and words[0]:
            return tuple(words[0]), tuple(words[1])
        raise ConfigError(
            f"{self._label}: blend_words={self.blend_words!r:.60}: give words of the source, or a pair (words of the "
            "source, words of the target), or None."
        )

    def self_window(self, steps: int) -> range:
        """Return the steps whose self-attention takes the source's map."""
        start, end = window(self.self_replace, "self_replace")
        return range(int(steps * start), int(steps * end))

    def plan(self, pipe: Any) -> WordPlan:
        """Read the prompts with a pipeline's tokenizer.

        Raises:
            ConfigError: A word is not in its prompt, or the prompts do not fit the mode.
            UnsupportedModelError: There is no pipeline, or it has no tokenizer.
        """
        tokenizer = getattr(pipe, "tokenizer", None)
        if tokenizer is None:
            raise UnsupportedModelError(
                f"{self._label} reads its prompts with the pipeline's tokenizer, which "
                f"{'a bare model' if pipe is None else type(pipe).__name__} has not. Pass the pipeline to control()."
            )
        if getattr(tokenizer, "padding_side", "right") == "left" or not _starts(tokenizer):
            raise UnsupportedModelError(
                f"{self._label} exchanges text tokens as CLIP's tokenizer lays them out: a start token first, padding "
                f"last. {type(tokenizer).__name__} of {type(pipe).__name__} does not."
            )
        length = int(tokenizer.model_max_length)
        weight = equalizer_row({self._find(pipe, w): v for w, v in (self.equalizer or {}).items()}, length)
        windows = self._windows
        default = window(windows.pop(_DEFAULT, 1.0), "cross_replace")
        words = {self._find(pipe, w): window(v, "cross_replace") for w, v in windows.items()}
        sides = self.blend_sides
        blend = tuple(t for w in sides[0] for t in self._find(pipe, w, self.source))
        return WordPlan(
            how=self._column_map(tokenizer, weight, length),
            default=default,
            words=words,
            blend=blend,
            blend_target=tuple(t for w in sides[1] for t in self._find(pipe, w)),
            length=length,
        )

    def _find(self, pipe: Any, word: str, prompt: str | None = None) -> tuple[int, ...]:
        return find_words(pipe, self.target if prompt is None else prompt, [word])[0].positions

    def _column_map(self, tokenizer: Any, weight: torch.Tensor, length: int) -> CrossEdit:
        if self.mode == "refine":
            ids_s, ids_t = (prompt_ids(tokenizer, text) for text in (self.source, self.target))
            return CrossEdit.refine(*refine_map(ids_s, ids_t, length), weight)
        words_s, words_t = (word_tokens(tokenizer, text) for text in (self.source, self.target))
        matrix = replace_matrix(self.source, self.target, words_s, words_t, length, self.replace_tail)
        return CrossEdit.replace(matrix, weight)

    # Sites -------------------------------------------------------------------------------------------------------

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        return self.groups(sites, family)[0]

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        fused, masks = self.groups(sites, family)
        names = {s.name for s in (*fused, *masks)}
        return tuple(s for s in sites if s.name in names)

    def groups(self, sites: Sequence[Site], family: Family) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """Return the sites whose attention is edited, and the cross-attention sites that the blend mask is made of."""
        if not family.unet:
            return transformer_groups(self, sites, family)
        if any(s.kind == "temporal" for s in sites):
            raise UnsupportedModelError(
                f"{self._label} edits the self- and cross-attention of image UNets (SD 1, SD 2, SDXL), frames riding "
                f"in the batch, and transformers; this is a {family.name} model."
            )
        factors = site_factors(sites)
        if self.sites is not None:
            fused = select(sites, self.sites, kinds=self.kinds, what=self._label)
        else:
            least = self.factor or (1 if latent_size(sites) <= 32 else 2)
            fused = tuple(s for s in sites if s.kind in self.kinds and factors[s.name] >= least)
            if not fused:
                raise SiteError(f"{self._label}: no layer has downsampling {least} or more. Give a smaller factor.")
        cross = {factors[s.name] for s in sites if s.kind == "cross"}
        wanted = self.mask_factor or max((f for f in cross if f <= 4), default=0)
        masks = tuple(s for s in sites if s.kind == "cross" and factors[s.name] == wanted)
        if self.blend_words is not None and not masks:
            raise SiteError(
                f"{self._label}: no cross-attention has downsampling {wanted or 4}, where the blend mask comes from; "
                f"mask_factor may be {', '.join(map(str, sorted(cross))) or 'none'}."
            )
        return fused, masks if self.blend_words is not None else ()


def _starts(tokenizer: Any) -> bool:
    """Tell whether a tokenizer begins a text with a token of its own."""
    ids = prompt_ids(tokenizer, "a")
    return bool(ids) and ids[0] in set(getattr(tokenizer, "all_special_ids", ids[:1]))


def site_factors(sites: Sequence[Site]) -> dict[str, int]:
    """Return how much coarser than the latents each site of a UNet is, by name.

    Raises:
        UnsupportedModelError: The model's configuration does not say for what size it was made.
    """
    size = latent_size(sites)
    return {s.name: 2 ** round(math.log2(size / s.grid[1])) for s in sites if s.grid is not None}


def latent_size(sites: Sequence[Site]) -> int:
    """Return the rows of the latents that a UNet was made for."""
    for s in sites:
        stage, _, rest = s.name.partition(".")
        if stage == "down_blocks" and s.grid is not None:
            return s.grid[1] * 2 ** int(rest.split(".")[0])
    raise UnsupportedModelError(
        "The UNet's configuration names no sample_size, or its down blocks have no attention: give `sites` instead of "
        "relying on downsampling factors."
    )
