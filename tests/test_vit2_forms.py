"""Further forms of vision papers: recorded outputs of the authors' code, and what each form is at its limits."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from vit2 import FOLDER, agrees, close, fixture, project, qkv_of

import attnctl
from attnctl.backbones.distil import distil
from attnctl.backbones.mixers import Slot, join_heads
from attnctl.backbones.mixers.gated import GatedMixer
from attnctl.backbones.mixers.local_linear import LocalLinearMixer, local_linear_weights
from attnctl.backbones.mixers.moh import MoHMixer, balance
from attnctl.backbones.mixers.reversed import ReversedMixer
from attnctl.backbones.mixers.sparsifiner import SparsifinerMixer
from attnctl.backbones.mixers.ssa import SSAMixer
from attnctl.backbones.mixers.tic import TiCMixer
from attnctl.backbones.mixers.vsa import VSAMixer
from attnctl.backbones.models import moh_dit
from attnctl.backbones.modules.contmix import ContMixBlock
from attnctl.errors import ConfigError

VIT = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 4, "reg_tokens": 2, "num_classes": 3}


@pytest.mark.parametrize("name", ["topk", "coef_topk", "threshold"])
@torch.no_grad()
def test_sparsifiner(name: str) -> None:
    x, y, w, a = fixture(f"sparsifiner_attn_{name}")
    q, k, v = qkv_of(x["x"], w, a["num_heads"])
    cfg = a["cfg"]
    mixer = SparsifinerMixer(
        Slot(a["dim"], a["num_heads"], (4, 4), 1, q.shape[-1] ** -0.5), keep=a["attn_keep_rate"],
        threshold=None if cfg["topk"] else cfg["th"], reduce_tokens=a["reduce_n_factor"],
        reduce_channels=a["reduce_c_factor"], basis_threshold=cfg["bt"], coef_threshold=cfg.get("ct", 0.0),
        coef_topk=2 if cfg.get("ctopk") else None,
    )  # fmt: skip
    names = {"proj_c_q": "predict_q", "proj_c_k": "predict_k", "proj_n": "reduce", "proj_back_n": "expand"}
    parts = [(k.partition(".")[2], t) for k, t in w.items() if k.startswith("mask_predictor.")]
    mixer.load_state_dict({n.replace(n.partition(".")[0], names[n.partition(".")[0]]): t for n, t in parts})
    close(mixer.approximate(q, k), y["approx_attn"])
    assert torch.equal(mixer.seen(q, k), y["attn_mask"] > 0)
    close(project(mixer(q, k, v, x["x"], (4, 4)), w), y["y"])


def test_a_predictor_is_taught_by_the_map() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    x = torch.rand(16, 3, 32, 32)
    plain = model(x)
    close(attnctl.swap(model, "sparsifiner", keep=1.0)(x), plain)
    attnctl.unswap(model)
    attnctl.swap(model, "sparsifiner", keep=0.25)
    model(x).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is None}
    assert trained == {n for n, p in model.named_parameters() if "mixer" in n}
    losses = distil(model, x, loss="weights", epochs=6, batch=8, quiet=True)
    assert all(last < first for first, last in losses.values())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mixer" in n)
    with pytest.raises(ConfigError, match="Take loss='weights'"):
        distil(model, x)
    with pytest.raises(ConfigError, match="60 tokens were given; this predictor is for 67"):
        model.blocks[0].attn.mixer(*torch.rand(3, 1, 4, 60, 8), torch.rand(1, 60, 32), (8, 8))  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", ["even", "padded", "zero_init"])
@torch.no_grad()
def test_varied_size_windows(name: str) -> None:
    x, y, w, a = fixture(f"vsa_attn_{name}")
    tokens, (h, width) = x["x"].flatten(2).mT, x["x"].shape[-2:]
    flat = {k: t.flatten(1) if t.ndim == 4 else t for k, t in w.items()}
    q, k, v = qkv_of(tokens, flat, a["num_heads"])
    mixer = VSAMixer(Slot(a["dim"], a["num_heads"], (h, width), 0, q.shape[-1] ** -0.5), window=a["window_size"])
    names = {"sampling_offsets.2": "offsets", "sampling_scales.2": "sizes"}
    state = {}
    for key, value in w.items():
        first = next((n for n in names if key.startswith(n)), None)
        if first or key == "relative_position_bias_table":
            state[key if first is None else key.replace(first, names[first])] = value
    mixer.load_state_dict(state)
    out = project(mixer(q, k, v, tokens, (h, width)), flat)
    close(out.mT.unflatten(2, (h, width)), y["y"])


def test_varied_size_windows_start_as_unshifted_ones() -> None:
    torch.manual_seed(0)
    swin = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **swin).eval()
    for block in model.modules():
        if hasattr(block, "relative_position_bias_table"):
            nn.init.normal_(block.relative_position_bias_table)
    first = model.layers[0]  # type: ignore[index]
    x = torch.rand(2, 3, 32, 32)
    tokens = model.patch_embed(x)  # type: ignore[operator]
    plain = first(tokens)
    attnctl.swap(model, "vsa")
    close(first(tokens), plain)
    model(x).sum().backward()
    mixer = first.blocks[0].attn.mixer  # type: ignore[union-attr, index]
    assert mixer.offsets.weight.grad.abs().sum() > 0
    assert torch.equal(attnctl.unswap(model).layers[0](tokens), plain)  # type: ignore[index]


@pytest.mark.parametrize("name", ["overlock_contmix_block", "overlock_contmix_block_smallmap"])
def test_context_mixing(name: str) -> None:
    _, _, w, a = fixture(name)
    block = ContMixBlock(a["dim"], a["kernel_size"], a["smk_size"], a["num_heads"], a["mlp_ratio"])
    agrees(name, block, w)
    with pytest.raises(ConfigError, match="kernel=9"):
        ContMixBlock(32, 9)


@torch.no_grad()
def test_moh_dit() -> None:
    x, y, w, a = fixture("moh_dit_small_model")
    lists = a["num_heads"], a["shared_head"], a["routed_head"]
    model = moh_dit.MoHDiT(
        a["hidden_size"], *lists, a["head_dim"], input_size=a["input_size"], mlp_ratio=a["mlp_ratio"],
        num_classes=a["num_classes"],
    ).eval()  # fmt: skip
    assert torch.equal(model.pos_embed, w["pos_embed"])
    model.load_state_dict(moh_dit.checkpoint_filter_fn(w, model))
    close(model(x["x"], x["t"], x["y"]), y["out"], whole=True)
    with pytest.raises(ConfigError, match="moh_dit_s_2_75"):
        moh_dit.moh_dit("moh_dit_s_2_70")


@pytest.mark.parametrize("name", ["s_2-75", "s_2-90"])
def test_keys_of_moh_dit(name: str) -> None:
    keys = json.loads((FOLDER / f"state_dict_moh-dit-{name}.json").read_text())["keys"]
    with torch.device("meta"):
        model = moh_dit.moh_dit(f"moh_dit_{name}".replace("-", "_"))
        state = {k: torch.empty(shape) for k, (shape, _) in keys.items()}
    loaded = moh_dit.checkpoint_filter_fn(state, model)
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in model.state_dict().items()}


@torch.no_grad()
def test_mixtures_of_normed_heads_of_any_width() -> None:
    x, y, w, a = fixture("moh_dit_attn_headdim_qknorm")
    module = moh_dit.MoHAttention(a["dim"], a["num_heads"], a["head_dim"], a["shared_head"], a["routed_head"], 1, True)
    names = {"wg.": "mixer.gates.route.", "wg_0.": "mixer.gates.split.", "wg_1.": "mixer.gates.share."}
    state = {}
    for key, value in w.items():
        first = next((n for n in names if key.startswith(n)), "")
        state[names.get(first, "") + key.removeprefix(first)] = value
    module.load_state_dict(state)
    close(module.eval()(x["x"]), y["y"])
    module.train()(x["x"])
    close(balance(module).reshape(1), y["l_aux"])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of heads [B, H, N, D] by angles [B, N, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


@pytest.mark.parametrize("per", ["headwise", "elementwise"])
@torch.no_grad()
def test_gated_attention_of_grouped_queries(per: str) -> None:
    x, y, w, a = fixture(f"gated_attn_{per}_kv2")
    d, groups = a["head_dim"], a["num_key_value_heads"]
    each = a["num_attention_heads"] // groups  # of a group: its queries first, then its gates
    rows = w["q_proj.weight"].unflatten(0, (groups, -1)), w["q_proj.bias"].unflatten(0, (groups, -1))
    q = F.linear(x["x"], rows[0][:, : each * d].flatten(0, 1), rows[1][:, : each * d].flatten())
    k, v = (F.linear(x["x"], w[f"{n}_proj.weight"], w[f"{n}_proj.bias"]) for n in "kv")
    q, k, v = (s.unflatten(-1, (-1, d)).transpose(1, 2) for s in (q, k, v))
    q, k = (F.rms_norm(s, (d,), w[f"{n}_norm.weight"], 1e-6) for n, s in (("q", q), ("k", k)))
    q, k = (turned(s, x["cos"], x["sin"]) for s in (q, k))
    k, v = (s.repeat_interleave(each, dim=1) for s in (k, v))
    form = {"headwise": "head", "elementwise": "channel"}[per]
    mixer = GatedMixer(Slot(32, 4, (3, 3), 0, d**-0.5), per=form, start="paper")
    mixer.gate.load_state_dict(
        {"weight": rows[0][:, each * d :].flatten(0, 1), "bias": rows[1][:, each * d :].flatten()}
    )
    close(F.linear(join_heads(mixer(q, k, v, x["x"], (3, 3))), w["o_proj.weight"], w.get("o_proj.bias")), y["y"])


def test_a_block_of_sigmoid_attention() -> None:
    """timm's block with layer scales, its attention swapped, is the released block."""
    x, y, w, _ = fixture("sigmoid_block_layerscale")
    options = {"img_size": 8, "patch_size": 2, "depth": 1, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2.0,
               "qkv_bias": False, "init_values": 1.0, "num_classes": 3, "reg_tokens": 2}  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", **options)
    attnctl.swap(
        model, "sigmoid", bias=float(w["attn.attn_bias"]), temperature=float(w["attn.attn_temp"]), qk_norm=True
    )
    block: Block = model.blocks[0].eval()  # type: ignore[index, union-attr, assignment]
    for norm in (block.norm1, block.norm2):
        norm.eps = 1e-5  # type: ignore[union-attr]
    state = {k.replace("attn.q_norm", "attn.mixer.q_norm").replace("attn.k_norm", "attn.mixer.k_norm"): v
             for k, v in w.items() if "attn_" not in k}  # fmt: skip
    wrong = block.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys
    for name in wrong.missing_keys:
        assert name.endswith("bias")
        nn.init.constant_(block.get_parameter(name), float(w["attn.attn_bias"]) if name.endswith("mixer.bias") else 0.0)
    with torch.no_grad():
        close(block(x["x"]), y["y"])


