"""TextCenGen in attention: the maps of words move out of a free space and multiply the values as they then are.

"TextCenGen: Attention-Guided Text-Centric Background Adaptation for Text-to-Image Generation", arXiv 2404.11824. For
each token of a concept with the columns P_h of its H heads' maps, and the free space R with the middle m:

    level       A = mean of P_h over heads, brought to [0, 1]
    conflict    the token moves where the mean of A in R is above theta
    force       its centroid p is pushed off m by force^2 / |p - m|, and off each border by margin / distance^2
    shift       P_h' = P_h moved by the sum of the pushes, zeros coming in
    exclusion   P_h'' = P_h' (x + (1 - x) (1 - R)), x = 1 - exclusion
    output      o + sum over moved tokens of g (P_h'' - P_h) v

In joint attention P is the text's part of the map, each row scaled to a sum of 1, and g the mass of the text, which
stays; in cross-attention g is 1. As in the paper no row is scaled again. `TextCenGen` moves latents in place of maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.control import Control
from attnctl.core.hosts.arguments import row_alone
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.words import RowText, given_text, prompt_words, row_texts
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.areas import box_on_grid
from attnctl.kernels.checks import repeat_heads, send
from attnctl.kernels.maps import stretched
from attnctl.processors.latent.fields import checked_concepts
from attnctl.processors.latent.textcengen import Box, checked_space, displacement, shifted

__all__ = ["TextCenGenMaps", "moved_columns"]


def moved_columns(columns: Tensor, space: Box, theta: float, force: float, margin: float, exclusion: float) -> Tensor:
    """Move the columns of tokens out of a space, where they lie in it (arXiv 2404.11824).

    Args:
        columns: Columns of attention maps [B, H, T, h, w], 0 or more.
        space: The free space: left, top, right, bottom in fractions of the picture.
        theta: Mean of a token's level in the space, 0 to 1, above which it moves.
        force: Distance in shares of the picture at which a push is as long as the distance.
        margin: Strength of the push off the picture's borders.
        exclusion: How much of a moved column is taken out of the space, 0 to 1.

    Returns:
        The columns [B, H, T, h, w]; those of tokens that are not in the way are the same.
    """
    free = send(box_on_grid(space, *columns.shape[-2:]), columns.device, columns.dtype)
    level = stretched(columns.mean(1), (-2, -1), from_zero=False)
    conflict = (level * free).sum((-2, -1)) / free.sum() > theta
    by = displacement(level, space, force, margin)[:, None].expand(*columns.shape[:3], 2)
    moved = shifted(columns, by) * (1 - exclusion * free)
    return torch.where(conflict[:, None, :, None, None], moved, columns)


@dataclass(frozen=True, kw_only=True)
class TextCenGenMaps(Control):
    """Keep a part of the picture free for text by moving the maps of words in attention (arXiv 2404.11824).

    Attributes:
        concepts: Words, phrases or token places of the prompt that leave the space; a tuple of tuples gives each prompt
            of a batch its own. Empty for every word of the prompt.
        prompt: The prompt, or one for each image, for calls that pass embeddings instead of text.
        space: The part to keep free: a box (left, top, right, bottom) in fractions of the picture.
        theta: Mean of a token's map in the space, from 0 to 1, above which the token moves.
        force: Distance in shares of the picture at which a push out of the space is as long as the distance.
        margin: Strength of the push away from the picture's borders.
        exclusion: How much of a moved map is taken out of the space, 0 to 1.
    """

    concepts: tuple[Any, ...] = knob((), hint="blank: every word", shown=True)
    prompt: str | tuple[str, ...] | None = None
    space: Box = knob((0.0, 0.0, 1.0, 0.33), kind="free", values="left, top, right, bottom, 0 to 1")
    theta: float = knob(0.25, 0.0, 1.0)
    force: float = knob(0.3, 0.0, 2.0, shown=True)
    margin: float = knob(0.001, 0.0, 1.0)
    exclusion: float = knob(0.75, 0.0, 1.0)

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    about: ClassVar[About] = About(
        does="keeps a part of the picture free for text, without gradients",
        page="textcengen",
        goal="get every object of the prompt, in its place",
        paper="arXiv 2404.11824",
        cite=("Liang et al., *TextCenGen: Attention-Guided Text-Centric Background Adaptation*, arXiv 2404.11824",),
        group="Words and layout",
        offered=False,
        sites="every cross-attention; without any, every joint attention",
        needs=("the prompt",),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("TextCenGenMaps", "site", "each moves the maps as the model made them: give one all concepts"),
        Conflict(
            ("NAG", "WordEdit", "Regions"),
            "site",
            "they compute the attention of chosen rows to chosen texts, of which the moved maps are none",
        ),
        Conflict("ShareAttention", "site", "moved maps are those of a picture that looks at itself alone"),
        Conflict(("PARO", "SparseAttention"), "site", "moved maps are those of all keys, not of chosen blocks"),
        Conflict("AgentAttention", "site", "maps move by the places of tokens, which merging takes away"),
        Conflict(
            ("Inject", "FlowEdit"),
            "model",
            "the edit makes calls with rows of its own, whose words are not those of the pipeline's prompt",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        concepts = self.concepts
        if not (isinstance(concepts, (tuple, list)) and not concepts):
            concepts = checked_concepts(self._label, concepts)
        object.__setattr__(self, "concepts", tuple(concepts))
        object.__setattr__(self, "space", checked_space(self.space, self._label))
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        cross = any(site.kind == "cross" for site in sites)
        return select(sites, "cross" if cross else "joint", kinds=self.kinds, what=self._label)

    def needs_prompt(self) -> bool:
        return self.prompt is None

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _MovedMaps(self, pipe)

    def moved(self, columns: Tensor) -> Tensor:
        """Move columns [B, H, T, h, w]; see `moved_columns`."""
        return moved_columns(columns, self.space, self.theta, self.force, self.margin, self.exclusion)


@dataclass(frozen=True)
class _Columns:
    """The tokens T that move in some rows of a call.

    Attributes:
        weights: One column for each of them, and one for the mass of the text [text tokens, T + 1].
        keys: Their places among the keys [T].
        rows: Whether each is one of a row's own [B, 1, T, 1, 1, 1].
    """

    weights: Tensor
    keys: Tensor
    rows: Tensor


class _MovedMaps(LiveControl):
    """One `TextCenGenMaps` at work on one denoiser."""

    def __init__(self, control: TextCenGenMaps, pipe: Any) -> None:
        self.control, self.pipe = control, pipe
        self.begin_run()

    def begin_run(self) -> None:
        self.places: list[tuple[int, ...]] = []
        """Tokens of the concepts in each row that carries the prompt."""
        self.columns: dict[Any, _Columns] = {}

    def before_call(self, passes: LiveDenoiser) -> None:
        state = passes.state
        if state.rows.role in ("uncond", "extra") or len(self.places) == state.rows.prompts:
            return
        control = self.control
        nested = bool(control.concepts) and isinstance(control.concepts[0], tuple)
        lists = len(control.concepts) if nested else None
        rows = row_texts(state.prompts, state.rows.prompts, control.describe(), prompt=control.prompt, lists=lists)
        self.places = [
            self._places(row, control.concepts[row.number] if nested else control.concepts, state) for row in rows
        ]

    def _places(self, row: RowText, words: Sequence[Any], state: CallState) -> tuple[int, ...]:
        """Find the tokens of words in one row's prompt; of all its words that attention sees, where none are given."""
        n_text, what = given_text(state.bound), self.control.describe()
        if words:
            found = list(row.find(self.pipe, words, n_text, what))
        else:
            found = []
            refusal = ConfigError(f"{what}: the prompt {row.prompt!r} has no word. Give words, or places of tokens.")
            for word in prompt_words(row.prompt):
                try:
                    found += row.find(self.pipe, [word], n_text, what)
                except ConfigError as error:
                    refusal = error  # cut off with the prompt's end, perhaps
            if not found:
                raise refusal
        return tuple(sorted({place for concept in found for place in concept.positions}))

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        rows = call.state.rows
        if rows.role in ("uncond", "extra") or not rows.prompts:
            return proceed(call)
        alone = row_alone(call.q, rows, call.index)
        mine = call.index == 0 if alone is None else alone in range(rows.total)[rows.cond]
        call.wants_sums = call.wants_sums or mine
        out = proceed(call)
        if not mine:  # a second attention, to an image prompt; or a row without the prompt
            return out
        if alone is None:
            places, cut = self.places, slice(rows.cond.start * call.folded, rows.cond.stop * call.folded)
        else:
            places, cut = self.places[alone - rows.cond.start :][:1], slice(0, 1)
        part = call if alone is not None else call.rows(rows.cond)
        image, _ = part.on_image()
        if part.q.shape[2] < image.stop:  # PAG asks for the text's queries alone
            return out
        result = out.clone()
        result[cut, :, image] += self._change(part, places).to(out.dtype)
        return result

    def _change(self, part: AttnCall, places: Sequence[tuple[int, ...]]) -> Tensor:
        """Compute what moving the maps adds to the output of the image's tokens, [B, H, N, D]."""
        _, (frames, h, w) = part.on_image()
        at = self._columns(part, places)
        read = part.text_map(at.weights)
        mass = read[..., -1:].clamp_min(torch.finfo(read.dtype).tiny)
        columns = (read[..., :-1] / mass).transpose(-2, -1).unflatten(-1, (frames, h, w))  # [B, H, T, frames, h, w]
        by_frame = columns.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        moved = self.control.moved(by_frame).unflatten(0, (-1, frames)).permute(0, 2, 3, 1, 4, 5)
        change = torch.where(at.rows, moved - columns, 0.0).flatten(-3).transpose(-2, -1) * mass
        values = repeat_heads(part.v, part.q.shape[1])[:, :, at.keys].to(read.dtype)
        return change @ values

    def _columns(self, part: AttnCall, places: Sequence[tuple[int, ...]]) -> _Columns:
        """Return where the tokens of some rows stand in a call; made once a run, on the device of the call."""
        text, device, repeat = part.text_keys(), part.q.device, part.q.shape[0] // len(places)
        key = (text.start, text.stop, device, repeat, *places)
        if key not in self.columns:
            n_text, tokens = text.stop - text.start, sorted({place for row in places for place in row})
            if tokens[-1] >= n_text:
                raise UnsupportedModelError(
                    f"{part.site.name} attends to {n_text} text tokens, and a concept stands at place {tokens[-1]}."
                )
            weights = torch.zeros(n_text, len(tokens) + 1)
            weights[tokens, range(len(tokens))] = 1
            weights[:, -1] = 1
            rows = torch.tensor([[token in row for token in tokens] for row in places]).repeat_interleave(repeat, 0)
            self.columns[key] = _Columns(
                send(weights, device),
                send(torch.tensor(tokens) + text.start, device),
                send(rows[:, None, :, None, None, None], device),
            )
        return self.columns[key]
