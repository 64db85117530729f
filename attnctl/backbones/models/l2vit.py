"""L2ViT: windows of softmax and linear attention over the map in turns, the second with a local convolution.

"The Linear Attention Resurrection in Vision Transformer" (arXiv 2501.16182).
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, register_notrace_module
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.groups import GroupAttention2d
from attnctl.backbones.modules.resize import pad_to
from attnctl.errors import ConfigError, require

__all__ = ["L2ViT", "LinearAttention2d", "linear_attention"]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, clamp: float = 100.0) -> Tensor:
    """Compute t relu(q) (relu(k)^T v) / max(relu(q) sum relu(k)^T, clamp); sums in float32.

    Shapes: q, k, v [B, H, N, D], factor t [H, 1, 1] -> [B, H, N, D]. Weights sum to t where the clamp is not met.
    """
    qf, kf, vf = q.float().relu(), k.float().relu(), v.float()
    total = (qf * kf.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    return (factor.float() * (qf @ (kf.transpose(-2, -1) @ vf)) / total.clamp(min=clamp)).to(v.dtype)


@register_notrace_module
class LinearAttention2d(nn.Module):
    """Linear attention of a map [B, H, W, C] with a learned factor per head. Raises: ConfigError."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        out = linear_attention(qkv[0], qkv[1], qkv[2], self.temperature)
        return self.proj(out.transpose(1, 2).reshape(b, h, w, c))


class _Depthwise(nn.Module):
    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalConcentration(nn.Module):
    """Two depthwise convolutions of 7 x 7 with a batch norm between: [B, H, W, C] -> the same."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        x = x.permute(0, 3, 1, 2)
        return self.conv2(self.bn(self.act(self.conv1(x)))).permute(0, 2, 3, 1)


class L2ViTBlock(nn.Module):
    """A position convolution, attention, and a perceptron: [B, H, W, C] -> the same.

    local: windows of softmax and a second position convolution; otherwise linear attention and local concentration.
    """

    def __init__(
        self, dim: int, heads: int, local: bool, window: int = 7, mlp_ratio: float = 4.0, drop_path: float = 0.0,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.local = local
        self.cpe = nn.ModuleList([_Depthwise(dim, **dd) for _ in range(2 if local else 1)])
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = (
            GroupAttention2d(dim, heads, window, bias=False, masked=False, **dd)
            if local
            else LinearAttention2d(dim, heads, **dd)
        )
        self.norm3 = nn.Identity() if local else nn.LayerNorm(dim, **dd)
        self.local_mp = nn.Identity() if local else LocalConcentration(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[-1](x) if self.local else x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stem(nn.Module):
    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd), nn.BatchNorm2d(dim // 2, **dd), nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd),
        ]  # fmt: skip
        self.proj = nn.Sequential(OrderedDict(proj=nn.Sequential(*layers)))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class _Halving(nn.Module):
    def __init__(self, before: int, after: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(before, **dd)
        self.proj = nn.Conv2d(before, after, 2, 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj(pad_to(x, 2)).permute(0, 2, 3, 1)


class L2ViT(Pyramid):
    """L2ViT with timm's interface. dims, depths, num_heads: per stage. window: of the local blocks."""

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(4, dims=dims, depths=depths, num_heads=num_heads)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks = [
                L2ViTBlock(c, num_heads[i], j % 2 == 0, window, mlp_ratio, next(rates), **dd) for j in range(depths[i])
            ]
            step = _Halving(dims[i - 1], c, **dd) if i else _Stem(common.get("in_chans", 3), c, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, LayerNorm2d(dims[-1], eps=1e-5, **dd), **common)
        self.apply(init_linear)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints."""
    state = take_state(state)
    if not any(k.startswith("downsample_layers.") for k in state):
        return load_filter(state, model)
    out = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        index, _, below = rest.partition(".")
        if part == "downsample_layers":
            key = f"stages.{index}.downsample.{below}"
        elif part == "stages":
            key = f"stages.{index}.blocks.{below}"
        out[key] = value
    return load_filter(out, model)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "l2vit_tiny": {},  # 28.6, 4.7
    "l2vit_small": {"depths": (2, 2, 18, 2)},  # 50.2, 9.0
    "l2vit_base": {  # 88.6, 15.9
        "dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32),
    },
    "l2vit_micro": {"dims": (16, 32, 48, 64), "depths": (2, 1, 2, 1), "num_heads": (1, 2, 3, 4), "window": 4},
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj.proj.0", classifier="head")
register(__name__, L2ViT, LAYOUTS, checkpoint_filter_fn)
