"""The pipeline call that is under way: which pipeline runs a denoiser, and what it was called with.

Pipelines share denoisers (`from_pipe`, components handed on), and none tells the denoiser who calls. The call is found
on the stack: the nearest object that holds the denoiser, and the arguments of its `__call__`.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.hosts.listing import DENOISERS, denoisers_of, unwrapped
from attnctl.errors import ConflictError, UnsupportedModelError

__all__ = ["Owner", "PipelineCall", "call_arguments", "calling_pipeline", "warn_of_idle"]

# What is read off a call: its own names for the texts, the steps and the guidance.
_READ = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "max_sequence_length",
    "timesteps",
    "use_dynamic_cfg",
    "guidance_scale",
    "current_guidance_scale",
    "true_cfg_scale",
    "guidance_rescale",
    "guidance_schedule",
    "i",
)


# Modules of hooks and models, which stand on the stack between a pipeline and what its denoiser's hooks call.
_BETWEEN = ("attnctl.core.", "torch.", "accelerate.", "diffusers.hooks.", "diffusers.models.", "diffusers.utils.")


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline.

    Attributes:
        pipe: The pipeline.
        values: Some of its arguments and variables, by name; "latent_rows" is the number of rows of its latents.
    """

    pipe: Any
    values: Mapping[str, Any] = field(default_factory=dict)


def _holds(pipe: Any, denoiser: torch.nn.Module) -> bool:
    """Tell whether a pipeline runs a denoiser, wrapped or compiled perhaps."""
    parts = getattr(pipe, "__dict__", {})
    return any(
        isinstance(m := parts.get(n), torch.nn.Module) and (m is denoiser or unwrapped(m) is denoiser)
        for n in DENOISERS
    )


def calling_pipeline(denoiser: torch.nn.Module) -> PipelineCall | None:
    """Find the pipeline call that runs a denoiser on this thread's stack; None where there is none."""
    frame = sys._getframe(1)
    pipe, values = None, None
    while frame is not None:
        code = frame.f_code
        between = frame.f_globals.get("__name__", "").startswith(_BETWEEN)
        if not between and code.co_argcount and code.co_varnames[0] == "self":
            local = frame.f_locals
            caller = local.get("self")
            if pipe is None and not isinstance(caller, torch.nn.Module) and _holds(caller, denoiser):
                pipe = caller
            if pipe is not None and caller is pipe and (values is None or code.co_name == "__call__"):
                values = {name: local[name] for name in _READ if name in local}
                latents = local.get("latents")
                values["latent_rows"] = latents.shape[0] if isinstance(latents, torch.Tensor) and latents.ndim else None
                if code.co_name == "__call__":
                    break
        frame = frame.f_back  # type: ignore[assignment]
    return None if pipe is None else PipelineCall(pipe, values or {})


