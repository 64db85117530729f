"""The guider for Modular Diffusers, driven by the protocol that its denoising loop follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from diffusers.guiders.guider_utils import rescale_noise_cfg

import attnctl
from attnctl.pipelines.guider import ControlGuider
from attnctl.processors import PAG, SoftPAG

SITES = "mid_block"


def drive(guider: ControlGuider, model: Any, inputs: dict[str, Any], steps: int = 2) -> list[torch.Tensor]:
    """Run a few steps as diffusers' modular denoising loop does."""
    text = inputs["encoder_hidden_states"]
    preds = []
    for i in range(steps):
        guider.set_state(step=i, num_inference_steps=steps, timestep=torch.tensor(900 - 400 * i))
        batches = guider.prepare_inputs({"encoder_hidden_states": (text[1:], text[:1])})
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = model(
                inputs["sample"][:1], inputs["timestep"], encoder_hidden_states=batch.encoder_hidden_states
            ).sample
            guider.cleanup_models(model)
        preds.append(guider(batches)[0])
    return preds


@pytest.fixture
def model() -> Any:
    """Build a tiny UNet in float64."""
    return zoo.build("sd15", dtype=torch.float64)


def parts(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute u, c and p by hand."""
    text, x, t = inputs["encoder_hidden_states"], inputs["sample"][:1], inputs["timestep"]
    u, c = (model(x, t, encoder_hidden_states=e).sample for e in (text[:1], text[1:]))
    plain = dict(model.attn_processors)
    model.set_attn_processor(attnctl.attn_processors(model, PAG(sites=SITES)))
    p = model(x, t, encoder_hidden_states=text[1:]).sample
    model.set_attn_processor(plain)
    return u, c, p


@torch.no_grad()
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_equals_the_formula(model: Any, rescale: float) -> None:
    unet, inputs = model
    u, c, p = parts(unet, inputs)
    guider = ControlGuider([PAG(scale=3.0, sites=SITES)], guidance_scale=5.0, guidance_rescale=rescale)
    expected = u + 5.0 * (c - u) + 3.0 * (c - p)
    if rescale:
        expected = rescale_noise_cfg(expected, c, rescale)
    for pred in drive(guider, unet, inputs):
        assert (pred - expected).norm() <= 1e-12 * expected.norm()
    assert guider._handle is not None
    assert not guider._handle._shared  # nothing outlasts the run
    assert (c - p).norm() > 0.01 * c.norm()


@torch.no_grad()
def test_without_cfg_and_outside_the_window(model: Any) -> None:
    unet, inputs = model
    _, c, p = parts(unet, inputs)
    guider = ControlGuider([PAG(scale=3.0, sites=SITES, stop=0.5)], guidance_scale=1.0)
    first, second = drive(guider, unet, inputs)
    assert (first - (c + 3.0 * (c - p))).norm() <= 1e-12 * c.norm()
    assert torch.equal(second, c)


@torch.no_grad()
def test_leaves_the_model_clean_and_survives_an_exception(model: Any) -> None:
    unet, inputs = model
    before = {n: dict(vars(m)) for n, m in unet.named_modules()}
    guider = ControlGuider([PAG(scale=3.0, sites=SITES)], guidance_scale=5.0)
    expected = drive(guider, unet, inputs)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(900))
    guider.prepare_models(unet)
    with pytest.raises(RuntimeError):
        unet(torch.zeros(1, 3, 8, 8, dtype=torch.float64), 1, encoder_hidden_states=inputs["encoder_hidden_states"])
    again = drive(guider, unet, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    after = {n: dict(vars(m)) for n, m in unet.named_modules()}
    assert all(before[n].keys() == after[n].keys() for n in before)
    assert all(before[n][k] is after[n][k] for n in before for k in before[n])


def test_config_round_trip(tmp_path: Path) -> None:
    guider = ControlGuider([SoftPAG(scale=2.0, u=0.25, heads=[("a.b", 1), (3, 2)])], guidance_scale=4.0)
    guider.save_pretrained(tmp_path)
    other = ControlGuider.from_pretrained(tmp_path)
    assert other.controls == guider.controls
    assert other.guidance_scale == 4.0
    assert guider.new(guidance_scale=2.0).controls == guider.controls


@torch.no_grad()
@pytest.mark.parametrize("guidance", [PAG(scale=3.0, sites=1), SoftPAG(scale=30.0, u=0.5, heads=[(1, 0)], start=0.4)])
def test_a_modular_pipeline_runs_as_the_classic_one_under_control(guidance: PAG | SoftPAG) -> None:
    blocks = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3")
    pipe, kwargs = pipes.build("sd3", torch.float64)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with attnctl.control(pipe, guidance):
        want = pipes.run(pipe, kwargs, latents=noise, guidance_scale=4.0)
    plain = pipes.run(pipe, kwargs, latents=noise, guidance_scale=4.0)
    before = {n: dict(vars(m)) for n, m in pipe.transformer.named_modules()}
    modular = blocks.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    modular.set_progress_bar_config(disable=True)
    guider = ControlGuider([guidance], guidance_scale=4.0)
    modular.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=guider)
    given = {name: value for name, value in kwargs.items() if name.endswith("embeds")}
    size = {"height": 128, "width": 96}  # without an autoencoder a latent counts as 8 pixels
    for _ in range(2):
        out = modular(**given, **size, latents=noise, num_inference_steps=3, output="latents")
        assert (out - want).norm() <= 1e-6 * want.norm()  # the scheduler steps in float32
    assert (want - plain).norm() > 1e-3 * plain.norm()
    after = {n: dict(vars(m)) for n, m in pipe.transformer.named_modules()}
    assert all(before[n].keys() == after[n].keys() for n in before)
