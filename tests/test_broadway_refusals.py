"""BroadWay where it does not fit: one clear error each."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from broadway_reference import build, free_noise
from contract import assert_clean, distance, snapshot

import attnctl
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import ConfigError, ConflictError, SiteError, UnsupportedModelError
from attnctl.processors import BroadWay, SoftPAG

pytestmark = pytest.mark.usefixtures("eight_frames")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is out of range"),
        ({"beta": -1.0}, "beta=-1.0 is out of range"),
        ({"beta": ()}, "empty list"),
        ({"beta": {}}, "must map selectors"),
        ({"beta": {"up.1": "much"}}, "out of range"),
        ({"tau": -1}, "tau=-1"),
        ({"tau": 3.5}, "whole number of bins"),
        ({"tau": "all"}, "tau='all'"),
        ({"motion": 11.0}, "motion=11.0 is out of range"),
        ({"motion": 1.0, "beta": 2.0}, "Give the one knob"),
        ({"interpolation": "cubic"}, "nearest, bilinear"),
        ({"head_match": "some"}, "group_mean, strict"),
        ({"beta_scope": "all"}, "batch, sample"),
        ({"mask": np.full((4, 4), 2.0)}, "from 0 to 1"),
        ({"mask": np.zeros((2, 2, 2))}, "mask must be a picture"),
        ({"mask": "missing.png"}, "cannot be read"),
        ({"mask": object()}, "mask must be a picture"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BroadWay(**fields)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="animatediff, videocrafter2"):
        BroadWay.preset("sora")


@pytest.mark.parametrize(
    ("name", "frames", "fields", "error", "message"),
    [
        ("animatediff", 3, {}, ConfigError, "3 frames are too few"),
        ("animatediff", 8, {"tau": 7}, ConfigError, "tau=7 is too large for 8 frames"),
        ("wan", 8, {"tau": 4}, ConfigError, "too large"),
        ("svd", 8, {"sites": "up_blocks.1.*temporal_transformer_blocks.0.attn2"}, SiteError, "cross attention"),
        ("sd15", 8, {}, UnsupportedModelError, "neither temporal attention"),
        ("flux", 8, {}, UnsupportedModelError, "neither temporal attention"),
        ("animatediff", 8, {"sites": "up.2"}, SiteError, "needs the maps of up_blocks.0"),
        ("animatediff", 8, {"reference": "up_blocks.7"}, SiteError, "no temporal attention"),
        ("animatediff", 8, {"beta": {"mid": 2.0}}, SiteError, r"matches|selects only"),
    ],
)
def test_models_and_lengths_that_do_not_fit_are_refused(
    name: str, frames: int, fields: dict[str, Any], error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "FRAMES", frames)
    model, inputs = build(name)
    before = snapshot(model)
    plain = zoo.call(model, inputs)
    with (
        pytest.raises(error, match=message),
        attnctl.control(model, BroadWay(stop=1.0, **fields), layout="uncond_first"),
    ):
        zoo.call(model, inputs)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_split_inference_is_refused(when: str) -> None:
    pipe, kwargs = free_noise(torch.float32)
    kwargs |= {"num_frames": 8}
    if when == "before":
        pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=16)
    with attnctl.control(pipe, BroadWay(stop=0.5)):
        if when == "after":
            pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=16)
        with pytest.raises(UnsupportedModelError, match="Split inference"):
            pipes.run(pipe, kwargs)


def test_heads_that_differ_are_averaged_or_refused() -> None:
    model, inputs = build("unet3d")
    with torch.random.fork_rng(devices=[]):
        model = diffusers.UNet3DConditionModel(
            **{**model.config, "block_out_channels": (8, 16, 16)}
            | {
                "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            }
        ).eval()
    zoo.randomize(model, torch.Generator().manual_seed(0))
    heads = {s.name.split(".")[1]: s.heads for s in attnctl.find_sites(model) if s.name.startswith("up_blocks")}
    assert heads == {"1": 4, "2": 2}
    plain = zoo.call(model, inputs)
    with attnctl.control(model, BroadWay(stop=1.0), layout="uncond_first"):
        assert distance(zoo.call(model, inputs), plain) > 1e-4
    with (
        pytest.raises(UnsupportedModelError, match="has 4 heads"),
        attnctl.control(model, BroadWay(stop=1.0, head_match="strict"), layout="uncond_first"),
    ):
        zoo.call(model, inputs)


def test_perturbing_some_heads_of_the_same_site_is_refused() -> None:
    model, inputs = build("animatediff")
    site = "up_blocks.2.motion_modules.0.transformer_blocks.0.attn1"
    controls = (BroadWay(stop=1.0), SoftPAG(u=1.0, scale=1.0, heads=[(site, 0)]))
    with attnctl.control(model, *controls, layout="uncond_first"), pytest.raises(ConflictError, match="3 of its 4"):
        zoo.call(model, inputs)


def test_what_does_not_act_is_said() -> None:
    model, _ = build("latte")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attnctl.control(model, BroadWay(stop=1.0), layout="cond").detach()
        attnctl.control(build("wan")[0], BroadWay(stop=1.0, alpha=0.0), layout="cond").detach()
    said = [str(w.message) for w in caught if "attnctl" in str(w.message)]
    assert "enhances only, and alpha=0.6 has no effect" in said[0]
    assert "experimental" in said[1]
    assert "no effect" not in said[1]


def test_it_can_be_written_down() -> None:
    control = BroadWay(beta={"up.2": (2.0, 1.0)}, mask=np.eye(4), tau=3)
    again = control_from_dict(control_to_dict(control))
    assert again == control
    assert "beta" in control.describe()
