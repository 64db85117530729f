"""How the attention of this package's models and of swapped forms is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.hosts import CosineMapHost, MapHost, WholeMapHost
from attnctl.backbones.kernel_hosts import KernelHost
from attnctl.backbones.look.reading import Reading
from attnctl.backbones.models.agent_cswin import CSwinBlock
from attnctl.backbones.models.agent_swin import AgentSwinBlock
from attnctl.backbones.models.emov2 import HybridAttention2d
from attnctl.backbones.models.inline import InLineCSwinBlock
from attnctl.backbones.models.l2vit import LinearAttention2d
from attnctl.backbones.models.moat import MOATAttention2d
from attnctl.backbones.models.nat import NeighborhoodAttention2d
from attnctl.backbones.models.soft import SequenceAttention
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.groups import GroupAttention2d
from attnctl.backbones.modules.inline import InLineAttention2d
from attnctl.backbones.modules.multiaxis import MultiAxisAttention
from attnctl.backbones.modules.plain import MapAttention
from attnctl.backbones.modules.rank_linear import GatedLinearAttention2d
from attnctl.backbones.modules.routing import BiLevelRoutingAttention
from attnctl.backbones.modules.transnext import CosineAttention2d

__all__ = ["OWN", "windows"]


def windows(enter: str, prenorm: bool = True, **settings: Any) -> Callable[[Any], Reading]:
    """Return how a block is read that cuts windows in a method of its own and holds its attention as `attn`."""

    def read(m: Any) -> Reading:
        a: Any = m.attn
        return Reading(
            heads=a.num_heads, width=a.qkv.out_features // 3, out=a.proj, values=a.qkv, enter=getattr(m, enter),
            by_head=bool(getattr(a, "head_first", False)), norm=m.norm1 if prenorm else None, windowed=True,
            settings=settings, core=a,
        )  # fmt: skip

    return read


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


def _agent_windows(m: Any) -> Reading:
    return windows("_windows" if m.window else "attn")(m)


def _mixed(m: Any) -> Reading:
    """Read a swapped form where its mixer is."""
    convolution = isinstance(m.proj, nn.Conv2d)
    return Reading(
        heads=m.num_heads, width=m.proj.in_channels if convolution else m.proj.in_features,
        out=getattr(m, "norm", None) or m.proj, enter=m.forward, mixer=m.mixer, prefix=int(getattr(m, "prefix", 0)),
        channels_first=bool(getattr(m, "channels_first", False)),
    )  # fmt: skip


def _grouped(m: Any) -> Reading:
    """Read a map that is padded, or cut into groups, before it reaches the projection."""
    return Reading(
        heads=m.num_heads, width=m.proj.in_features, out=m.proj, enter=m.forward, values=m.qkv, windowed=True
    )


def _inline(m: Any) -> Reading:
    values = m.kv if m.split_qkv else m.qkv
    return Reading(heads=m.num_heads, width=m.dim, out=m.proj, enter=m.forward, values=values, prefix=m.prefix)


def _gated(m: Any) -> Reading:
    return Reading(
        heads=m.num_heads, width=m.proj.in_channels, out=m.proj, enter=m.forward, mixer=m.mixer, channels_first=True
    )


def _hybrid(m: Any) -> Reading:
    def order(h: int, w: int) -> Tensor:
        return F.pad(torch.arange(1, h * w + 1).reshape(h, w), [0, -w % m.window, 0, -h % m.window]).flatten() - 1

    return Reading(
        heads=m.num_heads, width=m.width, out=m.mixer, enter=m.forward, mixer=m.mixer, channels_first=True, order=order
    )


OWN: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Reading | None]], ...] = (
    ((WholeMapHost,), lambda _: None),  # what it holds is read
    ((SequenceAttention,), lambda _: None),
    ((KernelHost, CosineMapHost), _mixed),
    ((AgentAttention2d,), _agents),
    ((BiLevelRoutingAttention,), _routed),
    ((MapAttention, MultiAxisAttention, MapHost, LinearAttention2d), _map),
    ((CSwinBlock, InLineCSwinBlock), _stripes),
    ((AgentSwinBlock,), _agent_windows),
    ((GroupAttention2d, NeighborhoodAttention2d, MOATAttention2d), _grouped),
    ((InLineAttention2d,), _inline),
    ((CosineAttention2d,), _map),
    ((GatedLinearAttention2d,), _gated),
    ((HybridAttention2d,), _hybrid),
)
