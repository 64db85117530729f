"""Attention of timm's other classes, read: maps are the softmax that the class itself computes without a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.swin_transformer import window_partition
from timm.models.volo import VOLO
from torch import Tensor, nn

import attnctl
from attnctl.errors import UnsupportedModelError
from attnctl.processors import Capture

POINT = (0.6, 0.3)
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
SWIN = {"img_size": 32, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "num_classes": 3}
PIT = {"img_size": 64, "patch_size": 8, "stride": 8, "base_dims": (8, 8), "depth": (1, 1), "heads": (2, 4)}
SAM = SMALL | {"window_size": 3, "global_attn_indexes": (1,), "use_rel_pos": True}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
METAFORMER = {
    "depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "token_mixers": [SepConv, SepConv, Attention, Attention],
    "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
}  # fmt: skip
VISFORMER = {"img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}
VOLO_D = {
    "img_size": 64,
    "layers": (1, 1, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (2, 4, 4, 4),
    "num_classes": 3,
}
FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}
HEADS = MaxxVitTransformerCfg(dim_head=8)
COATNET = {"img_size": 32, "cfg": MaxxVitCfg((16, 32), (1, 1), ("C", "T"), 16, transformer_cfg=HEADS)}
CASES: dict[str, tuple[Any, dict[str, Any], int, tuple[int, int], int]] = {
    # name, arguments, pixels, grid of the last site, prefix tokens
    "eva02": ("eva02_tiny_patch14_224", SMALL, 32, (4, 4), 1),
    "dinov3": ("vit_small_patch16_dinov3", SMALL, 32, (4, 4), 5),
    "rope": ("vit_small_patch16_rope_224", SMALL, 32, (4, 4), 1),
    "beit": ("beit_base_patch16_224", SMALL, 32, (4, 4), 1),
    "beit, shared": ("beit_base_patch16_224", SMALL | SHARED, 32, (4, 4), 1),
    "relpos": ("vit_relpos_small_patch16_224", SMALL, 32, (4, 4), 0),
    "relpos, class token": ("vit_relpos_base_patch16_cls_224", SMALL, 32, (4, 4), 1),
    "sam, whole map": ("samvit_base_patch16", SAM, 32, (4, 4), 0),
    "pit": ("pit_ti_224", PIT, 64, (4, 4), 1),
    "pit, distilled": ("pit_ti_distilled_224", PIT, 64, (4, 4), 2),
    "caformer": (MetaFormer, METAFORMER, 64, (2, 2), 0),
    "visformer": ("visformer_tiny", VISFORMER, 64, (2, 2), 0),
    "volo": (VOLO, VOLO_D, 64, (4, 4), 0),
    "fastvit": ("fastvit_sa12", FASTVIT, 64, (2, 2), 0),
    "coatnet": (MaxxVit, COATNET, 32, (4, 4), 0),
}


def build(name: Any, arguments: dict[str, Any]) -> nn.Module:
    """Build a small model, by timm's name or by class, whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments) if isinstance(name, str) else name(**arguments)
    model.eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
        else:
            nn.init.normal_(p, std=0.1, mean=0.5)
    return model


def weights_of(model: nn.Module, module: Any, images: Tensor) -> Tensor:
    """Run a model with the written-out attention of one module, and take its softmax, [..., H, N, N]."""
    taken: list[Tensor] = []
    hook = module.attn_drop.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    fused = getattr(module, "fused_attn", None)
    if fused is not None:
        module.fused_attn = False
    with torch.no_grad():
        model(images)
    hook.remove()
    if fused is not None:
        module.fused_attn = fused
    return taken[0]