@pytest.mark.parametrize("kind", ["sparsifiner", "vsa", "ssa", "local_linear", "tic", "reversed"])
def test_forms_export_for_any_number_of_images(kind: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": 1}).eval()
    attnctl.swap(model, kind)
    x = torch.rand(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},), strict=False)
    with torch.no_grad():
        close(program.module()(x), model(x))
        close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_limits_of_forms_without_a_release() -> None:
    torch.manual_seed(0)
    q, k, v, x = *(torch.randn(2, 2, 65, 8) for _ in range(3)), torch.randn(2, 65, 16)
    slot, grid = Slot(16, 2, (7, 9), 2, 0.3), (7, 9)
    softmax = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    close(LocalLinearMixer(slot, ridge=1e6)(q, k, v, x, grid), softmax)
    close(SSAMixer(slot, beta=50.0, queries=True, values=True)(q, k, v, x, grid), softmax)
    warmer = F.scaled_dot_product_attention(q * (1 + 0.5 * torch.log(torch.tensor(65.0))), k, v, scale=0.3)
    beta = float(torch.tensor(2.0).log().log())
    close(SSAMixer(slot, beta=beta)(q, k, v, x, grid), warmer)
    logits = (q @ k.mT * 0.3).softmax(-1)
    close(ReversedMixer(slot)(q, k, v, x, grid), logits.mT @ v)
    for step in (1, 2):
        mixer = TiCMixer(slot, kernel=3, dilation=step)
        padded = [F.pad(y[:, :, 2:].unflatten(2, grid), [0, 0, *[step] * 4]) for y in (k, v)]
        for row, column in ((0, 0), (3, 4), (6, 8)):
            near = [y[:, :, row : row + 2 * step + 1 : step, column : column + 2 * step + 1 : step].flatten(2, 3)
                    for y in padded]  # fmt: skip
            keys, values = (torch.cat([y[:, :, :2], part], 2) for y, part in zip((k, v), near, strict=True))
            at = 2 + row * 9 + column
            want = F.scaled_dot_product_attention(q[:, :, at : at + 1], keys, values, scale=0.3)
            close(mixer(q, k, v, x, grid)[:, :, at : at + 1], want)
        close(mixer(q, k, v, x, grid)[:, :, :2], softmax[:, :, :2])


