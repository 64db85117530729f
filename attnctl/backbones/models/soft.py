"""SOFT: a pyramid with softmax-free attention in three stages and softmax with a class token in the last.

"SOFT: Softmax-free Transformer with Linear Complexity" (arXiv 2110.11945), "Softmax-free Linear Transformers" (arXiv
2207.03341) for the normalised form. Blocks are compared with the release; whole networks by size and names alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from attnctl.backbones.models.agent_pvt import PVTBlock, ReducedAttention, fit_positions
from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.softmax_free import SoftmaxFreeAttention2d
from attnctl.errors import ConfigError

__all__ = ["SOFT", "SequenceAttention", "SoftmaxFreeBlock"]


class SoftmaxFreeBlock(nn.Module):
    """Attention and a perceptron of four times the width, each added and then normed: [B, H, W, C] -> the same."""

    def __init__(
        self, dim: int, heads: int, ratio: int, kernel: int, normed: bool = False, drop_path: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.mha = SoftmaxFreeAttention2d(dim, heads, ratio, kernel, normed, **dd)
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)
        self.ff1, self.ff2 = nn.Linear(dim, 4 * dim, **dd), nn.Linear(4 * dim, dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = self.norm1(x + self.drop_path(self.mha(x)))
        return self.norm2(x + self.drop_path(self.ff2(F.gelu(self.ff1(x), approximate="tanh"))))


class _Step(nn.Module):
    """Convolutions, batch norms and learned positions: [B, C, H, W] -> [B, H', W', C']."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, **dd), nn.BatchNorm2d(after, **dd), nn.ReLU()]
        self.proj = nn.Sequential(*layers)
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], widths[-1], **dd))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 2, 3, 1)
        return x + fit_positions(self.pos_embed, self.grid[0], self.grid[1], x.shape[1], x.shape[2])


class SequenceAttention(ReducedAttention):
    """Softmax attention of a sequence with a class token in it, [B, 1, 1 + N, C]: no map, so it cannot be read."""


class _Last(nn.Module):
    """The last stage: a class token ahead of the map, [B, C, H, W] -> tokens [B, 1, 1 + h * w, C']."""

    def __init__(self, step: nn.Module, dim: int, **dd: Any) -> None:
        super().__init__()
        self.step = step
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(x).flatten(1, 2)
        first = (self.cls_token + self.cls_position).expand(x.shape[0], -1, -1)
        return torch.cat([first, x], dim=1).unsqueeze(1)


class SOFT(Pyramid):
    """SOFT with timm's interface; its features are the last stage's tokens, the class token first, [B, C, 1, 1 + N].

    Args:
        img_size: What positions are learned for; other sizes resize them.
        dims: Channels of each stage.
        depths: Blocks of each.
        num_heads: Heads of each.
        ratios: How far the first three stages' attention reduces its tokens.
        kernels: Width of its convolutions, in the same stages.
        normed: Whether to take the normalised form.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (1, 2, 3, 2),
        num_heads: tuple[int, ...] = (2, 4, 10, 16),
        ratios: tuple[int, ...] = (8, 4, 2),
        kernels: tuple[int, ...] = (9, 5, 3),
        normed: bool = False,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(4, dims=dims, depths=depths, num_heads=num_heads)
        exactly(3, ratios=ratios, kernels=kernels)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        grids = self.grids((img_size, img_size) if isinstance(img_size, int) else img_size)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            narrow = min(32, dims[0])
            widths = (dims[i - 1], c) if i else (common.get("in_chans", 3), narrow, narrow, c)
            step: nn.Module = _Step(widths, (2,) if i else (2, 1, 2), grids[i], **dd)
            blocks: list[nn.Module]
            if i < 3:
                blocks = [
                    SoftmaxFreeBlock(c, num_heads[i], ratios[i], kernels[i], normed, next(rates), **dd)
                    for _ in range(depths[i])
                ]
            else:
                step = _Last(step, c, **dd)
                last = [PVTBlock(c, num_heads[i], (1, 1), "B", drop_path=next(rates), **dd) for _ in range(depths[i])]
                for block in last:
                    block.attn = SequenceAttention(c, num_heads[i], **dd)
                blocks = list(last)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, nn.Identity(), **common)
        self.final = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.apply(init_linear)

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ("avg", "token", ""):
            raise ConfigError(f"global_pool={global_pool!r} was given; expected 'token', 'avg' or ''.")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Take the class token, norm it and classify: [B, C, 1, 1 + N] -> [B, num_classes]."""
        x = self.head_drop(self.final(x[:, :, 0, 0]))
        return x if pre_logits else self.head(x)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints; the last stage's positions hold the class token's."""
    out = {}
    for key, value in take_state(state).items():
        name, _, rest = key.partition(".")
        kind, stage = name[:-1], int(name[-1]) - 1 if name[-1:].isdigit() else -1
        step = f"stages.{stage}.downsample" + (".step" if stage == 3 else "")
        if kind == "patch_embed":
            key = f"{step}.{rest}"
        elif kind == "pos_embed":
            key = f"{step}.pos_embed"
            if stage == 3:
                out["stages.3.downsample.cls_position"], value = value[:, :1], value[:, 1:]
        elif kind == "block":
            key = f"stages.{stage}.blocks.{rest.replace('.att.', '.')}"
        elif name == "cls_token":
            key = "stages.3.downsample.cls_token"
        elif name == "norm":
            key = f"final.{rest}"
        if not key.endswith(("inverse", "identity")):
            out[key] = value
    return load_filter(out, model, resize=True)


_SIZES: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "tiny": {},  # 13.1, 2.2
    "small": {"depths": (1, 3, 7, 4)},  # 24.1, as published; the released class has 20 blocks in the third stage
    "medium": {"dims": (64, 128, 288, 512), "num_heads": (2, 4, 9, 16), "depths": (1, 3, 29, 5)},  # 45.8, 9.1
    "large": {"depths": (1, 3, 40, 5)},  # 64.7, 13.7
    "huge": {"dims": (64, 128, 352, 512), "num_heads": (2, 4, 11, 16), "depths": (1, 5, 49, 5)},  # 87.1, 19.4
}
LAYOUTS: dict[str, dict[str, Any]] = {f"soft_{size}": layout for size, layout in _SIZES.items()}
LAYOUTS |= {f"soft_norm_{size}": layout | {"normed": True} for size, layout in _SIZES.items()}
LAYOUTS["soft_small_released"] = {"depths": (1, 3, 20, 4)}  # 38.9, 7.7
LAYOUTS["soft_micro"] = {
    "img_size": 64, "dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 3, 4), "ratios": (4, 2, 2),
    "kernels": (5, 3, 3),
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj.0", classifier="head", pool_size=None)
register(__name__, SOFT, LAYOUTS, checkpoint_filter_fn, out_indices=(0, 1, 2), flatten_sequential=True)
