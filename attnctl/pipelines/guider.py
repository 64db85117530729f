"""attnctl's controls as a guider of Modular Diffusers.

    pipe.update_components(guider=ControlGuider([PAG(scale=3.0)], guidance_scale=5.0))

A modular pipeline calls its denoiser once for the prompt and once for the negative prompt; the guider attaches the
controls for the length of each call, so that nothing stays on the model between calls, and leaves classifier-free
guidance to diffusers' own guider, from which it inherits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance

from attnctl.core.attach import DenoiserHandle
from attnctl.core.control import Control
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import ConfigError, shown

__all__ = ["ControlGuider"]


class _Host:
    """Shows a guider's denoiser and CFG settings the way a pipeline would."""

    def __init__(self, guider: ControlGuider, denoiser: torch.nn.Module) -> None:
        self.guider, self.unet = guider, denoiser

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guider.num_conditions == 2

    @property
    def guidance_scale(self) -> float:
        return self.guider.guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self.guider.guidance_rescale


class ControlGuider(ClassifierFreeGuidance):
    """Classifier-free guidance with attnctl controls, for Modular Diffusers.

    Args:
        controls: Controls, or their JSON form as `guider_config.json` holds it.
        guidance_scale: Scale of classifier-free guidance; 1 switches it off.
        guidance_rescale: Rescale of "Common Diffusion Noise Schedules ...", arXiv 2305.08891; guidance by the controls
            is not part of what it rescales against.
        start: Fraction of the run at which classifier-free guidance begins.
        stop: Fraction at which it ends. The controls have windows of their own.
        enabled: Whether anything guides at all.
    """

    @register_to_config
    def __init__(
        self,
        controls: Sequence[Control | dict[str, Any]] = (),
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, False, start, stop, enabled)
        if isinstance(controls, (str, type)) or not isinstance(controls, Sequence):
            raise ConfigError(f"controls={shown(controls)} was given; expected a list of controls, such as [PAG()].")
        self.controls = tuple(c if isinstance(c, Control) else control_from_dict(c) for c in controls)
        # super() registered its own arguments; the config is what this class takes, as JSON.
        self.register_to_config(
            controls=[control_to_dict(c) for c in self.controls],
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self._handle: DenoiserHandle | None = None
        self._denoiser: torch.nn.Module | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begin a step."""
        super().set_state(step, num_inference_steps, timestep)
        if self._handle is not None:
            self._tell_step(self._handle)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Attach the controls for one call of the denoiser."""
        super().prepare_models(denoiser)
        if not self._enabled or not self.controls:
            return
        if self._handle is None or self._denoiser is not denoiser:
            host = _Host(self, denoiser)
            self._handle = DenoiserHandle(host, self.controls, backend="auto", layout="sequential", replay=True)
            self._denoiser = denoiser
            self._tell_step(self._handle)
        if not self._handle.attached:  # a call that raised may have left it on
            self._handle.attach()

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Take the controls off after a call; what the prompt's call leaves for the negative one stays until then."""
        if self._handle is not None:
            self._handle.detach(pause=True)

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        """Put the predictions of a step together; after those of the last step nothing is kept."""
        output = super().forward(pred_cond, pred_uncond)
        if self._handle is not None and (self._step or 0) + 1 >= (self._num_inference_steps or 1):
            self._handle.detach()
        return output

    def _tell_step(self, handle: DenoiserHandle) -> None:
        timestep = None
        if any(getattr(c, "adaptive", 0) for c in self.controls) and self._timestep is not None:
            timestep = float(self._timestep)
        handle.set_step(self._step or 0, self._num_inference_steps or 1, timestep)
