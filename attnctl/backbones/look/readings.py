"""How each class of attention is read: where its values are, what takes its result, how its heads lie.

A class that hands q, k and v to torch's fused kernel is read there, whatever it does with projections, biases, norms
and rotary embeddings before. The others are read at the layer that makes their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.maxxvit import Attention2d, PartitionAttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.visformer import Attention as VisformerAttention
from timm.models.vision_transformer import Attention as TokenAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.volo import Attention as VoloAttention
from torch import Tensor, nn

from attnctl.backbones.hosts import MapHost, PVTHost, TokenHost
from attnctl.backbones.models.agent_cswin import CSwinBlock
from attnctl.backbones.models.agent_pvt import ReducedAttention
from attnctl.backbones.models.agent_swin import AgentSwinBlock
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.multiaxis import AnySizePartition, MultiAxisAttention
from attnctl.backbones.modules.plain import MapAttention
from attnctl.backbones.modules.routing import BiLevelRoutingAttention

__all__ = ["READABLE", "Reading", "reading_of"]

READABLE = (
    "ViT and DeiT, EVA and DINOv3, BEiT, relative-position ViTs, SAM, Swin (1, 2 and cr), PVTv2, MaxViT and CoAtNet, "
    "PiT, CrossViT, MobileViT, CAFormer, Visformer, FastViT, Twins and VOLO (its plain attention) of timm, every model "
    "of attnctl.backbones, and these with swapped attention"
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one attention module is read.

    Attributes:
        heads: Heads H: contiguous channels of what `out` is given.
        width: Channels of the values.
        out: The first layer behind attention.
        enter: Runs the attention on the (normed) tokens that its module was called with.
        values: The layer whose output ends with the values; None where they are read at torch's fused kernel.
        by_head: Whether queries, keys and values of one head lie together in that output.
        norm: A norm between the module's input and attention, or None.
        windowed: Whether the tokens are cut, shifted or padded before they reach `values`.
        channels_first: Whether the module is given maps [B, C, H, W].
        order: Numbers the tokens of a map of (height, width) as attention gets them: row by row from 0, -1 for
            padding; None where they come row by row, or as `windowed` blocks are found to have them.
        sized: Whether the second argument is the grid of the tokens.
        prefix: Class and register tokens ahead of the grid, None for as many as the model has.
        settings: Attributes that the module `core` needs while it is read.
        core: The module that holds the projections.
    """

    heads: int
    width: int
    out: nn.Module
    enter: Callable[..., Any]
    values: nn.Module | None = None
    by_head: bool = False
    norm: nn.Module | None = None
    windowed: bool = False
    channels_first: bool = False
    order: Callable[[int, int], Tensor] | None = None
    sized: bool = False
    prefix: int | None = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    core: nn.Module | None = None


def reading_of(module: nn.Module) -> Reading | None:
    """Return how a module is read, None for one that is no attention known here."""
    for kinds, read in _READINGS:
        if issubclass(type(module), kinds):
            return read(module)
    return None


def _tokens(m: Any) -> Reading:
    out = getattr(m, "norm", None) or m.proj
    width = m.qkv.out_features // 3
    return Reading(heads=m.num_heads, width=width, out=out, enter=m.forward, values=m.qkv, prefix=None)


