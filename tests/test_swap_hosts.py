"""Attention swaps in timm's other classes: what is kept between projections and kernel, and how swaps come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_backbones_classes import FOUR
from test_backbones_timm import COATNET, FASTVIT, METAFORMER, PIT, SAM, SHARED, SMALL, SWIN, VISFORMER, VOLO_D
from timm.models.davit import DaVit
from timm.models.maxxvit import MaxxVit
from timm.models.metaformer import MetaFormer
from timm.models.volo import VOLO
from torch import Tensor, nn

import attnctl
from attnctl.backbones.hosts import Host
from attnctl.errors import ConfigError
from attnctl.processors import Capture

GATED = SMALL | {"embed_dim": 32}
CASES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    # model, pixels, whether a mixture of all heads is the model itself
    "eva02": (lambda: timm.create_model("eva02_tiny_patch14_224", **SMALL), 32, True),
    "dinov3": (lambda: timm.create_model("vit_small_patch16_dinov3", **SMALL), 32, True),
    "rope": (lambda: timm.create_model("vit_small_patch16_rope_224", **SMALL), 32, True),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", **SMALL), 32, True),
    "beit, shared": (lambda: timm.create_model("beit_base_patch16_224", **SMALL | SHARED), 32, True),
    "relpos": (lambda: timm.create_model("vit_relpos_small_patch16_224", **SMALL), 32, True),
    "sam": (lambda: timm.create_model("samvit_base_patch16", **SAM), 32, True),
    "swin v2": (lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN), 32, False),
    "swin v2 cr": (lambda: timm.create_model("swinv2_cr_tiny_224", **SWIN), 32, False),
    "pit": (lambda: timm.create_model("pit_ti_224", num_classes=3, **PIT), 64, True),
    "crossvit": (lambda: timm.create_model("crossvit_tiny_240", num_classes=3), 240, True),
    "mobilevit": (lambda: timm.create_model("mobilevit_xxs", num_classes=3), 64, True),
    "caformer": (lambda: MetaFormer(**METAFORMER, num_classes=3), 64, True),
    "visformer": (lambda: timm.create_model("visformer_tiny", **VISFORMER), 64, True),
    "fastvit": (lambda: timm.create_model("fastvit_sa12", **FASTVIT), 64, True),
    "volo": (lambda: VOLO(**VOLO_D), 64, True),
    "coatnet": (lambda: MaxxVit(**COATNET), 32, True),
    "naflexvit": (
        lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=4), 64, True
    ),
    "davit": (lambda: DaVit(**FOUR, window_size=4), 64, True),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build a small model, and two images of its size."""
    make, size, _ = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = {**cfg, "input_size": (3, size, size)}  # type: ignore[assignment]
    with torch.no_grad():  # timm starts many of these at values that hide them
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model, torch.rand(2, 3, size, size)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """Run a model; VOLO answers with a pair while it trains."""
    out = model(x)
    return out if torch.is_tensor(out) else out[0]


@pytest.mark.parametrize("name", CASES)
def test_a_swap_keeps_all_but_the_kernel(name: str) -> None:
    model, x = build(name)
    plain = answer(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attnctl.swap(model, "moh", shared=0)
    if CASES[name][2]:
        torch.testing.assert_close(answer(model, x), plain, atol=1e-4, rtol=1e-4)
    attnctl.unswap(model)
    attnctl.swap(model, "rala", lepe=3)
    report = attnctl.swap_report(model)
    assert report.sites
    assert set(model.state_dict()) == (set(state) - set(report.dropped)) | set(report.new)
    changed = answer(model, x)
    assert changed.isfinite().all()
    assert not torch.equal(changed, plain)
    changed.square().sum().backward()
    inside = [p for m in model.modules() if isinstance(m, Host) for p in m.parameters()]
    assert all(p.grad is not None for p in inside)
    again = copy.deepcopy(model)
    assert torch.equal(answer(again, x), changed)
    attnctl.unswap(again)
    assert torch.equal(answer(again, x), plain)
    model.double()
    assert answer(model, x.double()).dtype == torch.float64
    model.float()
    model.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}, strict=False)
    attnctl.unswap(model)
    assert not any(isinstance(m, Host) for m in model.modules())
    got = model.state_dict()
    want = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    assert all(torch.equal(got[k], v) for k, v in want.items())
    model.load_state_dict(state)
    assert torch.equal(answer(model, x), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["eva02", "beit", "swin v2", "coatnet"])
def test_maps_of_swapped_attention(name: str) -> None:
    model, x = build(name)
    attnctl.swap(model, "inline", local=False)
    site = attnctl.find_sites(model)[-1]
    with torch.no_grad(), attnctl.control(model, Capture(sites=site.name, words=("mean",))) as handle:
        model(x)
        maps = handle.maps.layers[site.name]
    total = maps.sum((-1, -2))
    prefix = {"eva02": 1, "beit": 1}.get(name, 0)
    if prefix:
        assert total.isfinite().all()
    else:  # InLine's weights sum to one
        torch.testing.assert_close(total.float(), torch.ones_like(total).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["eva02", "dinov3"])
def test_other_sizes_of_rotary_models(name: str) -> None:
    make = {"eva02": "eva02_tiny_patch14_224", "dinov3": "vit_small_patch16_dinov3"}[name]
    model = timm.create_model(make, **SMALL | {"dynamic_img_size": True}).eval()
    attnctl.swap(model, "agent", num_agents=4)
    assert model(torch.rand(1, 3, 64, 32)).shape == (1, 3)
    model = timm.create_model(make, **SMALL).eval()
    attnctl.swap(model, "agent", num_agents=4)
    model.set_input_size((64, 32))  # type: ignore[operator]
    assert model(torch.rand(1, 3, 64, 32)).shape == (1, 3)


def test_naflexvit_takes_any_shape_of_image() -> None:
    model, _ = build("naflexvit")
    attnctl.swap(model, "agent", num_agents=4)
    assert model(torch.rand(2, 3, 32, 128)).shape == (2, 1000)
    with pytest.raises(ConfigError, match="patch tokens were given, but the grid is 4x4"):
        model.blocks[0].attn(torch.rand(1, 17, 32))  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", ["eva02", "coatnet", "caformer"])
def test_swapped_classes_export(name: str) -> None:
    model, x = build(name)
    attnctl.swap(model, "rala")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)))


@pytest.mark.compile
@pytest.mark.parametrize("name", ["eva02"])
def test_swapped_classes_compile(name: str) -> None:
    model, x = build(name)
    attnctl.swap(model, "rala")
    with torch.no_grad():
        plain = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain)


def test_channels_last() -> None:
    for name in ("coatnet", "visformer", "fastvit", "caformer"):
        model, x = build(name)
        attnctl.swap(model, "agent", num_agents=4)
        plain = answer(model, x)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(answer(model, x.to(memory_format=torch.channels_last)), plain, atol=1e-5, rtol=1e-5)


def test_gates_stay() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **GATED).eval()
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.gate = nn.Linear(32, 32)  # type: ignore[union-attr]
    x = torch.rand(1, 3, 32, 32)
    plain = model(x)
    attnctl.swap(model, "moh", shared=0)
    torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
