"""Models, processors and pipelines that cannot be controlled: one clear error each, and nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Through, assert_clean, snapshot
from diffusers.models import attention_processor as ap

import attnctl
from attnctl.errors import AttnctlError, ConflictError, SiteError, UnsupportedModelError
from attnctl.processors import PAG, SEG, Capture

pytestmark = pytest.mark.usefixtures("no_grad")

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


# Models and processors


def test_a_processor_that_another_tool_put_there_stays() -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    handle = attnctl.control(pipe, PAG(sites="mid"))
    module: Any = pipe.unet.get_submodule(MID)
    theirs = module.processor = ap.AttnProcessor2_0()
    with pytest.warns(UserWarning, match=f"{re.escape(MID)} was replaced"):
        handle.detach()
    assert module.processor is theirs
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    with attnctl.control(pipe, PAG(sites="mid")):
        guided = pipes.run(pipe, kwargs)
        theirs = module.processor = ap.AttnProcessor2_0()
        with pytest.warns(UserWarning, match="attached to the new one"):
            assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert module.processor is theirs
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize(
    "make", [ap.AttnProcessor, lambda: ap.SlicedAttnProcessor(1), ap.XFormersAttnProcessor], ids=["old", "sliced", "xf"]
)
def test_processors_that_do_not_call_sdpa_are_replaced_meanwhile(make: Callable[[], Any]) -> None:
    model, inputs = zoo.build("sd15", dtype=torch.float64)
    with attnctl.control(model, PAG(sites="mid"), layout="cond"):
        guided = zoo.call(model, inputs)
    module: Any = model.get_submodule(MID)
    theirs = module.processor = make()
    before = snapshot(model)
    with attnctl.control(model, PAG(sites="mid"), layout="cond"):
        torch.testing.assert_close(zoo.call(model, inputs), guided)
    assert module.processor is theirs
    assert_clean(before, model)


def test_processors_that_cannot_be_intercepted() -> None:
    model, inputs = zoo.build("sd15")
    plain = zoo.call(model, inputs)
    module: Any = model.get_submodule(MID)
    original = module.processor
    module.scale_qk, module.processor = False, ap.AttnProcessor()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="scale_qk=False"):
        attnctl.control(model, PAG(sites="*attn1"))
    assert_clean(before, model)
    module.scale_qk, module.processor = True, ap.PAGIdentitySelfAttnProcessor2_0()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"PAG pipeline.*set_attn_processor"):
        attnctl.control(model, PAG(sites="*attn1"))
    assert_clean(before, model)
    module.processor = original
    ring = diffusers.ContextParallelConfig(ring_degree=2)
    original._parallel_config = diffusers.ParallelConfig(context_parallel_config=ring)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"context parallelism.*Skip whole layers"):
        attnctl.control(model, SEG(sites="*attn1"))
    assert_clean(before, model)
    with pytest.raises(UnsupportedModelError, match="ring attention"):
        attnctl.control(model, PAG(sites="*attn1"))
    assert_clean(before, model)
    del original._parallel_config
    assert torch.equal(zoo.call(model, inputs), plain)


def test_processors_by_hand_and_control_do_not_mix() -> None:
    model, inputs = zoo.build("sd15")
    plain = zoo.call(model, inputs)
    held = dict(model.attn_processors)
    model.set_attn_processor(attnctl.attn_processors(model, PAG(sites="mid")))
    perturbed = zoo.call(model, inputs)
    before = snapshot(model)
    with pytest.raises(ConflictError, match=r"attn_processors.*set_attn_processor"):
        attnctl.control(model, PAG(sites="*attn1"))
    assert_clean_but_for_processors(before, snapshot(model))
    assert torch.equal(zoo.call(model, inputs), perturbed)
    model.set_attn_processor(held)
    assert torch.equal(zoo.call(model, inputs), plain)


def assert_clean_but_for_processors(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare snapshots of a model that carries controlled processors on purpose."""
    assert before.keys() == after.keys()
    assert [k for k in before if before[k] is not after[k]] == []


