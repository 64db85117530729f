"""Pipelines without a prompt: classes (DiT) and nothing at all (DDPM, DDIM)."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import zoo
from torch import Tensor, nn

import attnctl
from attnctl.processors import PAG

STEPS, WEIGHT, SCALE = 3, 2.5, 4.0


class _Identity:
    """Attend by the identity map, written out: every token takes its own value."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, shape = hidden_states, hidden_states.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = attn.to_out[1](attn.to_out[0](attn.to_v(x)))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class _Decoder(nn.Module):
    """Stand in for an autoencoder, and keep what it is to decode."""

    config = type("Config", (), {"scaling_factor": 1.0})
    device, dtype = torch.device("cpu"), torch.float64

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return type("Decoded", (), {"sample": latents})


def perturbed(model: nn.Module, site: str) -> nn.Module:
    """Return a copy of a model whose attention at one site is the identity."""
    twin = copy.deepcopy(model)
    module: Any = twin.get_submodule(site)
    module.processor = _Identity()
    return twin


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_classes_are_guided_as_by_hand(scale: float) -> None:
    site, labels = "transformer_blocks.2.attn1", [3, 5]
    model, _ = zoo.build("dit", dtype=torch.float64, num_embeds_ada_norm=1000)
    pipe = diffusers.DiTPipeline(model, _Decoder(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    watch = model.transformer_blocks[2].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    with attnctl.control(pipe, PAG(scale=WEIGHT, sites=site)) as handle:
        pipe(labels, guidance_scale=scale, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
        assert handle.passes == STEPS
    watch.remove()
    guided = scale > 1
    assert rows == [4 if guided else 2, 2] * STEPS  # rows of no class are in no perturbed pass

    twin, scheduler = perturbed(model, site), diffusers.DDIMScheduler()
    x = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            c = model(x, t.expand(2), torch.tensor(labels)).sample[:, :4]
            u = model(x, t.expand(2), torch.tensor([1000, 1000])).sample[:, :4]
            p = twin(x, t.expand(2), torch.tensor(labels)).sample[:, :4]
            x = scheduler.step(u + scale * (c - u) + WEIGHT * (c - p), t, x).prev_sample
    assert (pipe.vae.latents - x).abs().max() <= 1e-12 * x.abs().max()


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_unconditional_images_are_guided_as_by_hand(kind: str) -> None:
    model, _ = zoo.build("unet2d", dtype=torch.float64)
    site = next(s.name for s in attnctl.find_sites(model) if s.name.startswith("mid"))
    cls, schedule = {
        "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
        "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
    }[kind]
    pipe = cls(model, schedule(clip_sample=False, beta_end=2e-4))
    pipe.set_progress_bar_config(disable=True)
    with attnctl.control(pipe, PAG(scale=WEIGHT, sites="mid")) as handle:
        seed = torch.Generator().manual_seed(1)
        images = pipe(batch_size=2, num_inference_steps=STEPS, generator=seed, output_type="np").images
        assert handle.passes == STEPS
        assert [s.name for s in handle.sites] == [site]

    twin, scheduler = perturbed(model, site), schedule(clip_sample=False, beta_end=2e-4)
    generator = torch.Generator().manual_seed(1)
    size = model.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, model.config.in_channels, *size, generator=generator, dtype=torch.float64)
    scheduler.set_timesteps(STEPS)
    options = {} if kind == "ddpm" else {"eta": 0.0, "use_clipped_model_output": None}
    with torch.no_grad():
        for t in scheduler.timesteps:
            c, p = model(x, t).sample, twin(x, t).sample
            x = scheduler.step(c + WEIGHT * (c - p), t, x, generator=generator, **options).prev_sample
    want = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert (want - (x / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-12
    assert ((want > 0) & (want < 1)).double().mean() > 0.2  # not all is cut off
