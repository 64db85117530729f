"""NAG against its formula written out by hand, against the authors' outputs, and in pipelines with and without CFG."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines
from contract import Precise, assert_clean, run, snapshot
from naive_nag import doubled, naive_guidance, naive_nag, naive_nag_by_keys, naive_nag_by_turns
from safetensors.torch import load_file

import attnctl
from attnctl.core.hosts.ghost import negative_arguments, text_arguments
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors import NAG, PAG, SoftPAG
from attnctl.processors.nag import normalized_guidance
from attnctl.shapes.load import load_shapes

FIXTURES = Path(__file__).parent / "fixtures" / "nag"
SETTING = {"scale": 3.0, "tau": 2.0, "alpha": 0.4}
SAMPLE = (
    *(
        "sd15",
        "sdxl",
        "sd3",
        "sd35",
        "flux",
        "flux2",
        "qwen",
        "zimage",
        "cogvideox",
        "cogvideox_rope",
        "wan",
        "wan_i2v",
    ),
    *("ltx", "hunyuanvideo", "chroma", "sana", "pixart"),
)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.norm())


def two_texts(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, dict[str, Any]]:
    """Build a model, a call of it, and what another text changes in the call."""
    model, inputs = zoo.build(name, dtype=dtype)
    return model, inputs, text_arguments(zoo.build(name, dtype=dtype, seed=1)[1], inputs)


def test_formula_and_its_bound() -> None:
    g = torch.Generator().manual_seed(0)
    p, n = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    out = normalized_guidance(p, n, 2.0, 1.5, 0.5)
    assert (out - naive_guidance(p, n, 2.0, 1.5, 0.5)).abs().max() < 1e-12
    bound = (0.5 * 1.5 + 0.5) * p.abs().sum((1, 3))
    assert (out.abs().sum((1, 3)) <= bound + 1e-12).all()
    assert normalized_guidance(p.half(), n.half(), 2.0, 1.5, 0.5).dtype == torch.float16
    square = normalized_guidance(p, n, 2.0, 1.5, 0.5, 2)
    assert (square - naive_guidance(p, n, 2.0, 1.5, 0.5, 2)).abs().max() < 1e-12
    assert (square.norm(dim=(1, 3)) <= (0.5 * 1.5 + 0.5) * p.norm(dim=(1, 3)) + 1e-12).all()
    assert distance(square, out) > 1e-3


@pytest.mark.parametrize("name", SAMPLE)
def test_every_kind_of_attention_against_the_formula(name: str) -> None:
    model, inputs, other = two_texts(name)
    kind = "cross" if any(s.kind == "cross" for s in attnctl.find_sites(model)) else "joint"
    expected = naive_nag(model, inputs, {**inputs, **other}, kind, **SETTING)
    before = snapshot(model)
    assert distance(run(model, inputs, NAG(**SETTING, negative_embeds=other)), expected) < 1e-12
    # The same with the negative prompt's rows in the batch, whose own prediction stays as it is.
    batch = doubled({**inputs, **other}, inputs)
    guided = run(model, batch, NAG(**SETTING), layout="uncond_first")
    half = len(guided) // 2
    assert distance(guided[half:], expected) < 1e-12
    with torch.no_grad():
        assert distance(guided[:half], zoo.call(model, {**inputs, **other})) < 1e-12
        plain = zoo.call(model, inputs)
    assert torch.equal(run(model, inputs, NAG(scale=0.0, negative_embeds=other)), plain)
    with pytest.warns(UserWarning, match="equals the prompt"):
        assert torch.equal(run(model, inputs, NAG(negative_embeds={k: inputs[k] for k in other})), plain)
    assert_clean(before, model)


# Tiny models of which the formula written out says nothing.
OUTSIDE = {
    "mochi": "its text is pooled into the time embedding, so that its image's keys are another prompt's too",
    "stable_audio3": "its attention is the difference of two",
    **dict.fromkeys(("dit", "unet2d", "kandinsky6_sr", "minimax_music3", "prior"), "no text is attended to"),
    "anyflow_far": "its attention cannot be intercepted",
}


@pytest.mark.parametrize("name", [n for n in zoo.EVERY if n not in OUTSIDE])
def test_every_host_against_the_formula(name: str, precise: Precise) -> None:
    model, inputs = precise(name)
    other = text_arguments(precise(name, seed=1)[1], inputs)
    other = {k: v for k, v in other.items() if k in inputs}
    cross = any(s.kind == "cross" for s in attnctl.find_sites(model))
    reference = naive_nag_by_keys if cross else naive_nag_by_turns
    with torch.no_grad():
        expected = reference(model, inputs, {**inputs, **other}, **SETTING)
        out = run(model, inputs, NAG(**SETTING, negative_embeds=other))
        assert distance(out, expected) < 1e-12
        assert distance(out, zoo.call(model, inputs)) > 1e-4


def test_as_many_frames_as_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 4)
    model, inputs, other = two_texts("cogvideox")
    expected = naive_nag(model, inputs, {**inputs, **other}, "joint", **SETTING)
    assert distance(run(model, inputs, NAG(**SETTING, negative_embeds=other)), expected) < 1e-12


@pytest.mark.parametrize("form", ["stream", "rows"])
def test_texts_of_other_lengths_and_masks(form: str) -> None:
    model, inputs, _ = two_texts("qwen")
    text = torch.randn(2, 11, inputs["encoder_hidden_states"].shape[-1], dtype=torch.float64)
    mask = torch.arange(11)[None] < torch.tensor([[5], [9]])
    other = {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
    out = run(model, inputs, NAG(**SETTING, negative_embeds=other, form=form))
    # Both texts padded to one length, with masks, in the rows of one batch.
    full = torch.ones(2, 11, dtype=torch.bool)
    full[:, 7:] = False
    had = inputs.get("encoder_hidden_states_mask")
    full[:, :7] = True if had is None else had
    padded = torch.nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, 4))
    positive = {**inputs, "encoder_hidden_states": padded, "encoder_hidden_states_mask": full}
    expected = naive_nag(model, positive, {**positive, **other}, "joint", **SETTING)
    assert distance(out, expected) < 1e-12


@pytest.mark.parametrize(
    ("folder", "host"),
    [
        ("nag_flux", "FluxTransformer2DModel"),
        ("nag_sd35", "SD3Transformer2DModel"),
        ("nag_unet", "UNet2DConditionModel"),
        ("nag_wan_i2v", "WanTransformer3DModel"),
    ],
)
def test_authors_outputs(folder: str, host: str) -> None:
    model, cases, stored, given, base = recorded(folder, host)
    for case in cases:
        if folder == "nag_flux" and case["pooled"] == "own" and case["name"] != "off":
            continue  # image norms that follow the negative prompt's pooled embedding: see the next test
        inputs, layout, other = dict(base), "cond", {"encoder_hidden_states": given["negative"]}
        if case.get("pooled") == "own" and not case.get("cfg"):
            other["pooled_projections"] = given["pooled_negative"]
        if case.get("cfg"):
            layout = "uncond_first"
            negative = inputs | {"encoder_hidden_states": given["uncond"]}
            negative |= {"pooled_projections": given["pooled_uncond"]} if "pooled_uncond" in given else {}
            inputs = doubled(negative, inputs)
        control = NAG(scale=case["scale"] - 1, tau=case["tau"], alpha=case["alpha"], negative_embeds=other)
        out = run(model, inputs, control, layout=layout)
        assert distance(out, stored[f"output.{case['name']}"]) < 2e-7, case["name"]


def recorded(folder: str, host: str) -> tuple[Any, list[dict[str, Any]], Any, Any, dict[str, Any]]:
    """Load a recording of the authors' code: the model, its cases, what is stored, the inputs, and those of a call."""
    about = json.loads((FIXTURES / folder / "cases.json").read_text())
    stored = load_file(FIXTURES / folder / "cases.safetensors")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
    model = getattr(diffusers, host)(**config).double().eval()
    model.load_state_dict(load_file(FIXTURES / folder / "weights.safetensors"), strict=False)
    given = {k.removeprefix("input."): v for k, v in stored.items() if k.startswith("input.")}
    names = ("hidden_states", "sample", "timestep", "guidance", "img_ids", "txt_ids")
    base = {n: given[n] for n in names if n in given} | {"encoder_hidden_states": given["positive"]}
    base |= {"encoder_hidden_states_image": given["image"]} if "image" in given else {}
    base |= {"pooled_projections": given["pooled"]} if "pooled" in given else {}
    return model, about["cases"], stored, given, base


