"""What latent guidance is: a loss on concept maps whose gradient moves the latents before a step.

    z' = z - alpha_i transform(grad_z L(maps(z)))

`LatentGuidance` is an open base: a method is a subclass with a `loss`. The engine (`attnctl.processors.latent.engine`)
runs the denoiser on the prompt rows as far as the last map that is needed, and hands z' to the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnctl.core.live import LiveControl
from attnctl.core.sites import Site
from attnctl.processors.latent.engine import LatentEngine
from attnctl.processors.latent.fields import LatentFields

__all__ = ["LatentGuidance"]


@dataclass(frozen=True, kw_only=True)
class LatentGuidance(LatentFields, abstract=True):
    """Base of controls that move the latents down the gradient of a loss on concept maps.

    Subclasses define `loss`, and may keep something from one step to the next with `remember`. One that sets
    `needs_self_attention` is given the image's own attention as well.

    Attributes:
        concepts: Words, phrases or token places of the prompt, two or more for losses that compare them; a tuple of
            tuples gives each prompt of a batch its own, equally many.
        prompt: The prompt, or one for each image, for calls that pass embeddings instead of text; without
            weights such as "(cat)1.5", which are not tokenised.
        step_size: alpha_0; 0 switches the control off.
        schedule: "sqrt": alpha falls to alpha_0 sqrt(1/2) along the run, as in Attend-and-Excite; or "constant".
        grad_transform: "none", "l2" (a gradient of length 1 per sample, so that alpha is a distance) or "sign".
        update: "latents": z' = z - alpha grad L before the step. "velocity", for flow matching alone: the latents stay,
            and the prediction becomes v' = v + alpha sigma^2 grad L, with the noise level sigma in [0, 1] (FOCUS,
            arXiv 2510.02315: lambda sigma (1 - t) grad L, t from 0 at noise to 1, is subtracted from a velocity that
            points to the image; diffusers' points to the noise).
        iterations: Gradient steps before each denoising step; 1 with update="velocity".
        map_norm: "none" (probabilities), "max", "minmax", or "ae" (softmax(100 A) over the text tokens).
        smoothing: Width of the 3 x 3 blur of the maps; 0 for none.
        early_exit: Stop the forward after the last map that is needed (exact); off for debugging.
        checkpoint: Trade time for memory by gradient checkpointing inside the guidance forward.
    """

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return LatentEngine(self, sites, pipe)
