"""Guidance beside adapters, fused projections, backends, caches and foreign hooks is what its definition says."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import contract
import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, distance, snapshot
from naive_guidance import EXACT, LAYOUTS, build, naive, roots

import attnctl
from attnctl.errors import NeverApplied
from attnctl.processors import PAG

pytestmark = pytest.mark.usefixtures("no_grad")


# Adapters and fused projections


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "animatediff", "sd_controlnet"])
@pytest.mark.parametrize("sites", ["mid", "*attn1"])
def test_ip_adapter(recipe: str, sites: str) -> None:
    pipe, kwargs, _ = build(recipe)
    guidance = PAG(scale=2.0, sites=sites)
    plain = pipes.run(pipe, kwargs)
    clean = snapshot(*roots(pipe))
    handle = attnctl.control(pipe, guidance)
    guided = pipes.run(pipe, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = pipes.load_ip_adapter(pipe)  # replaces the processors under control
        under = pipes.run(pipe, kwargs | extra)
    loaded = snapshot(*roots(pipe))
    handle.detach()
    assert not any("Controlled" in str(type(p)) for p in pipe.unet.attn_processors.values())
    before = snapshot(*roots(pipe))
    assert before.keys() <= loaded.keys()
    with attnctl.control(pipe, guidance):
        after = pipes.run(pipe, kwargs | extra)
    assert_clean(before, *roots(pipe))
    assert distance(under, after) <= 1e-12
    assert distance(after, naive(pipe, kwargs | extra, guidance)) <= 1e-12
    handle = attnctl.control(pipe, guidance)
    pipes.run(pipe, kwargs | extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.unload_ip_adapter()
        assert distance(pipes.run(pipe, kwargs), guided) <= 1e-12
    handle.detach()
    assert not any("Controlled" in str(type(p)) for p in pipe.unet.attn_processors.values())
    assert distance(pipes.run(pipe, kwargs), plain) <= 1e-12
    assert clean.keys() >= {k for k in snapshot(*roots(pipe)) if "attnctl" in k}


def test_ip_adapter_loaded_or_unloaded_just_before_detach() -> None:
    pipe, kwargs, _ = build("sd")
    plain = pipes.run(pipe, kwargs)
    guidance = PAG(scale=2.0, sites="*attn1")
    for change in (pipes.load_ip_adapter, lambda pipe: pipe.unload_ip_adapter()):
        handle = attnctl.control(pipe, guidance)
        change(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle.detach()
        for processor in pipe.unet.attn_processors.values():
            assert "Controlled" not in type(processor).__name__
            assert not hasattr(processor, "_attnctl")
    assert distance(pipes.run(pipe, kwargs), plain) <= 1e-12


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_lora(recipe: str) -> None:
    pytest.importorskip("peft")
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
        pipe.load_lora_weights(pipes.lora_state(pipe))
        under = pipes.run(pipe, kwargs)
        pipe.unload_lora_weights()
        assert distance(pipes.run(pipe, kwargs), guided) <= 1e-12
    assert distance(pipes.run(pipe, kwargs), plain) <= 1e-12
    pipe.load_lora_weights(pipes.lora_state(pipe))
    with attnctl.control(pipe, guidance):
        assert distance(pipes.run(pipe, kwargs), under) <= EXACT[recipe]
    assert distance(under, guided) > 1e-3


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "sd3", "flux", "pixart", "cogvideox", "wan"])
def test_fused_projections(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    model: Any = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    classes = {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
    for order in ("fuse unfuse detach", "fuse detach unfuse"):
        handle = attnctl.control(pipe, guidance)
        for action in order.split():
            if action == "detach":
                handle.detach()
            else:
                getattr(model, f"{action}_qkv_projections")()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = pipes.run(pipe, kwargs)
            assert distance(result, guided if handle.attached else plain) <= 1e-12, (order, action)
        assert {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")} == classes
        assert not any(hasattr(m.processor, "_attnctl") for m in model.modules() if hasattr(m, "processor"))
    model.fuse_qkv_projections()
    with attnctl.control(pipe, guidance):
        assert distance(pipes.run(pipe, kwargs), guided) <= 1e-12


# Attention backends, caches, hooks of other tools


@pytest.fixture
def _keep_backend() -> Iterator[None]:
    """Give diffusers its attention backend back: set_attention_backend sets it for every model."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    held = registry._active_backend
    yield
    registry._active_backend = held


