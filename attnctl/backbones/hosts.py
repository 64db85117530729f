"""Where attention sits in timm's models, and the modules that take its place there.

A host keeps the projections of the original (the very same modules, so weights stay shared and their names unchanged)
and hands queries, keys and values to a mixer. Swin and MaxViT blocks are replaced whole, because their attention sees
windows only while a mixer wants the map; their norms and perceptrons are kept the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.maxxvit import PartitionAttentionCl
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention as TokenAttention
from torch import Tensor, nn

from attnctl.backbones.grid import GridRecorder
from attnctl.backbones.mixers.base import Grid, Mixer, Slot, join_heads
from attnctl.backbones.modules.multiaxis import AnySizePartition
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["HOSTS", "MapHost", "MaxViTHost", "PVTHost", "SwinHost", "TokenHost", "build_host"]

MakeMixer = Callable[[Slot], Mixer]


class _Host(nn.Module):
    mixer: Mixer

    def split(self, qkv: Tensor, heads: int, head_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Split a fused projection [B, N, 3 C] into q, k, v [B, H, N, D]; head_first: [head][q k v] channel order."""
        b, n, c = qkv.shape
        if head_first:
            q, k, v = qkv.reshape(b, n, heads, c // heads).transpose(1, 2).chunk(3, dim=-1)
            return q, k, v
        q, k, v = qkv.reshape(b, n, 3, heads, c // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class TokenHost(_Host):
    """The place of `timm.layers.Attention` in ViT and DeiT blocks: tokens [B, prefix + h * w, C]."""

    def __init__(self, old: nn.Module, mixer: Mixer, grid: Grid, prefix: int, recorder: GridRecorder | None) -> None:
        super().__init__()
        self.num_heads, self.grid, self.prefix = int(old.num_heads), grid, prefix  # type: ignore[arg-type]
        self.qkv, self.proj, self.proj_drop = old.qkv, old.proj, old.proj_drop
        self.q_norm, self.k_norm = old.q_norm, old.k_norm
        self.norm = getattr(old, "norm", None) or nn.Identity()
        self.mixer = mixer
        self.recorder = recorder

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens. Raises: ConfigError for a mask, and for tokens that do not fit the grid."""
        if attn_mask is not None or is_causal:
            raise ConfigError("attn_mask or is_causal was given; a swapped attention mixes by the grid, without masks.")
        grid = (self.recorder.grid if self.recorder else None) or self.grid
        n = x.shape[1] - self.prefix
        if n != grid[0] * grid[1]:
            raise ConfigError(
                f"{n} patch tokens were given, but the grid is {grid[0]}x{grid[1]}. Build the model with "
                "dynamic_img_size=True before swapping, or swap again after set_input_size, or give grid=(h, w)."
            )
        q, k, v = self.split(self.qkv(x), self.num_heads)  # type: ignore[operator]
        out = self.mixer(self.q_norm(q), self.k_norm(k), v, x, grid)  # type: ignore[operator]
        return self.proj_drop(self.proj(self.norm(join_heads(out))))  # type: ignore[operator]


class PVTHost(_Host):
    """The place of PVTv2's attention: tokens and their grid come as arguments; keys keep the full resolution."""

    def __init__(self, old: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.num_heads = int(old.num_heads)  # type: ignore[arg-type]
        self.q, self.kv, self.proj, self.proj_drop = old.q, old.kv, old.proj, old.proj_drop
        self.mixer = mixer

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        """Mix tokens [B, h * w, C] of a grid (h, w)."""
        qkv = torch.cat([self.q(x), self.kv(x)], dim=-1)  # type: ignore[operator]
        out = self.mixer(*self.split(qkv, self.num_heads), x, (int(feat_size[0]), int(feat_size[1])))
        return self.proj_drop(self.proj(join_heads(out)))  # type: ignore[operator]


class MapHost(_Host):
    """Attention over a whole map [B, H, W, C], with the projections of a windowed one."""

    def __init__(self, old: nn.Module, mixer: Mixer, head_first: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_first = int(old.num_heads), head_first  # type: ignore[arg-type]
        self.qkv, self.proj, self.proj_drop = old.qkv, old.proj, old.proj_drop
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        q, k, v = self.split(self.qkv(tokens), self.num_heads, self.head_first)  # type: ignore[operator]
        out = self.mixer(q, k, v, tokens, (h, w))
        return self.proj_drop(self.proj(join_heads(out))).reshape(b, h, w, c)  # type: ignore[operator]


class SwinHost(nn.Module):
    """The place of a Swin block: its norms and perceptron, and attention over the whole map instead of windows."""

    def __init__(self, old: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = old.norm1, old.norm2, old.mlp
        self.drop_path1, self.drop_path2 = old.drop_path1, old.drop_path2
        self.attn = MapHost(old.attn, mixer)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))  # type: ignore[operator]
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # type: ignore[operator]

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Take timm's call; mixers fit themselves to the map."""


class MaxViTHost(nn.Module):
    """The place of MaxViT's block or grid attention: everything kept but the partition and its position bias."""

    def __init__(self, old: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = old.norm1, old.norm2, old.mlp
        self.ls1, self.ls2 = old.ls1, old.ls2
        self.drop_path1, self.drop_path2 = old.drop_path1, old.drop_path2
        self.attn = MapHost(old.attn, mixer, bool(old.attn.head_first))  # type: ignore[arg-type, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))  # type: ignore[operator]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[operator]

    def set_partition_size(self, *_: Any) -> None:
        """Take timm's call; mixers fit themselves to the map."""


HOSTS: dict[type[nn.Module], str] = {
    TokenAttention: "attention of ViT and DeiT blocks",
    SwinTransformerBlock: "Swin blocks",
    PVTAttention: "attention of PVTv2 blocks",
    PartitionAttentionCl: "block and grid attention of MaxViT",
    AnySizePartition: "the same after any_size",
}


def build_host(old: nn.Module, make: MakeMixer, grid: Grid, prefix: int, recorder: GridRecorder | None) -> nn.Module:
    """Build the module that takes the place of `old`, with its device, dtype, and training state.

    Raises: UnsupportedModelError for an attention that gates its output (its weights would be lost).
    """
    inner: Any = old if isinstance(old, (TokenAttention, PVTAttention)) else old.attn
    first = inner.q if isinstance(old, PVTAttention) else inner.qkv
    dim, heads = inner.proj.in_features, inner.num_heads
    scale = float(getattr(inner, "scale", (dim // heads) ** -0.5))
    if getattr(inner, "gate", None) is not None:
        raise UnsupportedModelError(
            "The attention gates its output, which no swapped form keeps; leave that block out."
        )
    if not isinstance(old, TokenAttention):
        prefix = 0
    mixer = make(Slot(dim, heads, grid, prefix, scale, first.weight.device, first.weight.dtype))
    new: nn.Module
    if isinstance(old, TokenAttention):
        new = TokenHost(old, mixer, grid, prefix, recorder)
    elif isinstance(old, PVTAttention):
        new = PVTHost(old, mixer)
    elif isinstance(old, SwinTransformerBlock):
        new = SwinHost(old, mixer)
    else:
        new = MaxViTHost(old, mixer)
    new.training = old.training
    for child in new.modules():
        if isinstance(child, Mixer):
            child.train(old.training)
    return new