def test_authors_flux_in_both_norms() -> None:
    """Their two files for FLUX, L2 and then L1, in rows: the image's double blocks see the prompt's pooled embedding,
    its single blocks that of each row."""
    model, cases, stored, given, base = recorded("nag_flux", "FluxTransformer2DModel")

    def prompts_own(module: Any, args: Any, kwargs: Any) -> Any:
        half = kwargs["emb"].shape[0] // 2
        return args, kwargs | {"emb": kwargs["emb"][:half].repeat(2, 1)}

    for case in cases:
        own = case["pooled"] == "own"
        negative = base | {"encoder_hidden_states": given["negative"]}
        negative |= {"pooled_projections": given["pooled_negative"]} if own else {}
        hooks = [b.norm1.register_forward_pre_hook(prompts_own, with_kwargs=True) for b in model.transformer_blocks]
        setting = {"scale": case["scale"] - 1, "tau": case["tau"], "alpha": case["alpha"]}
        outs = {n: naive_nag(model, base, negative, "joint", **setting, norm=n) for n in (1, 2)}
        for hook in hooks:
            hook.remove()
        expected = stored[f"output.{case['name']}"]
        assert distance(outs[case["norm"]], expected) < 2e-7, case["name"]
        if case["name"] == "l1_tight":  # elsewhere tau bounds hardly a token, and the norms agree
            assert distance(outs[2], expected) > 1e-3
        if case["name"] == "off":
            continue
        # The control computes the same rows' formula in either norm, where the pooled embedding is the prompt's.
        other = {"encoder_hidden_states": given["negative"]}
        control = NAG(**setting, norm=case["norm"], negative_embeds=other)
        rows = naive_nag(model, base, base | other, "joint", **setting, norm=case["norm"])
        assert distance(run(model, base, control), rows) < 1e-12, case["name"]