def test_local_linear_weights_fit_a_line() -> None:
    """Values that are a linear function of the keys come back at the query, exactly so for a small ridge."""
    torch.manual_seed(0)
    q, k = 0.3 * torch.randn(1, 1, 5, 3, dtype=torch.float64), torch.randn(1, 1, 40, 3, dtype=torch.float64)
    line = torch.randn(3, 2, dtype=torch.float64)
    weights = local_linear_weights(q, k, 1.0, 1e-6).double()
    torch.testing.assert_close(weights @ (k @ line + 1), q @ line + 1, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 5).double(), atol=1e-5, rtol=0)


def test_wrong_options() -> None:
    slot = Slot(16, 2, (4, 4), 0, 0.3)
    for make, said in (
        (lambda: SparsifinerMixer(slot, keep=0.0), "keep=0.0"),
        (lambda: SparsifinerMixer(slot, reduce_tokens=99), "reduce_tokens=99"),
        (lambda: SparsifinerMixer(slot, coef_topk=3), "coef_topk=3"),
        (lambda: VSAMixer(slot, window=0), "window=0"),
        (lambda: TiCMixer(slot, kernel=4), "kernel=4"),
        (lambda: LocalLinearMixer(slot, ridge=0.0), "ridge=0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
    assert MoHMixer(slot, shared=2, topk=0).routed == 0
