"""Which attention of timm can be swapped, what its slot for a mixer looks like, and which host takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.maxxvit import PartitionAttentionCl
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import Attention as TokenAttention
from torch import nn

from attnctl.backbones.grid import GridSource
from attnctl.backbones.hosts import Host, MaxViTHost, PVTHost, SwinHost, SwinV2CrHost, SwinV2Host, TokenHost
from attnctl.backbones.kernel_hosts import KERNEL_HOSTS
from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.multiaxis import AnySizePartition

__all__ = ["PLACES", "SWAPPABLE", "build_host", "is_sequence", "place_of"]

MakeMixer = Callable[[Slot], Mixer]

SWAPPABLE = (
    "ViT and DeiT, EVA, DINOv3 and other rotary ViTs, BEiT, relative-position ViTs, NaFlexViT, SAM, Swin (1, 2 and "
    "cr), PVTv2, MaxViT and CoAtNet, PiT, CrossViT, MobileViT, CAFormer, Visformer, FastViT, VOLO, Twins and DaViT "
    "of timm"
)
_BLOCKS: tuple[type[nn.Module], ...] = (
    SwinTransformerBlock, SwinTransformerV2Block, SwinTransformerV2CrBlock, PartitionAttentionCl, AnySizePartition,
)  # fmt: skip
PLACES: tuple[type[nn.Module], ...] = (TokenAttention, PVTAttention, *_BLOCKS, *KERNEL_HOSTS)


def place_of(module: nn.Module) -> bool:
    """Return whether a module is attention that can be swapped."""
    return isinstance(module, PLACES) and not isinstance(module, Host)


def is_sequence(module: nn.Module) -> bool:
    """Return whether a module is given tokens [B, N, C] without their grid."""
    kind = KERNEL_HOSTS.get(type(module))
    return isinstance(module, TokenAttention) or (kind is not None and kind.sequence)


def build_host(old: nn.Module, make: MakeMixer, grid: Grid, prefix: int, source: GridSource) -> Host:
    """Build the module that takes the place of `old`, with its device, dtype, and training state.

    grid: (height, width) in tokens that the mixer is built for; source: where a sequence finds its grid when it runs.
    """
    prefix = prefix if is_sequence(old) else 0
    mixer = make(_slot(old, grid, prefix))
    new: Host
    if isinstance(old, TokenAttention):
        new = TokenHost(old, mixer, source, prefix)
    elif isinstance(old, PVTAttention):
        new = PVTHost(old, mixer)
    elif isinstance(old, SwinTransformerBlock):
        new = SwinHost(old, mixer)
    elif isinstance(old, (SwinTransformerV2Block, SwinTransformerV2CrBlock)):
        block = SwinV2Host if isinstance(old, SwinTransformerV2Block) else SwinV2CrHost
        new = block.__new__(block)
        new.settle(old, mixer)
    elif type(old) in KERNEL_HOSTS:
        kind = KERNEL_HOSTS[type(old)]
        new = kind.__new__(kind)
        new.settle(old, mixer, source if kind.sequence else None, prefix)
    else:
        new = MaxViTHost(old, mixer)
    new.training = old.training
    for child in new.modules():
        if isinstance(child, Mixer):
            child.train(old.training)
    new.keep(old)
    return new


def _slot(old: nn.Module, grid: Grid, prefix: int) -> Slot:
    """Describe the place between an attention's projections."""
    inner: Any = old.attn if isinstance(old, _BLOCKS) else old
    first = next(m for n in ("qkv", "q", "q_proj") if (m := getattr(inner, n, None)) is not None)
    conv = isinstance(inner.proj, nn.Conv2d)
    heads = int(inner.num_heads)
    dim = inner.proj.in_channels if conv else inner.proj.in_features
    scale = float(getattr(inner, "scale", (dim // heads) ** -0.5))
    if isinstance(old, (SwinTransformerV2Block, SwinTransformerV2CrBlock)):
        scale = 1.0  # the lengths of queries and keys carry it
    width = first.in_channels if conv and isinstance(first, nn.Conv2d) else first.in_features
    sides = tuple(old.window_size) if isinstance(old, SwinTransformerBlock) else ()
    window = sides[0] if len(set(sides)) == 1 else None
    table = inner.relative_position_bias_table if window else None
    return Slot(dim, heads, grid, prefix, scale, first.weight.device, first.weight.dtype, width, window, table)
