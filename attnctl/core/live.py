"""What a control keeps while it is attached to one denoiser, and what it may ask of that denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper
from attnctl.core.sites import Site

__all__ = ["LiveControl", "LiveDenoiser"]


class LiveDenoiser(Protocol):
    """One denoiser under control, as an attached control sees it."""

    pipe: Any
    state: CallState

    def extra_pass(
        self, phase: str, kwargs: dict[str, Any], wrappers: Mapping[str, Wrapper], last: Site | None = None
    ) -> Any:
        """Run the denoiser once more with other inputs and wrappers, and without guidance.

        Args:
            phase: What `state.phase` says meanwhile.
            kwargs: Inputs of the denoiser.
            wrappers: What wraps the kernel, by site name; every site named must be reached.
            last: The pass may end behind this site, its prediction not being asked for.

        Returns:
            The prediction, or None with `last`.
        """

    def beside(self, wrappers: Mapping[str, Wrapper]) -> contextlib.AbstractContextManager[None]:
        """Let modules of the denoiser run beside the pass that is under way, as if it did not notice.

        Args:
            wrappers: What wraps the kernel meanwhile, by site name; no other control acts.
        """


class LiveControl:
    """What a control keeps while it is attached to one denoiser: stored attention, say. It may change; controls do not.

    Attributes:
        changes_latents: Whether `stepped` is asked after each step of the scheduler.
        observes: Whether `wrap` only looks. Where all wrappers of a site do, the host's own kernel call is made.
    """

    changes_latents: bool = False
    observes: bool = False

    def begin_run(self) -> None:
        """Forget the last run."""

    def before(self, passes: LiveDenoiser) -> None:
        """Run ahead of each base pass in the control's window."""

    def wrap(self, call: AttnCall, proceed: Proceed) -> torch.Tensor:
        """Wrap the kernel at the control's sites in the base pass."""
        return proceed(call)

    def stepped(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents to go on with after a step of the scheduler."""
        return latents
