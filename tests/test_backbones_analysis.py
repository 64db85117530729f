"""Head importance and attention distance: known answers, every family, pictures, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import attnctl
from attnctl.backbones.look.analysis import _divergence, distance_profile, head_importance
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
FAMILIES = ["biformer_micro", "agent_pvt_micro", "agent_swin_micro", "agent_cswin_micro", "agent_deit_micro"]


def vit() -> Any:
    """Build a small vision transformer."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


def test_importance_is_what_zeroed_weights_lose() -> None:
    model, images = vit(), torch.rand(6, 3, 32, 32)
    for block in model.blocks:
        nn.init.normal_(block.attn.proj.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = head_importance(model.train(), images, batch=4)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        base = model(images).softmax(1)
        right = base.argmax(1, keepdim=True)
        model.blocks[1].attn.proj.weight[:, 16:24] = 0  # the inputs of head 2
        cut = model(images).softmax(1)
    assert found.accuracy == 1
    lost = (base - cut).gather(1, right).mean()
    torch.testing.assert_close(found.probability_drop["blocks.1.attn"][2], lost, atol=1e-6, rtol=1e-4)
    wrong = 1 - (cut.argmax(1, keepdim=True) == right).float().mean()
    torch.testing.assert_close(found.accuracy_drop["blocks.1.attn"][2], wrong)
    torch.testing.assert_close(found.divergence["blocks.1.attn"][2].double(), _divergence(base, cut), atol=1e-6, rtol=0)
    assert not model.blocks[1].attn.norm._forward_pre_hooks


def test_divergence() -> None:
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(_divergence(p, p)) == 0
    assert float(_divergence(p, q)) == pytest.approx(0.6931, abs=1e-4)


def test_distance_of_known_attention() -> None:
    """Uniform attention looks as far as the mean distance of places; a neighbourhood of one looks nowhere."""
    model, images = vit(), torch.rand(2, 3, 32, 32)
    nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    nn.init.zeros_(model.blocks[0].attn.qkv.bias)
    attnctl.swap(model, "neighborhood", blocks=1, kernel=1)
    found = distance_profile(model, images)
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4)).double() * 8
    want = torch.cdist(at, at).mean()
    torch.testing.assert_close(found.pixels["blocks.0.attn"], want.float().expand(4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pixels["blocks.1.attn"], torch.zeros(4))
    hops = found.hops["blocks.0.attn"]
    assert hops.shape == (4, 4)
    torch.testing.assert_close(hops[:, -1], torch.ones(4))
    torch.testing.assert_close(hops[:, 0], torch.full((4,), 1 / 16))
    torch.testing.assert_close(found.hops["blocks.1.attn"], torch.ones(4, 4))
    some = distance_profile(model, images, sites=0, queries=4)
    assert list(some.pixels) == ["blocks.0.attn"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=3).eval(), torch.rand(2, 3, 32, 32)
    plain = model(images)
    importance, far = head_importance(model, images), distance_profile(model, images, queries=4)
    assert torch.equal(model(images), plain)
    heads = {s.name: s.heads for s in attnctl.find_sites(model)}
    assert {n: len(v) for n, v in importance.divergence.items()} == heads
    assert {n: len(v) for n, v in far.pixels.items()} == heads
    assert all((v >= 0).all() and v.max() > 0 for v in importance.divergence.values())
    assert all((v >= 0).all() and v.max() < 46 for v in far.pixels.values())
    importance.save_picture(tmp_path / "heads.png")
    far.save_picture(tmp_path / "distance.png")
    assert all((tmp_path / f).stat().st_size > 5000 for f in ("heads.png", "distance.png"))


def test_reduced_keys_and_maps_as_answers() -> None:
    pvt = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    model, images = timm.create_model("pvt_v2_b0", num_classes=3, **pvt).eval(), torch.rand(2, 3, 32, 32)
    found = distance_profile(model, images)
    assert all(torch.allclose(v[:, -1], torch.ones(1)) for v in found.hops.values())
    maps = nn.Sequential(timm.create_model("pvt_v2_b0", features_only=True, out_indices=(1,), **pvt), _First()).eval()
    labels = torch.randint(32, (2, 4, 4))
    assert 0 <= head_importance(maps, images, labels).accuracy <= 1


class _First(nn.Module):
    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        """Return the first map."""
        return x[0]


def test_bad_input() -> None:
    model, images = vit(), torch.rand(2, 3, 32, 32)
    with pytest.raises(ConfigError, match="1 labels"):
        head_importance(model, images, torch.zeros(1))
    with pytest.raises(ConfigError, match="0 images"):
        head_importance(model, images[:0])
    with pytest.raises(ConfigError, match="queries=0"):
        distance_profile(model, images, queries=0)
    with pytest.raises(SiteError, match=r"blocks\.0\.attn"):
        distance_profile(model, images, sites="block.0.attn")
    with pytest.raises(UnsupportedModelError, match="ViT and DeiT"):
        head_importance(timm.create_model("resnet18"), images)
