"""Attention swaps in timm models: what they compute, what they keep, how they go."""

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
from attnctl.backbones.mixers import MIXERS, Slot
from attnctl.backbones.mixers.linear import inline, mala, rala
from attnctl.backbones.mixers.softmax import NeighborhoodMixer, sigmoid_attention
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels.neighborhood.axes import axes_of, neighborhood_mask

KINDS = [kind for kind, mixer in MIXERS.items() if mixer.__module__.startswith("attnctl.")]
OPTIONS: dict[str, dict[str, Any]] = {
    "agent": {"num_agents": 4}, "bra": {"window_size": 2, "topk": 1},
    "multiaxis": {"window": 2, "grid_size": 2, "mode": "mean"},
    "neighborhood": {"kernel": 3}, "moh": {"shared": 0}, "vsa": {"window": 3},
}  # fmt: skip


def hosts() -> dict[str, nn.Module]:
    """Build one small model of every host family; all take 32 px images."""
    torch.manual_seed(0)
    swin = {"img_size": 32, "depths": (1, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4}
    vit = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 4, "reg_tokens": 2}
    pvt = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    windows = MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8)
    maxvit = MaxxVit(MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows), img_size=32, num_classes=3)
    maxvit.pretrained_cfg = {"input_size": (3, 32, 32)}
    return {
        "vit": timm.create_model("vit_tiny_patch16_224", num_classes=3, **vit).eval(),
        "swin": timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **swin).eval(),
        "pvt": timm.create_model("pvt_v2_b0", num_classes=3, **pvt).eval(),
        "maxvit": maxvit.eval(),
    }