def test_an_ip_adapter_cannot_be_handed_out() -> None:
    pipe, _ = pipes.build("sd")
    pipes.load_ip_adapter(pipe)
    before = snapshot(pipe.unet)
    with pytest.raises(UnsupportedModelError, match=r"weights live in the model.*control"):
        attnctl.attn_processors(pipe.unet, Through())
    assert_clean(before, pipe.unet)


def test_dropout_in_attention_is_refused() -> None:
    model, inputs = zoo.build("hunyuandit")
    before = snapshot(model)

    class Dropping(type(model.get_submodule("blocks.1.attn1").processor)):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            q = hidden_states[:, None]
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]

    module: Any = model.get_submodule("blocks.1.attn1")
    held, module.processor = module.processor, Dropping()
    with (
        attnctl.control(model, PAG(sites="blocks.1.attn1"), layout="cond"),
        pytest.raises(UnsupportedModelError, match=r"drops attention weights.*eval\(\)"),
    ):
        zoo.call(model, inputs)
    module.processor = held
    assert_clean(before, model)


# Denoisers of diffusers that leave no place for a control, or none for what was asked -------------------------------


@pytest.mark.parametrize("name", ["anyflow_far", "kandinsky6_sr"])
@pytest.mark.parametrize("control", [PAG(sites="*self*", scope="all"), SEG(sites="*attn1*"), Capture(words=(1,))])
def test_attention_that_hides_is_named(name: str, control: Any) -> None:
    """Only flex_attention computes it."""
    model, inputs = zoo.build(name)
    before = snapshot(model)
    said = r"flex_attention|no attention|has no|no site|matches no|out of reach|never reached|cannot be"
    with pytest.raises(AttnctlError, match=said) as refused, attnctl.control(model, control, layout="cond"):
        zoo.call(model, inputs)
    assert len(str(refused.value)) > 40
    assert_clean(before, model)


@pytest.mark.parametrize(("name", "at"), [("ltx2", "audio_attn1"), ("kandinsky6", "audio_dec_block")])
@pytest.mark.parametrize("scope", ["image", "image_block", "all"])
def test_sound_is_no_place_for_guidance_of_images(name: str, at: str, scope: Any) -> None:
    model, _ = zoo.build(name)
    site = next(s for s in attnctl.find_sites(model) if at in s.name and s.kind == "audio")
    for sites in (site.name, f"*{at}*", (site.name,)):
        with pytest.raises(SiteError, match="audio"):
            attnctl.control(model, PAG(sites=sites, scope=scope))
    assert attnctl.handle_of(model) is None


@pytest.mark.parametrize("name", ["sana_wm_refiner", "prior"])
def test_maps_are_refused_where_no_grid_is_known(name: str) -> None:
    model, inputs = zoo.build(name)
    before = snapshot(model)
    for control in (Capture(words=(1,)), Capture(points=((0.5, 0.5),)), SEG(sigma=2.0, sites="self")):
        refused = pytest.raises(AttnctlError, match=r"lie|grid|no .*attention|no site|has no|kind|no image")
        with refused, attnctl.control(model, control, layout="cond"):
            zoo.call(model, inputs)
        assert_clean(before, model)


def test_two_denoisers_of_different_families_are_controlled_each_by_its_own() -> None:
    """Or refused in words: what one of them lacks is named with it."""
    one, other = zoo.build("sd15")[0], zoo.build("flux")[0]
    pipe = SimpleNamespace(unet=one, transformer=other, components={"unet": one, "transformer": other})
    before = [snapshot(m) for m in (one, other)]
    with pytest.raises(AttnctlError) as refused:
        attnctl.control(pipe, PAG(sites="mid"))
    assert "no attention site matches 'mid'" in str(refused.value)
    assert "This is said of FluxTransformer2DModel, one of 2 denoisers" in str(refused.value)
    for model, state in zip((one, other), before, strict=True):
        assert_clean(state, model)
