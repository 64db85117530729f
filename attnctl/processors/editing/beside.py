"""FateZero at work on a transformer: the source's row rides in front of every call of the edit.

At each call of the denoiser with the target's prompt, one more row is put in front: the source's latents of that noise
level, with the source's prompt. At every fused site the edit's row takes attention from it (`rows`); its prediction is
thrown away. Nothing of the source but one latent per step is kept, and the rows of the negative prompt are left alone.
With store="qk" or "maps" no row is added: what the source attends with was kept when it was inverted.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.appending import with_row_in_front
from attnctl.core.hosts.arguments import Rows, main_input
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.core.hosts.paths import PathScheduler
from attnctl.core.hosts.sums import three_rows
from attnctl.core.hosts.words import row_texts
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.editing.exchange import Exchange, check_reads, read_row
from attnctl.processors.editing.rows import RowFusion, SourceRow, row_of, word_column
from attnctl.processors.editing.source import Inversion, SourceStore

__all__ = ["BesideSource", "RowEditing", "check_inverted"]


def check_inverted(control: Any) -> Inversion:
    """Return a control's inversion; refuse a control without one, and one that would repeat its source, aloud.

    Raises:
        ConfigError: It has none.
    """
    name = type(control).__name__
    if control.inversion is None:
        raise ConfigError(
            f"{name} has no inversion to edit. Call attnctl.pipelines.edit_video, which inverts and edits; or "
            "attnctl.pipelines.invert, and attach dataclasses.replace(control, inversion=...)."
        )
    if control.source == control.target and not getattr(control, "equalizer", None):
        warnings.warn(
            f"{name}: source and target are both {control.target!r}: the edit reconstructs its source.", stacklevel=3
        )
    inversion: Inversion = control.inversion
    if inversion.prompt != control.source:
        raise ConfigError(
            f"{name}: the inversion was made with the prompt {inversion.prompt!r}, not with source={control.source!r}. "
            "Invert again, or give that source."
        )
    return inversion


class BesideSource(LiveControl):
    """Has a source's row ride in front of the calls of an edit.

    Attributes:
        active: Whether the call under way has the row.
        edit: The edit's row in it.
    """

    def __init__(self, control: Any, denoiser: torch.nn.Module, pipe: Any) -> None:
        self.control, self.inversion, self.pipe = control, check_inverted(control), pipe
        made = self.inversion.settings.get("model", "a UNet")
        if made != type(denoiser).__name__:
            raise ConfigError(
                f"{type(control).__name__}: the inversion was made on {made}, this is a {type(denoiser).__name__}. "
                "Invert with the pipeline that edits."
            )
        self.begin_run()

    def begin_run(self) -> None:
        self.active = self.checked = self.in_front = False
        self.edit = 0
        self.held: SourceRow | None = None

    def scheduler(self) -> PathScheduler:
        """Return the scheduler of the run, which says at which noise level the denoiser is called."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if not isinstance(scheduler, PathScheduler):
            raise ConfigError(
                f"{type(self.control).__name__}: the pipeline runs on {type(scheduler).__name__}, which does not lead "
                "back along the path of the inversion. Set pipe.scheduler = inversion.way_back() for the edit."
            )
        return scheduler

    def begin_edit(self, passes: LiveDenoiser) -> bool:
        """Prepare a call of the denoiser with the target's prompt; tell whether it needs the source."""
        raise NotImplementedError

    def check_run(self, passes: LiveDenoiser) -> None:
        """Refuse a run that does not fit the inversion."""
        scheduler, inversion, name = self.scheduler(), self.inversion, type(self.control).__name__
        if len(scheduler.levels) != len(inversion.levels) or any(
            abs(a - b) > 1e-5 for a, b in zip(scheduler.levels, inversion.levels[::-1], strict=True)
        ):
            raise ConfigError(
                f"{name}: the source was inverted in {inversion.steps} steps from level {inversion.levels[-1]:.3f}, "
                f"and this run has {len(scheduler.levels) - 1} from {scheduler.levels[0]:.3f}. Give "
                f"num_inference_steps={inversion.steps} and the same size, or invert again."
            )
        state = passes.state
        x = main_input(state.bound)
        if state.rows.prompts != 1 or not isinstance(x, Tensor) or x.shape[1:] != inversion.noise.shape[1:]:
            given = tuple(x.shape) if isinstance(x, Tensor) else "a list"
            raise ConfigError(
                f"{name} edits one picture or clip per run, of latents {tuple(inversion.noise.shape)}; the denoiser "
                f"was called with {state.rows.prompts} prompt rows of {given}. Give one prompt and "
                "latents=inversion.noise."
            )
        prompts = None if state.prompts is None else set(state.prompts.prompts)
        if prompts not in (None, {self.control.target}):
            raise ConfigError(
                f"{name}: the run's prompts are {sorted(prompts or ())}, the control's target is "
                f"{self.control.target!r}: the tokens would not correspond. Give that prompt."
            )

    def level(self, step: int) -> float:
        """Return the noise level of the denoiser call of a step."""
        return self.scheduler().at[step]

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        state = passes.state
        self.active = self.in_front = False
        self.held = None
        if state.rows.role in ("uncond", "extra"):
            return None
        if state.rows.role == "thirds":
            raise three_rows(self.control.describe(), passes.pipe)
        if not self.checked:
            self.check_run(passes)
            self.checked = True
        self.active = self.begin_edit(passes)
        self.edit = state.rows.cond.start
        if not self.active or not self.rides:
            return None
        x = main_input(state.bound)
        latents = self.inversion.between(self.level(state.step)).to(x)
        shared = frozenset() if state.family is None else state.family.shared
        joined = with_row_in_front(state.bound, self.inversion.inputs, latents, shared)
        rows = state.rows
        uncond = None if rows.uncond is None else slice(rows.uncond.start + 1, rows.uncond.stop + 1)
        state.rows = Rows(rows.total + 1, slice(rows.cond.start + 1, rows.cond.stop + 1), uncond, rows.role)
        self.edit, self.in_front = self.edit + 1, True
        return joined

    @property
    def rides(self) -> bool:
        """Tell whether the source's row rides in the call, or is stored."""
        return True

    def after_call(self, output: Any) -> Any:
        if not self.in_front:
            return None
        return with_main_output(output, main_output(output)[1:])

    def refuse_guidance(self, call: AttnCall) -> None:
        """Refuse a guidance's extra pass, in which no source rides.

        Raises:
            UnsupportedModelError: The call is of such a pass.
        """
        if call.state.phase != "base":
            raise UnsupportedModelError(
                f"{type(self.control).__name__} takes attention from a row of the same call, which the extra pass of a "
                "guidance has not. On transformers, edit without PAG and its like."
            )

    def source_at(self, call: AttnCall) -> SourceRow | None:
        """Return the source's attention at a call; None where the call is not the edit's (Mochi calls row by row)."""
        self.refuse_guidance(call)
        if call.q.shape[0] == 1 and call.state.rows.total > 1:
            if call.index == 0:
                self.held = row_of(call, 0)
            return self.held if call.index == self.edit else None
        return row_of(call, 0) if call.index == 0 else None

    def noise_added(self) -> None:
        raise ConfigError(
            f"{type(self.control).__name__}: the scheduler adds noise at its steps, which the inversion of the source "
            "has not. Set pipe.scheduler = inversion.way_back()."
        )

    def describe(self) -> str | None:
        inversion = self.inversion
        error = "not measured" if inversion.psnr is None else f"{inversion.psnr:.1f} dB"
        return (
            f"inverted by {inversion.rule} in {inversion.steps} steps, {inversion.nbytes / 2**20:.2f} MiB kept; "
            f"the inversion's own reconstruction: {error}"
        )


