"""What a control keeps while it is attached to one denoiser, when it is asked, and what it may ask of that denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper
from attnctl.core.hosts.latents import StepLatents
from attnctl.core.sites import Site
from attnctl.errors import ConfigError

__all__ = ["LiveControl", "LiveDenoiser", "PassEnded"]


class PassEnded(BaseException):
    """Ends the extra pass in which it is raised; no Exception, so that no host catches it."""


class LiveDenoiser(Protocol):
    """One denoiser under control, as an attached control sees it.

    Attributes:
        module: The denoiser.
        pipe: Its pipeline, or None.
        state: The call that is under way.
        latents: The latents of the current step.
        shared: What controls keep for the run, shared by denoisers that take turns; emptied when a run begins.
        running: Whether a further pass is under way: hooks of the base pass do nothing in it.
        listening: Handles of hooks that are removed when the call is over.
    """

    module: torch.nn.Module
    pipe: Any
    state: CallState
    latents: StepLatents
    shared: dict[Any, Any]
    running: bool
    listening: list[Any]

    def extra_pass(
        self, phase: str, kwargs: dict[str, Any], wrappers: Mapping[str, Wrapper], last: Site | None = None
    ) -> Any:
        """Run the denoiser once more with other inputs and wrappers, and without guidance.

        Args:
            phase: What `state.phase` says meanwhile.
            kwargs: Inputs of the denoiser.
            wrappers: What wraps the kernel, by site name; every site named must be reached.
            last: The pass may end behind this site: nobody needs its prediction.

        Returns:
            The prediction, or None with `last`.
        """

    def beside(self, wrappers: Mapping[str, Wrapper]) -> contextlib.AbstractContextManager[None]:
        """Let modules of the denoiser run beside the pass that is under way, as if it did not notice.

        Args:
            wrappers: What wraps the kernel meanwhile, by site name; no other control acts.
        """

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Note what the current pass does; the result does the same again, whenever it is entered."""


class LiveControl:
    """What a control keeps while it is attached to one denoiser: stored attention, say. It may change; controls do not.

    The events of one step, in order. Those of a call come once for each call of the denoiser in the control's window,
    the negative half of a pair and calls that guidance leaves alone included: `state.rows.role` tells them apart.

        before_call(passes)     the call is described, nothing has run; arguments returned here replace the call's
        wrap(call, proceed)     at each of the control's sites, in the base pass
        predicted(...)          the prediction, with what guidance is about to add to it
        after_call(output)      the prediction, guided already, before the pipeline receives it
        stepping(latents)       the pipeline hands its latents to the scheduler
        stepped(step, latents)  the scheduler has made the next ones of them

    Attributes:
        changes_latents: Whether `stepped` is asked after each step of the scheduler.
        observes: Whether `wrap` only looks. Where all wrappers of a site do, the host's own kernel call is made.
        records: Whether there is a `result` to read.
        forwards: Forwards with gradients that the control has run.
    """

    changes_latents: bool = False
    observes: bool = False
    records: bool = False
    forwards: int = 0

    def begin_run(self) -> None:
        """Forget the last run."""

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        """Prepare a call of the denoiser; return the arguments to go on with, or None for those that came."""
        return None

    def wrap(self, call: AttnCall, proceed: Proceed) -> torch.Tensor:
        """Wrap the kernel at the control's sites in the base pass."""
        return proceed(call)

    def predicted(self, passes: LiveDenoiser, output: Any, delta: Any) -> Any:
        """Put predictions together in place of the pipeline: return an output that holds their sum, or None.

        Args:
            passes: The denoiser.
            output: What it returned.
            delta: The sum of w (c - p) over all guidances, for the prompt's rows, or None; the output must hold it.
        """
        return None

    def after_call(self, output: Any) -> Any:
        """Return the denoiser's output to go on with, or None to leave it as it is."""
        return None

    def stepping(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents that the scheduler's step shall update; the step of the denoiser is over."""
        return latents

    def stepped(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents to go on with after a step of the scheduler."""
        return latents

    def noise_added(self) -> None:
        """Hear that a step of the scheduler drew random numbers; raise where the control cannot work with that."""

    def result(self, parts: Sequence[LiveControl]) -> Any:
        """Return what was recorded in the last run.

        Args:
            parts: What the same control keeps on each denoiser of the pipeline, this one first.
        """
        raise ConfigError(f"{type(self).__name__} records nothing: there is no result to read.")

    def describe(self) -> str | None:
        """Return a line for `handle.report()`, or None."""
        return None
