"""The run of a pipeline as its denoisers meet it: who calls, at which step, with which rows, words and latents.

Everything that a pipeline and its scheduler tell of a run is gathered here. What follows for the controls is the part
of the handle (`core.attach`), which hears of the beginning of a run and of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attnctl.core.hosts.arguments import bind_call
from attnctl.core.hosts.latents import StepLatents
from attnctl.core.hosts.pipelines import fill_in_time
from attnctl.core.hosts.prompt import PromptWatch, prompt_call
from attnctl.core.hosts.rows import Layout, RowLayout
from attnctl.core.hosts.running import Owner, PipelineCall, calling_pipeline
from attnctl.core.hosts.scheduler import SchedulerWatch
from attnctl.core.passes import ControlledDenoiser

__all__ = ["PipelineRun", "RunListener"]


class RunListener(Protocol):
    """What a run reports to."""

    @property
    def enabled(self) -> bool:
        """Whether the controls act."""

    def begin_run(self) -> None:
        """A run begins."""

    def end_step(self, sample: Any) -> Any:
        """The scheduler is about to make the next latents of `sample`; return those that it shall take instead."""

    def stepped(self, result: Any, drew: bool) -> Any:
        """It has made them, and drew random numbers or not; return its result, with other latents if a control asks."""


class PipelineRun:
    """The run of a pipeline, or of a bare denoiser, whose calls tell of themselves alone.

    Args:
        pipe: The pipeline that controls are attached to, or None.
        denoisers: Its denoisers.
        layout: What the user says of the rows.
        listener: What hears of the beginning of a run and of its steps.

    Attributes:
        call: The call of a pipeline that is under way: another pipeline may have been made of the same parts.
        hears_noise: Whether a control asks if a step draws random numbers.
    """

    def __init__(self, pipe: Any, denoisers: Sequence[torch.nn.Module], layout: Layout, listener: RunListener) -> None:
        self.pipe, self.listener = pipe, listener
        self.call = PipelineCall(pipe)
        self.owner = Owner(denoisers)
        self.scheduler = SchedulerWatch(pipe, self)
        self.rows = RowLayout(pipe, layout)
        self.latents = StepLatents(pipe)
        self.hears_noise = False
        self._seen, self._ends = False, True
        """Whether the beginning of the run was seen; whether the scheduler's last call ended a step."""

    def describe(
        self,
        w: ControlledDenoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        prompts: PromptWatch | None,
        *,
        level: bool,
    ) -> None:
        """Describe a call of a denoiser in its state: arguments, time, words and rows.

        Args:
            w: The denoiser.
            args: What it is called with by position.
            kwargs: What it is called with by name.
            prompts: What listens to the pipeline's texts, where a control needs them.
            level: Whether a control asks for the noise level, which may wait for the device.
        """
        state = w.state
        bound, w.positional = bind_call(w.module, args, kwargs), len(args)
        state.begin_call(w.module, w.family, bound)
        if callable(self.pipe):
            self.call = calling_pipeline(w.module) or PipelineCall(self.pipe)
        self._follow()
        w.pipe, values = self.call.pipe, self.call.values
        state.options = values
        if self.pipe is not None:
            fill_in_time(state, self.scheduler.current, self.call, seen=self._seen, level=level)
        if prompts is not None:
            prompts.close()
            state.prompts = prompts.call if self.call.pipe is self.pipe else prompt_call(values)
        text_call = None if state.prompts is None else prompt_call(values)
        samples = None if text_call is None else text_call.samples
        state.rows = self.rows.read(w.module, w.family, bound, samples, values.get("latent_rows"))

    def _follow(self) -> None:
        """Go by the pipeline whose call is under way, and watch its scheduler."""
        if self.call.pipe is not self.rows.pipe:
            self.rows.pipe = self.latents.pipe = self.scheduler.pipe = self.call.pipe
        former = self.scheduler.current
        self.scheduler.follow()
        # The first latents of a run whose beginning was not seen are scaled already.
        self.latents.unseen |= former is not self.scheduler.current

    # What the scheduler reports -------------------------------------------------------------------------------

    def claim(self) -> None:
        """Refuse a run beside one of another thread, and one on a denoiser that is under control no more."""
        if self.listener.enabled:
            self.owner.claim(type(self.pipe).__name__)
            self.owner.check_in_place(self.pipe)

    def on_set_timesteps(self, *, seen: bool) -> None:
        """Begin a run."""
        self.rows.new_run()
        self.latents.end_step()
        self.listener.begin_run()
        self._seen = seen

    def on_scale(self, sample: torch.Tensor, scale: Callable[[Any], Any]) -> None:
        """Note the latents that the pipeline scales."""
        self.rows.scaled(sample)
        self.latents.note(sample, scale)

    def on_step(self, sample: Any, prediction: Any) -> Any:
        """End a step, with the latents that the controls have made of the pipeline's."""
        self.latents.prediction = prediction
        enabled = self.listener.enabled
        self._ends = not enabled or self.rows.check_step(sample)
        if not self._ends:
            return sample
        if enabled:
            self.owner.check_in_place(self.pipe)
        sample = self.listener.end_step(sample)
        self.latents.end_step()
        return sample

    def on_stepped(self, result: Any, drew: bool) -> Any:
        """Give the latents that a step returned to the controls that change them."""
        return self.listener.stepped(result, drew) if self._ends else result