def image() -> Tensor:
    """Draw two images of the hosts' size."""
    return torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_host(kind: str) -> None:
    for name, model in hosts().items():
        options = OPTIONS.get(kind, {})
        x = image()
        plain = model(x)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        before = set(vars(model))
        assert attnctl.swap(model, kind, **options) is model
        if (kind, name) == ("sparsifiner", "pvt"):  # its predictor is for one number of tokens: that of 224 px here
            with pytest.raises(ConfigError, match="64 tokens were given; this predictor is for 3136"):
                model(x)
            continue
        report = attnctl.swap_report(model)
        changed = model(x)
        assert changed.isfinite().all()
        if (kind, name) not in (("moh", "vit"), ("gated", "vit")):
            assert not torch.equal(changed, plain), name
        changed.sum().backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == [], name
        assert set(model.state_dict()) == (set(state) - set(report.dropped)) | set(report.new)
        assert report.parameters[1] == sum(p.numel() for p in model.parameters())
        assert kind in str(report)
        assert torch.equal(copy.deepcopy(model)(x), changed)
        attnctl.unswap(model)
        assert torch.equal(model(x), plain)
        assert set(vars(model)) == before
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_agents_for_every_token() -> None:
    model = hosts()["vit"]
    attnctl.swap(model, "agent", num_agents="all")
    host = model.blocks[0].attn
    x = torch.rand(1, 3 + 64, 32)
    q, k, v = host.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    t, s = q[:, :, 3:], 8**-0.5
    gathered = (t @ k.transpose(-2, -1) * s).softmax(-1) @ v
    want = ((q @ t.transpose(-2, -1) * s).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    torch.testing.assert_close(host(x), host.proj(want), atol=1e-5, rtol=1e-4)


def test_all_windows_and_full_heads_change_nothing() -> None:
    for kind, options in (
        ("bra", {"topk": None, "window_size": 4}),
        ("multiaxis", {"window": 8, "grid_size": 8}),
        ("neighborhood", {"kernel": 17}),
        ("moh", {"shared": 1}),
    ):
        model, x = hosts()["vit"], image()
        plain = model(x)
        torch.testing.assert_close(attnctl.swap(model, kind, **options)(x), plain, atol=1e-6, rtol=1e-5)


def test_routing_by_the_scale_of_biformer() -> None:
    model = attnctl.swap(hosts()["vit"], "bra", topk=None, window_size=4, scale="dim")
    host, x = model.blocks[0].attn, torch.rand(1, 3 + 64, 32)
    q, k, v = host.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    want = host.proj(((q @ k.mT * 32**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(host(x), want, atol=1e-6, rtol=1e-5)


def test_linear_forms_against_written_out_weights() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 4).double().unbind(0)
    n, s = 10, 0.5
    weights = (q @ k.transpose(-2, -1) * s) / n + (1 - s * q @ k.mean(2, keepdim=True).transpose(-2, -1)) / n
    torch.testing.assert_close(inline(q, k, v, s), weights @ v, atol=1e-5, rtol=1e-4)
    fq, fk = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    z = s * fq @ fk.mean(2, keepdim=True).transpose(-2, -1)
    weights = (1 + 1 / (z + 1e-6)) * (fq @ fk.transpose(-2, -1)) * s / n - z / n
    torch.testing.assert_close(mala(q, k, v, s), weights @ v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 10).double(), atol=1e-4, rtol=0)
    alpha = (s * fq.mean(2, keepdim=True) @ fk.transpose(-2, -1)).softmax(-1) * n
    weights = fq @ (fk * alpha.transpose(-2, -1)).transpose(-2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(rala(q, k, v, s), weights @ v, atol=1e-5, rtol=1e-4)
    b = torch.tensor([-1.0, -2.0])
    want = (q @ k.transpose(-2, -1) * s + b.view(1, 2, 1, 1)).sigmoid() @ v
    torch.testing.assert_close(sigmoid_attention(q, k, v, s, b), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"dilation": 2}, {"kernel": 4, "stride": 2}, {"kernel": (3, 5), "causal": True}])
def test_neighbourhood(more: dict[str, Any]) -> None:
    window = {"kernel": 3, "stride": 1, "dilation": 1, "causal": False} | more
    q, k, v = (torch.randn(2, 2, 65, 8) for _ in range(3))
    mixer = NeighborhoodMixer(Slot(16, 2, (7, 9), 2, 0.3), **window)
    seen = neighborhood_mask(axes_of((7, 9), *window.values()))
    seen = nn.functional.pad(seen, [2, 0, 2, 0], value=True)
    want = (q @ k.mT * 0.3).masked_fill(~seen, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(mixer(q, k, v, q, (7, 9)), want, atol=1e-5, rtol=1e-5)


def test_the_report_names_what_is_new_once() -> None:
    report = attnctl.swap_report(attnctl.swap(hosts()["pvt"], "agent", num_agents=4))
    assert len(report.new) == 2 * 8
    first, new, unused = str(report).splitlines()
    assert first.startswith("agent: 2 places swapped, parameters ")
    assert "mixer.bias.an_bias (2), " in new
    assert unused.strip() == "unused now: sr.weight (1), sr.bias (1), norm.weight (1), norm.bias (1)"


def test_blocks_stack_and_multiply_adds() -> None:
    model, x = hosts()["vit"], image()
    plain = model(x)
    attnctl.swap(model, "agent", blocks=0, num_agents=4)
    attnctl.swap(model, "inline", blocks="blocks.1.*")
    assert attnctl.swap_report(model).sites == ("blocks.1.attn",)
    before, after = attnctl.swap_report(model).macs()
    assert before > 0
    assert after != before
    attnctl.unswap(attnctl.unswap(model))
    assert torch.equal(model(x), plain)


def test_keeps_modes_frozen_weights_and_dtype() -> None:
    model = hosts()["vit"].train().requires_grad_(False).to(torch.bfloat16)
    attnctl.swap(model, "agent", num_agents=4)
    assert all(m.training for m in model.modules())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in attnctl.swap_report(model).new)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image().bfloat16()).dtype == torch.bfloat16


def test_dynamic_size() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1, num_classes=3, dynamic_img_size=True
    ).eval()
    attnctl.swap(model, "agent", num_agents=4)
    assert model(torch.rand(1, 3, 16, 40)).isfinite().all()
    attnctl.unswap(model)
    assert not model.patch_embed._forward_hooks


VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}
SWIN = {"img_size": 32, "depths": (1, 1), "embed_dim": 16, "num_heads": (2, 4)}
PVT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
EXTRACTORS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT, "swin_tiny_patch4_window7_224": SWIN, "pvt_v2_b0": PVT,
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRACTORS)
def test_feature_extractors(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(0, 1), **EXTRACTORS[name]).eval()
    x = torch.rand(1, 3, 32, 32)
    plain = model(x)
    attnctl.swap(model, "agent", num_agents=4)
    assert [m.shape for m in model(x)] == [m.shape for m in plain]
    assert not torch.equal(model(x)[-1], plain[-1])
    before, after = attnctl.swap_report(model).macs((3, 32, 32))
    assert before != after
    assert torch.equal(attnctl.unswap(model)(x)[-1], plain[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_maxvit_that_takes_any_size(kind: str) -> None:
    model, x = any_size(hosts()["maxvit"]), torch.rand(1, 3, 36, 44)
    plain = model(x)
    swapped = attnctl.swap(model, kind, blocks=0, **OPTIONS.get(kind, {}))
    if kind == "sparsifiner":  # its predictor is for one number of tokens
        with pytest.raises(ConfigError, match="Swap again for the new size"):
            swapped(x)
        return
    assert swapped(x).shape == plain.shape
    assert not torch.equal(swapped(x), plain)
    assert torch.equal(attnctl.unswap(swapped)(x), plain)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["agent", "bra"])
def test_compile(kind: str) -> None:
    model, x = hosts()["vit"], image()
    attnctl.swap(model, kind, **OPTIONS.get(kind, {}))
    with torch.no_grad():
        fast = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "agnet"}, ConfigError, "'agent'"),
    ({"kind": "agent", "agents": 4}, ConfigError, "'num_agents'"),
    ({"kind": "agent", "num_agents": 5}, ConfigError, "square grid"),
    ({"kind": "agent", "init": "ones"}, ConfigError, "'trunc'"),
    ({"kind": "bra", "topk": 99}, ConfigError, "topk=99"),
    ({"kind": "bra", "scale": "both"}, ConfigError, "'dim'"),
    ({"kind": "multiaxis", "window": 0}, ConfigError, "at least 1"),
    ({"kind": "moh", "shared": 4}, ConfigError, "shared=4"),
    ({"kind": "moh", "topk": 9}, ConfigError, "topk=9"),
    ({"kind": "neighborhood", "kernel": 4, "stride": 5}, ConfigError, "cannot share a window"),
    ({"kind": "agent", "blocks": 9}, SiteError, "0 to 1"),
    ({"kind": "agent", "blocks": "block.0.attn"}, SiteError, "blocks.0.attn"),
    ({"kind": "agent", "blocks": []}, SiteError, "names nothing"),
]


@pytest.mark.parametrize(("call", "error", "said"), BAD, ids=[str(c) for c, _, _ in BAD])
def test_bad_input(call: dict[str, Any], error: type[Exception], said: str) -> None:
    model = hosts()["vit"]
    state = list(model.state_dict())
    with pytest.raises(error, match=said):
        attnctl.swap(model, **call)
    assert list(model.state_dict()) == state
    with pytest.raises(ConfigError, match="no swapped attention"):
        attnctl.unswap(model)


def test_models_without_such_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention that can be swapped"):
        attnctl.swap(timm.create_model("resnet18"), "agent")


def test_masks_are_refused() -> None:
    model = hosts()["vit"]
    attnctl.swap(model, "agent", blocks=0, num_agents=4)
    x = torch.rand(1, 3 + 64, 32)
    with pytest.raises(ConfigError, match="without masks"):
        model.blocks[0].attn(x, attn_mask=torch.ones(67, 67, dtype=torch.bool))
    with pytest.raises(ConfigError, match="66 patch tokens were given, but the grid is 8x8"):
        model.blocks[0].attn(torch.rand(1, 3 + 66, 32))
