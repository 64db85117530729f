"""Processors that do not call SDPA, and quantised or traced models: controlled, replaced meanwhile or refused."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Replace, Through, assert_clean, distance, perturbed, snapshot
from diffusers.models import attention_processor as ap
from naive_guidance import build, roots
from torch import Tensor, nn

import attnctl
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG

pytestmark = pytest.mark.usefixtures("no_grad")


# Processors that do not call SDPA


def test_an_old_ip_adapter_processor_is_replaced_meanwhile() -> None:
    pipe, kwargs, _ = build("sd")
    kwargs |= pipes.load_ip_adapter(pipe)
    for module in pipe.unet.modules():
        new = getattr(module, "processor", None)
        if isinstance(new, ap.IPAdapterAttnProcessor2_0):
            old = ap.IPAdapterAttnProcessor(new.hidden_size, new.cross_attention_dim, new.num_tokens, new.scale)
            old.load_state_dict(new.state_dict())
            module.processor = old.double()
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    through = Through()
    with attnctl.control(pipe, through):
        assert distance(pipes.run(pipe, kwargs), plain) <= 1e-12
    assert {call.index for call in through.seen if call.site.kind == "cross"} == {0, 1}
    assert_clean(before, *roots(pipe))
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_an_xformers_processor_of_joint_attention_is_replaced_meanwhile() -> None:
    model, inputs = zoo.build("sd3", dtype=torch.float64)
    site = "transformer_blocks.2.attn"
    guidance = PAG(sites=site)
    with attnctl.control(model, guidance, layout="cond"):
        guided = zoo.call(model, inputs)
    module: Any = model.get_submodule(site)
    theirs = module.processor = ap.XFormersJointAttnProcessor()
    before = snapshot(model)
    with attnctl.control(model, Replace(sites=site, function=lambda call, proceed: proceed(call)), layout="cond"):
        zoo.call(model, inputs)
    assert module.processor is theirs
    assert_clean(before, model)
    module.processor = ap.JointAttnProcessor2_0()
    with attnctl.control(model, guidance, layout="cond"):
        assert torch.equal(zoo.call(model, inputs), guided)


@pytest.mark.parametrize(
    "make", [ap.AttnAddedKVProcessor, lambda: ap.SlicedAttnAddedKVProcessor(1)], ids=["old", "sliced"]
)
def test_attention_with_added_keys_passes_through(make: Any) -> None:
    settings: dict[str, Any] = {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "attention_head_dim": 8,
    }
    model, inputs = zoo.build("sd15", dtype=torch.float64, **settings)
    model.set_attn_processor(make())
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    through = Through()
    with attnctl.control(model, through, layout="cond"):
        assert distance(zoo.call(model, inputs), plain) <= 1e-6  # the old ones take their softmax in float32
    assert {call.site.name for call in through.seen} == {s.name for s in attnctl.find_sites(model)}
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


# Quantised, traced, exported


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, without a parameter, as quantisers leave them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model: nn.Module) -> None:
    """Replace every linear layer inside attention."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (".attn" in name or name.startswith("attn")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "pixart", "wan"])
def test_quantised_attention_is_controlled_like_any_other(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    quantise(model)
    plain = zoo.call(model, inputs)
    own = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    guidance = PAG(scale=2.0, sites=own[len(own) // 2], scope="all")
    p = perturbed(model, guidance, inputs)
    before = snapshot(model)
    with attnctl.control(model, guidance, layout="cond") as handle:
        for _ in range(2):
            assert distance(zoo.call(model, inputs), plain + 2.0 * (plain - p)) <= 1e-12
        assert handle.passes == 2
    assert_clean(before, model)
    assert distance(p, plain) > 1e-3


def test_what_cannot_be_hooked_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        traced = torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    for target in (traced, types.SimpleNamespace(unet=traced)):
        with pytest.raises(UnsupportedModelError, match=r"TorchScript.*Load it as is"):
            attnctl.control(target, PAG(sites="mid"))
    exported = types.SimpleNamespace(unet=object())  # as a pipeline of ONNX models holds one
    with pytest.raises(UnsupportedModelError, match="no `unet` or `transformer` that is a torch module"):
        attnctl.control(exported, PAG(sites="mid"))