class RowEditing(BesideSource):
    """FateZero at work on one transformer."""

    def __init__(self, control: Any, denoiser: torch.nn.Module, pipe: Any) -> None:
        self.fusion = RowFusion(control, find_sites(denoiser), family_of(denoiser))
        check_reads(pipe, "FateZero")
        super().__init__(control, denoiser, pipe)
        self.changes_latents = control.blend_latents or self.inversion.region is not None
        have = None if self.inversion.store is None else self.inversion.store.mode
        if control.store != "recompute" and have != control.store:
            raise ConfigError(
                f"FateZero: store={control.store!r}, but the inversion kept {have or 'latents only'}. Invert with the "
                "control that edits."
            )

    def begin_run(self) -> None:
        super().begin_run()
        self.fusion.begin_run()
        self.summed: Tensor | None = None

    @property
    def rides(self) -> bool:
        return bool(self.control.store == "recompute")

    def begin_edit(self, passes: LiveDenoiser) -> bool:
        state, fusion = passes.state, self.fusion
        if fusion.exchange is None:
            row = row_texts(state.prompts, state.rows.prompts, "FateZero")[0]
            fusion.exchange = Exchange(self.control, self.inversion.readings, read_row(row, self.pipe, "FateZero"))
        active = fusion.begin_step(state.step, int(state.steps or 0))
        self.level_now = self.level(state.step)
        self.grid = state.grid
        fusion.region = self.inversion.region
        fusion.columns = self.inversion.columns_at(self.level_now) if self.control.blend_attention else None
        return active

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        rows = call.state.rows
        if rows.role in ("uncond", "extra"):
            return proceed(call)
        if self.control.blend_latents and call.site.name in self.fusion.masking and call.index == 0:
            tokens = self.fusion.exchange.blend(of_target=True) if self.fusion.exchange is not None else ()
            if tokens:
                share = word_column(call, self.edit, tokens)
                self.summed = share if self.summed is None else self.summed + share
        if not self.active or call.site.name not in self.fusion.fused:
            return proceed(call)
        alone = call.q.shape[0] == 1 and rows.total > 1
        if self.rides:
            source_row = self.source_at(call)
        else:
            store: SourceStore | None = self.inversion.store
            assert store is not None
            mine = call.index == (self.edit if alone else 0)
            source_row = store.get(call.state.step, call.site.name, call.q.device) if mine else None
        if source_row is None:
            return proceed(call)
        return self.fusion.fuse(call, proceed, source_row, 0 if alone else self.edit)

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        scheduler, fusion = self.scheduler(), self.fusion
        steps = len(scheduler.at)
        columns = self.inversion.columns_at(self.level_now)
        if self.inversion.region is None and (columns is None or not self.control.blends_at(step, steps)):
            return latents
        fusion.region = self.inversion.region
        grid = self.grid
        assert grid is not None
        mask = fusion.mask(grid, columns)
        if self.summed is not None and fusion.region is None:
            mask = mask | fusion.mask(grid, self.summed)
        after = scheduler.at[step + 1] if step + 1 < steps else scheduler.levels[-1]
        return fusion.blended(latents, self.inversion.between(after).to(latents), mask)
