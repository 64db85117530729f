"""Moving latents inside unmodified pipelines: the same as a loop written by hand, and no trace afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from latent_runs import PROMPT, SITE, STEPS, WORDS, astar, by_hand, controlled, sd
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, NeverApplied, SiteError, UnsupportedModelError
from attnctl.processors import PAG, AStar, AttendExcite
from attnctl.processors.latent import engine as engine
from attnctl.processors.latent.losses import normalise, segregation, smooth


@torch.no_grad()
def test_ddim_equals_a_hand_written_loop_bit_for_bit() -> None:
    pipe, kwargs = sd()
    plain = pipes.run(pipe, kwargs, num_inference_steps=STEPS, guidance_scale=5.0)
    want = by_hand(pipe, kwargs, lambda i: False)
    assert torch.equal(controlled(pipe, kwargs, astar(), guidance_scale=5.0), want)
    assert (want - plain).norm() > 0.01 * plain.norm()


SCHEDULERS: dict[str, Callable[[int], bool]] = {
    "EulerDiscreteScheduler": lambda i: False,
    "DPMSolverMultistepScheduler": lambda i: False,
    "UniPCMultistepScheduler": lambda i: False,
    # Several evaluations a step: only the first is guided.
    "HeunDiscreteScheduler": lambda i: i % 2 == 1,
    "KDPM2DiscreteScheduler": lambda i: i % 2 == 1,
    "DPMSolverSinglestepScheduler": lambda i: i == 1,  # its orders for 4 steps: 1, 2, 1, 1
    "PNDMScheduler": lambda i: i == 1,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_every_scheduler_equals_a_hand_written_loop(name: str) -> None:
    pipe, kwargs = sd(torch.float64, scheduler=name)
    want = by_hand(pipe, kwargs, SCHEDULERS[name])
    out = controlled(pipe, kwargs, astar(), guidance_scale=5.0)
    assert (out - want).norm() <= 1e-10 * want.norm()
    assert not torch.equal(out, pipes.run(pipe, kwargs, num_inference_steps=STEPS, guidance_scale=5.0))


@pytest.mark.parametrize("update", ["latents", "velocity"])
@torch.no_grad()
def test_flow_matching_equals_a_hand_written_loop(update: Any) -> None:
    pipe, kwargs = pipes.build("sd3", torch.float64)
    plain = pipes.run(pipe, kwargs, num_inference_steps=STEPS, guidance_scale=3.0)
    control = AStar(
        concepts=(1, 3), sites="transformer_blocks.1", ret=0.0, step_size=5.0, schedule="constant", update=update
    )
    out = controlled(pipe, kwargs, control, guidance_scale=3.0)
    pipe.scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 16, 12, generator=generator, dtype=torch.float64)
    names = ("encoder_hidden_states", "pooled_projections")
    cond = dict(zip(names, (kwargs["prompt_embeds"], kwargs["pooled_prompt_embeds"]), strict=True))
    uncond = dict(zip(names, (kwargs["negative_prompt_embeds"], kwargs["negative_pooled_prompt_embeds"]), strict=True))
    for t, sigma in zip(pipe.scheduler.timesteps, pipe.scheduler.sigmas, strict=False):
        seen: list[Tensor] = []

        def note(module: Any, args: Any, call: Any, seen: list[Tensor] = seen) -> None:
            x, text = call["hidden_states"], call["encoder_hidden_states"]
            split = lambda v: v.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # noqa: E731
            q, k = split(module.to_q(x)), split(torch.cat([module.to_k(x), module.add_k_proj(text)], 1))
            probs = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            at = x.shape[1] + torch.tensor([1, 3])
            seen.append(probs[..., at].mean(1).transpose(1, 2).unflatten(-1, (8, 6)))

        hook = pipe.transformer.transformer_blocks[1].attn.register_forward_pre_hook(note, with_kwargs=True)
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            pipe.transformer(hidden_states=leaf, timestep=t[None], **cond)
            loss = segregation(normalise(smooth(seen[0]), "max"))
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        hook.remove()
        if update == "latents":
            z = z - 5.0 * grad
        both = {n: torch.cat([uncond[n], cond[n]]) for n in names}
        u, c = pipe.transformer(hidden_states=torch.cat([z, z]), timestep=t.expand(2), **both).sample.chunk(2)
        guided = u + 3.0 * (c - u)
        if update == "velocity":
            guided = guided + 5.0 * sigma**2 * grad
        z = pipe.scheduler.step(guided, t, z).prev_sample
    assert (out - z).norm() <= 1e-6 * z.norm()  # the scheduler steps in float32
    assert (out - plain).norm() > 1e-4 * plain.norm()


@pytest.mark.parametrize("name", ["flux", "flux_cfg", "sd3"])
def test_the_velocity_of_packed_and_sequential_predictions_is_pushed(name: str) -> None:
    pipe, kwargs = pipes.build(name)
    control = AStar(concepts=(1, 3), step_size=5.0, update="velocity")
    plain = pipes.run(pipe, kwargs)
    before = snapshot(pipe.transformer)
    with attnctl.control(pipe, control) as handle:
        out = pipes.run(pipe, kwargs)
        assert handle.guidance_forwards == 3
    assert_clean(before, pipe.transformer)
    assert not torch.equal(out, plain)
    with attnctl.control(pipe, dataclasses.replace(control, step_size=0.0)):
        assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_true_guidance_passes_a_push_through_once_and_down_the_gradient() -> None:
    pipe, kwargs = pipes.build("flux_cfg", torch.float64)
    control = AStar(concepts=(1, 3), step_size=5.0, update="velocity", schedule="constant", ret=0.0)
    pushes: list[Tensor] = []
    move = engine.LatentEngine._move

    def spy(self: Any, *args: Any) -> None:
        move(self, *args)
        pushes.append(self.push)

    run = {"num_inference_steps": 1}
    plain = pipes.run(pipe, kwargs, **run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.LatentEngine, "_move", spy)
        with attnctl.control(pipe, control):
            out = pipes.run(pipe, kwargs, **run)
    (push,) = pushes
    sigma = pipe.scheduler.sigmas[0]
    assert torch.allclose(out - plain, -(sigma * push), atol=1e-6 * float(push.abs().max()) + 1e-7)


def test_only_flow_matching_has_a_velocity() -> None:
    pipe, kwargs = sd()
    plain = pipes.run(pipe, kwargs)
    with (
        attnctl.control(pipe, astar(update="velocity")),
        pytest.raises(UnsupportedModelError, match="DDIMScheduler steps otherwise"),
    ):
        pipes.run(pipe, kwargs)
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    with pytest.raises(ConfigError, match="nothing can be repeated: set iterations=1\\."):
        astar(update="velocity", iterations=2)
    with pytest.raises(ConfigError, match="iterations=1 and refine_steps=0"):
        AttendExcite(concepts=WORDS, update="velocity")
    with pytest.raises(ConfigError, match="update='speed' is unknown"):
        astar(update="speed")


# Inactive, exceptions, flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"step_size": 0.0}, {"seg": 0.0, "ret": 0.0}, {"start": 1.0}])
def test_inactive_is_bit_identical_and_free(options: dict[str, Any]) -> None:
    pipe, kwargs = sd()
    with attnctl.control(pipe, astar(**options)) as handle:
        out = pipes.run(pipe, kwargs)
        assert handle.guidance_forwards == 0
    assert torch.equal(out, pipes.run(pipe, kwargs))


class Boom(RuntimeError):
    """What a run raises."""


@pytest.mark.parametrize("at", range(6))
def test_an_exception_at_any_forward_leaves_no_trace(at: int) -> None:
    pipe, kwargs = sd()
    plain = pipes.run(pipe, kwargs)
    pipe.unet.train()
    pipe.unet.eval()
    pipe.unet.conv_in.requires_grad_(False)
    flags = [(p.requires_grad, m.training) for m in pipe.unet.modules() for p in m.parameters()]
    before = snapshot(pipe.unet, pipe.scheduler)
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > at:
            raise Boom

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with attnctl.control(pipe, astar(checkpoint=bool(at % 2))), pytest.raises(Boom):
        pipes.run(pipe, kwargs)
    hook.remove()
    assert [(p.requires_grad, m.training) for m in pipe.unet.modules() for p in m.parameters()] == flags
    assert_clean(before, pipe.unet, pipe.scheduler)
    assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_a_run_after_an_exception_starts_afresh() -> None:
    pipe, kwargs = sd()
    control = AStar(concepts=WORDS, sites=SITE)
    want = controlled(pipe, kwargs, control)

    def fail(pipe: Any, step: int, time: Any, values: Any) -> Any:
        raise Boom

    with attnctl.control(pipe, control) as handle:
        with pytest.raises(Boom):
            pipes.run(pipe, kwargs, num_inference_steps=STEPS, callback_on_step_end=fail)
        assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=STEPS), want)
        handle.enabled = False
        plain = pipes.run(pipe, kwargs, num_inference_steps=STEPS)
    assert torch.equal(plain, pipes.run(pipe, kwargs, num_inference_steps=STEPS))


def test_parameters_get_no_gradient_and_inference_mode_works() -> None:
    pipe, kwargs = sd(scheduler="EulerDiscreteScheduler")
    want = controlled(pipe, kwargs, astar())
    with torch.inference_mode():
        assert torch.equal(controlled(pipe, kwargs, astar()), want)
    assert all(p.grad is None and p.requires_grad for p in pipe.unet.parameters())


def test_gradient_checkpointing_of_the_user_changes_nothing() -> None:
    pipe, kwargs = sd()
    want = controlled(pipe, kwargs, astar())
    pipe.unet.enable_gradient_checkpointing()
    assert torch.equal(controlled(pipe, kwargs, astar()), want)


def test_compiled_blocks_are_set_aside() -> None:
    pipe, kwargs = sd()
    want = controlled(pipe, kwargs, astar())
    pipe.unet.mid_block.compile(backend="eager")
    compiled = pipe.unet.mid_block._compiled_call_impl
    assert torch.equal(controlled(pipe, kwargs, astar()), want)
    assert pipe.unet.mid_block._compiled_call_impl is compiled


def test_batch_equals_stacked_singles() -> None:
    pipe, kwargs = sd(torch.float64, batch=2)
    prompts = [PROMPT, "the water and a bear"]
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    control = AStar(concepts=WORDS, sites=SITE)
    both = controlled(pipe, kwargs | {"prompt": prompts}, control, latents=noise)
    for i, prompt in enumerate(prompts):
        single = kwargs | {"prompt": prompt, "negative_prompt": "ugly"}
        one = controlled(pipe, single, control, latents=noise[i : i + 1])
        assert (both[i] - one[0]).norm() <= 1e-10 * one.norm()
    twice = controlled(
        pipe, kwargs | {"prompt": PROMPT, "negative_prompt": "ugly"}, control, num_images_per_prompt=2, latents=noise
    )
    assert (twice[0] - both[0]).norm() <= 1e-10 * both[0].norm()


def test_refinement_of_a_batch_equals_that_of_its_samples() -> None:
    pipe, kwargs = sd(torch.float64, batch=2)
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    control = AttendExcite(concepts=WORDS, sites=SITE, thresholds=((0.0, 0.4), (0.5, 0.6)), refine_steps=4)
    both = controlled(pipe, kwargs, control, latents=noise)
    for i in range(2):
        single = kwargs | {"prompt": PROMPT, "negative_prompt": "ugly"}
        one = controlled(pipe, single, control, latents=noise[i : i + 1])
        assert (both[i] - one[0]).norm() <= 1e-10 * one.norm()


# Together with others ----------------------------------------------------------------------------------------------


def test_pag_sees_the_moved_latents_and_does_not_act_in_the_guidance_forward() -> None:
    pipe, kwargs = sd(torch.float64)
    pag = PAG(scale=2.0, sites="mid")
    moved: list[Tensor] = []
    stepping = engine.LatentEngine.stepping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine.LatentEngine, "stepping", lambda self, s: moved.append(stepping(self, s)) or moved[-1]
        )  # what the scheduler goes on with
        with attnctl.control(pipe, pag, astar(stop=0.25)) as handle:
            both = pipes.run(pipe, kwargs, num_inference_steps=STEPS)
            assert handle.passes == STEPS
    # Guided in the first step alone: PAG on the moved noise does the rest.
    with attnctl.control(pipe, pag):
        alone = pipes.run(pipe, kwargs, num_inference_steps=STEPS, latents=moved[0])
    assert (both - alone).norm() <= 1e-12 * alone.norm()


@pytest.mark.parametrize(
    "name", ["sd_img2img", "sd_inpaint", "sd_inpaint9", "sd_controlnet", "animatediff", "flux_cfg", "wan", "pixart"]
)
def test_other_pipelines_are_guided(name: str) -> None:
    pipe, kwargs = pipes.build(name)
    plain = pipes.run(pipe, kwargs)
    words, sites = ((0, 2), "cross") if name in ("wan", "pixart") else ((1, 2), None)
    with attnctl.control(pipe, AStar(concepts=words, sites=sites)) as handle:
        out = pipes.run(pipe, kwargs)
        assert handle.guidance_forwards == (2 if name == "sd_img2img" else 3)
        assert "guidance forwards" in handle.report()
    assert out.isfinite().all()
    assert (out - plain).norm() > 1e-4 * plain.norm()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_a_bare_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="pass the pipeline"):
        attnctl.control(sd()[0].unet, astar())


def test_nan_in_a_map_is_an_error() -> None:
    pipe, kwargs = sd()
    with torch.no_grad():
        pipe.unet.get_submodule(SITE).to_q.weight[0, 0] = torch.nan
    with attnctl.control(pipe, astar()), pytest.raises(UnsupportedModelError, match="not a finite number"):
        pipes.run(pipe, kwargs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bear", "fox"), "'fox' is not in the prompt"),
        (("bear", 0), "start token"),
        (("bear", 70), "past the end"),
        (("bear", 99), "past the end"),
    ],
)
def test_words_must_be_in_the_prompt(words: Any, message: str) -> None:
    pipe, kwargs = sd()
    with attnctl.control(pipe, astar(concepts=words)), pytest.raises(ConfigError, match=message):
        pipes.run(pipe, kwargs)


def test_a_word_that_was_cut_off_is_an_error() -> None:
    pipe, kwargs = sd()
    kwargs["prompt"] = "a bear and " * 40 + "water"
    with attnctl.control(pipe, astar()), pytest.raises(ConfigError, match="cut off"):
        pipes.run(pipe, kwargs)


def test_embeddings_need_a_prompt_or_places() -> None:
    pipe, kwargs = sd()
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, True, "ugly")
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "height": 32, "width": 24}
    with attnctl.control(pipe, astar()), pytest.raises(ConfigError, match="prompt="):
        pipes.run(pipe, given)
    want = controlled(pipe, kwargs, astar())
    assert torch.equal(controlled(pipe, given, astar(prompt=PROMPT)), want)
    with attnctl.control(pipe, astar(prompt=(PROMPT, PROMPT))), pytest.raises(ConfigError, match="do not fit"):
        pipes.run(pipe, given)


def test_a_site_that_is_never_reached_is_an_error() -> None:
    pipe, kwargs = sd()
    block = pipe.unet.mid_block
    with attnctl.control(pipe, astar(sites="mid")):
        block.forward = lambda x, *args, **kwargs: x
        with pytest.raises(NeverApplied, match="mid_block"):
            pipes.run(pipe, kwargs)
    del block.forward


def test_a_model_without_text_attention_is_refused() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(SiteError, match="no cross- or joint attention"):
        attnctl.control(pipe, AStar(concepts=(1, 2)))


def test_a_family_without_published_layers_names_candidates() -> None:
    with pytest.raises(SiteError, match=r"Candidates: .*attn2"):
        attnctl.control(pipes.build("pixart")[0], AStar(concepts=(1, 2)))
