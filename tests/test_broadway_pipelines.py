"""BroadWay in whole pipelines: every AnimateDiff pipeline, windows of frames, other controls beside it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from broadway_reference import FRAMES, GRIDS, Official, build, free_noise
from contract import Replace, assert_clean, distance, snapshot
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.processors import PAG, BroadWay

pytestmark = pytest.mark.usefixtures("eight_frames")


def _controlled_calls(pipe: Any, kwargs: dict[str, Any], control: BroadWay, **options: Any) -> tuple[Tensor, list[int]]:
    """Run a pipeline and note on which step of the run a guided site was active."""
    steps: list[int] = []
    with attnctl.control(pipe, control) as handle:
        watched = handle._watched[0]
        own = watched.live[0][1]
        wrap, first = own.wrap, next(iter(own.guides))
        for name, wrappers in watched.base.items():
            watched.base[name] = [(c, lambda call, proceed: note(call, proceed)) for c, _ in wrappers]

        def note(call: AttnCall, proceed: Proceed) -> Tensor:
            if call.site.name == first:
                steps.append(call.state.step)
            return wrap(call, proceed)

        out = pipes.run(pipe, kwargs, **options)
    return out, steps


def _siblings(name: str) -> tuple[Any, dict[str, Any]]:
    """Build the other AnimateDiff pipelines around the zoo's."""
    pipe, kwargs = pipes.build("animatediff")
    parts = pipe.components
    video = [Image.new("RGB", (24, 32), (20 * i, 100, 50)) for i in range(FRAMES)]
    if name == "text2video":
        return pipe, kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "video2video":
            made = diffusers.AnimateDiffVideoToVideoPipeline(**parts)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("num_frames",)} | {"video": video, "strength": 0.8}
        else:
            unet, _ = zoo.build("sd15", 1)
            if name == "controlnet":
                net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
                made = diffusers.AnimateDiffControlNetPipeline(**parts, controlnet=net.eval())
                kwargs |= {"conditioning_frames": video}
            else:
                net = diffusers.SparseControlNetModel(
                    in_channels=4,
                    conditioning_channels=4,
                    block_out_channels=(16, 32, 32),
                    layers_per_block=1,
                    down_block_types=(
                        "CrossAttnDownBlockMotion",
                        "CrossAttnDownBlockMotion",
                        "DownBlockMotion",
                    ),
                    cross_attention_dim=32,
                    attention_head_dim=4,
                    norm_num_groups=8,
                    motion_num_attention_heads=4,
                    conditioning_embedding_out_channels=(8, 16),
                    use_simplified_condition_embedding=True,
                )
                made = diffusers.AnimateDiffSparseControlNetPipeline(**parts, controlnet=net.eval())
                kwargs |= {"conditioning_frames": video[:1], "controlnet_frame_indices": [0]}
    return pipes.quiet(made), kwargs


@pytest.mark.parametrize("name", ["text2video", "video2video", "controlnet", "sparsectrl"])
def test_every_animatediff_pipeline(name: str) -> None:
    pipe, kwargs = _siblings(name)
    before = snapshot(pipe.unet, pipe.scheduler)
    plain = pipes.run(pipe, kwargs, num_inference_steps=6)
    moved, steps = _controlled_calls(pipe, kwargs, BroadWay(stop=0.5), num_inference_steps=6)
    assert steps == ([0, 1, 2] if name != "video2video" else [0, 1])
    assert distance(moved, plain) > 1e-3
    assert_clean(before, pipe.unet, pipe.scheduler)
    assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=6), plain)


def test_free_init_begins_each_round_anew() -> None:
    pipe, kwargs = pipes.build("animatediff")
    pipe.enable_free_init(num_iters=2)
    _, steps = _controlled_calls(pipe, kwargs, BroadWay(stop=0.5), num_inference_steps=4)
    assert steps == [0, 1, 0, 1]


def test_windows_of_free_noise_take_references_of_their_own() -> None:
    pipe, kwargs = free_noise()
    kwargs |= {"num_frames": 16, "num_inference_steps": 2}
    setting = {"alpha": 0.6, "beta": 1.1}
    with attnctl.control(pipe, BroadWay(stop=0.5, **setting)) as handle:
        ours = pipes.run(pipe, kwargs)
        names = [s.name for s in handle.sites]
    oracle = Official(tuple(GRIDS), GRIDS, **setting)
    with attnctl.control(pipe, Replace(sites=names, function=oracle, stop=0.5)):
        theirs = pipes.run(pipe, kwargs)
    assert len(oracle.reference[".motion_modules.0.transformer_blocks.0.attn1"]) == 3
    assert distance(ours, theirs) < 1e-9


def test_with_pag_and_free_noise_in_one_run() -> None:
    pipe, kwargs = free_noise()
    kwargs |= {"num_frames": 12, "num_inference_steps": 3}
    controls = (BroadWay(stop=0.5), PAG(scale=2.0, sites="up_blocks.2.attentions.0"))
    results = []
    for replay in (True, False):
        with attnctl.control(pipe, *controls, replay=replay) as handle:
            results.append(pipes.run(pipe, kwargs))
            assert handle.passes == 3
    assert distance(results[0], results[1]) < 1e-10, "the perturbed pass may take the reference stage over"
    with attnctl.control(pipe, controls[0]):
        assert distance(pipes.run(pipe, kwargs), results[0]) > 1e-3
    with attnctl.control(pipe, controls[1]):
        assert distance(pipes.run(pipe, kwargs), results[0]) > 1e-3


def test_other_wrappers_behind_it_keep_their_say() -> None:
    model, inputs = build("animatediff", torch.float64)
    seen: list[str] = []

    def sharper(call: AttnCall, proceed: Proceed) -> Tensor:
        seen.append(call.site.name)
        return proceed(call.with_(q=1.5 * call.q))

    inner = Replace(sites="temporal", function=sharper)
    with attnctl.control(model, BroadWay(stop=1.0), inner, layout="uncond_first") as handle:
        nested = zoo.call(model, inputs)
        names = {s.name for s in handle.sites}
    assert set(seen) == names
    with attnctl.control(model, inner, BroadWay(stop=1.0), layout="uncond_first"):
        assert distance(zoo.call(model, inputs), nested) < 1e-11
