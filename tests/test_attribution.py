"""Rollout, relevance and gradient times attention, against the same written out with full matrices."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from test_backbones_classes import VIT, case
from test_backbones_timm import SMALL
from timm.models.cait import Cait
from torch import Tensor, nn

import attnctl
from attnctl.backbones.look.attribution import gradient_attention, relevance, rollout
from attnctl.backbones.look.sites import backbone_sites
from attnctl.errors import ConfigError, UnsupportedModelError

NAMES = {"vit": "vit_tiny_patch16_224", "eva02": "eva02_tiny_patch14_224", "siglip": "vit_base_patch16_siglip_224"}


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    """Build a small model and two images."""
    model, image = case(lambda: timm.create_model(NAMES[name], **SMALL | {"depth": 3}), 32)
    return model.double(), torch.cat([image, image.flip(-1)]).double()


def matrices(model: nn.Module, images: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    """Compute every layer's softmax [B, H, N, N] without a kernel, and the gradient of a logit by it."""
    taken: list[Tensor] = []
    modules: list[Any] = [s.module for s in attnctl.find_sites(model) if s.kind == "self"]

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        taken.append(args[0])
        args[0].retain_grad()

    hooks = [m.attn_drop.register_forward_pre_hook(keep) for m in modules]
    for m in modules:
        m.fused_attn = False
    model(images)[:, target].sum().backward()
    for m, hook in zip(modules, hooks, strict=True):
        m.fused_attn = True
        hook.remove()
    return [a.detach() for a in taken], [a.grad for a in taken]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_rollout_and_relevance_by_full_matrices(name: str) -> None:
    model, images = model_of(name)
    weights, gradients = matrices(model, images, 1)
    eye = torch.eye(17, dtype=torch.float64)
    flow, explained = eye.expand(2, 17, 17), eye.expand(2, 17, 17)
    for a, g in zip(weights, gradients, strict=True):
        flow = (0.5 * eye + 0.5 * a.mean(1)) @ flow
        explained = explained + (a * g).clamp(min=0).mean(1) @ explained
    got = rollout(model, images)
    torch.testing.assert_close(got.flatten(1).double(), flow[:, 0, 1:], atol=1e-5, rtol=1e-4)
    got = relevance(model, images, 1)
    torch.testing.assert_close(got.flatten(1).double(), explained[:, 0, 1:], atol=1e-5, rtol=1e-4)
    got = gradient_attention(model, images, torch.tensor([1, 1]))
    want = (weights[-1] * gradients[-1]).clamp(min=0).mean(1)[:, 0, 1:]
    torch.testing.assert_close(got.flatten(1).double(), want, atol=1e-6, rtol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(relevance(model, images), relevance(model, images, model(images).argmax(1)))


def test_a_pool_is_where_they_begin() -> None:
    model, images = model_of("siglip")
    weights, _ = matrices(model, images, 0)
    pool = model.attn_pool
    pool.fused_attn = False  # type: ignore[union-attr, assignment]
    from test_backbones_classes import softmaxes

    first = softmaxes(model, pool, images).outputs[-1].mean(1)[:, 0]
    for a in reversed(weights):
        first = 0.5 * first + 0.5 * torch.einsum("bq,bqk->bk", first, a.mean(1))
    pool.fused_attn = True  # type: ignore[union-attr, assignment]
    torch.testing.assert_close(rollout(model, images).flatten(1).double(), first, atol=1e-5, rtol=1e-4)
    assert relevance(model, images).shape == (2, 4, 4)


def test_late_class_tokens_and_swaps() -> None:
    model, image = case(lambda: Cait(**VIT))
    assert rollout(model, image).isfinite().all()  # talking heads need not sum to one
    assert relevance(model, image).min() >= 0
    model, images = model_of("eva02")
    attnctl.swap(model, "rala")
    assert rollout(model, images).isfinite().all()


def test_models_whose_tokens_change_are_refused() -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=3).eval()
    with pytest.raises(UnsupportedModelError, match="not the same tokens at every layer"):
        rollout(model, torch.rand(1, 3, 64, 64))
    model, images = model_of("vit")
    with pytest.raises(ConfigError, match="expected classes from 0 to 2"):
        relevance(model, images, 3)
    with pytest.raises(ConfigError, match="residual=2"):
        rollout(model, images, residual=2)
    with pytest.raises(ConfigError, match="layer=7 was given, but this model has 3"):
        gradient_attention(model, images, layer=7)
    assert gradient_attention(timm.create_model("pvt_v2_b0", num_classes=3), torch.rand(1, 3, 64, 64)).shape[0] == 1


def test_gradient_times_attention_of_maps() -> None:
    """BiFormer's last stage attends over a map [B, H, W, C], and routed windows before it."""
    import attnctl.backbones  # registers the names with timm

    del attnctl
    model = timm.create_model("biformer_micro", num_classes=3).eval().double()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    last: Any = backbone_sites(model)[-1].module
    taken: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        weights.retain_grad()
        taken.append(weights)
        return weights @ v

    from attnctl.backbones.modules import plain

    whole = plain.attend
    plain.attend = keep  # type: ignore[assignment]
    try:
        model(images)[:, 1].sum().backward()
    finally:
        plain.attend = whole
    want = (taken[-1] * taken[-1].grad).clamp(min=0).mean((1, 2))  # type: ignore[operator]
    got = gradient_attention(model, images, 1)
    torch.testing.assert_close(got.flatten(1).double(), want, atol=1e-7, rtol=1e-4)
    assert last.num_heads > 1
    for layer in range(len(backbone_sites(model)) - 1):
        assert gradient_attention(model, images, 1, layer=layer).min() >= 0
