"""Offloading and caches of hosts: guidance and maps are what their definitions say, or are refused in words."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from contract import Through, distance, snapshot
from naive_guidance import build, naive, roots

import attnctl
from attnctl.errors import NeverApplied, UnsupportedModelError
from attnctl.processors import PAG, AStar, Capture

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("recipe", ["sd3", "wan"])
def test_group_offloading(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    model: Any = pipes.denoiser(pipe)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance) as handle:
        assert distance(pipes.run(pipe, kwargs), guided) <= 1e-12
        assert handle.passes == 3
        assert "group offloading" in handle.report()
    assert before.keys() == snapshot(*roots(pipe)).keys()
    assert distance(pipes.run(pipe, kwargs), plain) <= 1e-12


def test_maps_and_latent_guidance_under_offloading() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe, kwargs, _ = build("sd")
    controls = Capture(words=("cat",)), AStar(concepts=("a", "cat"), step_size=5.0)
    found = []
    for offloaded in (False, True):
        if offloaded:
            cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        with attnctl.control(pipe, *controls) as handle:
            found.append((pipes.run(pipe, kwargs), handle.maps["cat"]))
    remove_hook_from_module(pipe.unet, recurse=True)
    for got, want in zip(found[1], found[0], strict=True):
        assert distance(got, want) <= 1e-12


def broadcast(pipe: Any, **options: Any) -> diffusers.PyramidAttentionBroadcastConfig:
    """Make a configuration that is in force at all timesteps."""
    ranges = {f"{kind}_attention_timestep_skip_range": (-1, 1001) for kind in ("spatial", "cross")}
    return diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500, **ranges | options)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("wan", {"spatial_attention_block_skip_range": 2}),
        ("wan", {"cross_attention_block_skip_range": 2}),  # not even where the guidance perturbs
        ("cogvideox", {"spatial_attention_block_skip_range": 3}),
    ],
)
def test_a_cache_that_passes_would_share_is_refused(recipe: str, options: dict[str, Any]) -> None:
    pipe, kwargs, guidance = build(recipe)
    model: Any = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    model.enable_cache(broadcast(pipe, **options))
    before = snapshot(*roots(pipe))
    with (
        attnctl.control(pipe, guidance),
        pytest.raises(UnsupportedModelError, match=r"PyramidAttentionBroadcastHook.*one state.*disable_cache\(\)"),
    ):
        pipes.run(pipe, kwargs)
    assert before.keys() == snapshot(*roots(pipe)).keys()
    model.disable_cache()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("kind", ["MagCacheConfig", "TaylorSeerCacheConfig"])
@pytest.mark.parametrize("recipe", ["flux", "wan"])
def test_other_caches_with_contexts_keep_the_passes_apart(recipe: str, kind: str) -> None:
    cls = getattr(diffusers, kind, None)
    if cls is None:
        pytest.skip(f"this host has no {kind}")
    options: dict[str, Any] = {
        "MagCacheConfig": {"num_inference_steps": 4, "mag_ratios": [1.0] * 4, "threshold": 10.0},
        "TaylorSeerCacheConfig": {"disable_cache_before_step": 2, "taylor_factors_dtype": torch.float64}
        | ({"cache_identifiers": [r"blocks\.\d+\.attn[12]"]} if recipe == "wan" else {}),
    }[kind]
    pipe, kwargs, guidance = build(recipe)
    kwargs |= {"num_inference_steps": 4}
    guidance = PAG(scale=2.5, sites=guidance.sites, scope="all")
    layout = "sequential" if recipe == "wan" else "cond"
    by_hand = naive(pipe, kwargs, guidance, layout=layout, cache=cls(**options))
    model: Any = pipes.denoiser(pipe)
    everywhere = pipes.run(pipe, kwargs)
    model.enable_cache(cls(**options))
    plain = pipes.run(pipe, kwargs)
    assert not torch.equal(plain, everywhere)  # the cache does something
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 4
    assert distance(guided, by_hand) <= 1e-12
    assert distance(guided, plain) > 1e-3
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_latent_guidance_does_not_read_a_shared_cache() -> None:
    pipe, kwargs, _ = build("cogvideox")
    pipe.transformer.enable_cache(broadcast(pipe, spatial_attention_block_skip_range=2))
    with (
        attnctl.control(pipe, AStar(concepts=(1, 2), sites="transformer_blocks.1")),
        pytest.raises(UnsupportedModelError, match="one state for all passes"),
    ):
        pipes.run(pipe, kwargs)


def test_an_inactive_control_leaves_a_shared_cache_alone() -> None:
    pipe, kwargs, guidance = build("cogvideox")
    pipe.transformer.enable_cache(broadcast(pipe, spatial_attention_block_skip_range=2))
    cached = pipes.run(pipe, kwargs)
    pipe.transformer._reset_stateful_cache()
    off = PAG(sites=guidance.sites, scale=0.0)
    with attnctl.control(pipe, off, Through(start=1.0)):
        assert torch.equal(pipes.run(pipe, kwargs), cached)


def test_maps_that_a_cache_would_skip_are_an_error() -> None:
    pipe, kwargs, _ = build("cogvideox")
    pipe.transformer.enable_cache(broadcast(pipe, spatial_attention_block_skip_range=2))
    with attnctl.control(pipe, Capture(words=(1,))), pytest.raises(NeverApplied, match="cache"):
        pipes.run(pipe, kwargs)


def test_a_cache_that_drops_the_negative_prompt_is_refused() -> None:
    pipe, kwargs, guidance = build("cogvideox", torch.float32)
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_identifiers=("transformer_blocks",),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: 500,
    )
    pipe.transformer.enable_cache(config)
    for control in (Through(), Capture(words=(1,)), guidance):
        with attnctl.control(pipe, control), pytest.raises(UnsupportedModelError, match="FasterCache"):
            pipes.run(pipe, kwargs)
        pipe.transformer._reset_stateful_cache()
