"""Where attention sits in a backbone, in whatever form: the layers that make its values and take its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.models.maxxvit import PartitionAttentionCl
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention as TokenAttention
from torch import nn

from attnctl.backbones.hosts import MapHost, PVTHost, TokenHost
from attnctl.backbones.models.agent_cswin import CSwinBlock
from attnctl.backbones.models.agent_pvt import ReducedAttention
from attnctl.backbones.models.agent_swin import AgentSwinBlock
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.multiaxis import AnySizePartition, MultiAxisAttention
from attnctl.backbones.modules.plain import MapAttention
from attnctl.backbones.modules.routing import BiLevelRoutingAttention
from attnctl.core.sites import Site
from attnctl.errors import UnsupportedModelError

__all__ = ["BackboneSite", "find_places", "sites_of"]


@dataclass(frozen=True)
class BackboneSite:
    """One attention of a backbone.

    Attributes:
        name: Dotted name of the module that is called.
        module: That module.
        enter: Runs its attention on the (normed) tokens that it was called with.
        values: The layer whose output holds the values.
        width: Channels of the values, at the end of that output unless `by_head`.
        out: The first layer behind attention.
        heads: Heads H: contiguous channels of what `out` is given.
        norm: A norm between the module's input and attention, or None.
        windowed: Whether the tokens are cut, shifted or padded before they reach `values`.
        by_head: Whether queries, keys and values of one head lie together.
        prefix: Class and register tokens ahead of the grid.
    """

    name: str
    module: nn.Module
    enter: Callable[..., Any]
    values: nn.Module
    width: int
    out: nn.Module
    heads: int
    norm: nn.Module | None = None
    windowed: bool = False
    by_head: bool = False
    prefix: int = 0


def find_places(model: nn.Module) -> tuple[BackboneSite, ...]:
    """List the attention of a backbone in execution order.

    Raises: UnsupportedModelError for a model with none that can be read.
    """
    found: dict[str, BackboneSite] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{seen}.") for seen in found):
            continue
        place = _place(name, module, int(getattr(owner_of(model, name), "num_prefix_tokens", 0)))
        if place is not None:
            found[name] = place
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be read. Readable: ViT and DeiT, Swin, PVTv2 and MaxViT "
            "of timm, every model of attnctl.backbones, and these with swapped attention."
        )
    return tuple(found.values())


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the nearest module around a place that embeds patches, or the model."""
    parts = name.split(".")[:-1]
    while parts:
        around = model.get_submodule(".".join(parts))
        if hasattr(around, "patch_embed"):
            return around
        parts.pop()
    return model


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """Describe the attention of a backbone as sites of kind "self"; grids are known once images have passed."""
    return tuple(
        Site(p.name, "self", p.heads, p.width // p.heads, depth, module=p.module)
        for depth, p in enumerate(find_places(model))
    )


def _place(name: str, module: nn.Module, prefix: int) -> BackboneSite | None:
    m: Any = module
    kind = type(module)  # a class test on `m` itself would type it as a bare module
    if issubclass(kind, (TokenAttention, TokenHost)):
        out = getattr(m, "norm", None) or m.proj
        return BackboneSite(name, m, m.forward, m.qkv, m.qkv.out_features // 3, out, m.num_heads, prefix=prefix)
    if issubclass(kind, (PVTAttention, PVTHost, ReducedAttention)):
        return BackboneSite(name, m, m.forward, m.kv, m.kv.out_features // 2, m.proj, m.num_heads)
    if issubclass(kind, AgentAttention2d):
        values = m.kv if m.split_qkv else m.qkv
        return BackboneSite(name, m, m.forward, values, m.dim, m.proj, m.num_heads, prefix=m.prefix)
    if issubclass(kind, BiLevelRoutingAttention):
        return BackboneSite(name, m, m.forward, m.qkv, m.dim, m.wo, m.num_heads, windowed=True)
    if issubclass(kind, (MapAttention, MultiAxisAttention)):
        n = getattr(m, "prefix", 0)
        return BackboneSite(name, m, m.forward, m.qkv, m.qkv.out_features // 3, m.proj, m.num_heads, prefix=n)
    if issubclass(kind, CSwinBlock):
        heads = sum(int(a.num_heads) for a in m.attns)
        return BackboneSite(name, m, m.forward, m.qkv, m.qkv.out_features // 3, m.proj, heads)
    if issubclass(kind, MapHost):
        width = m.qkv.out_features // 3
        return BackboneSite(name, m, m.forward, m.qkv, width, m.proj, m.num_heads, by_head=m.head_first)
    enter = _entrance(kind, m)
    if enter is None:
        return None
    a: Any = m.attn
    by_head = bool(getattr(a, "head_first", False))
    width = a.qkv.out_features // 3
    return BackboneSite(name, m, enter, a.qkv, width, a.proj, a.num_heads, norm=m.norm1, windowed=True, by_head=by_head)


def _entrance(kind: type[nn.Module], m: Any) -> Callable[..., Any] | None:
    """Return what a block with windows of its own runs on normed tokens."""
    if issubclass(kind, SwinTransformerBlock):
        return m._attn
    if issubclass(kind, PartitionAttentionCl):
        return m._partition_attn
    if issubclass(kind, AnySizePartition):
        return m._mix
    if issubclass(kind, AgentSwinBlock):
        return m._windows if m.window else m.attn.forward
    return None
