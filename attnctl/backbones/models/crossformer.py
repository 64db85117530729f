"""CrossFormer and CrossFormer++: attention inside windows and inside grids of an interval, block by block.

"CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (arXiv 2108.00154), "CrossFormer++"
(arXiv 2303.06908).
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.groups import GroupAttention2d

__all__ = ["CrossFormer", "CrossFormerBlock"]


class CrossScaleStem(nn.Module):
    """Patches of four sizes around the same centres, norms: [B, 3, H, W] -> [B, H / 4, W / 4, C]."""

    def __init__(self, in_chans: int, dim: int, sizes: tuple[int, ...] = (4, 8, 16, 32), **dd: Any) -> None:
        super().__init__()
        widths = [dim // 2 ** (i + 1) for i in range(len(sizes) - 1)]
        widths.append(dim - sum(widths))
        self.projs = nn.ModuleList(
            nn.Conv2d(in_chans, c, k, 4, (k - 4) // 2, **dd) for k, c in zip(sizes, widths, strict=True)
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stem."""
        parts: list[Tensor] = []
        for proj in self.projs:
            parts.append(proj(x))
        return self.norm(torch.cat(parts, dim=1).permute(0, 2, 3, 1))


class CrossScaleMerging(nn.Module):
    """Norm a map and halve it by patches of two sizes: [B, C, H, W] -> [B, H / 2, W / 2, C']."""

    def __init__(self, before: int, after: int, sizes: tuple[int, ...] = (2, 4), **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(before, **dd)
        widths = [after // 2 ** (i + 1) for i in range(len(sizes) - 1)]
        widths.append(after - sum(widths))
        self.reductions = nn.ModuleList(
            nn.Conv2d(before, c, k, 2, (k - 2) // 2, **dd) for k, c in zip(sizes, widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the merging."""
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        parts: list[Tensor] = []
        for reduction in self.reductions:
            parts.append(reduction(x))
        return torch.cat(parts, dim=1).permute(0, 2, 3, 1)


class CrossFormerBlock(nn.Module):
    """Attention inside groups and a perceptron, each behind a norm and added: [B, H, W, C] -> the same.

    interval: step between the tokens of a group, 1 for windows. cooling: a depthwise convolution and a norm take the
    place of what the block gives (arXiv 2303.06908, amplitude cooling layer).
    """

    def __init__(
        self, dim: int, heads: int, group: int, interval: int = 1, mlp_ratio: float = 4.0, cooling: bool = False,
        drop_path: float = 0.0, both_sides: bool = False, **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = GroupAttention2d(dim, heads, group, interval, both_sides=both_sides, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.cooling = cooling
        self.ex_conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **dd) if cooling else nn.Identity()
        self.ex_ln = nn.LayerNorm(dim, **dd) if cooling else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.cooling:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class CrossFormer(Pyramid):
    """CrossFormer and CrossFormer++ with timm's interface.

    Args:
        dim: channels of the first stage, doubled at every other. depths, num_heads: per stage.
        groups: side of a group per stage. intervals: step of every second block's groups per stage.
        cooling: whether every third block ends in an amplitude cooling layer.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (1, 1, 8, 6),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        groups: tuple[int, ...] = (7, 7, 7, 7),
        intervals: tuple[int, ...] = (8, 4, 2, 1),
        cooling: bool = False,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(len(depths), depths=depths, num_heads=num_heads, groups=groups, intervals=intervals)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        dims = tuple(dim * 2**i for i in range(len(depths)))
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks = [
                CrossFormerBlock(
                    c, num_heads[i], groups[i], intervals[i] if j % 2 else 1, mlp_ratio,
                    cooling and j % 3 == 2 and j < depths[i] - 1, next(rates), **dd,
                )
                for j in range(depths[i])
            ]  # fmt: skip
            step = CrossScaleMerging(dims[i - 1], c, **dd) if i else CrossScaleStem(common.get("in_chans", 3), c, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, LayerNorm2d(dims[-1], eps=1e-5, **dd), **common)
        self.apply(init_linear)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints; the offsets of biases are computed here."""
    out = {}
    for key, value in take_state(state).items():
        part, _, rest = key.partition(".")
        if key.endswith(("relative_position_index", "biases", "attn_mask")):
            continue
        if part == "patch_embed":
            key = f"stages.0.downsample.{rest}"
        elif part == "layers":
            index, _, below = rest.partition(".")
            key = f"stages.{int(index) + below.startswith('downsample.')}.{below}"
        out[key] = value
    return load_filter(out, model)


_WIDE: dict[str, Any] = {"dim": 96, "num_heads": (3, 6, 12, 24)}
_LARGE: dict[str, Any] = {"dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}
_PLUS: dict[str, Any] = {"groups": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True, "depths": (2, 2, 18, 2)}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "crossformer_tiny": {},  # 27.8, 2.9
    "crossformer_small": _WIDE | {"depths": (2, 2, 6, 2)},  # 30.7, 4.9
    "crossformer_base": _WIDE | {"depths": (2, 2, 18, 2)},  # 52.0, 9.2
    "crossformer_large": _LARGE,  # 92.0, 16.1
    "crossformer_pp_small": _PLUS,  # 23.3, 4.4
    "crossformer_pp_base": _WIDE | _PLUS,  # 52.0, 9.6
    "crossformer_pp_large": _LARGE | _PLUS,  # 92.0, 16.8
    "crossformer_pp_huge": _LARGE | _PLUS | {"depths": (6, 6, 18, 2)},  # 96.0, 22.1
    "crossformer_micro": {
        "dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "groups": (2, 2, 2, 1), "intervals": (2, 2, 1, 1),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.projs.0", classifier="head")
register(__name__, CrossFormer, LAYOUTS, checkpoint_filter_fn)