def read(model: nn.Module, images: Tensor, site: str, **asked: Any) -> Tensor:
    """Read one site: [images, labels, H, h, w]."""
    with torch.no_grad():
        plain = model(images)
        with attnctl.control(model, Capture(sites=site, keep=("heads",), store="float32", **asked)) as handle:
            again = model(images)
            maps = handle.maps.layers[site][:, :, 0, :, 0]
    for a, b in zip([again], [plain], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return maps


@pytest.mark.parametrize("case", CASES)
def test_maps_are_the_softmax(case: str) -> None:
    name, arguments, size, (h, w), prefix = CASES[case]
    model, images = build(name, arguments), torch.rand(2, 3, size, size)
    site = [s for s in attnctl.find_sites(model) if s.kind == "self"][-1]
    got = read(model, images, site.name, points=(POINT,))
    want = weights_of(model, site.module, images).reshape(2, site.heads, prefix + h * w, prefix + h * w)
    row = prefix + int(POINT[1] * h) * w + int(POINT[0] * w)
    torch.testing.assert_close(got.flatten(-2)[:, 0], want[:, :, row, prefix:], atol=1e-5, rtol=0)
    assert want.std() > 1e-3  # far from uniform, or the place would not matter
    mean = read(model, images, site.name, words=("mean",)).flatten(-2)[:, 0]
    torch.testing.assert_close(mean, want[:, :, prefix:, prefix:].mean(2), atol=1e-5, rtol=0)
    if prefix:
        first = read(model, images, site.name, words=("class",)).flatten(-2)[:, 0]
        torch.testing.assert_close(first, want[:, :, 0, prefix:], atol=1e-5, rtol=0)


def row_of_windows(want: Tensor, h: int, w: int, sides: tuple[int, int], shift: int, at: tuple[int, int]) -> Tensor:
    """Find one place's row in weights of padded, shifted windows [windows, H, N, N], laid out on the map [H, h, w]."""
    numbers = torch.arange(1, h * w + 1).reshape(1, h, w, 1).roll((-shift, -shift), (1, 2))
    padded = nn.functional.pad(numbers, [0, 0, 0, -w % sides[1], 0, -h % sides[0]])
    windows = window_partition(padded, sides).flatten(1) - 1
    which, place = (windows == at[0] * w + at[1]).nonzero()[0].tolist()
    row = torch.zeros(want.shape[1], h * w + 1)
    row.index_add_(1, windows[which] % (h * w + 1), want[which, :, place])  # padding, -1, goes to the last column
    return row[:, :-1].reshape(-1, h, w)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
@pytest.mark.parametrize("depth", [0, 1])
def test_windows_of_swin_v2(name: str, depth: int) -> None:
    model, images = build(name, SWIN), torch.rand(1, 3, 32, 32)
    site = attnctl.find_sites(model)[depth]
    block: Any = site.module
    want = weights_of(model, block.attn, images)
    side, shift = tuple(block.window_size), block.shift_size[0]
    assert shift == 2 * depth
    at = (int(POINT[1] * 8), int(POINT[0] * 8))
    got = read(model, images, site.name, points=(POINT,))[0, 0]
    torch.testing.assert_close(got, row_of_windows(want, 8, 8, side, shift, at), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["twins_svt_small", "twins_pcpvt_small"])
def test_windows_and_reduced_keys_of_twins(name: str) -> None:
    model, images = timm.create_model(name, num_classes=3).eval(), torch.rand(2, 3, 224, 224)
    sites = attnctl.find_sites(model)
    of = {type(s.module).__name__: s for s in reversed(sites)}
    first, second = of.get("LocallyGroupedAttn"), of["GlobalSubSampleAttn"]
    at = (int(POINT[1] * 56), int(POINT[0] * 56))
    if first is not None:
        want = weights_of(model, first.module, images)  # [images, windows, H, N, N]
        side = first.module.ws  # type: ignore[union-attr]
        got = read(model, images, first.name, points=(POINT,))
        for image in range(2):
            row = row_of_windows(want[image], 56, 56, (side, side), 0, at)
            torch.testing.assert_close(got[image, 0], row, atol=1e-5, rtol=0)
    want = weights_of(model, second.module, images)
    got = read(model, images, second.name, points=(POINT,)).flatten(-2)[:, 0]
    torch.testing.assert_close(got, want[:, :, at[0] * 56 + at[1]], atol=1e-5, rtol=0)


def test_windows_of_sam() -> None:
    model, images = build("samvit_base_patch16", SAM), torch.rand(2, 3, 32, 32)
    site = attnctl.find_sites(model)[0]
    want = weights_of(model, site.module, images).reshape(2, -1, 4, 9, 9)
    got = read(model, images, site.name, points=(POINT,))
    for image in range(2):
        row = row_of_windows(want[image], 4, 4, (3, 3), 0, (int(POINT[1] * 4), int(POINT[0] * 4)))
        torch.testing.assert_close(got[image, 0], row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 72])
