"""Networks of vision papers: outputs, parameters and key lists of the published code, timm's interface, reading."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import timm
import torch
from vit2 import FOLDER, agrees, close, fixture

import attnctl
import attnctl.backbones  # registers the names
from attnctl.backbones.mixers.moh import balance
from attnctl.backbones.models import (
    crossformer,
    emov2,
    inline,
    l2vit,
    moat,
    moh_transnext,
    nat_relatives,
    soft,
    spectformer,
)
from attnctl.backbones.models.agent_swin import AgentSwinBlock
from attnctl.backbones.modules.groups import GroupAttention2d
from attnctl.backbones.modules.inline import InLineAttention2d
from attnctl.backbones.modules.softmax_free import SoftmaxFreeAttention2d, newton_inverse
from attnctl.backbones.modules.transnext import AggregatedAttention2d, CosineAttention2d
from attnctl.errors import UnsupportedModelError
from attnctl.processors import Capture

GATES = {f"{a}.weight": f"gates.{b}.weight" for a, b in (("wg", "route"), ("wg_0", "split"), ("wg_1", "share"))}
COUNTS = json.loads((FOLDER / "model_counts.json").read_text())
KEYS = {
    "ravlt_t": "ravlt_tiny", "mala_s": "mavit_small", "nat_mini": "nat_mini", "dinat_tiny": "dinat_tiny",
    "crossformer_tiny": "crossformer_tiny", "crossformer_pp_small": "crossformer_pp_small", "l2vit_tiny": "l2vit_tiny",
    "emo2_1m": "emov2_1m", "inline_deit_tiny": "inline_deit_tiny", "inline_pvt_tiny": "inline_pvt_tiny",
    "inline_swin_tiny": "inline_swin_tiny", "inline_cswin_tiny": "inline_cswin_tiny",
    "moh_transnext_base_50": "moh_transnext_base_50", "soft_tiny": "soft_tiny", "dinat_s_tiny": "dinat_s_tiny",
    "dinat_isotropic_small": "dinat_isotropic_small", "spectformer_s": "spectformer_s",
    "spectformer_vanilla_xs": "spectformer_vanilla_xs",
}  # fmt: skip
# What the rows of attention sum to, where that is known: two softmaxes are added in EMOv2.
SUMS = {
    "crossformer_micro": 1.0, "l2vit_micro": None, "emov2_micro": 2.0, "inline_deit_micro": None,
    "inline_pvt_micro": None, "inline_swin_micro": None, "inline_cswin_micro": None, "moh_transnext_micro": None,
    "ravlt_micro": None, "mavit_micro": None, "nat_micro": 1.0,
    "dinat_s_micro": 1.0, "moat_micro": 1.0, "soft_micro": None, "spectformer_micro": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["sda", "sda_padded", "lda", "lda_padded", "lda_padded_sym", "acl"])
def test_blocks_of_crossformer(name: str) -> None:
    _, _, w, a = fixture(f"crossformer_block_{name}")
    step = a["interval"] if a["lsda_flag"] else 1
    block = crossformer.CrossFormerBlock(
        a["dim"], a["num_heads"], a["group_size"], step, a["mlp_ratio"], a["use_extra_conv"],
        both_sides=bool(a.get("pad_type")),
    )  # fmt: skip
    agrees(f"crossformer_block_{name}", block, w, a["input_resolution"])


@torch.no_grad()
def test_crossformer() -> None:
    x, y, w, _ = fixture("crossformer_attn_dpb")
    attention = GroupAttention2d(48, 3, 4)
    attention.load_state_dict(w)
    close(attention.mix(x["x"], 4), y["y"])
    _, _, w, a = fixture("crossformer_small_model")
    model = crossformer.CrossFormer(
        16, tuple(a["depths"]), tuple(a["num_heads"]), tuple(a["group_size"]), tuple(a["crs_interval"]),
        mlp_ratio=1.0, num_classes=10,
    )  # fmt: skip
    agrees("crossformer_small_model", model, crossformer.checkpoint_filter_fn(w, model), whole=True)


@pytest.mark.parametrize("name", ["linear_attn", "linear_attn_unclamped", "lga_block", "lwa_block", "small_model"])
def test_l2vit(name: str) -> None:
    _, _, w, a = fixture(f"l2vit_{name}")
    if name == "small_model":
        model = l2vit.L2ViT(tuple(a["dims"]), tuple(a["depths"]), tuple(a["num_heads"]), 4, 1.0, num_classes=10)
        agrees("l2vit_small_model", model, l2vit.checkpoint_filter_fn(w, model), whole=True)
        return
    module: torch.nn.Module = l2vit.LinearAttention2d(a["dim"], a["num_heads"])
    if "block" in name:
        local = name == "lwa_block"
        module = l2vit.L2ViTBlock(a["dim"], a["num_heads"], local, a.get("window_size", 7), a["mlp_ratio"])
    agrees(f"l2vit_{name}", module, w, (6, 9))


@pytest.mark.parametrize("name", ["close", "remote", "hybrid", "i2rmb_down", "i2rmb_hybrid", "small_model"])
def test_emov2(name: str) -> None:
    _, _, w, a = fixture(f"emov2_{name}")
    if name == "small_model":
        model = emov2.EMOv2(
            tuple(a["embed_dims"]), tuple(a["depths"]), tuple(a["exp_ratios"]), tuple(a["dim_heads"]), window=4,
            num_classes=10,
        )  # fmt: skip
        agrees("emov2_small_model", model, emov2.checkpoint_filter_fn(w, model), whole=True)
    elif name.startswith("i2rmb"):
        more: dict[str, Any] = {"stride": 2, "early": True} if "down" in name else {"kind": "hybrid", "dim_head": 8}
        block = emov2.InvertedResidual(a["dim_in"], a["dim_out"], int(a["dim_in"] * a["exp_ratio"]), window=4, **more)
        agrees(f"emov2_{name}", block, {k.replace("norm.norm.", "norm."): v for k, v in w.items()} if "hybrid" in name
               else w)  # fmt: skip
    else:
        agrees(f"emov2_{name}", emov2.HybridAttention2d(16, 32, 8, 4, name), w)


def test_inline_attention_and_blocks() -> None:
    _, _, w, _ = fixture("inline_deit_attn")
    agrees("inline_deit_attn", InLineAttention2d(24, 3, prefix=1), w)
    x, y, w, _ = fixture("inline_pvt_attn")
    agrees("inline_pvt_attn", InLineAttention2d(24, 3, split_qkv=True), w, (int(x["H"]), int(x["W"])))
    agrees("inline_swin_block", AgentSwinBlock(24, (8, 8), 3, mlp_ratio=2.0, form="I"),
           fixture("inline_swin_block")[2], (8, 8))  # fmt: skip
    x, y, w, _ = fixture("inline_cswin_attn_full")
    full = inline.InLineFull(24, 3)
    full.load_state_dict(w)
    q, k, v = x["qkv"].unflatten(2, (6, 6))
    close(full(q, k, v, x["x_mean"]).detach().flatten(1, 2), y["y"])
    block = inline.InLineCSwinBlock(24, 3, (6, 6), mlp_ratio=2.0)
    agrees("inline_cswin_block", block, fixture("inline_cswin_block")[2], (6, 6))


def test_inline_models() -> None:
    _, _, w, a = fixture("inline_deit_small_model")
    deit = inline.InLineVisionTransformer(
        img_size=48, patch_size=16, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=10
    )
    agrees("inline_deit_small_model", deit, inline.checkpoint_filter_fn(w, deit), whole=True)
    _, _, w, a = fixture("inline_pvt_small_model")
    pvt = inline.InLinePVT(
        a["attn_type"], tuple(a["num_heads"]), img_size=32, dims=tuple(a["embed_dims"]), depths=tuple(a["depths"]),
        mlp_ratios=tuple(a["mlp_ratios"]), num_classes=10,
    )  # fmt: skip
    agrees("inline_pvt_small_model", pvt, inline.checkpoint_filter_fn(w, pvt), whole=True)


@pytest.mark.parametrize("name", ["attn_allshared", "attn_shared1_top2of3", "agg_allshared", "agg_shared2_top2of4"])
def test_attention_of_moh_transnext(name: str) -> None:
    x, y, w, a = fixture(f"moh_transnext_{name}")
    heads = a["dim"], a["num_heads"], a["shared_head"], a["routed_head"]
    module = CosineAttention2d(*heads) if name.startswith("attn") else AggregatedAttention2d(*heads, a["sr_ratio"])
    names = {
        "wg.weight": "gates.route.weight",
        "wg_0.weight": "gates.split.weight",
        "wg_1.weight": "gates.share.weight",
    }
    agrees(f"moh_transnext_{name}", module, {names.get(k, k): v for k, v in w.items()}, a["input_resolution"])
    if "l_aux" in y:
        module.train()(x["x"].unflatten(1, a["input_resolution"]))
        close(balance(module).detach().reshape(1), y["l_aux"])


def test_moh_transnext() -> None:
    _, _, w, a = fixture("moh_transnext_small_model")
    per_stage = ("embed_dims", "depths", "num_heads", "shared_head", "routed_head", "mlp_ratios", "sr_ratios")
    model = moh_transnext.MoHTransNeXt(*(tuple(a[n]) for n in per_stage), num_classes=10)
    agrees("moh_transnext_small_model", model, moh_transnext.checkpoint_filter_fn(w, model), whole=True)


@pytest.mark.parametrize("name", ["attn_r2", "attn_r4", "norm_attn_r2", "norm_attn_r4"])
def test_softmax_free_attention(name: str) -> None:
    _, _, w, a = fixture(f"soft_{name}")
    module = SoftmaxFreeAttention2d(a["dim"], a["num_heads"], a["ratio"], a["conv_size"], name.startswith("norm"))
    agrees(f"soft_{name}", module, w, (8, 6) if name.endswith("r2") else (8, 12))


def test_softmax_free_block_and_inverse() -> None:
    block = soft.SoftmaxFreeBlock(16, 2, 2, 3)
    agrees("soft_block", block, {k.removeprefix("att."): v for k, v in fixture("soft_block")[2].items()}, (8, 6))
    x, y, _, _ = fixture("soft_newton")
    close(newton_inverse(x["mat"]), y["inv"])
    matrix = x["mat"].double().requires_grad_()  # symmetric and well conditioned: the gradient is the inverse's
    seed = torch.rand_like(matrix)
    (got,) = torch.autograd.grad((newton_inverse(matrix, iterations=40) * seed).sum(), matrix)
    inverse = (matrix.detach() + 0.01 * torch.eye(12)).inverse()
    torch.testing.assert_close(got, -inverse.mT @ seed @ inverse.mT, rtol=1e-4, atol=1e-4)


def test_relatives_of_nat() -> None:
    _, _, w, a = fixture("dinats_small_model")
    dilations = tuple(map(tuple, a["dilations"]))
    swin = nat_relatives.DiNATs(8, tuple(a["depths"]), tuple(a["num_heads"]), 3, dilations, 2.0, num_classes=10)
    agrees("dinats_small_model", swin, nat_relatives.checkpoint_filter_fn(w, swin), whole=True)
    _, _, w, a = fixture("vitrpb_iso_small_model")
    flat = nat_relatives.NATIsotropic(24, 2, 3, 5, mlp_ratio=2.0, num_classes=10)
    agrees("vitrpb_iso_small_model", flat, nat_relatives.checkpoint_filter_fn(w, flat), whole=True)


@pytest.mark.parametrize(
    "name", ["block_s1_global", "block_s2_window", "block_s1_resizedpe", "block_s1_nope", "mbconv_s1", "mbconv_s2",
             "mbconv_s2_pool3_odd"],
)  # fmt: skip
@torch.no_grad()
def test_moat(name: str) -> None:
    x, y, arrays, a = fixture(f"moat_{name}")
    more: dict[str, Any] = {"attention": False, "pool": a.get("pool_size", 2)}
    if name.startswith("block"):
        places = None if name.endswith("nope") else a["position_embedding_size"]
        more = {"expansion": a["expansion_rate"], "head": a["head_size"], "places": places}
        more["window"] = a.get("window_size", [None])[0]
    block = moat.MOATBlock(x["x"].shape[-1], a["hidden_size"], a["block_stride"], **more).eval()
    weights = moat.from_tensorflow({k.partition("/")[2]: v for k, v in arrays.items()})
    wrong = block.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys
    assert all(k.endswith("num_batches_tracked") for k in wrong.missing_keys)
    close(block(x["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1), y["y"])


def test_spectformer() -> None:
    agrees("spectformer_gate", spectformer.SpectralGate(16, (7, 7)), fixture("spectformer_gate")[2], (7, 7))
    weights = fixture("spectformer_attn_block")[2]
    block = spectformer.SpectralBlock(32, 2, 2.0)
    agrees("spectformer_attn_block", block, {k.replace("dwconv.dwconv", "dwconv"): v for k, v in weights.items()},
           (5, 6))  # fmt: skip
    agrees("spectformer_class_block", spectformer.ClassBlock(32, 2, 2.0), fixture("spectformer_class_block")[2])


@pytest.mark.parametrize("name", [n for n in COUNTS if n.endswith(("_tiny", "_mini", "_1m", "_2m"))])
def test_published_models_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", KEYS)
def test_published_keys_load(name: str) -> None:
    keys = json.loads((FOLDER / f"state_dict_{name}.json").read_text())["keys"]
    with torch.device("meta"):
        model = timm.create_model(KEYS[name])
        state = {k: torch.empty(shape) for k, (shape, _) in keys.items()}
    loaded = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", SUMS)
def test_interface_of_timm_and_reading(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1)
    x = torch.rand(2, 3, 64, 64) if name == "soft_micro" else torch.rand(2, 3, 32, 32)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().requires_grad_(False)
    plain = model(x)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), plain)
    features = timm.create_model(name, features_only=True)
    channel = -1 if "swin_micro" in name and "cswin" not in name else 1
    assert [m.shape[channel] for m in features(x)] == features.feature_info.channels()
    if name == "soft_micro":
        with pytest.raises(UnsupportedModelError, match="through landmarks"):
            attnctl.find_sites(model)
        return
    with attnctl.control(model, Capture(points=((0.6, 0.3),))) as handle:
        assert torch.equal(model(x), plain)
        layers = handle.maps.layers
    assert list(layers) == [s.name for s in attnctl.find_sites(model)]
    assert all(layer.isfinite().all() for layer in layers.values())
    if SUMS[name] is not None:  # deeper maps are padded
        total = next(iter(layers.values())).sum((-2, -1))
        torch.testing.assert_close(total, torch.full_like(total, SUMS[name]), atol=1e-4, rtol=0)
