"""The registered models: counts, key lists, timm's interface, any size, compilation, export, refusals."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from torch import Tensor, nn

import attnctl
import attnctl.backbones
from attnctl.backbones import AgentAttention2d, BiLevelRoutingAttention, MultiAxisAttention, any_size
from attnctl.backbones.modules import routed_flex
from attnctl.backbones.swap import multiply_adds
from attnctl.errors import BackendError, ConfigError, UnsupportedModelError
from attnctl.kernels.sparse import flex

FIXTURES = Path(__file__).parent / "fixtures" / "vit"
MICRO = ["biformer_micro", "agent_deit_micro", "agent_pvt_micro", "agent_swin_micro", "agent_cswin_micro"]
# Parameters, and multiply-adds of one 224 px image in units of 1e9, from the published tables.
TABLE = {
    "biformer_tiny": (13142760, 2.216), "biformer_small": (25536232, 4.464), "biformer_base": (56804968, 9.759),
    "biformer_stl": (28372552, 4.59), "agent_deit_tiny": (6015640, 1.168), "agent_deit_small": (22647112, 4.427),
    "agent_deit_base": (87204904, 17.527), "agent_pvt_tiny": (11570352, 1.986), "agent_pvt_small": (20635066, 3.955),
    "agent_pvt_medium": (35921746, 7.035), "agent_pvt_large": (48738180, 10.339),
    "agent_swin_tiny": (28902964, 4.499), "agent_swin_small": (49666684, 8.733),
    "agent_swin_base": (88095096, 15.444), "agent_cswin_tiny": (20458672, 4.292),
    "agent_cswin_small": (32814100, 6.744), "agent_cswin_base": (73249696, 14.923),
}  # fmt: skip
OTHER_SIZES = [
    ("agent_deit_small", {"img_size": 448}, 23070472), ("agent_pvt_medium", {"img_size": 256}, 36083682),
    ("agent_swin_small", {"img_size": 288}, 49707964), ("agent_swin_base", {"img_size": 384}, 88305016),
    ("agent_cswin_base", {"img_size": 384, "split_sizes": (1, 2, 12, 12)}, 73328416),
]  # fmt: skip
LISTS = {
    "biformer_tiny": "biformer_tiny", "biformer_small": "biformer_small", "biformer_base": "biformer_base",
    "agent_deit_t": "agent_deit_tiny", "agent_deit_s": "agent_deit_small", "agent_deit_b": "agent_deit_base",
    "agent_pvt_t": "agent_pvt_tiny", "agent_swin_t": "agent_swin_tiny", "agent_cswin_t": "agent_cswin_tiny",
}  # fmt: skip


def size_of(model: nn.Module) -> int:
    """Count parameters."""
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_multiply_adds(name: str) -> None:
    params, macs = TABLE[name]
    model = timm.create_model(name, device="meta").eval()
    assert size_of(model) == params
    assert multiply_adds(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(("name", "kwargs", "params"), OTHER_SIZES)
def test_parameters_at_other_sizes(name: str, kwargs: dict[str, Any], params: int) -> None:
    assert size_of(timm.create_model(name, device="meta", **kwargs)) == params


@pytest.mark.parametrize("listed", LISTS)
def test_official_keys_load(listed: str) -> None:
    info = json.loads((FIXTURES / f"state_dict_{listed}.json").read_text())
    shapes = next(v for v in info.values() if isinstance(v, dict))
    state = {k: torch.empty(s, dtype=getattr(torch, kind), device="meta") for k, (s, kind) in shapes.items()}
    model = timm.create_model(LISTS[listed], device="meta")
    to_own = sys.modules[type(model).__module__].checkpoint_filter_fn
    model.load_state_dict(to_own({"model": state}, model), strict=True, assign=True)


@pytest.mark.parametrize("name", MICRO)
def test_timm_interface(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.1).eval()
    x = torch.rand(2, 3, 32, 32)
    want = model(x)
    assert want.shape == (2, 7)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train()(x).shape, want.shape)
    want = model.eval()(x)  # batch norms have seen a batch
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model(
        name,
        pretrained=True,
        num_classes=7,
        pretrained_cfg_overlay={"file": str(tmp_path / "own.pth"), "num_classes": 7},
    )
    assert torch.equal(again.eval()(x), want)
    features = timm.create_model(name, features_only=True, in_chans=1).eval()
    maps = features(torch.rand(1, 1, 32, 32))
    channel = -1 if getattr(features, "output_fmt", None) == "NHWC" or name.startswith("agent_swin") else 1
    assert [m.shape[channel] for m in maps] == features.feature_info.channels()


@pytest.mark.parametrize("name", [n for n in MICRO if "deit" not in n])
@pytest.mark.parametrize("size", [(40, 52), (33, 65)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    extra = {}
    if name.startswith("agent_swin"):  # as timm's own: told beforehand, and whole patches
        extra, size = {"dynamic_img_size": True}, (size[0] // 4 * 4, size[1] // 4 * 4)
    model = timm.create_model(name, num_classes=3, **extra).eval()
    assert model(torch.rand(1, 3, *size)).isfinite().all()


def test_any_size_vit() -> None:
    model = timm.create_model("agent_deit_micro", num_classes=3, dynamic_img_size=True).eval()
    square = torch.rand(1, 3, 32, 32)
    want = model(square)
    assert model(torch.rand(1, 3, 24, 48)).isfinite().all()
    assert torch.equal(model(square), want)
    fixed = timm.create_model("agent_deit_micro", num_classes=3).eval()
    with pytest.raises(ConfigError, match="grid"):
        fixed.blocks[0].attn(torch.rand(1, 1 + 63, 64))


@pytest.mark.parametrize("name", MICRO[1:])
def test_set_input_size_equals_resizing_on_the_fly(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval().requires_grad_(False)
    model.set_input_size(img_size=(64, 64))
    out = model(torch.rand(1, 3, 64, 64))
    assert out.isfinite().all()
    assert not any(p.requires_grad for p in model.parameters())


def test_all_windows_equal_softmax_attention() -> None:
    torch.manual_seed(0)
    routed = BiLevelRoutingAttention(32, 4, 4, topk=None, scale="head", side_dwconv=0)
    x = torch.rand(2, 16, 16, 32)
    q, k, v = routed.qkv(x).flatten(1, 2).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    want = routed.wo((weights @ v).transpose(1, 2).reshape(2, 16, 16, 32))
    assert (routed(x) - want).abs().max() < 1e-6
    by_size = BiLevelRoutingAttention(32, 4, window_size=4, topk=16, scale="head", side_dwconv=0)
    by_size.load_state_dict(routed.state_dict())
    assert (by_size(x) - want).abs().max() < 1e-6


def test_gather_equals_expanded_gather() -> None:
    x = torch.rand(2, 9, 4, 6, requires_grad=True)
    index = torch.rand(2, 9, 9).topk(3).indices
    got = attnctl.backbones.modules.routing.gather_windows(x, index)
    want = x[:, None].expand(2, 9, 9, 4, 6).gather(2, index[..., None, None].expand(2, 9, 3, 4, 6)).flatten(2, 3)
    assert torch.equal(got, want)
    seed = torch.rand_like(got)
    (a,), (b,) = (torch.autograd.grad((y * seed).sum(), x, retain_graph=True) for y in (got, want))
    torch.testing.assert_close(a, b)


def test_masked_padding_is_exact() -> None:
    torch.manual_seed(0)
    module = BiLevelRoutingAttention(16, 2, 4, topk=16, pad="mask", side_dwconv=0)
    x = torch.rand(1, 10, 13, 16)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    want = module.wo(((q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v).transpose(1, 2).reshape(1, 10, 13, 16))
    torch.testing.assert_close(module(x), want, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("pad", "size"), [("none", (12, 20)), ("pre", (10, 13)), ("post", (11, 14)), ("mask", (10, 13))]
)
def test_windows_read_where_they_lie_are_the_gathered_ones(pad: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = BiLevelRoutingAttention(32, 4, 4, topk=3, pad=pad).eval()
    in_place = BiLevelRoutingAttention(32, 4, 4, topk=3, pad=pad, backend="flex").eval()
    in_place.load_state_dict(module.state_dict())
    x = torch.rand(2, *size, 32)
    with torch.no_grad():
        torch.testing.assert_close(in_place(x), module(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(BackendError, match="no backward pass on CPU"):
        in_place(x)


@pytest.mark.slow
@pytest.mark.compile
def test_windows_read_where_they_lie_compiled() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9 * 64, 16).unbind(0)
    with torch.inference_mode():
        run = flex.compiled()
        for seed in (0, 1):
            index = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(seed)).topk(3).indices
            mask = routed_flex._block_mask(index, 64, None)
            got = run(q, k, v, block_mask=mask, scale=0.3)
            allowed = torch.zeros(2, 9, 9, dtype=torch.bool).scatter_(2, index, True)
            allowed = allowed.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, None]
            want = (q @ k.mT * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", ["bias", "mlp", "bias_tf"])
def test_maxvit_any_size(bias: str) -> None:
    windows = MaxxVitTransformerCfg(window_size=(7, 7), grid_size=(7, 7), dim_head=8, rel_pos_type=bias)
    model = MaxxVit(MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows), num_classes=3).eval()
    x = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        want, keys = model(x), list(model.state_dict())
        any_size(model)
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
        assert list(model.state_dict()) == keys
        for size in ((200, 328), (96, 96)):
            assert model(torch.rand(1, 3, *size)).isfinite().all()


def test_maxvit_tiny_of_timm() -> None:
    model, x = timm.create_model("maxvit_tiny_tf_224", num_classes=3).eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(any_size(model)(x), want, atol=1e-5, rtol=1e-4)
        for size in ((200, 328), (96, 96)):
            last, maps = model.forward_intermediates(torch.rand(1, 3, *size))
            assert [m.shape[2:] for m in maps[1:]] == [tuple(-(-s // r) for s in size) for r in (4, 8, 16, 32)]
            assert model.forward_head(last).isfinite().all()


def test_maps_smaller_than_a_window() -> None:
    small = torch.rand(1, 3, 5, 16)
    for module in (
        BiLevelRoutingAttention(16, 2, window_size=8, topk=1),
        BiLevelRoutingAttention(16, 2, n_win=7, topk=2, pad="mask"),
        MultiAxisAttention(16, 2, window=9, grid_size=9),
    ):
        assert module(small).isfinite().all()
        assert module(small).shape == small.shape


def test_multi_axis_module() -> None:
    module = MultiAxisAttention(16, 4, window=4, grid_size=4, prefix=1)
    assert module(torch.rand(2, 1 + 5 * 7, 16), grid=(5, 7)).shape == (2, 36, 16)
    whole = MultiAxisAttention(16, 4, window=6, grid_size=6)
    x = torch.rand(1, 6, 6, 16)
    q, k, v = whole.qkv(x).flatten(1, 2).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    want = whole.proj(((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).reshape(1, 6, 6, 16))
    torch.testing.assert_close(whole(x), want, atol=1e-6, rtol=1e-5)


def exported(name: str) -> nn.Module:
    """Build a registered micro model, a MaxViT made to run at any size, or a swapped ViT; all take 32 px images."""
    if name == "maxvit":
        windows = MaxxVitTransformerCfg(window_size=(3, 3), grid_size=(3, 3), dim_head=8)
        return any_size(MaxxVit(MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows))).eval()
    if name == "swapped":
        vit = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
        return attnctl.swap(timm.create_model("vit_tiny_patch16_224", **vit), "bra", window_size=2, topk=2).eval()
    return timm.create_model(name, num_classes=3).eval()


@pytest.mark.compile
@pytest.mark.parametrize("name", [*MICRO, "maxvit", "swapped"])
def test_compile(name: str) -> None:
    model = exported(name)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        fast = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*MICRO, "maxvit", "swapped"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = exported(name)
    x = torch.rand(1, 3, 32, 32)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MICRO)
def test_torchscript(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x: Tensor = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


BAD = [
    (lambda: BiLevelRoutingAttention(30, 4), "num_heads=4"),
    (lambda: BiLevelRoutingAttention(32, 4, 3, topk=10), "9 windows"),
    (lambda: BiLevelRoutingAttention(32, 4, pad="reflect"), "'reflect'"),
    (lambda: BiLevelRoutingAttention(32, 4, side_dwconv=4), "side_dwconv=4"),
    (lambda: BiLevelRoutingAttention(32, 4, param_routing=True), "diff_routing"),
    (lambda: BiLevelRoutingAttention(32, 4, diff_routing=True), "soft_routing"),
    (lambda: BiLevelRoutingAttention(32, 4, window_size=0), "window_size=0"),
    (lambda: BiLevelRoutingAttention(32, 4, kv_pool="avgpool", pad="mask"), "kv_pool"),
    (lambda: BiLevelRoutingAttention(32, 4, attn_drop=0.1, backend="flex"), "where they lie"),
    (lambda: BiLevelRoutingAttention(32, 4, soft_routing=True, backend="flex"), "no soft_routing"),
    (lambda: BiLevelRoutingAttention(32, 4, 4, pad="none")(torch.rand(1, 10, 8, 32)), "does not divide"),
    (lambda: BiLevelRoutingAttention(32, 4, 7, pad="post")(torch.rand(1, 5, 9, 32)), "smaller than n_win=7"),
    (lambda: BiLevelRoutingAttention(32, 4, window_size=4, topk=9)(torch.rand(1, 8, 8, 32)), "only 4 windows"),
    (lambda: AgentAttention2d(30, 4), "num_heads=4"),
    (lambda: AgentAttention2d(32, 4, num_agents=10), "square grid"),
    (lambda: AgentAttention2d(32, 4, sr_ratio=2), "split_qkv"),
    (lambda: AgentAttention2d(32, 4, (4, 4))(torch.rand(1, 17, 32)), "17 patch tokens"),
    (lambda: AgentAttention2d(32, 4, (4, 4))(torch.rand(1, 16, 32), is_causal=True), "mask"),
    (lambda: MultiAxisAttention(32, 1), "mode='mean'"),
    (lambda: MultiAxisAttention(32, 4)(torch.rand(1, 16, 32)), "grid=None"),
    (lambda: timm.create_model("agent_cswin_micro")(torch.rand(1, 3, 2, 40)), "A map of 2x40"),
    (lambda: timm.create_model("agent_pvt_micro", attn_type="AAXB"), "'AAXB'"),
    (lambda: timm.create_model("agent_swin_micro", attn_type="AAM"), "'AAM'"),
    (lambda: timm.create_model("agent_pvt_micro", num_agents=(9, 4)), "num_agents"),
    (lambda: timm.create_model("biformer_micro", depths=(1, 1)), "depths"),
    (lambda: timm.create_model("agent_deit_micro", agent_layer=9), "agent_layer=9"),
    (lambda: timm.create_model("agent_pvt_micro", num_heads=(3, 2, 3, 4)), "num_heads=3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input(call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        call()


def test_weights_of_another_variant() -> None:
    small, other = timm.create_model("biformer_micro"), timm.create_model("biformer_micro", depths=(1, 1, 2, 1))
    with pytest.raises(UnsupportedModelError, match=r"\d+ missing \(stages.2.blocks.1.*0 unexpected"):
        attnctl.backbones.models.biformer.checkpoint_filter_fn(small.state_dict(), other)
    wide = timm.create_model("biformer_micro", dims=(16, 32, 48, 80))
    with pytest.raises(UnsupportedModelError, match="of another shape"):
        attnctl.backbones.models.biformer.checkpoint_filter_fn(small.state_dict(), wide)


@pytest.mark.parametrize("name", MICRO)
def test_unknown_arguments(name: str) -> None:
    with pytest.raises(TypeError):
        timm.create_model(name, not_an_argument=1)


def test_any_size_refuses_other_models() -> None:
    with pytest.raises(UnsupportedModelError, match="maxvit"):
        any_size(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