@pytest.mark.usefixtures("_keep_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
@pytest.mark.parametrize("recipe", ["flux", "wan"])
def test_attention_backends_do_not_hide_attention(recipe: str, backend: str) -> None:
    pipe, kwargs, guidance = build(recipe, torch.float32)
    model: Any = pipes.denoiser(pipe)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    model.set_attention_backend(backend)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance) as handle:
        assert distance(pipes.run(pipe, kwargs), guided) < 1e-4
        assert handle.passes == 3
        model.set_attention_backend(backend)  # under control
        assert distance(pipes.run(pipe, kwargs), guided) < 1e-4
    assert_clean(before, *roots(pipe))
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("threshold", [0.0, 1e6])  # never reuses a block; reuses them on every step after the first
@pytest.mark.parametrize("recipe", ["flux", "wan", "qwen"])
def test_first_block_cache_keeps_the_passes_apart(recipe: str, threshold: float) -> None:
    config = diffusers.FirstBlockCacheConfig(threshold=threshold)
    pipe, kwargs, guidance = build(recipe)
    guidance = PAG(scale=2.5, sites=guidance.sites, scope="all")
    model: Any = pipes.denoiser(pipe)
    by_hand = naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe], cache=config)
    model.enable_cache(config)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        assert handle.passes == 3
        assert torch.equal(guided, pipes.run(pipe, kwargs))
    assert distance(guided, by_hand) <= 1e-12
    assert distance(guided, plain) > 1e-3
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_a_cache_that_skips_attention_in_the_base_pass_is_an_error() -> None:
    pipe, kwargs, _ = build("flux")
    model: Any = pipes.denoiser(pipe)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e6))
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, contract.Through()), pytest.raises(NeverApplied, match="cache"):
        pipes.run(pipe, kwargs)
    model._reset_stateful_cache()  # what an aborted run left in the host's cache
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("order", ["hooks first", "control first"])
@pytest.mark.parametrize("recipe", ["sd", "flux"])
def test_accelerate_hooks(recipe: str, order: str) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe, kwargs, guidance = build(recipe)
    model = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    handle = None
    if order == "control first":
        handle = attnctl.control(pipe, guidance)
    add_hook_to_module(model, hook)
    if handle is None:
        handle = attnctl.control(pipe, guidance)
    assert torch.equal(pipes.run(pipe, kwargs), guided)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(pipes.run(pipe, kwargs), guided)
    handle.detach()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("recipe", ["sd", "flux"])
def test_cpu_offload_of_every_layer(recipe: str) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe, kwargs, guidance = build(recipe)
    model = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        before = snapshot(*roots(pipe))
        with attnctl.control(pipe, guidance) as handle:
            assert distance(pipes.run(pipe, kwargs), guided) <= 1e-12
            assert handle.passes == 3
        after = snapshot(*roots(pipe))
        assert before.keys() == after.keys()
    finally:
        remove_hook_from_module(model, recurse=True)
    model.to("cpu")
    del plain


def test_scheduler_swapped_under_control() -> None:
    pipe, kwargs, guidance = build("sd")
    first = pipe.scheduler
    others: list[Any] = [diffusers.DPMSolverMultistepScheduler, diffusers.EulerAncestralDiscreteScheduler]
    others += [None, diffusers.DDIMScheduler]  # None: another of the class that the pipeline holds
    with attnctl.control(pipe, dataclasses.replace(guidance, start=0.3)) as handle:
        pipes.run(pipe, kwargs)
        for other in others:
            pipe.scheduler = (other or type(pipe.scheduler)).from_config(pipe.scheduler.config)
            before = handle.passes
            guided = pipes.run(pipe, kwargs)
            assert handle.passes == before + 2
            plain = copy.copy(guided)
            handle.enabled = False
            assert not torch.equal(pipes.run(pipe, kwargs), plain)
            handle.enabled = True
            assert torch.equal(pipes.run(pipe, kwargs), guided)
        last = pipe.scheduler
        pipe.scheduler = type(last).from_config(last.config)  # and no run with it
    assert "_attnctl" not in {*vars(first), *vars(last), *vars(pipe.scheduler)}
    assert {type(first), type(last), type(pipe.scheduler)} == {diffusers.DDIMScheduler}
