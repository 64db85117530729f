"""ShareAttention: pictures of one batch attend to each other's keys and values.

For the queries of picture i, whose sources are the pictures S(i) of the same half of the batch:

    append    softmax([q k_i^T, (q k_s^T) factor + bias for s in S(i)] / sqrt(d)) [v_i, v_s ...]
    replace   softmax(q k_s^T / sqrt(d)) v_s, for the parts that are taken
    AdaIN     x <- (x - mean x) / std x * std x_s + mean x_s    over tokens, per head and channel

"Style Aligned Image Generation via Shared Attention", arXiv 2312.02133 (section 4); "MasaCtrl", arXiv 2304.08465;
"StoryDiffusion", arXiv 2405.01434: `StyleAligned`, `MasaCtrl` and `Consistent` are settings of it. In joint attention
the image's keys are shared, and each picture keeps its own text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.tokens import has_outer_keys, image_keys
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError, choice, unboxed, whole
from attnctl.kernels.sharing import match_statistics, widened_mask

__all__ = ["ShareAttention", "Sources", "source_table"]

Sources: TypeAlias = str | int | tuple[int, ...]
Take: TypeAlias = Literal["append", "replace"]
Halves: TypeAlias = Literal["both", "cond"]
_WORDS = ("first", "previous", "others")
_PARTS = ("q", "k", "v")


def source_table(sources: Sources, pictures: int) -> list[list[int]]:
    """List the pictures that each picture of a batch takes keys from.

    Args:
        sources: "first", "previous", "others", the number of a picture, or one number per picture.
        pictures: Pictures in the batch.

    Raises:
        ConfigError: There is one picture alone, or a number that no picture has.
    """
    if pictures < 2:
        raise ConfigError(
            "Attention is shared between the pictures of one batch, and this call makes one: pass several prompts, or "
            "num_images_per_prompt=2 or more."
        )
    if isinstance(sources, str):
        numbers = range(pictures)
        rules: dict[str, list[list[int]]] = {
            "first": [[0] for _ in numbers],
            "previous": [[max(i - 1, 0)] for i in numbers],
            "others": [[j for j in numbers if j != i] for i in numbers],
        }
        return rules[sources]
    table = [[s] for s in ([sources] * pictures if isinstance(sources, int) else sources)]
    if len(table) != pictures or any(s >= pictures for (s,) in table):
        raise ConfigError(
            f"sources={sources!r} was given for a batch of {pictures} pictures: give one number from 0 to "
            f"{pictures - 1} for all, or a tuple of {pictures} such numbers."
        )
    return table


@dataclass(frozen=True, kw_only=True)
class ShareAttention(Control):
    """Let the pictures of one batch attend to each other.

    Attributes:
        sources: The pictures that each picture takes from: "first", "previous", "others" (all of them), the number of
            one picture from 0, or a tuple with one number per picture.
        take: "append" adds the sources' keys and values to a picture's own; "replace" replaces a picture's own by them.
        parts: Parts that "replace" takes from the source, some of "q", "k" and "v".
        adain: Which of "q", "k" and "v" receive the source's mean and deviation first.
        bias: Added to the logits of appended keys; log(2) counts them twice.
        factor: Multiplies appended keys that are not a picture's own.
        share: Share of a source's tokens that are appended, drawn anew at each step and site; above 0, to 1.
        chance: Probability that the control acts at a site in a step, 0 to 1.
        seed: Seed of both draws.
        halves: "both" shares among the rows of the negative prompt, too; "cond" among the rows of the prompt alone.
    """

    sources: Sources = knob("first", kind="free", values="first, previous, others, a number or one per picture")
    take: Take = knob("append", options=Take)
    parts: tuple[str, ...] = knob(("k", "v"), kind="free", values="some of q, k, v")
    adain: tuple[str, ...] = knob((), kind="free", values="some of q, k, v")
    bias: float = knob(0.0, -20.0, 20.0, span=(-3.0, 3.0, 0.1), shown=True)
    factor: float = knob(1.0, 0.0, 10.0)
    share: float = knob(1.0, high=1.0, above=0.0, shown=True, span=(0.05, 1.0, 0.05))
    chance: float = knob(1.0, 0.0, 1.0)
    seed: int = knob(0, 0)
    halves: Halves = knob("both", options=Halves)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "dual")
    about: ClassVar[About] = About(
        does="pictures of one batch attend to each other's keys and values",
        page="share_attention",
        goal="make pictures of a batch agree",
        title="ShareAttention",
        paper="arXiv 2312.02133",
        cite=(
            "Hertz et al., *Style Aligned Image Generation via Shared Attention*, arXiv 2312.02133",
            "Cao et al., *MasaCtrl: Tuning-Free Mutual Self-Attention Control*, arXiv 2304.08465",
            "Zhou et al., *StoryDiffusion: Consistent Self-Attention*, arXiv 2405.01434",
        ),
        group="Sharing",
        offered=False,
        sites="every self- and joint attention",
        needs=("several pictures in one batch",),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("ShareAttention", "site", "the second would share keys that the first has appended or replaced"),
        Conflict("PARO", "site", "its plan knows the picture's own keys alone, and other pictures' are appended here"),
        Conflict("AgentAttention", "site", "it pools keys on the picture's own grid, and others' are appended here"),
        Conflict("WordEdit", "site", "both decide which picture's keys the queries see"),
        Conflict("NAG", "site", "it attends for the prompt's rows alone, and the others' keys would be missing"),
        Conflict("BroadWay", "site", "it mixes the frames of the values, and other pictures' are appended here"),
        Conflict("EnhanceAVideo", "site", "it measures a video's own frames, and other videos' are appended here"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("parts", "adain"):
            given = getattr(self, name)
            chosen = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            object.__setattr__(self, name, tuple(choice(c, f"{self._label}: {name}", _PARTS) for c in chosen))
        if self.take == "replace" and not self.parts:
            raise ConfigError(f"{self._label}: parts=() takes nothing. Name some of q, k, v.")
        object.__setattr__(self, "sources", self._checked_sources())
        if self.adain and self.sources == "others":
            raise ConfigError(f"{self._label}: adain={self.adain} needs one source per picture, not sources='others'.")

    def _checked_sources(self) -> Sources:
        what = f"{self._label}: sources"
        if isinstance(self.sources, str):
            return str(choice(self.sources, what, _WORDS))
        if isinstance(self.sources, (list, tuple)):
            return tuple(whole(unboxed(s), what, 0, of="pictures") for s in self.sources)
        return whole(unboxed(self.sources), what, 0, of="pictures")

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        present = [kind for kind in ("self", "joint") if any(s.kind == kind for s in sites)]
        return select(sites, present or "self", kinds=self.kinds, what=self._label)

    def is_off(self) -> bool:
        return self.chance == 0

    @property
    def several(self) -> bool:
        """Tell whether it needs several pictures in one batch."""
        return True

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        tables: dict[Any, Tensor] = {}  # the rows of a call stay the same over a run: one copy to the device for all
        return functools.partial(self._shared, tables)

    # What happens at a site -----------------------------------------------------------------------------------

    def _shared(self, tables: dict[Any, Tensor], call: AttnCall, proceed: Proceed) -> Tensor:
        rows = call.state.rows
        if call.index > 0 or (self.halves == "cond" and rows.role == "uncond"):
            return proceed(call)  # a second attention is to an image prompt
        image = self.image_keys(call)
        tokens = self.drawn_tokens(call, image)
        if tokens is None:
            return proceed(call)
        call = call.with_(wants_sums=False)  # they would be sums over other keys than the call's own
        if self.halves == "cond" and len(rows.groups) > 1:
            table, prompt = self._rows(tables, call, rows.cond), call.rows(rows.cond)
            parts = [
                self._attend(prompt, proceed, table, image, tokens) if part == rows.cond else proceed(call.rows(part))
                for part in rows.groups
            ]
            return torch.cat(parts)
        return self._attend(call, proceed, self._rows(tables, call, slice(0, rows.total)), image, tokens)

    def image_keys(self, call: AttnCall) -> slice:
        """Return the places of the image among the keys of a call.

        Raises:
            UnsupportedModelError: Nothing tells, in attention that is joint with text; or keys of references are there.
        """
        if has_outer_keys(call):
            raise UnsupportedModelError(
                f"{self._label}: {call.site.name} attends to keys of reference images too, which pictures of a batch "
                "cannot share. Take the references out."
            )
        if call.site.kind == "joint" and call.image is None:
            raise UnsupportedModelError(
                f"{self._label}: the image's tokens at {call.site.name} are not known, whose attention is joint with "
                "text. Choose other sites."
            )
        return image_keys(call)

    def _attend(self, call: AttnCall, proceed: Proceed, table: Tensor, image: slice, tokens: Tensor) -> Tensor:
        places = {"q": image if call.image is None else call.image, "k": image, "v": image}
        for part in self.adain:
            x, at = getattr(call, part), places[part]
            call = call.with_(**{part: _put(x, at, match_statistics(x[:, :, at], x[table[:, 0]][:, :, at]))})
        if self.take == "replace":
            taken = {part: (getattr(call, part), places[part]) for part in self.parts}
            return proceed(call.with_(**{p: _put(x, at, x[table[:, 0]][:, :, at]) for p, (x, at) in taken.items()}))
        return proceed(self._appended(call, table, tokens))

    def _appended(self, call: AttnCall, table: Tensor, tokens: Tensor) -> AttnCall:
        """Put the keys and values of a table's rows behind a call's own."""
        shape = (call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2])
        mask = widened_mask(call.mask, shape, table, tokens, self.bias, call.q)
        k, v = (x[:, :, tokens][table] for x in (call.k, call.v))  # [B, S, H, M, D]
        if self.factor != 1:
            other = table != torch.arange(len(table), device=table.device)[:, None]  # its own keys keep their length
            k = torch.where(other[:, :, None, None, None], k * self.factor, k)
        k, v = (torch.cat([x, y.transpose(1, 2).flatten(2, 3)], 2) for x, y in ((call.k, k), (call.v, v)))
        return call.with_(k=k, v=v, mask=mask)

    def drawn_tokens(self, call: AttnCall, image: slice) -> Tensor | None:
        """Choose the tokens that are appended at a site in a step, in order; None where the control rests.

        The same are drawn in every pass of the step, and in every run.
        """
        chance = self._chance(call.state)
        if self.share == 1 and chance == 1:
            return torch.arange(image.start, image.stop, device=call.k.device)
        drawn = self._generator(call.state.step, call.site.depth)
        if float(torch.rand((), generator=drawn)) >= chance:
            return None
        n = image.stop - image.start
        chosen = torch.randperm(n, generator=drawn)[: max(1, round(self.share * n))].sort().values
        return (chosen + image.start).to(call.k.device, non_blocking=True)

    def acts_at(self, step: int, steps: int, depth: int) -> bool:
        """Tell whether the control acts at a site in a step of a run."""
        drawn = float(torch.rand((), generator=self._generator(step, depth)))
        return self.in_window_at(step, steps) and drawn < self._chance(CallState(step=step, steps=steps))

    def _generator(self, step: int, depth: int) -> torch.Generator:
        generator = torch.Generator()
        generator.manual_seed(((self.seed * 1_000_003 + step) * 1_009 + depth) % 2**63)
        return generator

    def _chance(self, state: CallState) -> float:
        """Return the probability that the control acts at a site in the current step."""
        return self.chance

    def _rows(self, tables: dict[Any, Tensor], call: AttnCall, part: slice) -> Tensor:
        """Return the rows that each of some rows takes from, counted from the first of them: [B, S]."""
        rows, frames = call.state.rows, call.folded
        key = (rows.total, part.start, part.stop, rows.role, frames, call.q.device)
        if key not in tables:
            halves = len(rows.groups) if part.stop - part.start == rows.total else 1
            table = _row_table(self.sources, (part.stop - part.start) // halves, halves, frames)
            tables[key] = table.to(call.q.device, non_blocking=True)
        return tables[key]


def _row_table(sources: Sources, pictures: int, halves: int, frames: int) -> Tensor:
    """Spread a table of pictures over the rows of a call, which are the pictures' frames in UNets for videos."""
    table = torch.tensor(source_table(sources, pictures))
    table = torch.cat([table + half * pictures for half in range(halves)])
    return (table[:, None] * frames + torch.arange(frames)[None, :, None]).flatten(0, 1)


def _put(x: Tensor, image: slice, part: Tensor) -> Tensor:
    """Replace the image's tokens of queries, keys or values [B, H, N, D]."""
    if part.shape[2] == x.shape[2]:
        return part
    return torch.cat([x[:, :, : image.start], part, x[:, :, image.stop :]], 2)
