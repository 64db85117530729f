"""Attention and models of vision papers against what their authors' code gave (tests/fixtures/vit2)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vit2 import agrees, close, fixture, project, qkv_of

import attnctl
import attnctl.backbones
from attnctl.backbones.distil import distil
from attnctl.backbones.look.patterns import (
    attention_distance,
    attention_entropy,
    mutual_information,
    pattern_loss,
    patterns,
)
from attnctl.backbones.mixers import Slot, join_heads
from attnctl.backbones.mixers.gated import GatedMixer
from attnctl.backbones.mixers.hedgehog import HedgehogMixer, hedgehog_features, hedgehog_weights
from attnctl.backbones.mixers.linear import InLineMixer, MALAMixer, RALAMixer
from attnctl.backbones.mixers.moh import MoHMixer, balance, routed_attention
from attnctl.backbones.mixers.softmax import SigmoidMixer
from attnctl.backbones.models import nat, ravlt
from attnctl.backbones.modules.gates import ULSAM, GaussianAttention, NiNformerBlock, PolarizedAttention
from attnctl.backbones.modules.rank_linear import GatedLinearAttention2d, rotation
from attnctl.backbones.probing import EfficientProbing, probe
from attnctl.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rala_attn_32_2h_6x5", "rala"), ("rala_attn_64_4h_7x9", "rala"), ("mala_attn_32_2h_6x5", "mala"),
     ("mala_attn_64_4h_7x9", "mala"), ("ravlt_softmax_attn", "softmax")],
)  # fmt: skip
@torch.no_grad()
def test_gated_linear_attention(name: str, kind: str) -> None:
    x, y, weights, arguments = fixture(name)
    module = GatedLinearAttention2d(arguments["dim"], arguments["num_heads"], kind)
    module.load_state_dict(weights)
    close(module(x["x"]), y["y"])
    h, w = x["x"].shape[-2:]
    sin, cos = rotation(h, w, x["sin"].shape[-1], x["x"])
    close(sin, x["sin"])
    close(cos, x["cos"])


@pytest.mark.parametrize(
    ("name", "kind"), [("ravlt_block_l", "rala"), ("ravlt_block_v", "softmax"), ("mavit_block_l", "mala")]
)
@torch.no_grad()
def test_blocks_of_ravlt(name: str, kind: str) -> None:
    x, y, weights, a = fixture(name)
    block = ravlt.RAVLTBlock(a["embed_dim"], a["num_heads"], a["ffn_dim"], kind, init=1.0 if a["layerscale"] else None)
    block.load_state_dict(weights)
    close(block.eval()(x["x"]), y["y"])


@pytest.mark.parametrize(("name", "kind"), [("ravlt_small_model", "rala"), ("mavit_small_model", "mala")])
@torch.no_grad()
def test_models_of_ravlt(name: str, kind: str) -> None:
    x, y, weights, a = fixture(name)
    scales = tuple(v if on else None for v, on in zip(a["layer_init_values"], a["layerscales"], strict=True))
    model = ravlt.RAVLT(
        tuple(a["embed_dims"]), tuple(a["depths"]), tuple(a["num_heads"]), kind, mlp_ratio=a["mlp_ratios"][0],
        projection=a["projection"], num_classes=a["num_classes"], init_values=scales,
    ).eval()  # fmt: skip
    model.load_state_dict(ravlt.checkpoint_filter_fn(weights, model))
    close(model(x["x"]), y["y"], whole=True)
    close(model.forward_head(model.forward_features(x["x"]), pre_logits=True), y["features"], whole=True)


@torch.no_grad()
def test_a_swapped_vit_computes_the_papers_attention() -> None:
    """The mixer with rope and gate is the module, but for its projection."""
    for name, mixer in (("rala_attn_32_2h_6x5", RALAMixer), ("mala_attn_32_2h_6x5", MALAMixer)):
        x, y, weights, a = fixture(name)
        h, w = x["x"].shape[-2:]
        tokens = x["x"].flatten(2).mT
        y4 = F.linear(tokens, weights["qkvo.weight"].flatten(1), weights["qkvo.bias"]).chunk(4, -1)
        q, k, v = (part.reshape(2, h * w, a["num_heads"], -1).transpose(1, 2) for part in y4[:3])
        made = mixer(Slot(a["dim"], a["num_heads"], (h, w), 0, q.shape[-1] ** -0.5), rope=True, gate=True)
        made.lepe.load_state_dict({"weight": weights["lepe.weight"], "bias": weights["lepe.bias"]})
        made.gate.load_state_dict(
            {"weight": weights["qkvo.weight"].flatten(1)[-a["dim"] :], "bias": weights["qkvo.bias"][-a["dim"] :]}
        )
        out = F.linear(
            join_heads(made(q, k, v, tokens, (h, w))), weights["proj.weight"].flatten(1), weights["proj.bias"]
        )
        close(out.mT.reshape(x["x"].shape), y["y"])


@pytest.mark.parametrize("name", ["allshared", "shared2_top3of6", "shared0_top2of4"])
@torch.no_grad()
def test_mixtures_of_heads(name: str) -> None:
    x, y, weights, a = fixture(f"moh_dit_attn_{name}")
    q, k, v = qkv_of(x["x"], weights, a["num_heads"])
    slot = Slot(a["dim"], a["num_heads"], (1, 11), 0, q.shape[-1] ** -0.5, width=a["dim"])
    every = a["routed_head"] == 0
    for skip in (True, False):
        mixer = MoHMixer(slot, shared=a["shared_head"], topk=a["routed_head"], skip=skip).eval()
        assert (mixer.routed == 0) == every
        names = {
            "wg.weight": "gates.route.weight",
            "wg_1.weight": "gates.share.weight",
            "wg_0.weight": "gates.split.weight",
        }
        mixer.load_state_dict(
            {names[n]: t for n, t in weights.items() if n in names and names[n] in mixer.state_dict()}
        )
        close(project(mixer(q, k, v, x["x"], (1, 11)), weights), y["y"])
    if "l_aux" in y:
        mixer.train()
        mixer(q, k, v, x["x"], (1, 11))
        close(balance(mixer).reshape(1), y["l_aux"])


def test_heads_that_no_token_uses_are_not_computed() -> None:
    torch.manual_seed(0)
    q, k, v, x = *(torch.randn(1, 8, 64, 16) for _ in range(3)), torch.randn(1, 64, 128)
    slot = Slot(128, 8, (8, 8), 0, 0.25)
    flops, outs = {}, []
    for skip in (False, True):
        torch.manual_seed(1)
        mixer = MoHMixer(slot, shared=2, topk=2, skip=skip).eval()
        nn.init.normal_(mixer.gates.route.weight)
        with (
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            out = mixer(q, k, v, x, (8, 8))
        gates = sum(2 * 64 * weight.numel() for weight in mixer.gates.parameters())
        flops[skip] = counter.get_total_flops() - gates
        outs.append(out)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    assert flops[False] == 4 * 8 * 64 * 64 * 16
    assert flops[True] == flops[False] // 2  # four of eight heads
    q.requires_grad_()
    used = torch.rand(1, 64, 8) > 0.5
    routed_attention(q, k, v, used, 0.25).sum().backward()
    assert (q.grad.transpose(1, 2)[~used] == 0).all()


@pytest.mark.parametrize("per", ["headwise", "elementwise"])
@torch.no_grad()
def test_gated_attention(per: str) -> None:
    x, y, w, a = fixture(f"gated_attn_{per}_kv4")
    d, size = a["head_dim"], 1 if per == "headwise" else a["head_dim"]
    rows = w["q_proj.weight"].reshape(4, d + size, -1), w["q_proj.bias"].reshape(4, d + size)
    split = [F.linear(x["x"], rows[0][:, :d].flatten(0, 1), rows[1][:, :d].flatten())]
    split += [F.linear(x["x"], w[f"{n}_proj.weight"], w[f"{n}_proj.bias"]) for n in "kv"]
    q, k, v = (s.reshape(2, 9, 4, d).transpose(1, 2) for s in split)
    mixer = GatedMixer(
        Slot(32, 4, (3, 3), 0, d**-0.5), per={"headwise": "head", "elementwise": "channel"}[per], start="paper"
    )
    mixer.gate.load_state_dict({"weight": rows[0][:, d:].flatten(0, 1), "bias": rows[1][:, d:].flatten()})
    out = mixer(q, k, v, x["x"], (3, 3))
    close(F.linear(join_heads(out), w["o_proj.weight"], w.get("o_proj.bias")), y["y"])


@pytest.mark.parametrize("form", ["softmax", "exp"])
@torch.no_grad()
def test_hedgehog(form: str) -> None:
    x, y, w, _ = fixture(f"hedgehog_{form}_dim")
    phi_q, phi_k = (hedgehog_features(x[n], w[f"{n}.layer"], form) for n in "qk")
    close(phi_q, y["phi_q"])
    close(phi_k, y["phi_k"])
    close(hedgehog_weights(phi_q, phi_k), y["weights"])
    mixer = HedgehogMixer(Slot(24, 3, (1, 11), 0, 8**-0.5), form=form)
    mixer.q_features.copy_(w["q.layer"])
    mixer.k_features.copy_(w["k.layer"])
    close(mixer(x["q"], x["k"], x["v"], x["q"], (1, 11)), y["y"])


@pytest.mark.parametrize("name", ["ep_pool_q1", "ep_pool_q4_dout2", "ep_pool_q8"])
@torch.no_grad()
def test_efficient_probing(name: str) -> None:
    x, y, w, a = fixture(name)
    pool = EfficientProbing(a["dim"], a["num_queries"], a.get("d_out", 1))
    pool.load_state_dict(w)
    close(pool(x["x"]), y["y"])
    close(pool.weights(x["x"]), y["attn"])


@pytest.mark.parametrize("kernel", ["identity", "relu", "leakyrelu", "exp"])
@torch.no_grad()
def test_inline_with_kernels(kernel: str) -> None:
    x, y, w, a = fixture(f"inline_swin_attn_{kernel}")
    q, k, v = qkv_of(x["x"], w, a["num_heads"])
    mixer = InLineMixer(Slot(a["dim"], a["num_heads"], (6, 6), 0, q.shape[-1] ** -0.5), kernel=kernel)
    mixer.load_state_dict({n: t for n, t in w.items() if n.startswith("residual")})
    close(project(mixer(q, k, v, x["x"], (6, 6)), w), y["y"])


@pytest.mark.parametrize("name", ["nobias", "bias_logn", "qknorm_temp"])
@torch.no_grad()
def test_sigmoid_attention(name: str) -> None:
    x, y, w, a = fixture(f"sigmoid_attn_{name}")
    q, k, v = qkv_of(x["x"], w, a["num_heads"])
    mixer = SigmoidMixer(
        Slot(a["dim"], a["num_heads"], (1, 19), 0, q.shape[-1] ** -0.5), bias=float(w["attn_bias"]),
        temperature=float(w["attn_temp"]), qk_norm=bool(a.get("qk_norm")),
    )  # fmt: skip
    mixer.load_state_dict({n: t for n, t in w.items() if n in mixer.state_dict() and "norm" in n}, strict=False)
    close(project(mixer(q, k, v, x["x"], (1, 19)), w), y["y"])


def test_patterns_of_maps() -> None:
    x, y, _, a = fixture("analysis_nmi_distance")
    places = x["attn"][:, :, 1:, 1:]
    close(mutual_information(places), y["nmi"])
    close(attention_distance(places, (4, 4), a["patch_size"]), y["distance"])
    close(attention_entropy(places), y["entropy"])
    x, y, _, _ = fixture("unip_kd_loss")
    close(pattern_loss(x["student_qk"], x["teacher_qk"]).reshape(1), y["kl"])
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=3).eval()
    found = patterns(model, torch.rand(2, 3, 32, 32))
    assert set(found.label.values()) <= {"local", "hybrid", "global"}
    assert all(float(v.min()) >= 0 and float(v.max()) <= 1 for v in found.information.values())


@pytest.mark.parametrize("name", ["nat_attn_rpb_k3", "nat_attn_rpb_k7", "nat_attn_rpb_d2", "nat_attn_rpb_d3_padded"])
@torch.no_grad()
def test_neighbourhoods_with_biases(name: str) -> None:
    x, y, w, a = fixture(name)
    module = nat.NeighborhoodAttention2d(a["dim"], a["num_heads"], a["kernel_size"], a.get("dilation") or 1)
    module.load_state_dict(w)
    close(module(x["x"]), y["y"])


@torch.no_grad()
def test_a_small_dinat() -> None:
    x, y, w, a = fixture("dinat_small_model")
    model = nat.NAT(
        a["embed_dim"], tuple(a["depths"]), tuple(a["num_heads"]), a["kernel_size"], tuple(map(tuple, a["dilations"])),
        a["mlp_ratio"], a["layer_scale"], num_classes=a["num_classes"],
    ).eval()  # fmt: skip
    model.load_state_dict(nat.checkpoint_filter_fn(w, model))
    close(model(x["x"]), y["y"], whole=True)


def test_gates_of_maps_and_tokens() -> None:
    for name, module in (
        ("psa_p", PolarizedAttention(16)),
        ("psa_s", PolarizedAttention(16, sequential=True)),
        ("ulsam", ULSAM(16, groups=4)),
        ("gaam_single_head", GaussianAttention(3)),
    ):
        agrees(name, module, fixture(name)[2])
    x, y, w, _ = fixture("gaam_single_head")
    gate = GaussianAttention(3)
    gate.load_state_dict(w)
    close(gate.weights(x["x"]).detach(), y["mixture"])
    names = {
        "mgu.Mixer.channel_mix.0": "channel_norm", "mgu.Mixer.channel_mix.1.net": "channel_mix", "ffn.net": "ffn",
        "mgu.Mixer.token_mix.0": "token_norm", "mgu.Mixer.token_mix.2.net": "token_mix", "mgu.proj": "proj",
    }  # fmt: skip
    weights = {}
    for key, value in fixture("ninformer_block")[2].items():
        start = next((n for n in names if key.startswith(n)), None)
        weights[key if start is None else names[start] + key.removeprefix(start)] = value
    agrees("ninformer_block", NiNformerBlock(24, 32, 9), weights)
    with pytest.raises(ConfigError, match="groups=3"):
        ULSAM(16, groups=3)


def small_vit() -> nn.Module:
    """Build a small transformer whose attention is far from uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.25)
    return model