def call_arguments(pipe: Any) -> dict[str, Any]:
    """Return what a pipeline's call on this thread's stack has in its arguments by now, by name; {} for no call."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if code.co_name == "__call__" and names[:1] == ("self",) and frame.f_locals.get("self") is pipe:
            return {name: frame.f_locals[name] for name in names[1:] if name in frame.f_locals}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


class Owner:
    """The thread whose run is under way on a denoiser; another is refused while it runs.

    One denoiser under control has one state. The owner is at work as long as the function that runs the denoiser is on
    its thread's stack: a run that was broken off leaves nothing behind. A thread that runs another pipeline meanwhile,
    even one of the same class, is not at work.
    """

    def __init__(self, denoisers: Sequence[torch.nn.Module] = ()) -> None:
        self._denoisers = denoisers
        self._thread: int | None = None
        self._code: Any = None
        self._named = False

    def claim(self, name: str, *, loop: bool = False) -> None:
        """Take the denoiser for this thread.

        Args:
            name: What is run, for messages.
            loop: Whether a bare model is called, of whose loop `set_step` may have told.

        Raises:
            ConflictError: Another thread is at work with it.
        """
        me = threading.get_ident()
        if self._thread not in (None, me) and self.at_work():
            raise ConflictError(
                f"Two threads run one {name} under control at the same time, and its controls follow one run. Run the "
                "requests one after the other (a lock around the call), or give each thread a pipeline with a denoiser "
                "of its own, copy.deepcopy(pipe), and control that. A loop of your own calls handle.set_step in the "
                "thread that runs the model."
            )
        if loop and self._thread == me and self._code is not None:
            return
        self._thread = me
        if loop:  # nobody has told of steps: the call of the model is all there is
            self._code, self._named = torch.nn.Module._call_impl.__code__, True
        else:
            self._code, self._named = self._runner()

    def release(self) -> None:
        """Let the denoiser go: the run is over."""
        self._thread = self._code = None

    def at_work(self) -> bool:
        """Tell whether the run that was claimed is still under way."""
        frame = sys._current_frames().get(self._thread or 0)
        while frame is not None:
            if frame.f_code is self._code and (not self._named or self._runs(frame)):
                return True
            frame = frame.f_back
        return False

    def _runs(self, frame: Any) -> bool:
        """Tell whether a frame is one of a denoiser, or of a pipeline that runs one."""
        caller = None if frame is None or not frame.f_code.co_argcount else frame.f_locals.get("self")
        return caller is not None and any(caller is m or _holds(caller, m) for m in self._denoisers)

    def _runner(self) -> tuple[Any, bool]:
        """Find the call of a pipeline, else the function that calls the denoiser; tell whether it runs one by name."""
        frame, nearest = sys._getframe(1), None
        while frame is not None:
            if not frame.f_globals.get("__name__", "").startswith(_BETWEEN):
                nearest = frame if nearest is None else nearest
                if frame.f_code.co_name == "__call__" and self._runs(frame):
                    return frame.f_code, True
            frame = frame.f_back  # type: ignore[assignment]
        return (None, False) if nearest is None else (nearest.f_code, self._runs(nearest))

    def check_in_place(self, pipe: Any) -> None:
        """Raise if a pipeline runs another denoiser than the ones that it was given.

        Raises:
            ConflictError: The user gave it another.
            UnsupportedModelError: The denoiser was compiled as a whole meanwhile.
        """
        if pipe is None or self._unchanged(pipe):
            return
        for name, module in denoisers_of(pipe).items():
            if all(unwrapped(module) is not other for other in self._denoisers):
                raise ConflictError(
                    f"pipe.{name} was replaced while under control: the controls are on the "
                    f"{type(self._denoisers[0]).__name__} that it was before. Detach the handle, and call "
                    "attnctl.control on the pipeline again."
                )
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise UnsupportedModelError(
                    f"pipe.{name} was compiled as a whole while under control, so that hooks on it are compiled too. "
                    f"Compile its blocks instead: pipe.{name}.compile_repeated_blocks(fullgraph=True)."
                )

    def _unchanged(self, pipe: Any) -> bool:
        """Tell at a glance that a pipeline holds just these denoisers, unwrapped and not compiled."""
        parts = [part for name in DENOISERS if (part := getattr(pipe, name, None)) is not None]
        return [*map(id, parts)] == [*map(id, self._denoisers)] and all(
            part._compiled_call_impl is None for part in parts
        )


def warn_of_idle(controls: Sequence[Any], steps: int) -> None:
    """Warn of controls that no step of a run has reached."""
    shown = [f"{i / steps:.3g}" for i in range(steps)]
    shown = shown if steps <= 6 else [*shown[:3], "...", shown[-1]]
    begin = (
        f"the {steps} steps of the run begin at {', '.join(shown)}" if steps != 1 else "the run's only step begins at 0"
    )
    for c in controls:
        if any(c.start <= i / steps < c.stop for i in range(steps)) and getattr(c, "adaptive", False):
            cause = f"adaptive={c.adaptive:g} has its weight fall to 0 before. Begin earlier, or lower `adaptive`."
        else:
            cause = f"It acts from start={c.start:g} to before stop={c.stop:g}; {begin}. Run more steps, or "
            cause += "widen the window."
        warnings.warn(f"attnctl: {c.describe()} acted at no step of this run. {cause}", stacklevel=7)
