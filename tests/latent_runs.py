"""One tiny pipeline whose latents are moved: by a control, and by a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import zoo_pipelines as pipes
from torch import Tensor

import attnctl
from attnctl.kernels import columns
from attnctl.processors import AStar, LatentGuidance
from attnctl.processors.latent import engine as engine
from attnctl.processors.latent.losses import normalise, segregation, smooth

SITE = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
PROMPT, WORDS = "a black bear in the water", ("bear", "water")
STEPS = 4


def astar(**options: Any) -> AStar:
    """Make a control that acts strongly on the tiny UNet."""
    return AStar(**{"concepts": WORDS, "sites": SITE, "ret": 0.0, "step_size": 30.0} | options)


def sd(dtype: torch.dtype = torch.float32, batch: int = 1, scheduler: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Build the tiny Stable Diffusion pipeline, with another scheduler if one is named."""
    pipe, kwargs = pipes.build("sd", dtype, batch)
    kwargs["prompt"] = PROMPT if batch == 1 else [PROMPT] * batch
    if scheduler is not None:
        options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    return pipe, kwargs


class Read(diffusers.models.attention_processor.AttnProcessor2_0):
    """Compute plain attention and keep the columns of two tokens."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.maps: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Tensor:
        """Attend."""
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        self.maps = columns(q, k, self.weights).sum(1) / attn.heads
        return super().__call__(attn, hidden_states, encoder_hidden_states, **rest)


def by_hand(pipe: Any, kwargs: dict[str, Any], later: Callable[[int], bool], size: float = 30.0) -> Tensor:
    """Sample with the update written into the loop: full forward, autograd through the scaling."""
    cond, uncond = pipe.encode_prompt(kwargs["prompt"], "cpu", 1, True, kwargs["negative_prompt"])
    ids = pipe.tokenizer(PROMPT).input_ids
    weights = torch.zeros(cond.shape[1], 2)
    for c, word in enumerate(WORDS):
        tokens = pipe.tokenizer(word, add_special_tokens=False).input_ids
        at = next(i for i in range(len(ids)) if ids[i : i + len(tokens)] == tokens)
        weights[at : at + len(tokens), c] = 1 / len(tokens)
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(STEPS)
    timesteps = pipe.scheduler.timesteps
    shape = (1, 4, kwargs["height"] // 2, kwargs["width"] // 2)
    z = torch.randn(shape, generator=generator, dtype=cond.dtype) * pipe.scheduler.init_noise_sigma
    attn = pipe.unet.get_submodule(SITE)
    for i, t in enumerate(timesteps):
        if not later(i):
            plain, attn.processor = attn.processor, Read(weights)
            with torch.enable_grad():
                leaf = z.detach().clone().requires_grad_()
                pipe.unet(pipe.scheduler.scale_model_input(leaf, t), t, cond)
                h, w = shape[2] // 2, shape[3] // 2
                maps = attn.processor.maps.unflatten(1, (h, w)).permute(0, 3, 1, 2)
                loss = segregation(normalise(smooth(maps), "max"))
                (grad,) = torch.autograd.grad(loss.sum(), leaf)
            attn.processor = plain
            n = len(timesteps)
            z = (z - size * (1 - 0.5 * i / (n - 1)) ** 0.5 * grad).detach()
        x = pipe.scheduler.scale_model_input(torch.cat([z, z]), t)
        u, c = pipe.unet(x, t, torch.cat([uncond, cond])).sample.chunk(2)
        z = pipe.scheduler.step(u + 5.0 * (c - u), t, z).prev_sample
    return z


def controlled(pipe: Any, kwargs: dict[str, Any], control: LatentGuidance, **options: Any) -> Tensor:
    """Run a pipeline under one control."""
    with attnctl.control(pipe, control):
        return pipes.run(pipe, kwargs, num_inference_steps=STEPS, **options)
