"""Swapped and registered backbones on the roads that users take them: casts, moves, resizes, loads, exports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from torch import Tensor, nn

import attnctl
from attnctl.backbones import any_size
from attnctl.backbones.mixers import MIXERS
from attnctl.backbones.models import biformer
from attnctl.errors import BackendError, ConfigError, ConflictError
from attnctl.processors import Capture

KINDS = [kind for kind, mixer in MIXERS.items() if mixer.__module__.startswith("attnctl.")]
OPTIONS: dict[str, dict[str, Any]] = {
    "agent": {"num_agents": 4}, "bra": {"window_size": 2, "topk": 1},
    "multiaxis": {"window": 2, "grid_size": 2, "mode": "mean"}, "neighborhood": {"kernel": 3}, "moh": {"shared": 0},
}  # fmt: skip
SWIN = {"img_size": 32, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "num_classes": 3}
VIT = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
PVT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
MICRO = ["biformer_micro", "agent_deit_micro", "agent_pvt_micro", "agent_swin_micro", "agent_cswin_micro"]
HOSTS = ["vit", "swin", "pvt", "maxvit", "maxvit any size"]


def host(name: str, seed: int = 0) -> nn.Module:
    """Build a small model with random weights of a host family; all take 32 px images."""
    torch.manual_seed(seed)
    if name == "vit":
        return timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    if name == "swin":
        return timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", num_classes=3, **PVT).eval()
    windows = MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8)
    model = MaxxVit(MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows), img_size=32, num_classes=3)
    return (any_size(model) if "any" in name else model).eval()


def images(size: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw two images."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def to_meta_and_back(model: nn.Module) -> nn.Module:
    """Move a model to the meta device, give it new memory and ones in it."""
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            p.fill_(1)
    return model


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "frozen": lambda m: m.requires_grad_(False),
    "training": lambda m: m.train(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
}


def same(got: nn.Module, want: nn.Module) -> None:
    """Compare two models: classes, modes, parameters and buffers with their dtypes, layout and flags."""
    assert [(n, type(m), m.training) for n, m in got.named_modules()] == [
        (n, type(m), m.training) for n, m in want.named_modules()
    ]
    for ours, theirs in (
        (got.named_parameters(), want.named_parameters()),
        (got.named_buffers(), want.named_buffers()),
    ):
        mine, others = dict(ours), dict(theirs)
        assert list(mine) == list(others)
        for name, x in mine.items():
            y = others[name]
            assert (x.dtype, x.device, x.stride(), x.requires_grad) == (y.dtype, y.device, y.stride(), y.requires_grad)
            assert x.is_meta or torch.equal(x, y), name


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_model_reaches_what_a_swap_set_aside(name: str, change: str) -> None:
    plain, model = host(name), host(name)
    attnctl.swap(model, "agent", num_agents=4)
    for m in (plain, model):
        CHANGES[change](m)
    attnctl.unswap(model)
    same(model, plain)
    if change not in ("half", "training"):
        x = images(dtype=next(plain.parameters()).dtype)
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", HOSTS)
def test_moves_reach_what_a_swap_set_aside(name: str) -> None:
    plain, model = host(name), attnctl.swap(host(name), "agent", num_agents=4)
    same(attnctl.unswap(model.to("meta")), plain.to("meta"))
    back = attnctl.unswap(to_meta_and_back(attnctl.swap(host(name), "agent", num_agents=4)))
    assert {p.device.type for p in [*back.parameters(), *back.buffers()]} == {"cpu"}


@pytest.mark.parametrize("name", HOSTS)
def test_copies_of_swapped_models_are_whole(name: str) -> None:
    plain, model = host(name), attnctl.swap(host(name), "agent", num_agents=4)
    copied = copy.deepcopy(model).double()
    same(attnctl.unswap(copied), plain.double())
    same(attnctl.unswap(model), host(name))  # which the copy's cast has not touched


@pytest.mark.parametrize("name", HOSTS)
def test_loading_reaches_what_a_swap_set_aside(name: str) -> None:
    other, model = host(name, seed=1), attnctl.swap(host(name), "agent", num_agents=4)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert set(missing) == set(attnctl.swap_report(model).new)
    assert not unexpected
    same(attnctl.unswap(model), other)


@pytest.mark.parametrize("name", HOSTS)
def test_state_of_a_swapped_model_round_trips(name: str) -> None:
    model, again = (attnctl.swap(host(name, seed), "agent", num_agents=4) for seed in (0, 1))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))
    assert not [n for n in model.state_dict() if "original" in n]


def test_weights_lost_on_the_meta_device_are_refused_at_the_unswap() -> None:
    state, plain = None, host("pvt")
    model = attnctl.swap(host("pvt"), "agent", num_agents=4)
    state = model.state_dict()
    model.to("meta").load_state_dict(state, assign=True)
    with pytest.raises(ConfigError, match="lost their data when"):
        attnctl.unswap(model)
    assert model(images()).isfinite().all()  # still swapped
    model.load_state_dict(plain.state_dict(), strict=False, assign=True)
    assert torch.equal(attnctl.unswap(model)(images()), plain(images()))


@pytest.mark.parametrize("name", ["vit", "swin", "maxvit"])
@pytest.mark.parametrize("kind", ["agent", "bra"])
def test_another_input_size_reaches_what_a_swap_set_aside(name: str, kind: str) -> None:
    plain, model = host(name), attnctl.swap(host(name), kind, **OPTIONS[kind])
    if not hasattr(plain, "set_input_size"):
        pytest.skip("this release of timm cannot resize the model")
    for m in (plain, model):
        m.set_input_size(img_size=(64, 64))  # type: ignore[operator]
    assert model(images(64)).isfinite().all()
    before, after = attnctl.swap_report(model).macs()
    assert min(before, after) > 0
    attnctl.unswap(model)
    same(model, plain)
    assert torch.equal(model(images(64)), plain(images(64)))


@pytest.mark.parametrize("name", HOSTS)
def test_replaced_projections_stay_after_the_unswap(name: str) -> None:
    """As adapters and quantisation replace them, in the place that the model has at the time."""
    model = attnctl.swap(host(name), "agent", num_agents=4)
    path, old = next((n, m) for n, m in model.named_modules() if n.endswith("proj") and isinstance(m, nn.Linear))
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(old, nn.Identity()))
    attnctl.unswap(model)
    assert isinstance(model.get_submodule(path), nn.Sequential)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_multiply_adds_after_a_cast(name: str, dtype: torch.dtype) -> None:
    model = attnctl.swap(host(name), "agent", num_agents=4)
    want = attnctl.swap_report(model).macs((3, 32, 32))
    assert attnctl.swap_report(model.to(dtype)).macs((3, 32, 32)) == want


@pytest.mark.parametrize("kind", KINDS)
def test_swaps_take_channels_last(kind: str) -> None:
    for name in HOSTS:
        if (kind, name) == ("sparsifiner", "pvt"):  # its predictor is for the tokens of 224 px here
            continue
        model = attnctl.swap(host(name), kind, **OPTIONS.get(kind, {}))
        want = model(images())
        model.to(memory_format=torch.channels_last)
        got = model(images().to(memory_format=torch.channels_last))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MICRO)
def test_registered_models_take_channels_last(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    want = model(images())
    model.to(memory_format=torch.channels_last)
    got = model(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    got.sum().backward()
    model.to(memory_format=torch.contiguous_format).double()  # gradients go along
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float64}


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Export a model for any number of images."""
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_swaps_export_with_any_batch(kind: str, name: str) -> None:
    model = attnctl.swap(host(name), kind, **OPTIONS.get(kind, {}))
    x = torch.rand(5, 3, 32, 32)
    if (kind, name) == ("sparsifiner", "pvt"):  # its predictor is for one number of tokens: that of 224 px here
        with pytest.raises(ConfigError, match="64 tokens were given; this predictor is for 3136"):
            model(x)
        return
    with torch.no_grad():
        run = exported(model, images())
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(run(x[:1]), model(x[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_may_follow_inference_mode(kind: str) -> None:
    model = attnctl.swap(host("vit"), kind, **OPTIONS.get(kind, {}))
    with torch.inference_mode():
        model(images())
    model(images()).sum().backward()


@pytest.mark.compile
@pytest.mark.parametrize("name", MICRO)
def test_registered_models_export_with_any_batch(name: str) -> None:
    model, x = timm.create_model(name, num_classes=3).eval(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(model, images())(x), model(x), atol=1e-5, rtol=1e-4)


def test_any_size_after_a_swap_is_refused() -> None:
    model = attnctl.swap(host("maxvit"), "agent", num_agents=4)
    with pytest.raises(ConflictError, match="any_size before swap"):
        any_size(model)
    assert any_size(attnctl.unswap(model))(images(36)).isfinite().all()


OWN_SIZES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("swin_tiny_patch4_window7_224", SWIN | {"img_size": (32, 64), "in_chans": 1, "features_only": True}, (1, 32, 64)),
    ("vit_tiny_patch16_224", VIT | {"img_size": (16, 32), "in_chans": 4}, (4, 16, 32)),
    ("pvt_v2_b0", PVT | {"in_chans": 4, "features_only": True, "out_indices": (0, 1)}, (4, 224, 224)),
]


@pytest.mark.parametrize(("name", "options", "size"), OWN_SIZES, ids=[n for n, *_ in OWN_SIZES])
def test_dry_runs_use_the_size_of_the_model(name: str, options: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = timm.create_model(name, **options).eval()
    sizes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    attnctl.swap(model, "bra", window_size=2, topk=1)
    attnctl.swap_report(model).macs()
    hook.remove()
    assert set(sizes) == {(1, *size)}


def test_a_dry_run_of_a_rectangular_maxvit() -> None:
    windows = MaxxVitTransformerCfg(window_size=(2, 4), grid_size=(2, 4), dim_head=8)
    layout = MaxxVitCfg((16, 32), (1, 1), ("M", "M"), 16, transformer_cfg=windows)
    model = MaxxVit(layout, img_size=(16, 32), in_chans=1, num_classes=3).eval()
    if not hasattr(model, "img_size"):
        model.pretrained_cfg = {"input_size": (1, 16, 32)}  # older releases of timm note the size there alone
    attnctl.swap(model, "agent", num_agents=4)
    host_: Any = model.get_submodule(attnctl.swap_report(model).sites[0])
    assert host_.attn.mixer.grid == (4, 8)


def as_released(model: nn.Module) -> dict[str, Tensor]:
    """Name a BiFormer's weights as the authors' files do: no stage modules, and a perceptron without a convolution."""
    state = {}
    for key, value in model.state_dict().items():
        part = key.split(".")
        if part[0] == "stages" and part[2] == "downsample":
            key = ".".join(["downsample_layers", part[1], *part[3:]])
        elif part[0] == "stages":
            key = ".".join(["stages", part[1], *part[3:]])
        state[key.replace(".mlp.3.", ".mlp.2.")] = value
    return state


STL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "head_dim": 8, "n_win": 1, "topks": (1, 1, 1, -2)}


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: s])
def test_biformer_stl_loads_the_names_of_the_authors(wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("biformer_stl", num_classes=1000, **STL).eval()
    file = tmp_path / "stl.pth"
    torch.save(wrap(as_released(model)), file)
    again = timm.create_model("biformer_stl", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **STL).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=0)
    own = biformer.checkpoint_filter_fn(model.state_dict(), model)
    assert set(own) == set(model.state_dict())


def test_full_size_names_of_biformer_stl() -> None:
    model = timm.create_model("biformer_stl", device="meta")
    assert set(biformer.checkpoint_filter_fn({"model": as_released(model)}, model)) == set(model.state_dict())


def test_handles_of_backbones_behave_as_those_of_denoisers() -> None:
    model = host("vit")
    for given, error in (({"backend": "nonsense"}, BackendError), ({"layout": "sideways"}, ConfigError)):
        with pytest.raises(error, match=r"nonsense|sideways"):
            attnctl.control(model, Capture(), **given)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with attnctl.control(model, Capture()) as handle:
        assert attnctl.handle_of(model) is handle
        with pytest.raises(ConfigError, match="set_step"):
            handle.set_step(3, 2)
        handle.set_step(0, 2)
        model(images())
        assert handle.maps.images == 2
    assert attnctl.handle_of(model) is None