def _kernel(m: Any) -> Reading:
    """Read a sequence of class tokens, registers and patches at the fused kernel."""
    return Reading(
        heads=m.num_heads, width=m.proj.in_features, out=getattr(m, "norm", None) or m.proj, enter=m.forward,
        prefix=None, settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _map_kernel(m: Any) -> Reading:
    """Read a map, or the sequence of one, at the fused kernel."""
    convolution = isinstance(m.proj, nn.Conv2d)
    return Reading(
        heads=m.num_heads, width=m.proj.in_channels if convolution else m.proj.in_features, out=m.proj,
        enter=m.forward, channels_first=convolution or isinstance(m, FastVitAttention),
        settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _sized_kernel(m: Any) -> Reading:
    """Read a class of Twins at the fused kernel: keys of a reduced map, or windows of a padded one."""
    side = int(getattr(m, "ws", 1))

    def order(h: int, w: int) -> Tensor:
        numbers = F.pad(torch.arange(1, h * w + 1).reshape(h, w), [0, -w % side, 0, -h % side]) - 1
        return numbers.unfold(0, side, side).unfold(1, side, side).flatten()

    return Reading(
        heads=m.num_heads, width=m.proj.in_features, out=m.proj, enter=m.forward, sized=True,
        order=order if side > 1 else None, settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _reduced(m: Any) -> Reading:
    sized = not isinstance(m, ReducedAttention)
    width = m.kv.out_features // 2
    return Reading(heads=m.num_heads, width=width, out=m.proj, enter=m.forward, values=m.kv, sized=sized)


def _agents(m: Any) -> Reading:
    values = m.kv if m.split_qkv else m.qkv
    return Reading(heads=m.num_heads, width=m.dim, out=m.proj, enter=m.forward, values=values, prefix=m.prefix)


def _routed(m: Any) -> Reading:
    return Reading(heads=m.num_heads, width=m.dim, out=m.wo, enter=m.forward, values=m.qkv, windowed=True)


def _map(m: Any) -> Reading:
    sized = isinstance(m, MultiAxisAttention)
    width, by_head = m.qkv.out_features // 3, bool(getattr(m, "head_first", False))
    return Reading(
        heads=m.num_heads, width=width, out=m.proj, enter=m.forward, values=m.qkv, by_head=by_head, sized=sized,
        prefix=int(getattr(m, "prefix", 0)),
    )  # fmt: skip


def _stripes(m: Any) -> Reading:
    heads = sum(int(a.num_heads) for a in m.attns)
    return Reading(heads=heads, width=m.qkv.out_features // 3, out=m.proj, enter=m.forward, values=m.qkv)


def _windows(enter: str, prenorm: bool = True, **settings: Any) -> Callable[[Any], Reading]:
    """Return how a block is read that cuts windows in a method of its own and holds its attention as `attn`."""

    def read(m: Any) -> Reading:
        a: Any = m.attn
        return Reading(
            heads=a.num_heads, width=a.qkv.out_features // 3, out=a.proj, values=a.qkv, enter=getattr(m, enter),
            by_head=bool(getattr(a, "head_first", False)), norm=m.norm1 if prenorm else None, windowed=True,
            settings=settings, core=a,
        )  # fmt: skip

    return read


def _agent_windows(m: Any) -> Reading:
    return _windows("_windows" if m.window else "attn")(m)


_READINGS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Reading]], ...] = (
    ((TokenAttention, TokenHost), _tokens),
    ((AttentionRope, EvaAttention, BeitAttention, RelPosAttention), _kernel),
    (
        (SamAttention, MetaFormerAttention, Attention2d, VisformerAttention, VoloAttention, FastVitAttention),
        _map_kernel,
    ),
    ((LocallyGroupedAttn, GlobalSubSampleAttn), _sized_kernel),
    ((PVTAttention, PVTHost, ReducedAttention), _reduced),
    ((AgentAttention2d,), _agents),
    ((BiLevelRoutingAttention,), _routed),
    ((MapAttention, MultiAxisAttention, MapHost), _map),
    ((CSwinBlock,), _stripes),
    ((SwinTransformerBlock,), _windows("_attn")),
    # Its projection is called as a function unless the bias is added apart; the norms come after attention.
    ((SwinTransformerV2Block,), _windows("_attn", prenorm=False, qkv_bias_separate=True)),
    ((SwinTransformerV2CrBlock,), _windows("_shifted_window_attn", prenorm=False)),
    ((PartitionAttentionCl,), _windows("_partition_attn")),
    ((AnySizePartition,), _windows("_mix")),
    ((AgentSwinBlock,), _agent_windows),
)
