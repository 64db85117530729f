"""Attention of backbones, read: exact rows in every family and swapped form, nothing changed, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from torch import Tensor, nn

import attnctl
from attnctl.backbones import any_size
from attnctl.backbones.hosts import split_qkv
from attnctl.backbones.look.probe import probe_attention
from attnctl.backbones.look.sites import backbone_sites
from attnctl.errors import ConfigError, ConflictError, NeverApplied, SiteError, UnsupportedModelError
from attnctl.processors import PAG, Capture

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
POINT = (0.6, 0.3)
MICRO = ["biformer_micro", "agent_deit_micro", "agent_pvt_micro", "agent_swin_micro", "agent_cswin_micro"]


def vit(**kwargs: Any) -> nn.Module:
    """Build a small vision transformer whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(VIT | kwargs)).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


def maxvit() -> nn.Module:
    """Build a small MaxViT with windows of 4."""
    windows = MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8)
    return MaxxVit(MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows), img_size=32).eval()


def others() -> dict[str, nn.Module]:
    """Build one small model of every other family; all take 32 px images."""
    torch.manual_seed(0)
    swin = {"img_size": 32, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 3}
    pvt = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    models = {
        "swin": timm.create_model("swin_tiny_patch4_window7_224", **swin).eval(),
        "pvt": timm.create_model("pvt_v2_b0", **pvt).eval(),
        "maxvit": maxvit(),
        "maxvit any size": any_size(maxvit()),
    }
    return models | {name: timm.create_model(name).eval() for name in MICRO}


