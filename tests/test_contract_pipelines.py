"""The contract of whole, unmodified pipelines: guidance is what its definition says, whatever else the pipeline does,
and nothing is left behind, whatever goes wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract
import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, distance, guidances, snapshot
from torch import Tensor, nn

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.errors import AttnctlError, NeverApplied, UnsupportedModelError
from attnctl.processors import PAG, SoftPAG

PLAIN = tuple(n for n in pipes.NAMES if n not in pipes.PAG_TWINS.values())
SEQUENTIAL = {"flux_cfg", "qwen", "wan"}
LAYOUTS = dict.fromkeys(PLAIN, "uncond_first") | dict.fromkeys(SEQUENTIAL, "sequential") | {"flux": "cond"}
EXACT = dict.fromkeys(PLAIN, 1e-12) | {"sana": 1e-5, "ltx": 1e-5}  # these two compute partly in float32
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
# diffusers' PAG pipelines perturb these by default; SD3's and PixArt's patterns also hit blocks.10 and beyond.
TWIN_SITES = {"sd": "mid", "sdxl": "mid", "sd3": "transformer_blocks.1.attn", "pixart": "transformer_blocks.1.attn1"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(recipe: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Any, dict[str, Any], PAG | SoftPAG]:
    """Build a pipeline, its call, and a PAG at one of its middle sites."""
    pipe, kwargs = pipes.build(recipe, dtype, batch)
    return pipe, kwargs, guidances(pipes.denoiser(pipe))["PAG"]


def roots(pipe: Any) -> list[Any]:
    """List what a control may touch."""
    return [*(c for c in pipe.components.values() if isinstance(c, nn.Module)), pipe.scheduler]


def naive(
    pipe: Any,
    kwargs: dict[str, Any],
    *controls: PAG | SoftPAG,
    layout: str = "uncond_first",
    weight: Callable[[int], float] = lambda step: 1.0,
    cache: Any = None,
    **overrides: Any,
) -> Tensor:
    """Run a pipeline under guidance computed by hand: a second model with perturbed attention beside the first.

    The perturbed model sees every row of every call; the rows' meaning is told by `layout`, not found out.
    """
    model: Any = pipes.denoiser(pipe)
    twins: list[tuple[float, Any]] = []
    for c in controls:
        twin = copy.deepcopy(model)
        sites = c.resolve(attnctl.find_sites(twin), family_of(twin))
        wrap = c.branch(sites, twin).perturb
        assert wrap is not None
        if cache is None:
            attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")
        else:  # a control refuses caches that skip its site; processors do not mind
            for key, processor in attnctl.attn_processors(twin, c).items():
                twin.get_submodule(key.removesuffix(".processor")).processor = processor
            twin.enable_cache(cache)
        twins.append((c.scale, twin))
    calls, memory = 0, []

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal calls
        pred = output[0]
        step = calls // 2 if layout == "sequential" else calls
        calls += 1
        if layout == "sequential" and calls % 2 == 0:
            pred = pred + memory.pop()
        else:
            half = pred.shape[0] // 2 if layout == "uncond_first" else 0
            delta = torch.zeros_like(pred[half:])
            for scale, twin in twins:
                with twin.cache_context("perturbed") if cache else contextlib.nullcontext():
                    p = twin(*args, **given)[0]
                delta = delta + weight(step) * scale * (pred - p)[half:]
            memory[:] = [delta]
            pred = pred + (torch.cat([delta, delta]) if half else delta)
        return (pred, *output[1:]) if isinstance(output, tuple) else type(output)(sample=pred)

    hook = model.register_forward_hook(guide, with_kwargs=True)
    if cache is not None:
        model.enable_cache(cache)
    try:
        return pipes.run(pipe, kwargs, **overrides)
    finally:
        hook.remove()
        if cache is not None:
            model.disable_cache()


@pytest.mark.parametrize("recipe", PLAIN)
def test_guided_run_is_exact_and_leaves_no_trace(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        steps = handle._watched[0].state.step
        assert handle.passes == steps > 0
        assert torch.equal(guided, pipes.run(pipe, kwargs))
        handle.enabled = False
        assert torch.equal(plain, pipes.run(pipe, kwargs))
        assert handle.passes == 2 * steps
    assert_clean(before, *roots(pipe))
    assert torch.equal(plain, pipes.run(pipe, kwargs))
    assert distance(guided, plain) > 1e-3
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "sd3", "pixart", "flux", "wan", "animatediff", "qwen"])
def test_soft_heads_in_two_layers(recipe: str) -> None:
    pipe, kwargs, _ = build(recipe)
    guidance = guidances(pipes.denoiser(pipe))["SoftPAG"]
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


# Against diffusers' own PAG pipelines


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("recipe", pipes.PAG_TWINS)
def test_equal_to_diffusers_pag(recipe: str, cfg: float) -> None:
    pipe, kwargs = pipes.build(recipe, torch.float64)
    kwargs |= {"guidance_scale": cfg}
    twin = pipes.run(pipes.pag_twin(pipe), kwargs | {"pag_scale": 3.0})
    with attnctl.control(pipe, PAG(scale=3.0, sites=TWIN_SITES[recipe])):
        ours = pipes.run(pipe, kwargs)
    assert distance(ours, twin) <= 1e-12
    assert distance(ours, pipes.run(pipe, kwargs)) > 1e-3


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("recipe", ["sd", "sdxl"])
def test_guidance_rescale_leaves_the_added_guidance_alone(recipe: str, rescale: float) -> None:
    # Rescale measures the prompt's prediction: it must see c, not c + d, and u must carry d alone.
    pipe, kwargs = pipes.build(recipe, torch.float64)
    pipe.scheduler = diffusers.DDIMScheduler(**DDIM)
    kwargs |= {"guidance_scale": 5.0, "guidance_rescale": rescale}
    twin = pipes.run(pipes.pag_twin(pipe), kwargs | {"pag_scale": 3.0})
    for combine in ("auto", "rescale_safe"):
        with attnctl.control(pipe, PAG(scale=3.0, sites="mid", combine=combine)):
            assert distance(pipes.run(pipe, kwargs), twin) <= 1e-12
    with attnctl.control(pipe, PAG(scale=3.0, sites="mid", combine="add")):
        assert (distance(pipes.run(pipe, kwargs), twin) <= 1e-12) == (rescale == 0)


# Rows


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(
    ("recipe", "images"),
    [
        *(("sd", 1), ("sd", 2), ("sdxl", 2), ("pixart", 2), ("sd_inpaint9", 2), ("sd_controlnet", 2)),
        *(("sd3", 1), ("animatediff", 1)),  # these two hosts take one image for a prompt given as an embedding
    ],
)
def test_batches_of_prompts(recipe: str, images: int, cfg: float) -> None:
    pipe, kwargs, guidance = build(recipe, batch=2)
    kwargs |= {"guidance_scale": cfg} | ({"num_images_per_prompt": images} if images > 1 else {})
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs, num_inference_steps=2)
        rows = handle._watched[0].state.rows
    assert rows.prompts == 2 * images
    assert rows.role == ("both" if cfg > 1 else "all")
    layout = "uncond_first" if cfg > 1 else "cond"
    assert distance(guided, naive(pipe, kwargs, guidance, layout=layout, num_inference_steps=2)) <= EXACT[recipe]


@pytest.mark.parametrize("recipe", ["flux", "flux_cfg", "qwen", "wan"])
def test_batches_of_prompts_in_other_layouts(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe, batch=2)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    assert distance(guided, naive(pipe, kwargs, guidance, layout=LAYOUTS[recipe])) <= EXACT[recipe]


def test_two_images_from_equal_latents_are_not_taken_for_a_negative_prompt() -> None:
    pipe, kwargs, guidance = build("flux", batch=2)
    latents = zoo.Draw(1, 3).rows(8 * 6, 16).double().repeat(2, 1, 1)
    plain = pipes.run(pipe, kwargs, latents=latents)
    with (
        attnctl.control(pipe, guidance),
        pytest.raises(UnsupportedModelError, match=r'two images.*layout="cond"'),
    ):
        pipes.run(pipe, kwargs, latents=latents)
    with attnctl.control(pipe, guidance, layout="cond"):
        guided = pipes.run(pipe, kwargs, latents=latents)
    assert distance(guided, naive(pipe, kwargs, guidance, layout="cond", latents=latents)) <= 1e-12
    assert torch.equal(plain, pipes.run(pipe, kwargs, latents=latents))
    sd, kwargs, guidance = build("sd", batch=2)  # says itself that there is no guidance
    latents = zoo.Draw(1, 3).rows(4, 16, 12).double().repeat(2, 1, 1, 1)
    with attnctl.control(sd, guidance):
        guided = pipes.run(sd, kwargs, latents=latents, guidance_scale=1.0)
    reference = naive(sd, kwargs, guidance, layout="cond", latents=latents, guidance_scale=1.0)
    assert distance(guided, reference) <= 1e-12


def count_rows(pipe: Any, run: Callable[[], Any]) -> list[int]:
    """Count the rows of every pass through a denoiser, guidance passes included."""
    model = pipes.denoiser(pipe)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    rows: list[int] = []
    last = attnctl.find_sites(model)[-1].module
    hook = last.register_forward_pre_hook(
        lambda m, a, k: rows.append((a or [*k.values()])[0].shape[0]), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    assert first is not None
    return rows


@pytest.mark.parametrize("recipe", ["sd", "sd3", "wan"])
def test_rows_computed_are_the_rows_planned(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    steps = 4
    plain = count_rows(pipe, lambda: pipes.run(pipe, kwargs, num_inference_steps=steps))
    base = sum(plain)
    plans: list[tuple[dict[str, Any], int]] = [
        ({}, steps),
        ({"scale": 0.0}, 0),
        ({"start": 0.5}, 2),
        ({"stop": 0.25}, 1),
        ({"start": 0.25, "stop": 0.75}, 2),
        ({"start": 0.3, "stop": 0.45}, 0),
        ({"every": 2}, 2),
        ({"every": 3}, 2),
        ({"adaptive": 1.0, "adaptive_form": "timestep"}, 0),
        ({"adaptive": 1.0}, 0),
    ]
    for change, expected in plans:
        changed = dataclasses.replace(guidance, **change)
        with attnctl.control(pipe, changed) as handle:
            rows = count_rows(pipe, lambda: pipes.run(pipe, kwargs, num_inference_steps=steps))
            first_step = change.get("adaptive") is not None and recipe != "sd"  # flow matching begins at t = 1000
            assert sum(rows) == base + expected + first_step, change
            assert handle.passes == expected + first_step


@pytest.mark.parametrize("recipe", ["sd", "wan"])
def test_weight_zero_is_the_plain_run(recipe: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    for change in ({"scale": 0.0}, {"start": 0.4, "stop": 0.6}):
        with attnctl.control(pipe, dataclasses.replace(guidance, **change)) as handle:
            assert torch.equal(pipes.run(pipe, kwargs), plain)
            assert handle.passes == 0


def test_window_counts_the_steps_that_run() -> None:
    pipe, kwargs, guidance = build("sd_img2img")
    call = {"num_inference_steps": 10, "strength": 0.5}  # the last five of ten timesteps
    windowed = dataclasses.replace(guidance, start=0.4, stop=0.8)
    with attnctl.control(pipe, windowed) as handle:
        guided = pipes.run(pipe, kwargs, **call)
        assert handle.passes == 2
    by_hand = naive(pipe, kwargs, guidance, weight=lambda step: float(step in (2, 3)), **call)
    assert distance(guided, by_hand) <= 1e-12
    adaptive = dataclasses.replace(guidance, adaptive=0.5)
    times = pipe.scheduler.timesteps[5:].tolist()
    assert len(times) == 5
    with attnctl.control(pipe, adaptive):
        guided = pipes.run(pipe, kwargs, **call)
    by_hand = naive(pipe, kwargs, guidance, weight=lambda i: max(0.0, 1 - 0.5**4 * (1000 - times[i])), **call)
    assert distance(guided, by_hand) <= 1e-12


def test_every_reuses_the_last_difference() -> None:
    pipe, kwargs, guidance = build("sd")
    unet, held, calls = pipe.unet, [], 0
    twin = copy.deepcopy(unet)
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    replace = Replace(sites=[s.name for s in sites], function=guidance.branch(sites, twin).perturb)
    attnctl.control(twin, replace, layout="cond")

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal calls
        if calls % 2 == 0:
            held[:] = [guidance.scale * (output[0] - twin(*args, **given)[0])[1:]]
        calls += 1
        return (output[0] + held[0],)

    hook = unet.register_forward_hook(guide, with_kwargs=True)
    by_hand = pipes.run(pipe, kwargs, num_inference_steps=5)
    hook.remove()
    with attnctl.control(pipe, dataclasses.replace(guidance, every=2)) as handle:
        guided = pipes.run(pipe, kwargs, num_inference_steps=5)
        assert handle.passes == 3
        assert torch.equal(guided, pipes.run(pipe, kwargs, num_inference_steps=5))
        assert handle.passes == 6
    assert distance(guided, by_hand) <= 1e-12


# Several controls


def test_two_controls_add_up_and_equal_ones_share_a_pass() -> None:
    pipe, kwargs, guidance = build("sd")
    soft = SoftPAG(scale=1.5, u=0.5, heads=[("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 1)])
    with attnctl.control(pipe, guidance, soft) as handle:
        both = pipes.run(pipe, kwargs)
        assert handle.passes == 6
    assert distance(both, naive(pipe, kwargs, guidance, soft)) <= 1e-12
    parts = [dataclasses.replace(guidance, scale=s) for s in (1.0, 1.5)]
    with attnctl.control(pipe, *parts) as handle:
        shared = pipes.run(pipe, kwargs)
        assert handle.passes == 3
    assert distance(shared, naive(pipe, kwargs, guidance)) <= 1e-12
    windows = [dataclasses.replace(guidance, stop=0.5), dataclasses.replace(guidance, start=0.5)]
    with attnctl.control(pipe, *windows) as handle:
        assert distance(pipes.run(pipe, kwargs), shared) <= 1e-12
        assert handle.passes == 3


def test_switching_off_and_on_between_calls() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance) as handle:
        guided = pipes.run(pipe, kwargs)
        for enabled in (False, True, True, False, False, True):
            handle.enabled = enabled
            assert torch.equal(pipes.run(pipe, kwargs), guided if enabled else plain)


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


# What goes wrong


class Boom(RuntimeError):
    """What a test raises."""


@pytest.mark.parametrize("recipe", ["sd", "sd3", "flux", "wan"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_exception_at_any_step(recipe: str, error: type[BaseException]) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    for k in range(3):

        def stop(pipe: Any, step: int, time: Any, values: dict[str, Any], k: int = k) -> dict[str, Any]:
            if step == k:
                raise error
            return values

        with pytest.raises(error), attnctl.control(pipe, guidance):
            pipes.run(pipe, kwargs, callback_on_step_end=stop)
        assert_clean(before, *roots(pipe))
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        handle = attnctl.control(pipe, guidance)
        with pytest.raises(error):
            pipes.run(pipe, kwargs, callback_on_step_end=stop)
        assert torch.equal(pipes.run(pipe, kwargs), guided)  # the next run starts afresh
        handle.detach()
        assert_clean(before, *roots(pipe))


@pytest.mark.parametrize("where", ["base", "perturbed"])
@pytest.mark.parametrize("recipe", ["sd", "flux", "wan"])
def test_an_exception_inside_the_denoiser(recipe: str, where: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    model = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    handle = attnctl.control(pipe, guidance)
    last = attnctl.find_sites(model)[-1].module
    for k in range(3):
        calls = 0

        def fail(*_: Any, k: int = k, handle: attnctl.Handle = handle) -> None:
            nonlocal calls
            if (handle._watched[0].state.phase != "base") == (where == "perturbed"):
                calls += 1
                if calls == k + 1:
                    raise Boom

        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(Boom):
            pipes.run(pipe, kwargs)
        hook.remove()
        assert torch.equal(pipes.run(pipe, kwargs), guided)
        handle.detach()
        assert_clean(before, *roots(pipe))
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        handle = attnctl.control(pipe, guidance)
    handle.detach()


def test_a_lost_handle_and_a_lost_pipeline() -> None:
    pipe, kwargs, guidance = build("sd", torch.float32)
    plain = pipes.run(pipe, kwargs)
    attnctl.control(pipe, guidance)  # the handle is not kept
    assert not torch.equal(pipes.run(pipe, kwargs), plain)
    found = attnctl.handle_of(pipe)
    assert found is not None
    assert attnctl.handle_of(pipe.unet) is found
    found.detach()
    assert attnctl.handle_of(pipe) is None
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    handle = attnctl.control(pipe, guidance)
    pipes.run(pipe, kwargs)
    dead = [weakref.ref(x) for x in (pipe, pipe.unet, pipe.scheduler, handle)]
    del pipe, handle, found
    gc.collect()
    assert [ref() for ref in dead] == [None] * 4


def test_saved_under_control_is_saved_clean(tmp_path: Path) -> None:
    pipe, kwargs, guidance = build("sd", torch.float32)
    plain = pipes.run(pipe, kwargs)
    pipe.save_pretrained(tmp_path / "plain")
    with attnctl.control(pipe, guidance):
        pipes.run(pipe, kwargs)
        pipe.save_pretrained(tmp_path / "controlled")
    for file in sorted((tmp_path / "plain").rglob("*")):
        if file.is_file():
            other = tmp_path / "controlled" / file.relative_to(tmp_path / "plain")
            if file.suffix == ".json":
                first, second = json.loads(file.read_text()), json.loads(other.read_text())
                assert first == second, file
            else:
                assert file.read_bytes() == other.read_bytes(), file
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "controlled", safety_checker=None)
    assert torch.equal(pipes.run(pipes.quiet(again), kwargs), plain)


def test_a_copy_of_a_controlled_pipeline_is_plain() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
        twin = copy.deepcopy(pipe.unet)
        inputs = zoo.build("sd15", dtype=torch.float64)[1]
        assert attnctl.handle_of(twin) is None
        twin(**inputs)
        assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert torch.equal(zoo.call(twin, inputs), zoo.call(pipe.unet, inputs))


def test_pipelines_that_share_components() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    other = pipes.quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe, torch_dtype=torch.float64))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
        assert torch.equal(pipes.run(other, kwargs), guided)
        with pytest.raises(AttnctlError, match="under control already"):
            attnctl.control(other, guidance)
        assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert torch.equal(pipes.run(other, kwargs), plain)