@pytest.mark.parametrize(("kind", "loss"), [("hedgehog", "weights"), ("hedgehog", "outputs"), ("rala", "outputs")])
def test_distilling_brings_a_form_nearer_to_softmax(kind: str, loss: str) -> None:
    model, images = small_vit(), torch.rand(16, 3, 32, 32)
    attnctl.swap(model, kind)
    modes = [m.training for m in model.modules()]
    losses = distil(model, images, loss=loss, epochs=20, lr=0.02, batch=8, quiet=True)
    assert len(losses) == 2
    for first, last in losses.values():
        assert last < first - (0.02 if loss == "weights" else 0.1 * first if kind == "hedgehog" else 0)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ConfigError, match="expected 'outputs' or 'weights'"):
        distil(model, images, loss="mean")
    with pytest.raises(ConfigError, match="has no swapped form"):
        distil(small_vit(), images)


def test_probes_train_their_head_alone() -> None:
    model, images = small_vit(), torch.rand(8, 3, 32, 32)
    sizes = {}
    for head in ("ep", "mha", "linear"):
        probed = probe(model, 3, head, queries=4, heads=4).train()
        assert not probed.backbone.training
        probed(images).sum().backward()
        sizes[head] = sum(p.numel() for p in probed.parameters() if p.requires_grad)
    assert sizes["linear"] < sizes["ep"] < sizes["mha"]
    assert probe(model, 3, queries=4).attention(images).shape == (8, 4, 17)
    with pytest.raises(ConfigError, match="must divide dim=32"):
        probe(model, 3, queries=5)
    assert math.isfinite(float(probed(images).sum()))
