"""Word maps that cannot be had: one clear error each, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import snapshot

import attnctl
from attnctl.errors import ConfigError, NeverApplied, SiteError, UnsupportedModelError
from attnctl.processors import PAG, Capture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduce": "median"}, "Choose one of mean, sum, max, none, ema"),
        ({"keep": ("layers",)}, "keep='layers' is unknown"),
        ({"reduce": "ema", "keep": ("steps",)}, "runs over the steps"),
        ({"reduce": "ema", "decay": 1.0}, "decay=1.0 is out of range"),
        ({"decay": -0.1}, "decay=-0.1 is out of range"),
        ({"rows": "both"}, "rows='both' is unknown"),
        ({"words": "cat"}, r"give a tuple of words"),
        ({"words": ()}, "give a tuple of words"),
        ({"words": (1.5,)}, "1.5 in words"),
        ({"words": ("cat", ("dog",))}, "mixes words and lists"),
        ({"words": (("cat",), ())}, "mixes words and lists"),
        ({"heads": ()}, r"heads=\(\)"),
        ({"heads": (1, 1)}, "give different head numbers"),
        ({"heads": (-1,)}, "give different head numbers"),
        ({"budget": 0}, "budget=0"),
        ({"device": "gpu0"}, "device='gpu0' is unknown"),
        ({"store": "float16"}, r'add keep=\("steps",\)'),
        ({"store": "int8", "keep": ("steps",)}, "store='int8' is unknown"),
        ({"start": 0.9, "stop": 0.1}, "lies after stop"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capture(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("catt",)}, "'catt' is not in the prompt 'a cat'. Did you mean 'cat'"),
        ({"words": (0,)}, "start token"),
        ({"words": ("cat",), "heads": (4,)}, r"heads=\(4,\) do not all exist"),
        ({"words": (("cat",), ("dog",))}, "lists for 2 prompts, but there are 1"),
        ({"words": ("cat",), "budget": 1000}, r"budget=1000 bytes: \d+ with .*, which is layer \d+ of 7"),
        ({"words": ("cat",), "budget": 30_000, "reduce": "none"}, "budget=30000 bytes"),
        ({"words": ("cat",), "prompt": ("a cat", "a cat")}, "1 rows for 2 prompts"),
    ],
)
def test_bad_input_leaves_nothing_behind(fields: dict[str, Any], message: str) -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    before = snapshot(pipe.unet, pipe.scheduler)

    def go() -> None:
        with attnctl.control(pipe, Capture(**fields)):
            pipes.run(pipe, kwargs)

    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        go()
    after = snapshot(pipe.unet)
    assert {k for k in after if k.startswith("0:")} == {k for k in before if k.startswith("0:")}
    assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_reading_too_early_and_negative_words_without_negative_prompt() -> None:
    pipe, kwargs = pipes.build("sd")
    handle = attnctl.control(pipe, Capture(words=("cat",)))
    with pytest.raises(NeverApplied, match="run the pipeline first"):
        _ = handle.maps
    handle.detach()
    with attnctl.control(pipe, PAG()) as handle, pytest.raises(ConfigError, match="there are 0"):
        _ = handle.maps
    with attnctl.control(pipe, Capture(words=("cat",), rows="uncond")), pytest.raises(ConfigError, match="no negative"):
        pipes.run(pipe, {**kwargs, "negative_prompt": None})


def test_a_bare_denoiser_takes_places_only() -> None:
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, Capture(words=("cat",)), layout="cond"), pytest.raises(ConfigError, match="not known"):
        zoo.call(model, inputs)
    with (
        attnctl.control(model, Capture(words=("cat",), prompt="a cat"), layout="cond"),
        pytest.raises(ConfigError, match="a bare denoiser has no tokenizer"),
    ):
        zoo.call(model, inputs)
    with (
        attnctl.control(model, Capture(words=(zoo.TEXT,)), layout="cond"),
        pytest.raises(ConfigError, match=f"attention sees {zoo.TEXT} text tokens"),
    ):
        zoo.call(model, inputs)


def test_self_attention_is_no_site_for_words() -> None:
    pipe, _ = pipes.build("sd")
    with pytest.raises(SiteError):
        attnctl.control(pipe, Capture(words=("cat",), sites="self"))
    model, _ = zoo.build("svd")
    capture = Capture(words=(1,))
    if not any(s.kind in Capture.kinds for s in attnctl.find_sites(model)):
        with pytest.raises(SiteError):
            attnctl.control(model, capture)


def test_a_map_that_is_not_finite_is_an_error() -> None:
    pipe, kwargs = pipes.build("sd")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        pipe.unet.get_submodule(name).to_q.weight[0, 0] = torch.nan
    for capture in (Capture(words=("cat",), sites="mid"), Capture(words=("cat",), sites="mid", keep=("steps",))):
        with attnctl.control(pipe, capture) as handle:
            pipes.run(pipe, kwargs)
            with pytest.raises(UnsupportedModelError, match=f"maps of {name} hold values that are not finite"):
                _ = handle.maps


def test_a_model_without_text_attention_is_refused() -> None:
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(SiteError, match="no cross- or joint attention, so nothing"):
        attnctl.control(pipe, Capture(words=(1,)))


def test_a_copied_pipeline_records_nothing() -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        other = copy.deepcopy(pipe)
        pipes.run(other, kwargs)
        with pytest.raises(NeverApplied):
            _ = handle.maps
