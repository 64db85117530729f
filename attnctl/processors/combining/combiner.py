"""What combiners share: a control that puts u and c together in place of the pipeline's u + w (c - u).

u is the prediction for the negative prompt, c that for the prompt, w the guidance scale. The sum of one step is

    p = rule(u, c)  or  u + w (c - u)     one `Combiner` at most; outside a `GuidanceInterval` p = c
    p <- p + sum of w_i (c - p_i)         what PAG, SEG, SLG and others add
    p <- finished(p, c)                   `Rescale`

and takes the place of the pipeline's own (`core.hosts.sums`). The rule sees u and c before anything is added to them,
of one batch or of two calls, in float32 (float64 stays), in the space that it is told to work in.

The first of the combining controls that act in a call does the work for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.control import Control
from attnctl.core.hosts.arguments import Rows, main_input, time_of
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.outputs import fitted, main_output, with_main_output
from attnctl.core.hosts.spaces import Space, Way, way_to
from attnctl.core.hosts.sums import (
    as_rows,
    cfg_scale,
    check_handed,
    check_negative,
    parts_of,
    unguided,
    used,
    with_sum,
)
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.combining import linear

__all__ = ["Combiner", "Combining", "LiveSum", "Moment"]

_PARTS = "controls that put predictions together"
_STATE = "memory of rules"
_FIRST = "the prompt's prediction, until the negative prompt's"


@dataclass(frozen=True)
class Moment:
    """What a rule may know of its step.

    Attributes:
        state: The call.
        scale: The pipeline's guidance scale, counted as in u + s (c - u); None where nothing tells it.
        memory: What rules keep from step to step; empty when a run begins.
        step: The step of the run.
    """

    state: CallState
    scale: float | None
    memory: dict[Any, Any]
    step: int

    def weight(self, scale: float | None, what: str) -> float:
        """Return a rule's guidance scale: its own, or else the pipeline's.

        Raises:
            ConfigError: It has none, and nothing tells the pipeline's.
        """
        weight = self.scale if scale is None else scale
        if weight is None:
            raise ConfigError(
                f"{what} has no scale of its own, and the pipeline does not tell its guidance scale for this step. "
                "Pass scale=, for example scale=5.0."
            )
        return weight


@dataclass(frozen=True, kw_only=True)
class Combining(Control, abstract=True):
    """Base of the controls that act on the predictions for prompt and negative prompt, and at no site."""

    kinds: ClassVar[tuple[str, ...]] = ()

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if self.sites is not None:
            raise ConfigError(
                f"{self._label}: sites={self.sites!r} was given, but it acts on the predictions of the whole model and "
                "at no attention. Leave sites out."
            )
        return ()

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return LiveSum(self)

    def guides(self, state: CallState) -> bool:
        """Tell whether the step is guided at all; the prompt's prediction is taken where any control says no."""
        return True

    def leaves(self, state: CallState) -> bool:
        """Tell whether the pipeline's own sum is right at this step, as far as this control is concerned."""
        return False

    def finished(self, p: Tensor, c: Tensor, moment: Moment) -> Tensor:
        """Change the whole sum [B, C, ...], with all that other guidance has added."""
        return p


@dataclass(frozen=True, kw_only=True)
class Combiner(Combining, abstract=True):
    """Base of the rules that replace u + w (c - u).

    Attributes:
        scale: Guidance scale w, counted as in u + w (c - u); None for the pipeline's own.
        space: Form of the predictions that the rule receives: "model" for the model's own, as in diffusers' guiders;
            "x0" for the clean images, "eps" for the noise. Linear rules give the same result in all of them.
    """

    scale: float | None = knob(None, -math.inf, hint="blank: the pipeline's", shown=True)
    space: Space = knob("model", options=Space)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("Combiner", "model", "both put the same two predictions together: there is one sum"),
    )

    def rule(self, u: Tensor, c: Tensor, moment: Moment) -> Tensor:
        """Put u and c [B, C, ...] together, in the rule's space."""
        raise TypeError(f"{self._label} defines no rule")

    def total(self, u: Tensor, c: Tensor, way: Way, moment: Moment) -> Tensor:
        """Put two predictions of the model together: go to the rule's space, and back."""
        return way.back(self.rule(way.there(u), way.there(c), moment))

    def weight(self, moment: Moment) -> float:
        """Return the guidance scale of the step."""
        return moment.weight(self.scale, self.describe())


