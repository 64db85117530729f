"""The shortest pipeline around a tiny denoiser, for controls that move the latents between steps."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import zoo

IMAGE_INPUTS = ("sample", "hidden_states", "x", "vision_tokens")
"""Arguments of a denoiser that hold its latents."""


class Loop(diffusers.DiffusionPipeline):
    """The shortest pipeline: a scheduler moves the latents, and two calls of the denoiser see them.

    The prediction of the second call is what comes out; the scheduler is given noise, whatever was predicted.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], guidance_scale: float = 1.0) -> Any:
        """Run two steps; return the last prediction. A host of codes has no latents: nothing moves."""
        self.guidance_scale = guidance_scale
        key = next((k for k in IMAGE_INPUTS if k in inputs), "")
        listed = isinstance(inputs.get(key), list)
        latents = torch.stack(inputs[key]) if listed else inputs.get(key, torch.zeros(1))
        generator = torch.Generator().manual_seed(0)
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            out = zoo.call(self.transformer, inputs | ({key: [*latents] if listed else latents} if key else {}))
            noise = torch.randn(latents.shape, generator=generator)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return out