def latents(pipe: Any, negative: str | None, guidance_scale: float = 1.0, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": guidance_scale} | options
    prompt = {} if "prompt_embeds" in options else {"prompt": "a red circle"}
    out: torch.Tensor = pipe(**prompt, negative_prompt=negative, generator=generator, **options).images
    return out


@pytest.fixture(scope="module", params=["mmdit", "text2image"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return zoo_pipelines.quiet(load_shapes(request.param))


def test_pipelines_without_guidance_encode_the_negative_prompt_themselves(pipe: Any) -> None:
    plain = latents(pipe, "blue square")
    state, before = torch.random.get_rng_state(), snapshot(pipe.scheduler)
    with attnctl.control(pipe, NAG()) as handle:
        guided = latents(pipe, "blue square")
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(latents(pipe, "blue square"), guided)
        green = latents(pipe, "green square")
        if handle.sites[0].kind == "cross":  # keys are recorded once per run
            assert handle._watched[0].live[0][1].recordings == 3
    assert distance(guided, plain) > 1e-3 < distance(guided, green)
    with attnctl.control(pipe, NAG(negative_prompt="green square")):
        assert torch.equal(latents(pipe, None), green)
    with attnctl.control(pipe, NAG(start=0.4, stop=0.4)):
        assert torch.equal(latents(pipe, "blue square"), plain)
    assert_clean(before, pipe.scheduler)
    assert torch.equal(latents(pipe, "blue square"), plain)


def test_embeddings_in_place_of_texts(pipe: Any) -> None:
    with torch.no_grad():
        if "StableDiffusion3" in type(pipe).__name__:
            texts = [pipe.encode_prompt(t, t, t) for t in ("a red circle", "blue square")]
            positive, negative = ({"prompt_embeds": t[0], "pooled_prompt_embeds": t[2]} for t in texts)
        else:
            texts = [pipe.encode_prompt(t, "cpu", 1, False) for t in ("a red circle", "blue square")]
            positive, negative = ({"prompt_embeds": t[0]} for t in texts)
    with attnctl.control(pipe, NAG()):
        expected = latents(pipe, "blue square")
    names = {f"negative_{n}": v for n, v in negative.items()}
    bare = copy.copy(pipe)
    bare.text_encoder = bare.text_encoder_2 = bare.text_encoder_3 = None
    with attnctl.control(bare, NAG()):
        assert torch.equal(latents(bare, None, **positive, **names), expected)
    with attnctl.control(bare, NAG(negative_embeds=negative)):
        assert torch.equal(latents(bare, None, **positive), expected)
    with attnctl.control(bare, NAG(negative_prompt="blue square")), pytest.raises(ConfigError, match="pass embeddings"):
        latents(bare, None, **positive)


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_a_negative_prompt_for_a_further_encoder_alone(name: str) -> None:
    pipe, _ = zoo_pipelines.build(name)
    made = negative_arguments(pipe, {"prompt": ["a cat", "a dog"], "negative_prompt_2": "birds"})
    assert made["prompt"] == ["", ""]
    assert made["prompt_2"] == ["birds", "birds"]
    made = negative_arguments(pipe, {"prompt_embeds": torch.zeros(1, 7, 8), "negative_prompt_2": "birds"})
    assert made["prompt"] == ""
    assert made["prompt_embeds"] is None


def test_two_calls_take_the_negative_prompt_to_the_prompts_call_alone() -> None:
    pipe, kwargs = zoo_pipelines.build("qwen", dtype=torch.float64)
    zoo_pipelines.quiet(pipe)
    options = {"true_cfg_scale": 1.0} | {k: v for k, v in kwargs.items() if not k.startswith("negative")}
    other = {k.removeprefix("negative_"): v for k, v in kwargs.items() if k.startswith("negative_")}
    with attnctl.control(pipe, NAG(negative_embeds=other)):
        guided = zoo_pipelines.run(pipe, options)
    assert distance(guided, zoo_pipelines.run(pipe, options)) > 1e-4
    with attnctl.control(pipe, NAG()):
        both = zoo_pipelines.run(pipe, kwargs, num_inference_steps=1)
    assert distance(both, zoo_pipelines.run(pipe, kwargs, num_inference_steps=1)) > 1e-4


def test_beside_other_guidance() -> None:
    # p carries NAG too, so that c - p holds the perturbation alone: without any, it is zero.
    for name in ("pixart", "sd3", "flux"):
        model, inputs, other = two_texts(name)
        site = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")][2]
        nag = NAG(**SETTING, negative_embeds=other)
        alone = run(model, inputs, nag)
        soft = run(model, inputs, SoftPAG(scale=2.0, u=0.0, heads=[(site, 0)]), nag)
        assert distance(soft, alone) < 1e-12
        assert distance(run(model, inputs, PAG(scale=2.0, sites=site), nag), alone) > 1e-3


def test_nothing_is_left_behind_by_an_error() -> None:
    model, inputs, other = two_texts("flux", torch.float32)
    before, threads = snapshot(model), threading.active_count()

    def fail(*args: Any) -> None:
        raise RuntimeError("in a block")

    with attnctl.control(model, NAG(negative_embeds=other), layout="cond"), torch.no_grad():
        hook = model.single_transformer_blocks[-1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in a block"):
            zoo.call(model, inputs)
        hook.remove()
        assert threading.active_count() == threads
        zoo.call(model, inputs)
    assert threading.active_count() == threads
    assert_clean(before, model)


def test_refusals(pipe: Any) -> None:
    with attnctl.control(pipe, NAG()), pytest.raises(ConfigError, match="no negative prompt"):
        latents(pipe, None)
    with pytest.warns(UserWarning, match="equals the prompt"), attnctl.control(pipe, NAG()):
        latents(pipe, "a red circle")
    model, inputs, other = two_texts("flux", torch.float32)
    with pytest.raises(UnsupportedModelError, match="negative rows"):
        run(model, inputs, NAG())
    with pytest.raises(ConfigError, match="give one row"):
        run(model, inputs, NAG(negative_embeds={k: v.repeat(2, 1, 1)[:3] for k, v in other.items()}))
    model.enable_gradient_checkpointing()
    handle = attnctl.control(model, NAG(negative_embeds=other), layout="cond")
    with handle, pytest.raises(UnsupportedModelError, match="checkpointing"):
        zoo.call(model, inputs)


def test_compiled_blocks() -> None:
    model, inputs, other = two_texts("wan", torch.float32)
    control = NAG(**SETTING, negative_embeds=other)
    expected = run(model, inputs, control)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert distance(run(model, inputs, control), expected) < 1e-5
    model, inputs, other = two_texts("flux", torch.float32)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(UnsupportedModelError, match="not compiled"):
        run(model, inputs, NAG(negative_embeds=other))


@pytest.mark.parametrize(
    "fields",
    [
        {"tau": 0.5},
        {"alpha": 1.5},
        {"form": "columns"},
        {"negative_prompt": 3},
        {"negative_embeds": {}},
        {"negative_embeds": {"prompt_embeds": torch.zeros(1)}, "negative_prompt": "both"},
    ],
)
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NAG(**fields)