def softmax_of(attn: Any, x: Tensor) -> Tensor:
    """Write attention out: [B, H, N, N]."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)


def test_vit_maps_are_the_softmax() -> None:
    model, images = vit(reg_tokens=2), torch.rand(2, 3, 32, 32)
    tokens: list[Tensor] = []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    with torch.inference_mode():
        plain = model(images)
        want = softmax_of(model.blocks[1].attn, tokens[0])
        for capture, rows in (
            (Capture(words=("class", "register2"), sites=1, keep=("heads",)), want[:, :, [0, 2], 3:]),
            (Capture(points=(POINT,), sites="blocks.1.attn", keep=("heads",)), want[:, :, [3 + 4 + 2], 3:]),
            (Capture(words=("mean",), sites=1, keep=("heads",)), want[:, :, 3:, 3:].mean(2, keepdim=True)),
        ):
            with attnctl.control(model, capture) as handle:
                assert torch.equal(model(images), plain)
                got = handle.maps.layers["blocks.1.attn"][:, :, 0, :, 0].flatten(-2).transpose(1, 2)
            torch.testing.assert_close(got, rows, atol=1e-6, rtol=1e-4)
    assert not model.blocks[0].attn._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.patch_embed._forward_hooks


def test_defaults_heads_and_reading() -> None:
    model, images = vit(), torch.rand(2, 3, 32, 32)
    with attnctl.control(model, Capture()) as handle:
        with pytest.raises(NeverApplied, match="run the model"):
            _ = handle.maps
        model(images)
        maps = handle.maps
        assert maps.words == ("class",)
        assert maps["class"].shape == (2, 4, 4)
        assert "blocks.1.attn: 4 heads" in handle.report()
        handle.enabled = False
        model(images[:1])
        assert handle.maps.images == 2
        with pytest.raises(ConflictError, match="already"):
            attnctl.control(model, Capture())
    two = Capture(heads=(1, 3), keep=("heads",), store="float32")
    with attnctl.control(model, two) as handle:
        model(images)
        assert handle.maps.get_map("class", head=3).shape == (2, 4, 4)
        copied = copy.deepcopy(model)
        copied(images[:1])
        assert handle.maps.images == 2
    assert [s.name for s in attnctl.find_sites(model)] == ["blocks.0.attn", "blocks.1.attn"]
    assert {(s.kind, s.heads, s.head_dim) for s in attnctl.find_sites(model)} == {("self", 4, 8)}


@pytest.mark.parametrize("name", list(others()))
def test_every_family(name: str) -> None:
    model, images = others()[name], torch.rand(2, 3, 32, 32)
    first = next(iter(attnctl.find_sites(model)))
    plain = model(images)
    with attnctl.control(model, Capture(points=(POINT,), keep=("heads",))) as handle:
        assert torch.equal(model(images), plain)
        maps = handle.maps
    assert list(maps.layers) == [s.name for s in attnctl.find_sites(model)]
    assert maps.layers[first.name].shape[3] == first.heads
    for layer in maps.layers.values():
        total = layer.sum((-2, -1))
        assert total.min() > 0
        assert total.max() < 1 + 1e-4
    if name not in ("biformer_micro", "agent_deit_micro"):  # padded windows and a class token take their share
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


def test_windows_lie_where_they_should() -> None:
    """A shifted, padded Swin block attends only to tokens of the query's own window."""
    model = others()["swin"]
    with attnctl.control(model, Capture(points=(POINT,), sites=[0, 1])) as handle:
        model(torch.rand(1, 3, 32, 32))
        plain, shifted = (handle.maps.layers[n][0, 0, 0, 0, 0] for n in handle.maps.layers)
    row, column = int(0.3 * 8), int(0.6 * 8)
    for seen, shift in ((plain, 0), (shifted, 1)):
        where = [(int(r), int(c)) for r, c in (seen > 0).nonzero()]
        block = (row - shift) // 3, (column - shift) // 3
        assert (row, column) in where
        assert all(((r - shift) // 3, (c - shift) // 3) == block for r, c in where)


@pytest.mark.parametrize("kind", ["agent", "bra", "multiaxis", "mala", "moh", "neighborhood", "sigmoid"])
def test_swapped_forms(kind: str) -> None:
    options = {"agent": {"num_agents": 4}, "bra": {"window_size": 2, "topk": 1}, "neighborhood": {"kernel": 3}}
    model = attnctl.swap(vit(), kind, **options.get(kind, {}))
    (site, _), images = backbone_sites(model), torch.rand(1, 3, 32, 32)
    inputs: list[Any] = []
    site.module.register_forward_pre_hook(lambda _, args: inputs.append(args))
    model(images)
    host: Any = site.module
    with probe_attention(site, inputs[0], {}, (4, 4)) as probe:
        rows = torch.stack([probe.one(n) for n in range(17)], 2)
    v = split_qkv(host.qkv(inputs[0][0]), 4)[2]
    order = [*range(1, 17), 0]  # the grid first, then the class token
    want = host.mixer(*split_qkv(host.qkv(inputs[0][0]), 4), inputs[0][0], (4, 4))
    torch.testing.assert_close(rows @ v[:, :, order], want[:, :, order], atol=1e-5, rtol=1e-4)


BAD: list[tuple[Any, type[Exception], str]] = [
    (Capture(words=("cls",)), ConfigError, "class, mean"),
    (Capture(words=("register1",)), ConfigError, "class, mean"),
    (Capture(points=((0.5, 0.5, 1),)), ConfigError, "frame"),
    (Capture(start=0.5), ConfigError, "start"),
    (Capture(rows="uncond"), ConfigError, "rows"),
    (Capture(refine=1), ConfigError, "refine"),
    (Capture(reduce="ema"), ConfigError, "ema"),
    (Capture(sites="blocks.7.attn"), SiteError, "blocks.1.attn"),
    (PAG(), UnsupportedModelError, "one Capture"),
]


@pytest.mark.parametrize(("control", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input(control: Any, error: type[Exception], said: str) -> None:
    model = vit()
    with pytest.raises(error, match=said):
        attnctl.control(model, control)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("capture", "said"), [(Capture(heads=(9,)), "4 heads"), (Capture(budget=10), "budget=10")])
def test_bad_input_seen_when_run(capture: Capture, said: str) -> None:
    model = vit()
    with attnctl.control(model, capture), pytest.raises(ConfigError, match=said):
        model(torch.rand(1, 3, 32, 32))
    assert not model.blocks[0].attn._forward_hooks
    assert not model.blocks[0].attn.qkv._forward_hooks


def test_compiled_models() -> None:
    with pytest.raises(UnsupportedModelError, match=r"before torch\.compile"):
        attnctl.control(torch.compile(vit()), Capture())
    model = vit()
    model.compile()
    with pytest.raises(UnsupportedModelError, match=r"before torch\.compile"):
        attnctl.control(model, Capture())


def test_models_without_readable_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="ViT and DeiT"):
        attnctl.control(timm.create_model("resnet18"), Capture())