def test_mobilevit_gives_each_image_its_own_maps(size: int) -> None:
    """Tokens at one place of every patch of 2 x 2 attend to each other; the model has each such place as an image."""
    model, images = build("mobilevit_xxs", {"num_classes": 3}), torch.rand(2, 3, size, size)
    for site in attnctl.find_sites(model)[::3]:
        got = read(model, images, site.name, points=(POINT,))
        h, w = got.shape[-2:]
        want = weights_of(model, site.module, images)  # [images * 4, H, N, N]
        y, x = int(POINT[1] * h), int(POINT[0] * w)
        place, patch = y % 2 * 2 + x % 2, y // 2 * (w // 2) + x // 2
        row = torch.zeros(2, site.heads, h, w)
        row[..., y % 2 :: 2, x % 2 :: 2] = want.unflatten(0, (2, 4))[:, place, :, patch].unflatten(-1, (h // 2, w // 2))
        torch.testing.assert_close(got[:, 0], row, atol=1e-5, rtol=0)


def test_crossvit_has_a_class_token_in_each_branch() -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("crossvit_tiny_240", num_classes=3).eval(), torch.rand(1, 3, 240, 240)
    for site in attnctl.find_sites(model)[:2]:
        got = read(model, images, site.name, words=("class",)).flatten(-2)[:, 0]
        want = weights_of(model, site.module, images)
        torch.testing.assert_close(got, want[:, :, 0, 1:], atol=1e-5, rtol=0)


def test_importance_and_distance_of_other_classes() -> None:
    from attnctl.backbones.look.analysis import distance_profile, head_importance

    for case in ("eva02", "visformer", "fastvit"):
        name, arguments, size, *_ = CASES[case]
        model, images = build(name, arguments), torch.rand(4, 3, size, size)
        site = attnctl.find_sites(model)[-1]
        assert head_importance(model, images).divergence[site.name].shape == (site.heads,)
        reached = distance_profile(model, images).hops[site.name][:, -1]
        torch.testing.assert_close(reached, torch.ones(site.heads), atol=1e-4, rtol=0)


class Folding(nn.Module):
    """A model that hands attention more rows than it was given images."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = timm.layers.Attention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Fold two halves of the tokens into the batch."""
        return self.attn(x.unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)


def test_places_folded_into_the_batch_are_refused() -> None:
    from attnctl.backbones.look.capture import BackboneHandle

    model = Folding().eval()
    with (
        BackboneHandle(model, (Capture(points=(POINT,)),)).attach(),
        pytest.raises(UnsupportedModelError, match="a batch of 6 for 3 images"),
    ):
        model(torch.rand(3, 18, 8))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mobilevitv2_050", "LinearSelfAttention sums the keys up"),
        ("edgenext_xx_small", "CrossCovarianceAttn weighs channels"),
        ("lambda_resnet26t", "LambdaLayer sums the keys up"),
        ("mambaout_femto", "It has no attention"),
        ("resnet18", "It has no attention"),
    ],
)
def test_what_cannot_be_read_says_why_and_what_can(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*Readable: ViT and DeiT, EVA and DINOv3"):
        attnctl.control(timm.create_model(name), Capture())