class LiveSum(LiveControl):
    """Sums up predictions, for all combining controls of a call.

    Args:
        control: The control that it belongs to.
    """

    def __init__(self, control: Combining) -> None:
        self.control = control
        self.pipe: Any = None
        self.begin_run()

    def begin_run(self) -> None:
        self.memory: dict[Any, Any] = {}
        self.waits = False
        """Whether the prompt was predicted in this step, and the negative prompt not yet."""
        self.summed: tuple[LiveDenoiser, Tensor, Tensor, Tensor] | None = None
        """The denoiser, u, c and the sum of the step."""
        self.guided = self.checked = False
        """Whether a negative prompt was predicted in this run; whether the pipeline was seen to use the sum."""

    def before_call(self, passes: LiveDenoiser) -> None:
        passes.state.scratch.setdefault(_PARTS, []).append(self)
        self.pipe = passes.pipe
        if passes.state.rows.role == "extra":
            raise UnsupportedModelError(
                f"{self.control.describe()}: {type(passes.pipe).__name__} adds guidance of its own to its sum "
                "(skip_guidance_layers), from a prediction that is no longer there. Use attnctl's SLG for it."
            )
        if not self.guided:
            check_negative(self.control.describe(), passes.pipe, passes.state.rows)

    def predicted(self, passes: LiveDenoiser, output: Any, delta: Any) -> Any:
        rows, pred, parts = passes.state.rows, main_output(output), passes.state.scratch[_PARTS]
        if all(part.control.leaves(passes.state) for part in parts):
            return None
        if rows.role == "all":
            self.waits = True
            passes.shared[_FIRST] = self, as_rows(pred), delta
            return output
        if rows.role == "uncond":
            if _FIRST not in passes.shared:
                raise UnsupportedModelError(
                    f"{self.control.describe()}: the negative prompt was predicted before the prompt, which no known "
                    "pipeline does."
                )
            u = as_rows(pred)
            first, c, delta = passes.shared.pop(_FIRST)  # of another denoiser in Ideogram 4, with its text in front
            first.waits, c, delta = False, fitted(c, u), fitted(delta, u)
        else:
            u, c = parts_of(as_rows(pred), rows)
        for part in parts:
            part.guided = True
        channels = used(c, main_input(passes.state.bound))
        return with_main_output(output, self._sum(passes, pred, u[:, :channels], c[:, :channels], delta))

    def _sum(self, passes: LiveDenoiser, pred: Any, u: Tensor, c: Tensor, delta: Any) -> Any:
        state, parts = passes.state, passes.state.scratch[_PARTS]
        wide = torch.promote_types(c.dtype, torch.float32)
        u, c = u.to(wide), c.to(wide)
        scale = cfg_scale(passes.pipe, state)
        ruling = [part for part in parts if isinstance(part.control, Combiner)]
        # Denoisers that take turns in one run (Wan 2.2) go on with one memory.
        memory = passes.shared.setdefault(_STATE, (ruling or parts)[0].memory)
        moment = Moment(state, scale, memory, state.step)
        rules = [part.control for part in parts if isinstance(part.control, Combiner)]
        if not all(part.control.guides(state) for part in parts):
            p = c
        elif rules:
            way = self._way(passes, rules[0].space, c)
            p = rules[0].total(u, c, way, moment)
        else:
            p = linear(u, c, moment.weight(None, self.control.describe()))
        if delta is not None:
            p = p + as_rows(delta)[:, : p.shape[1]].to(wide)
        for part in parts:
            p = part.control.finished(p, c, moment)
        for part in parts:
            part.summed = passes, u, c, p
        return with_sum(pred, p, c, state.rows, passes.pipe, scale)

    def _way(self, passes: LiveDenoiser, space: Space, c: Tensor) -> Way:
        if space == "model":
            return Way()
        state = passes.state
        rows = state.rows
        if rows.role == "uncond":  # the same latents as in the prompt's call; this call has prompt rows of its own
            state.rows = Rows.all(rows.total)
        try:
            x = passes.latents.of(state)
        finally:
            state.rows = rows
        if x.shape != c.shape:
            raise UnsupportedModelError(
                f"{self.control.describe()}: latents {tuple(x.shape)} and predictions {tuple(c.shape)} do not fit, so "
                f'space="{space}" is not known. Use space="model".'
            )
        return way_to(space, getattr(passes.pipe, "scheduler", None), time_of(state.bound), x)

    def stepping(self, latents: Tensor) -> Tensor:
        """Check that the pipeline uses the sum, on the first step of a run."""
        single, self.waits = self.waits, False
        if single and not self.guided:
            raise unguided(self.control.describe(), self.pipe)
        if self.summed is not None and not self.checked:
            self.checked = True
            passes, _, c, p = self.summed
            signed = getattr(self.control, "space", "model") != "model"
            handed = passes.latents.prediction
            if check_handed(self.control.describe(), passes.pipe, handed, p, c, signed=signed):
                self.renormed()
        if not self.changes_latents:
            self.summed = None
        return latents

    def renormed(self) -> None:
        """Hear that the pipeline scales its sum to the length of the prompt's prediction, token by token."""
