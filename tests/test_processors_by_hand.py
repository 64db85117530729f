"""diffusers' own plug point: processors made by `attn_processors` compute what `control` does, or are refused."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, own, snapshot
from torch import Tensor, nn

import attnctl
from attnctl.core.hosts.predictions import difference
from attnctl.errors import ConfigError, ConflictError, UnsupportedModelError
from attnctl.processors import (
    APG,
    NAG,
    PAG,
    SEG,
    SLG,
    TPG,
    AgentAttention,
    AStar,
    AutoGuidance,
    Capture,
    Control,
    EnhanceAVideo,
    Guidance,
    ShareAttention,
    SoftPAG,
    SparseAttention,
)

PLUGGED = {
    "sd15": (PAG(sites="mid", scale=2.0), AgentAttention(agents_stop=1.0), ShareAttention(sites="up.1", share=0.5)),
    "sd3": (PAG(sites=1, scale=2.0), SEG(sites=1, scale=2.0), ShareAttention(sites=1)),
    "flux": (PAG(sites=(1, 2), scale=2.0), SoftPAG(sites=2, scale=2.0, scope="image", u=0.4)),  # of one and two streams
    "pixart": (SEG(sites="self", scale=2.0), AutoGuidance(sites="self")),
    "wan": (EnhanceAVideo(), PAG(sites=2, scale=2.0)),
    "sana": (PAG(sites=2, scale=2.0),),  # linear attention
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", PLUGGED)
def test_equals_control(name: str) -> None:
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    for control in PLUGGED[name]:
        before = snapshot(model)
        made = attnctl.attn_processors(model, control)
        assert_clean(before, model)
        with attnctl.control(model, control, layout="cond", replay=False):
            expected = zoo.call(model, inputs)
        seen = plugged(model, made, inputs)
        if isinstance(control, Guidance):
            seen = plain + control.scale * difference(plain, seen)
        assert torch.equal(seen, expected), control
        assert not torch.equal(expected, plain), control
        assert_clean(before, model)


def test_a_pipeline_that_carries_them_equals_one_under_control() -> None:
    pipe, kwargs = pipes.build("sd", batch=2)
    unet = pipes.denoiser(pipe)
    controls = ShareAttention(sites="up.1", share=0.5, halves="cond"), AgentAttention(agents_stop=1.0, metric="norm")
    for control in controls:  # rows, and the step that a drawing depends on, are read from the pipeline's call
        with attnctl.control(pipe, control):
            expected = pipes.run(pipe, kwargs)
        before = snapshot(unet, pipe.scheduler)
        plain = dict(unet.attn_processors)
        unet.set_attn_processor(attnctl.attn_processors(pipe, control))
        for _ in range(2):
            assert torch.equal(pipes.run(pipe, kwargs), expected)
        twin = copy.deepcopy(pipe)
        assert torch.equal(pipes.run(twin, kwargs), expected)
        unet.set_attn_processor(plain)
        assert before.keys() == snapshot(unet, pipe.scheduler).keys()
    unet.set_attn_processor(attnctl.attn_processors(pipe, PAG(sites="mid")))
    with pytest.warns(UserWarning, match=r"StableDiffusionPipeline runs.*perturbed.*attnctl\.control\(pipe, PAG"):
        pipes.run(pipe, kwargs)


def test_two_calls_of_a_step_are_not_told_apart() -> None:
    pipe, kwargs = pipes.build("wan")
    model = pipes.denoiser(pipe)
    model.set_attn_processor(attnctl.attn_processors(pipe, ShareAttention(sites="self")))
    with pytest.raises(UnsupportedModelError, match=r'which rows.*not told to a processor.*layout="cond"'):
        pipes.run(pipe, kwargs)


def test_off_hands_out_the_models_own() -> None:
    model, _ = zoo.build("sd15")
    for off in (PAG(sites="mid", scale=0.0), SoftPAG(sites="mid", u=0.0)):
        assert attnctl.attn_processors(model, off) == model.attn_processors


REFUSED: list[tuple[Control, str]] = [
    (SLG(sites="mid", start=0.0, stop=1.0), "replaces whole blocks"),
    (SLG(sites="mid"), "step of the run"),
    (TPG(sites="mid"), "replaces whole blocks|prepares each"),
    (AStar(concepts=("a", "b")), "words of the prompt"),
    (NAG(), "words of the prompt"),
    (Capture(points=((0.5, 0.5),), words=None), "recorded is read from a handle|words of the prompt"),
    (APG(), "outside attention"),
    (PAG(sites="mid", start=0.2), "step of the run"),
    (PAG(sites="mid", every=2), "step of the run"),
    (AgentAttention(), "step of the run"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c[0].describe())
def test_what_needs_the_run_is_refused(case: tuple[Control, str]) -> None:
    model, _ = zoo.build("sd15")
    before = snapshot(model)
    control, words = case
    with pytest.raises(ConfigError, match=rf"(?s)({words}).*attnctl\.control\(pipe, {type(control).__name__}"):
        attnctl.attn_processors(model, control)
    assert_clean(before, model)


def test_other_refusals() -> None:
    model, inputs = zoo.build("sd15")
    with pytest.raises(ConfigError, match=r"each guide away.*once for each"):
        attnctl.attn_processors(model, PAG(sites="mid"), SEG(sites="mid"))
    two = type("Pipe", (), {"transformer": model, "transformer_2": model})()
    with pytest.raises(ConfigError, match=r"2 denoisers.*attn_processors\(pipe\.transformer"):
        attnctl.attn_processors(two, PAG(sites="mid"))
    plain, own_processors = zoo.call(model, inputs), dict(model.attn_processors)
    model.set_attn_processor(PAG(sites="mid"))
    with pytest.raises(ConfigError, match=r"PAG.* is a control.*attn_processors\(model, PAG"):
        zoo.call(model, inputs)
    with pytest.raises(ConflictError, match="in place of a processor"):
        attnctl.control(model, PAG(sites="mid"))
    model.set_attn_processor(own_processors)
    assert torch.equal(zoo.call(model, inputs), plain)


def test_nothing_of_a_call_is_kept() -> None:
    model, inputs = zoo.build("flux")
    made = attnctl.attn_processors(model, PAG(sites=own(attnctl.find_sites(model))[1].name))
    inputs["hidden_states"] = inputs["hidden_states"].clone()
    latents = weakref.ref(inputs["hidden_states"])
    plugged(model, made, inputs)
    del inputs
    gc.collect()
    assert latents() is None


def test_a_forward_without_a_call_is_refused_where_the_call_is_needed() -> None:
    model, inputs = zoo.build("flux")
    carry(model, attnctl.attn_processors(model, PAG(sites=3)))  # one stream: its text is known from the call alone
    with pytest.raises(UnsupportedModelError, match="tell image from text"):
        model.forward(**inputs)


def test_sparse_attention_in_the_shape_of_a_window() -> None:
    from attnctl.plans import Neighborhood

    model, inputs = zoo.build("wan")
    control = SparseAttention(Neighborhood(window=(3, 3, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnctl.control(model, control, layout="cond"):
            expected = zoo.call(model, inputs)
        assert torch.equal(plugged(model, attnctl.attn_processors(model, control), inputs), expected)


def carry(model: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Put processors on a model; return those that were there."""
    before = {name: model.get_submodule(name.removesuffix(".processor")).processor for name in made}
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(dict(made))
        return before
    for name, processor in made.items():
        module: Any = model.get_submodule(name.removesuffix(".processor"))
        module.processor = processor
    return before


def plugged(model: nn.Module, made: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
    """Call a model that carries processors; it has its own again afterwards."""
    before = carry(model, made)
    try:
        return zoo.call(model, inputs)
    finally:
        carry(model, before)
