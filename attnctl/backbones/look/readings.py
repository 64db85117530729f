"""How each class of attention is read: where its values are, what takes its result, how its heads lie.

A class that hands q, k and v to torch's fused kernel, or multiplies what its softmax gave with the values, is read
there, whatever it does with projections, biases, norms, gates and rotary embeddings before. The others are read at the
layer that makes their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d, AttentionPoolLatent, AttentionRope, MultiQueryAttention2d, RotAttentionPool2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.diff_attention import DiffAttention
from timm.layers.halo_attn import HaloAttn
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.coat import FactorAttnConvRelPosEnc
from timm.models.convit import GPSA, MHSA
from timm.models.cpubone import ConvAttention as CPUBoneAttention
from timm.models.crossvit import CrossAttention
from timm.models.davit import WindowAttention as DavitWindows
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientformer_v2 import Attention2d as TalkingAttention2d
from timm.models.efficientformer_v2 import Attention2dDownsample as StridedAttention2d
from timm.models.efficientvit_mit import LiteMLA
from timm.models.efficientvit_msra import CascadedGroupAttention
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.gemma4_vit import Gemma4Attention
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention as SAM2Attention
from timm.models.levit import Attention as LevitAttention
from timm.models.levit import AttentionDownsample as LevitDownsample
from timm.models.lowformer import ConvAttention as LowFormerAttention
from timm.models.maxxvit import Attention2d, PartitionAttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.mvitv2 import MultiScaleAttention
from timm.models.nest import Attention as NestAttention
from timm.models.nextvit import EfficientAttention
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.shvit import SHSA
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.tnt import Attention as TNTAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.visformer import Attention as VisformerAttention
from timm.models.vision_transformer import Attention as TokenAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.volo import Attention as VoloAttention
from timm.models.volo import ClassAttention, OutlookAttention
from torch import Tensor, nn

from attnctl.backbones.hosts import PVTHost, TokenHost
from attnctl.backbones.look.own_readings import OWN, windows
from attnctl.backbones.look.reading import Reading
from attnctl.backbones.models.agent_pvt import ReducedAttention
from attnctl.backbones.modules.multiaxis import AnySizePartition

__all__ = ["READABLE", "Reading", "reading_of"]

READABLE = (
    "ViT and DeiT, EVA and DINOv3, BEiT, relative-position ViTs, SAM, Swin (1, 2 and cr), PVTv2, MaxViT and CoAtNet, "
    "PiT, CrossViT, MobileViT, CAFormer, Visformer, FastViT, Twins, VOLO, NesT, DaViT (its windows), GCViT, TinyViT, "
    "LeViT, EfficientFormer (1 and 2), EfficientViT of MSRA, Hiera, SAM 2, MViTv2, CaiT, ConViT, TNT, NextViT, SHViT, "
    "multi-query attention of MobileNet, BoTNet, HaloNet, CoaT, EfficientViT of MIT and attention pools of timm, "
    "every model of attnctl.backbones, and these with swapped attention"
)


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


def _by_proj(**more: Any) -> Callable[[Any], Reading]:
    """Return how a class is read that joins its heads before a linear layer `proj`."""

    def read(m: Any) -> Reading:
        fused = {"fused_attn": True} if hasattr(m, "fused_attn") else {}
        chosen: dict[str, Any] = {"settings": fused, "out": m.proj, "core": m, **more}
        return Reading(heads=m.num_heads, width=m.proj.in_features, enter=m.forward, **chosen)

    return read


def _differential(m: Any) -> Reading:
    """Read a difference of two softmaxes: of two fused kernels one would be missed, written out they are one map."""
    return _by_proj(prefix=None, out=m.norm, settings={"fused_attn": False})(m)


def _gemma(m: Any) -> Reading:
    return Reading(
        heads=m.num_heads, width=m.num_heads * m.head_dim, out=m.o_proj, enter=m.forward, prefix=None,
        settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _single_head(m: Any) -> Reading:
    """Read SHViT, where attention has some of the channels."""
    return Reading(heads=1, width=m.pdim, out=m.proj, enter=m.forward, channels_first=True)


def _bottleneck(m: Any) -> Reading:
    return Reading(heads=m.num_heads, width=m.dim_out_v, out=m.pool, enter=m.forward, channels_first=True)


def _halo(m: Any) -> Reading:
    """Read attention of blocks to keys around them: the values lie in a map, head by head behind their keys."""
    return Reading(
        heads=m.num_heads, width=m.dim_out_v, out=m.pool, enter=m.forward, values=m.kv, by_head=True,
        channels_first=True,
    )  # fmt: skip


def _factored(m: Any) -> Reading:
    """Read CoaT, whose keys go through a softmax over places; the convolution of its values does not count."""
    return Reading(
        heads=m.num_heads, width=m.qkv.out_features // 3, out=m.proj, enter=m.forward, values=m.qkv, sized=True,
        prefix=1,
    )  # fmt: skip


def _linear_scales(m: Any) -> Reading:
    """Read ReLU attention, whose heads of coarser scales follow those of the map."""
    width = m.proj.conv.in_channels
    return Reading(heads=width // m.dim, width=width, out=m.proj, enter=m.forward, channels_first=True, summed=True)


def _reduced_map(m: Any) -> Reading:
    """Read attention over a map that a convolution has reduced."""
    return Reading(
        heads=m.num_heads, width=m.o_proj_inpdim, out=m.o_proj, enter=m.forward, channels_first=True,
        settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _levit(m: Any) -> Reading:
    width = m.num_heads * m.val_dim
    return Reading(heads=m.num_heads, width=width, out=m.proj, enter=m.forward, channels_first=m.use_conv)


def _talking_2d(m: Any) -> Reading:
    return Reading(heads=m.num_heads, width=m.dh, out=m.act, enter=m.forward, channels_first=True)


def _cascaded(m: Any) -> Reading:
    heads = len(m.qkvs)
    return Reading(heads=heads, width=heads * m.val_dim, out=m.proj, enter=m.forward, channels_first=True, rounds=heads)


def _averaged(m: Any) -> Reading:
    return Reading(
        heads=m.num_heads, width=m.dim, out=m.proj, enter=m.forward, settings={"fused_attn": True}, core=m,
        spread=m.N_ratio if m.sr is not None else 1,
    )  # fmt: skip


def _mask_units(m: Any) -> Reading:
    return Reading(
        heads=m.heads, width=m.dim_out, out=m.proj, enter=m.forward, settings={"fused_attn": True}, core=m,
        heads_first=True,
    )  # fmt: skip


def _pooled_queries(m: Any) -> Reading:
    return Reading(
        heads=m.num_heads, width=m.dim_out, out=m.proj, enter=m.forward, sized=True, prefix=int(m.has_cls_token)
    )


def _shared_values(m: Any) -> Reading:
    """Read multi-query attention, whose heads share their values."""
    return Reading(
        heads=m.num_heads, width=m.num_heads * m.value_dim, out=m.output, enter=m.forward, channels_first=True,
        settings={"einsum": False, "fused_attn": True}, core=m,
    )  # fmt: skip


def _latents(m: Any) -> Reading:
    """Read an attention pool whose queries are learned."""
    names = ("pool",) if m.latent_len == 1 else tuple(f"pool{n}" for n in range(1, m.latent_len + 1))
    return Reading(
        heads=m.num_heads, width=m.kv.out_features // 2, out=m.proj, enter=m.forward, prefix=None, pool=names,
        settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _map_pool(m: Any) -> Reading:
    """Read an attention pool over a map: its query is the mean token, or a class token, ahead of the keys."""
    return Reading(
        heads=m.num_heads, width=m.embed_dim, out=m.drop, enter=m.forward, channels_first=True, prefix=1,
        pool=("pool",), settings={"fused_attn": True}, core=m,
    )  # fmt: skip


def _class_attention(m: Any) -> Reading:
    """Read attention of a class token to itself and all places."""
    settings = {"fused_attn": True} if hasattr(m, "fused_attn") else {}
    return Reading(
        heads=m.num_heads, width=m.proj.in_features, out=m.proj, enter=m.forward, prefix=1, pool=("class",),
        settings=settings, core=m,
    )  # fmt: skip


def _outlook(m: Any) -> Reading:
    return Reading(heads=m.num_heads, width=m.v.out_features, out=m.proj, enter=m.forward, values=m.v)


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


_READINGS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Reading | None]], ...] = (
    *OWN,
    ((TokenAttention, TokenHost), _tokens),
    ((AttentionRope, EvaAttention, BeitAttention, RelPosAttention), _kernel),
    (
        (SamAttention, MetaFormerAttention, Attention2d, VisformerAttention, VoloAttention, FastVitAttention),
        _map_kernel,
    ),
    ((LocallyGroupedAttn, GlobalSubSampleAttn), _sized_kernel),
    ((NestAttention,), _by_proj(heads_first=True)),
    ((DavitWindows, WindowAttentionGlobal, SAM2Attention), _by_proj()),
    ((TalkingHeadAttn, GPSA, EfficientFormerAttention, TinyVitAttention), _by_proj()),
    ((TNTAttention,), _by_proj(prefix=None)),
    ((MHSA,), _by_proj(prefix=1)),
    ((DiffAttention,), _differential),
    ((Gemma4Attention,), _gemma),
    ((SHSA,), _single_head),
    ((BottleneckAttn,), _bottleneck),
    ((HaloAttn,), _halo),
    ((FactorAttnConvRelPosEnc,), _factored),
    ((LiteMLA,), _linear_scales),
    ((LowFormerAttention, CPUBoneAttention), _reduced_map),
    ((LevitAttention, LevitDownsample), _levit),
    ((TalkingAttention2d, StridedAttention2d), _talking_2d),
    ((CascadedGroupAttention,), _cascaded),
    ((EfficientAttention,), _averaged),
    ((MaskUnitAttention,), _mask_units),
    ((MultiScaleAttention,), _pooled_queries),
    ((MultiQueryAttention2d,), _shared_values),
    ((AttentionPoolLatent,), _latents),
    ((AttentionPool2d, RotAttentionPool2d), _map_pool),
    ((ClassAttn, ClassAttention, CrossAttention), _class_attention),
    ((OutlookAttention,), _outlook),
    ((PVTAttention, PVTHost, ReducedAttention), _reduced),
    ((SwinTransformerBlock,), windows("_attn")),
    # Its projection is called as a function unless the bias is added apart; the norms come after attention.
    ((SwinTransformerV2Block,), windows("_attn", prenorm=False, qkv_bias_separate=True)),
    ((SwinTransformerV2CrBlock,), windows("_shifted_window_attn", prenorm=False)),
    ((PartitionAttentionCl,), windows("_partition_attn")),
    ((AnySizePartition,), windows("_mix")),
)
