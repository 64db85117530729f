"""RAVLT and MAViT: pyramids with gated linear attention in the first stages and softmax in the last.

"Breaking the Low-Rank Dilemma of Linear Attention" (arXiv 2411.07635), "Rectifying Magnitude Neglect in Linear
Attention" (arXiv 2507.00698). Stages 3 and 4 are softmax attention, as in the released models.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, take_state
from attnctl.backbones.modules.rank_linear import GatedLinearAttention2d

__all__ = ["RAVLT", "RAVLTBlock"]


class Stem(nn.Module):
    """Four convolutions of 3 x 3 that shrink images four times: [B, 3, H, W] -> [B, C, H / 4, W / 4]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        sizes = [(in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim // 2, 1), (dim // 2, dim, 2)]
        layers: list[nn.Module] = []
        for i, (before, after, stride) in enumerate(sizes):
            layers += [nn.Conv2d(before, after, 3, stride, 1, **dd), nn.BatchNorm2d(after, **dd)]
            layers += [nn.GELU()] if i < 3 else []
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stem."""
        return self.proj(x)


class Reduction(nn.Module):
    """Halve a map: a convolution of 3 x 3 and a batch norm."""

    def __init__(self, before: int, after: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(before, after, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the reduction."""
        return self.norm(self.reduction(x))


class ConvFeedForward(nn.Module):
    """A perceptron of 1 x 1 convolutions with a depthwise one, added, in its middle."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] -> [B, C, H, W]."""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class _Norm(nn.Module):
    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class RAVLTBlock(nn.Module):
    """A position convolution, attention and a perceptron, each added: [B, C, H, W] -> [B, C, H, W].

    init: of the layer scales, None for none.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, kind: str, drop_path: float = 0.0, init: float | None = None,
        backend: str = "auto", **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **dd)
        self.norm1 = _Norm(dim, **dd)
        self.attn = GatedLinearAttention2d(dim, heads, kind, backend, **dd)
        self.norm2 = _Norm(dim, **dd)
        self.ffn = ConvFeedForward(dim, hidden, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.scaled = init is not None
        if init is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), float(init), **dd))
            self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), float(init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self.pos(x)
        mixed = self.attn(self.norm1(x))
        x = x + self.drop_path(self.gamma_1 * mixed if self.scaled else mixed)
        mapped = self.ffn(self.norm2(x))
        return x + self.drop_path(self.gamma_2 * mapped if self.scaled else mapped)


class RAVLT(Pyramid):
    """RAVLT (attention="rala") and MAViT ("mala") with timm's interface.

    Args:
        dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        attention: Attention of the stages that are not in softmax_stages.
        mlp_ratio: Hidden channels over channels.
        init_values: Start of the layer scales per stage, None for none.
        projection: Channels before the classifier.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        attention: str = "rala",
        softmax_stages: tuple[int, ...] = (2, 3),
        mlp_ratio: float = 3.5,
        init_values: tuple[float | None, ...] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        img_size: int | tuple[int, int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        exactly(4, dims=dims, depths=depths, num_heads=num_heads, init_values=init_values)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            kind = "softmax" if i in softmax_stages else attention
            blocks = [
                RAVLTBlock(c, num_heads[i], int(mlp_ratio * c), kind, next(rates), init_values[i], backend, **dd)
                for _ in range(depths[i])
            ]
            step = Reduction(dims[i - 1], c, **dd) if i else Stem(in_chans, c, **dd)
            stages.append(Stage(step, blocks, channels_last=False))
        last = OrderedDict(
            proj=nn.Conv2d(dims[-1], projection, 1, **dd), bn=nn.BatchNorm2d(projection, **dd), act=nn.SiLU()
        )
        super().__init__(
            stages, dims, nn.Sequential(last), num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
            drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.num_features = self.head_hidden_size = projection
        self.head = nn.Linear(projection, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.apply(_init)


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints; their rotary angles are computed here."""
    state = take_state(state)
    if any(k.startswith("stages.") for k in state):
        return load_filter(state, model)
    out = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if key.endswith("RoPE.angle"):
            continue
        if part == "patch_embed":
            key = f"stages.0.downsample.{rest}"
        elif part == "layers":
            index, _, below = rest.partition(".")
            shift = below.startswith("downsample.")
            key = f"stages.{int(index) + shift}.{below}"
        elif part in ("proj", "norm"):
            key = f"norm.{'bn' if part == 'norm' else 'proj'}.{rest}"
        elif key == "head.weight":
            value = value.flatten(1)
        out[key] = value
    return load_filter(out, model)


_TINY: dict[str, Any] = {}
_SMALL: dict[str, Any] = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
_BASE: dict[str, Any] = {
    "dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "num_heads": (1, 2, 6, 8),
    "init_values": (1.0, 1.0, 1e-6, 1e-6),
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (1, 2, 7, 10), "init_values": (1e-6,) * 4,
}  # fmt: skip
_MICRO: dict[str, Any] = {
    "dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "projection": 128,
}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "ravlt_tiny": _TINY,  # 14.9, 2.6
    "ravlt_small": _SMALL,  # 25.6, 4.9
    "ravlt_base": _BASE,  # 48.2, 10.6
    "ravlt_large": _LARGE,  # 95.2, 17.2
    "ravlt_micro": _MICRO,
    "mavit_tiny": _TINY | {"attention": "mala", "projection": 2048},  # 16.4, 2.6
    "mavit_small": _SMALL | {"attention": "mala", "projection": 2048},  # 27.1, 4.9
    "mavit_base": _BASE | {"attention": "mala", "projection": 2048},  # 49.8, 10.6
    "mavit_large": _LARGE | {"attention": "mala", "projection": 2560},  # 97.8, 17.3
    "mavit_micro": _MICRO | {"attention": "mala"},
}
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj.0", classifier="head")
register(__name__, RAVLT, LAYOUTS, checkpoint_filter_fn)
