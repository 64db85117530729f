"""Dual cross-attention learning against what its parts are when nothing is left out."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import attnctl
from attnctl.backbones.look.attribution import rollout
from attnctl.backbones.modules.dual_cross import DualCrossAttention
from attnctl.errors import ConfigError, UnsupportedModelError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


def vit(**more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL | more)
    for p in model.parameters():  # zero biases and equal norms would hide a part that is left out
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_row_is_the_rollout() -> None:
    model = vit(qk_norm=True)
    _, row = DualCrossAttention(model).rows(images())
    assert torch.allclose(row.sum(1), torch.ones(3), atol=1e-5)
    assert (row[:, 1:].reshape(3, 4, 4) - rollout(model, images())).abs().max() < 1e-6


def test_all_queries_are_one_more_block() -> None:
    """With every place chosen, in their order of attention, the second look is a block behind the last."""
    model = vit(init_values=0.5)
    both = DualCrossAttention(model, ratio=1.0)
    with torch.no_grad():
        x, _ = both.rows(images())
        again = model.head(model.norm(both.block(x))[:, 0])
        assert torch.allclose(both(images()), (model(images()) + again) / 2, atol=1e-5)


def test_few_queries_are_those_that_the_class_token_looked_at() -> None:
    both = DualCrossAttention(vit(), ratio=0.1).double()
    seen: list[Tensor] = []
    both.block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        x, row = both.rows(images().double())
        both(images().double())
        whole = x + both.block.ls1(both.block.attn(both.block.norm1(x)))
    best = row[:, 1:].topk(2).indices + 1
    expected = torch.stack([both.block.norm2(w)[[0, *b.tolist()]] for w, b in zip(whole, best, strict=True)])
    assert (seen[0] - expected).abs().max() < 1e-12


def test_a_picture_that_is_its_own_partner_stays_as_it_is() -> None:
    model = vit()
    both = DualCrossAttention(model).double()
    with torch.no_grad():
        alone, pair = (
            both._pairs(images().double(), torch.arange(3)),
            both._pairs(images().double(), torch.tensor([1, 2, 0])),
        )
        assert (alone - model(images().double())).abs().max() < 1e-12  # doubled keys
    assert (pair - alone).abs().max() > 1e-4


def test_training_reaches_every_part_and_starts_as_the_mean_of_three() -> None:
    both = DualCrossAttention(vit()).train()
    targets = torch.tensor([0, 1, 2])
    loss = both.loss(images(), targets)
    own, again = both._answers(images())
    pairs = both._pairs(images(), torch.tensor([2, 0, 1]))
    parts = [torch.nn.functional.cross_entropy(a, targets) for a in (own, again, pairs)]
    assert torch.allclose(loss, sum(parts) / 2)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in both.parameters())
    with torch.inference_mode():
        assert both.eval()(images()).shape == (3, 5)


def test_what_it_is_not_for() -> None:
    with pytest.raises(ConfigError, match=r"ratio=0 was given; expected above 0 to 1"):
        DualCrossAttention(vit(), ratio=0)
    with pytest.raises(UnsupportedModelError, match="classifies by its class token"):
        DualCrossAttention(vit(global_pool="avg"))
    with pytest.raises(UnsupportedModelError, match="VisionTransformerDistilled: expected"):
        DualCrossAttention(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5))
    with pytest.raises(UnsupportedModelError, match=r"ConvNeXt: expected a timm VisionTransformer"):
        DualCrossAttention(timm.create_model("convnext_atto", num_classes=5))
    gated, swapped = vit(), vit()
    gated.blocks[0].attn.gate = torch.nn.Linear(32, 32)
    attnctl.swap(swapped, "sigmoid")
    for other in (timm.create_model("vit_small_patch16_18x2_224", num_classes=5), swapped, gated):
        with pytest.raises(UnsupportedModelError, match="blocks are not timm's own"):
            DualCrossAttention(other)
