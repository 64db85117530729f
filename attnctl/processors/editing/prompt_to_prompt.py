"""Prompt-to-prompt: two images of one noise, the second of a changed prompt, with the first one's attention.

"Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626. Source and target are generated
together, `pipe([source, target], latents=...)` with equal latents, and at every step the target's row takes from the
source's row of the same batch

    cross    columns of the source's map for the words that both prompts share, in the steps of `cross_replace`
    self     the source's whole map, times the target's values, in the steps of `self_replace`

and with blend words, from a fifth of the run on, the source's latents wherever neither image attends to them (there
called local blend). Unlike `FateZero` nothing is inverted and nothing is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.arguments import main_input
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.noise import is_noisy
from attnctl.core.hosts.words import row_texts
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Grid, Site
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.editing.exchange import Exchange, check_reads, read_row
from attnctl.processors.editing.fusion import blend_latents, blend_mask, fold_values
from attnctl.processors.editing.prompts import WordEdit
from attnctl.processors.editing.rows import RowFusion, SourceRow, row_of, word_column
from attnctl.processors.editing.source import token_weights

__all__ = ["PromptToPrompt"]


@dataclass(frozen=True, kw_only=True)
class PromptToPrompt(WordEdit):
    """Generate an image and its edit together (arXiv 2208.01626).

    Run `pipe([source, target], latents=noise.repeat(2, 1, 1, 1))`: the first image is the source's own, bit for bit,
    the second the edit. Self-attention is taken over at `factor` and coarser, cross-attention everywhere.

    Attributes:
        blend_window: Window of the run in which the latents outside the blend words are the source's.

    Example:
        >>> PromptToPrompt(source="a red car", target="a blue car").describe()
        "PromptToPrompt(source='a red car', target='a blue car')"
    """

    blend_window: tuple[float, float] = knob((0.2, 1.0), kind="window")

    about: ClassVar[About] = About(
        does="edits an image with a prompt",
        page="prompt_to_prompt",
        goal="edit a video or an image with a prompt",
        title="Prompt-to-prompt",
        paper="arXiv 2208.01626",
        cite=("Hertz et al., *Prompt-to-Prompt Image Editing with Cross Attention Control*, arXiv 2208.01626",),
        group="Editing",
        offered=False,
        sites="self-attention at half of the latents' side and below, every cross-attention",
        needs=("the prompt", "the source in the same batch"),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            "LatentGuidance",
            "model",
            "latent guidance moves the source's latents too, so that source and edit no longer begin alike",
        ),
    )

    def needs_prompt(self) -> bool:
        return True

    def groups(self, sites: Sequence[Site], family: Any) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        fused, masks = super().groups(sites, family)
        if self.sites is None:
            names = {s.name for s in fused} | {s.name for s in sites if s.kind == "cross"}
            fused = tuple(s for s in sites if s.name in names)
        return fused, masks

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return (_Pair if family_of(denoiser).unet else _RowPair)(self, denoiser, pipe)


class _Pair(LiveControl):
    """Prompt-to-prompt at work: the rows of a source and of its edit in one batch."""

    def __init__(self, control: PromptToPrompt, denoiser: torch.nn.Module, pipe: Any) -> None:
        if control.source == control.target and not control.equalizer:
            warnings.warn(
                f"PromptToPrompt: source and target are both {control.target!r}: the edit repeats its source.",
                stacklevel=2,
            )
        self.control, self.pipe = control, pipe
        sites, family = find_sites(denoiser), family_of(denoiser)
        fused, masks = control.groups(sites, family)
        self._prepare(sites, family)
        self.fused = frozenset(s.name for s in fused)
        self.masking = frozenset(s.name for s in masks)
        self.changes_latents = control.blend_words is not None
        self.begin_run()

    def _prepare(self, sites: Sequence[Site], family: Any) -> None:
        self.plan = self.control.plan(self.pipe)

    def begin_run(self) -> None:
        self.follow: Tensor | None = None
        self.steps = self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.grid: Grid = (1, 1, 1)

    def before_call(self, passes: LiveDenoiser) -> None:
        state = passes.state
        if self.follow is None:
            self._check_run(passes)
        self.step = state.step

    def _check_run(self, passes: LiveDenoiser) -> None:
        state, control = passes.state, self.control
        prompts = None if state.prompts is None else state.prompts.prompts
        if (
            state.rows.prompts != 2
            or state.rows.role not in ("both", "all")
            or prompts
            not in (
                None,
                (control.source, control.target),
            )
        ):
            given = f"{state.rows.prompts} prompt rows" if prompts is None else f"the prompts {list(prompts)}"
            raise ConfigError(
                f"PromptToPrompt edits one image beside its source: run pipe([{control.source!r}, {control.target!r}], "
                f"latents=noise.repeat(2, 1, 1, 1)), one image a prompt; the run has {given}."
            )
        if is_noisy(getattr(passes.pipe, "scheduler", None)):
            self.noise_added()
        x = main_input(state.bound)[state.rows.cond]
        if not torch.equal(x[0], x[1]):
            raise ConfigError(
                "PromptToPrompt: source and target begin with different noise. Give latents=noise.repeat(2, 1, 1, 1), "
                "or two generators of one seed."
            )
        self.steps = int(state.steps or 0)
        self._read_words(state, x)

    def _read_words(self, state: CallState, x: Tensor) -> None:
        follow = self.plan.follow(self.steps)
        self.crossing = [bool(row.any()) for row in follow]
        self.follow, self.how = follow.to(x.device), self.plan.how.to(x)

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        if call.index > 0:
            return proceed(call)
        cond = call.state.rows.cond
        source, target = (slice(cond.start + i, cond.start + i + 1) for i in (0, 1))
        if call.site.name in self.masking and call.state.phase == "base" and self.changes_latents:
            self._sum(call, source, target)
        if call.site.name not in self.fused:
            return proceed(call)
        if call.site.kind == "self":
            if self.step not in self.control.self_window(self.steps):
                return proceed(call)
            return proceed(call.with_(q=_with(call.q, target, call.q[source]), k=_with(call.k, target, call.k[source])))
        if not self.crossing[self.step]:
            return proceed(call)
        if call.mask is not None or call.k.shape[2] != self.plan.length:
            raise UnsupportedModelError(
                f"{call.site.name} masks its text, or sees {call.k.shape[2]} tokens instead of {self.plan.length}: "
                "such prompts cannot be edited."
            )
        assert self.follow is not None
        from_source, from_edit = fold_values(call.v[target], self.how, self.follow[self.step])
        out = proceed(call.with_(v=_with(call.v, target, from_edit)))
        taken = proceed(call.with_(q=call.q[source], k=call.k[source], v=from_source))
        return _with(out, target, out[target] + taken)

    def _sum(self, call: AttnCall, source: slice, target: slice) -> None:
        """Add up the attention to the blend words over steps, layers and heads."""
        for side, rows, tokens in (("source", source, self.plan.blend), ("target", target, self.plan.blend_target)):
            if tokens:
                part = call.rows(rows)
                share = part.text_map(token_weights(tokens, call.k))[..., 0].mean(1)
                self.sums[side] = self.sums[side] + share if side in self.sums else share
                self.grid = part.on_image()[1]  # the same in all mask layers, which are of one downsampling

    def noise_added(self) -> None:
        raise ConfigError(
            f"PromptToPrompt: {type(self.pipe.scheduler).__name__} adds noise at its steps, which differs between the "
            "source's row and the target's: the pictures would part for no reason of the prompts. Use a scheduler that "
            "adds none, such as DDIMScheduler with eta=0, EulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        start, end = self.control.blend_window
        if not int(start * self.steps) < step + 1 <= int(end * self.steps) or not self.sums:
            return latents
        size = (int(latents.shape[-2]), int(latents.shape[-1]))
        mask = torch.zeros(1, *size, dtype=torch.bool, device=latents.device)
        for total in self.sums.values():
            mask = mask | blend_mask(total, self.grid[1:], size, self.control.blend_threshold)
        return torch.cat([latents[:1], blend_latents(latents[1:2], latents[:1], mask)])


class _RowPair(_Pair):
    """Prompt-to-prompt at work on a transformer."""

    def _prepare(self, sites: Sequence[Site], family: Any) -> None:
        check_reads(self.pipe, "PromptToPrompt")
        self.fusion = RowFusion(self.control, sites, family)

    def begin_run(self) -> None:
        super().begin_run()
        self.fusion.begin_run()
        self.held: SourceRow | None = None

    def _read_words(self, state: CallState, x: Tensor) -> None:
        source, target = row_texts(state.prompts, 2, "PromptToPrompt")
        readings = [read_row(row, self.pipe, "PromptToPrompt") for row in (source, target)]
        self.fusion.exchange = Exchange(self.control, readings[0], readings[1])
        self.follow = torch.ones(1)  # the words are read

    def before_call(self, passes: LiveDenoiser) -> None:
        if passes.state.rows.role in ("uncond", "extra"):
            return
        super().before_call(passes)
        self.active = self.fusion.begin_step(self.step, self.steps)
        self.held = None

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        rows = call.state.rows
        if rows.role in ("uncond", "extra"):
            return proceed(call)
        source = rows.cond.start
        alone = call.q.shape[0] == 1 and rows.total > 1  # Mochi calls attention row by row
        if call.index > 0 and not alone:
            return proceed(call)
        if call.site.name in self.masking and call.state.phase == "base" and self.changes_latents:
            self._sum_words(call, source)
        if not self.active or call.site.name not in self.fused:
            return proceed(call)
        if alone and call.index == source:
            self.held = row_of(call, 0)
        if alone and call.index != source + 1:
            return proceed(call)
        source_row = self.held if alone else row_of(call, source)
        assert source_row is not None
        return self.fusion.fuse(call, proceed, source_row, 0 if alone else source + 1)

    def _sum_words(self, call: AttnCall, source: int) -> None:
        """Add up the attention to the blend words over steps, layers and heads."""
        assert self.fusion.exchange is not None
        for side, row in (("source", source), ("target", source + 1)):
            tokens = self.fusion.exchange.blend(side == "target")
            if tokens:
                share = word_column(call, row, tokens)
                self.sums[side] = self.sums[side] + share if side in self.sums else share
                self.grid = call.on_image()[1]

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        start, end = self.control.blend_window
        if not int(start * self.steps) < step + 1 <= int(end * self.steps) or not self.sums:
            return latents
        mask = torch.zeros(self.grid, dtype=torch.bool, device=latents.device)
        for columns in self.sums.values():
            mask = mask | self.fusion.mask(self.grid, columns)
        return torch.cat([latents[:1], self.fusion.blended(latents[1:2], latents[:1], mask)])


def _with(x: Tensor, rows: slice, part: Tensor) -> Tensor:
    """Return x with some rows replaced."""
    return torch.cat([x[: rows.start], part, x[rows.stop :]])
