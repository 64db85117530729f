"""The latents of the current step: what the pipeline holds, how the denoiser sees them, what a control makes of them.

scheduler.scale_model_input   shows the latents z and how they are scaled; flow-matching pipelines never call it and
                              hand z itself to the denoiser
a control, before the call    reads z (`of`), moves it (`move`), and has the call go on with z' (`written`)
further calls of the step     go on with z' as well
scheduler.step                is given z' as its sample (`carried`): the same as a loop that changes z before it
                              scales it, at every step including the first
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.hosts.arguments import main_input, main_name
from attnctl.errors import UnsupportedModelError

__all__ = ["StepLatents"]


class StepLatents:
    """The latents of one pipeline's current step, shared by the controls that move them.

    Args:
        pipe: The pipeline, or None for a bare model, whose denoiser is handed the latents themselves.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.end_step()

    def end_step(self) -> None:
        """Forget the latents of the last step."""
        self._raw: Tensor | None = None
        self._scale: Callable[[Tensor], Tensor] | None = None
        self._moved: Tensor | None = None
        self.prediction: Any = None
        """What the pipeline hands to its scheduler, once it does."""
        self.unseen = False
        """Whether the pipeline may have scaled the latents before anybody watched."""

    def note(self, sample: Tensor, scale: Callable[[Tensor], Tensor]) -> None:
        """Note latents that the pipeline scales, and how."""
        self._raw, self._scale = sample, scale

    def of(self, state: CallState) -> Tensor:
        """Return the latents of the prompt's rows, [prompts, ...], as earlier controls of the step have moved them.

        Raises:
            UnsupportedModelError: The denoiser takes them in a form that cannot be moved.
        """
        if self._moved is not None:
            return self._moved
        rows, main = state.rows, main_input(state.bound)
        if not isinstance(main, Tensor):
            name = type(state.denoiser).__name__
            raise UnsupportedModelError(f"{name} takes its latents as a list, which attnctl cannot move.")
        if self._raw is None and self.unseen and getattr(self.pipe.scheduler, "init_noise_sigma", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"The latents that this {type(self.pipe).__name__} scales were not seen: controls that move latents "
                "must be attached to the pipeline that runs, before it is called."
            )
        raw = main if self._raw is None else self._raw
        latents = raw[rows.cond] if raw.shape[0] == rows.total else raw
        if latents.shape[0] != rows.prompts:
            raise UnsupportedModelError(f"{raw.shape[0]} latents were scaled for {rows.total} rows of the denoiser.")
        return latents

    def move(self, latents: Tensor) -> None:
        """Replace the latents of the prompt's rows for the rest of the step."""
        self._moved = latents

    def written(self, state: CallState) -> dict[str, Any]:
        """Return the arguments of the current call with the moved latents in them."""
        bound = dict(state.bound)
        if self._moved is not None:
            name = main_name(bound)
            latents = torch.cat([self._moved] * len(state.rows.groups))
            bound[name] = self.input(latents, bound[name])
        return bound

    def input(self, latents: Tensor, template: Tensor) -> Tensor:
        """Write latents as the denoiser's input: scaled, cast, and with the channels that the pipeline adds."""
        x = latents if self._scale is None else self._scale(latents)
        x = x.to(template.dtype)
        if x.shape == template.shape:
            return x
        same = x.shape[0] == template.shape[0] and x.shape[2:] == template.shape[2:]
        if x.ndim != template.ndim or not same or x.shape[1] > template.shape[1]:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} gives its denoiser {tuple(template.shape)} for latents {tuple(x.shape)}: "
                "attnctl cannot move latents through that."
            )
        return torch.cat([x, template[:, x.shape[1] :]], 1)  # inpainting masks and images stand behind the latents

    def unscaled(self, grad: Tensor, z: Tensor) -> Tensor:
        """Turn a gradient by the denoiser's input into one by the latents z."""
        if grad.ndim > 1 and grad.shape != z.shape:
            grad = grad[:, : z.shape[1]]
        grad = grad.to(torch.promote_types(grad.dtype, z.dtype))
        return grad if self._scale is None else self._scale(grad)  # scaling is a factor: its own adjoint

    def carried(self, sample: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return the scheduler's sample, moved as the latents were from `old` to `new`."""
        if sample.shape != old.shape:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} hands its scheduler latents {tuple(sample.shape)} and its denoiser "
                f"{tuple(old.shape)}: attnctl cannot move them."
            )
        moved = sample + (new - old).to(sample)
        if sample.dtype != old.dtype:
            return moved
        return torch.where((sample == old).all(), new.to(sample.device), moved)
