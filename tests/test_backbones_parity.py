"""BiFormer and the Agent families against recorded runs of the published code (tests/fixtures/vit)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from attnctl.backbones import (
    AgentAttention2d,
    AgentCSwin,
    AgentPVT,
    AgentSwinTransformer,
    AgentVisionTransformer,
    BiFormer,
    BiLevelRoutingAttention,
    MapAttention,
)  # fmt: skip
from attnctl.backbones.models import agent_cswin, agent_deit, agent_pvt, agent_swin, biformer
from attnctl.backbones.modules.resize import fit_weight

FIXTURES = Path(__file__).parent / "fixtures" / "vit"


class Case(NamedTuple):
    """One recorded case."""

    kwargs: dict[str, Any]
    state: dict[str, Tensor]
    given: dict[str, Tensor]
    wanted: dict[str, Tensor]


def load(name: str) -> Case:
    """Load a recorded case."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    parts: list[dict[str, Tensor]] = [
        {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("sd.", "input.", "output.")
    ]
    return Case(json.loads((FIXTURES / f"{name}.json").read_text())["kwargs"], *parts)


def ready(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load recorded weights strictly."""
    module.load_state_dict(state)
    return module.eval()


def close(got: Tensor, want: Tensor, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Compare within the tolerance that the fixtures ask for."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def model_close(model: nn.Module, case: Case) -> None:
    """Compare the logits and pooled features of a whole model."""
    with torch.no_grad():
        close(model(case.given["x"]), case.wanted["logits"], 1e-3, 1e-4)
        features = model.forward_head(model.forward_features(case.given["x"]), pre_logits=True)
        close(features, case.wanted["features"], 1e-3, 1e-4)


def routing(k: dict[str, Any], pad: str) -> BiLevelRoutingAttention:
    """Build the module of a recorded configuration."""
    return BiLevelRoutingAttention(
        k["dim"], k["num_heads"], k["n_win"], topk=k["topk"], side_dwconv=k["side_dwconv"], qk_dim=k.get("qk_dim"),
        kv_pool=k.get("kv_downsample_mode", "identity"), kv_per_win=k.get("kv_per_win", 1),
        kv_ratio=k.get("kv_downsample_ratio", 1), soft_routing=k.get("soft_routing", False),
        diff_routing=k.get("diff_routing", False), param_routing=k.get("param_routing", False),
        out_proj=k.get("param_attention", "qkvo") == "qkvo", pad=pad,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["ada_avgpool_kv2", "allwindows_2win", "autopad_20x17", "basic_7win", "maxpool_ratio2", "param_diff_soft",
     "qkdim_qkv", "rect_14x28", "soft_routing", "topk1_4win"],
)  # fmt: skip
def test_routing(name: str) -> None:
    case = load(f"bra_{name}")
    pad = "pre" if case.kwargs.get("auto_pad") else "none"
    out, weight, index = ready(routing(case.kwargs, pad), case.state).routed(case.given["x"])
    close(out, case.wanted["y"])
    close(weight, case.wanted["r_weight"])
    if pad == "none":  # fully padded windows tie, and either choice gives the same output
        assert torch.equal(index, case.wanted["r_idx"])


@pytest.mark.parametrize("name", ["basic", "pad_20x17"])
def test_routing_refactored(name: str) -> None:
    case = load(f"bra_nchw_{name}")
    state = {
        k.replace("qkv_linear", "qkv.qkv").replace("output_linear", "wo"): v
        if "lepe" in k or v.ndim < 4
        else v[..., 0, 0]
        for k, v in case.state.items()
    }
    out = ready(routing(case.kwargs, "post"), state)(case.given["x"].permute(0, 2, 3, 1))
    close(out.permute(0, 3, 1, 2), case.wanted["y"])


@pytest.mark.parametrize("name", ["lepe", "plain", "lepe_nchw"])
def test_map_attention(name: str) -> None:
    case, nchw = load(f"attention_{name}"), name.endswith("nchw")
    state = {k: v if "lepe" in k or v.ndim < 4 else v[..., 0, 0] for k, v in case.state.items()}
    side = case.kwargs.get("side_dwconv", 0)
    bias = "qkv.bias" in state
    module = ready(MapAttention(64, 8, side_dwconv=side, side="v" if nchw else "input", qkv_bias=bias), state)
    x = case.given["x"]
    close(module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nchw else module(x), case.wanted["y"])


@pytest.mark.parametrize("name", ["mlpdw_nopos_ls", "postnorm_ls", "prenorm", "topk0_conv", "topk_m2"])
def test_biformer_block(name: str) -> None:
    case = load(f"block_{name}")
    k = case.kwargs
    block = biformer.BiFormerBlock(
        k["dim"], k["num_heads"], n_win=k["n_win"], topk=k["topk"], qk_dim=k["qk_dim"], mlp_ratio=k["mlp_ratio"],
        mlp_dwconv=k.get("mlp_dwconv", False), side_dwconv=k["side_dwconv"], pos_dwconv=k["before_attn_dwconv"],
        layer_scale=k.get("layer_scale_init_value"), pre_norm=k.get("pre_norm", True),
    )  # fmt: skip
    close(ready(block, case.state)(case.given["x"]), case.wanted["y"])


@pytest.mark.parametrize("name", ["model", "autopad"])
def test_biformer(name: str) -> None:
    case = load(f"biformer_small_{name}")
    k = case.kwargs
    model = BiFormer(
        k["depth"], k["embed_dim"], k["mlp_ratios"], k["topks"], k["head_dim"], n_win=k["n_win"],
        num_classes=k["num_classes"],
    )  # fmt: skip
    ready(model, biformer.checkpoint_filter_fn({"model": case.state}, model))
    with torch.no_grad():
        last, maps = model.forward_intermediates(case.given["x"])
        close(model(case.given["x"]), case.wanted["logits"], 1e-3, 1e-4)
    close(last, case.wanted["features"], 1e-3, 1e-4)
    for i, stage in enumerate(maps):
        close(stage, case.wanted[f"stage{i}"], 1e-3, 1e-4)


@pytest.mark.parametrize(
    "name",
    ["deit_attn_w14_a49", "deit_attn_w8_a9", "swin_attn_dynamic", "swin_attn_w14_a49", "swin_attn_w8_a9",
     "pvt_attn_dynamic", "pvt_attn_sr1", "pvt_attn_sr2"],
)  # fmt: skip
def test_agent_attention(name: str) -> None:
    case = load(f"agent_{name}")
    k, pvt = case.kwargs, name.startswith("pvt")
    side = int(k["num_patches"] ** 0.5) if pvt else k.get("window")
    base = (side, side) if side else tuple(k["window_size"])
    agents = tuple(k["downstream_agent_shape"]) if "downstream_agent_shape" in k else None
    grid = tuple(k["hw_shape"]) if "hw_shape" in k else (k["H"], k["W"]) if pvt else None
    module = AgentAttention2d(
        k["dim"], k["num_heads"], base, k["agent_num"], qkv_bias=k["qkv_bias"], prefix=int(name.startswith("deit")),
        agent_grid=agents, split_qkv=pvt, sr_ratio=k.get("sr_ratio", 1),
    )  # fmt: skip
    close(ready(module, case.state)(case.given["x"], grid=grid), case.wanted["y"])


@pytest.mark.parametrize("index", ["0", "1", "m1"])
def test_agent_stripes(index: str) -> None:
    case = load(f"agent_cswin_attn_idx{index}")
    shape = {"0": "columns", "1": "rows", "m1": "full"}[index]
    agents = case.kwargs["agent_num"]
    module = ready(agent_cswin.AgentStripes(32, 4, shape, case.kwargs["split_size"], (14, 14), agents), case.state)
    q, k, v = case.given["qkv"].unflatten(2, (14, 14))
    close(module(q, k, v).flatten(1, 2), case.wanted["y"])


@pytest.mark.parametrize("name", ["A_full", "A_split", "B_last", "B_split"])
def test_cswin_block(name: str) -> None:
    case = load(f"agent_cswin_block_{name}")
    k = case.kwargs
    full = k.get("last_stage", False) or k["reso"] == k["split_size"]
    grid = (k["reso"], k["reso"])
    block = agent_cswin.CSwinBlock(32, 4, grid, k["attn_type"], k["split_size"], full, k.get("agent_num", 49))
    close(ready(block, case.state)(case.given["x"].unflatten(1, grid)).flatten(1, 2), case.wanted["y"])


@pytest.mark.parametrize("name", ["A", "A_windows", "B_shift"])
def test_swin_block(name: str) -> None:
    case = load(f"agent_swin_block_{name}")
    k, grid = case.kwargs, tuple(case.kwargs["input_resolution"])
    state = {n: v for n, v in case.state.items() if not n.endswith(("attn_mask", "relative_position_index"))}
    block: nn.Module
    if name == "B_shift":
        block = SwinTransformerBlock(32, grid, 4, window_size=7, shift_size=3)
    else:
        block = agent_swin.AgentSwinBlock(32, grid, 4, k["agent_num"], k["window_size"], k["shift_size"])
    close(ready(block, state)(case.given["x"].unflatten(1, grid)).flatten(1, 2), case.wanted["y"])


def test_pvt_block_and_attention() -> None:
    case = load("agent_pvt_block")
    block = ready(agent_pvt.PVTBlock(32, 4, (16, 16), "A", 9, norm_eps=1e-5), case.state)
    close(block(case.given["x"].unflatten(1, (16, 16))).flatten(1, 2), case.wanted["y"])
    case = load("pvt_softmax_attn")
    attention = ready(agent_pvt.ReducedAttention(32, 4, sr_ratio=4), case.state)
    close(attention(case.given["x"].unflatten(1, (16, 16))).flatten(1, 2), case.wanted["y"])


def test_deit_block() -> None:
    case = load("agent_deit_block")
    block = Block(32, 4, 4.0, qkv_bias=True, norm_layer=nn.LayerNorm)
    block.attn = AgentAttention2d(32, 4, (8, 8), 16, prefix=1)
    close(ready(block, case.state)(case.given["x"]), case.wanted["y"])


def test_agent_models() -> None:
    case = load("agent_deit_small_model")
    agents = tuple(map(int, case.kwargs["agent_num"]))
    deit = AgentVisionTransformer(
        agents, 3, img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10
    )
    model_close(ready(deit, agent_deit.checkpoint_filter_fn({"model": case.state}, deit)), case)

    case = load("agent_pvt_small_model")
    k, agents = case.kwargs, tuple(map(int, case.kwargs["agent_num"]))
    pvt = AgentPVT(
        64, k["depths"], k["embed_dims"], k["num_heads"], k["mlp_ratios"], agents, attn_type=k["attn_type"],
        sr_ratios=k["sr_ratios"], num_classes=10,
    )  # fmt: skip
    model_close(ready(pvt, agent_pvt.checkpoint_filter_fn({"model": case.state}, pvt)), case)

    case = load("agent_swin_small_model")
    k, agents = case.kwargs, tuple(map(int, case.kwargs["agent_num"]))
    swin = AgentSwinTransformer(
        k["attn_type"], agents, img_size=112, patch_size=2, embed_dim=16, depths=k["depths"],
        num_heads=k["num_heads"], mlp_ratio=2.0, num_classes=10,
    )  # fmt: skip
    model_close(ready(swin, agent_swin.checkpoint_filter_fn({"model": case.state}, swin)), case)

    case = load("agent_cswin_small_model")
    k, agents = case.kwargs, tuple(map(int, case.kwargs["agent_num"]))
    cswin = AgentCSwin(
        128, k["depth"], 16, k["num_heads"], k["split_size"], None, agents, k["attn_type"], num_classes=10
    )
    model_close(ready(cswin, agent_cswin.checkpoint_filter_fn({"model": case.state}, cswin)), case)


def test_bias_resize() -> None:
    case = load("agent_bias_resize")
    for name, bias in case.given.items():
        close(fit_weight(name, bias, case.wanted[name]), case.wanted[name], 0, 1e-6)
