"""Where attention sits in timm's models, and the modules that take its place there.

A host keeps the projections of the original (the very same modules, so weights stay shared and their names unchanged)
and hands queries, keys and values to a mixer. Swin and MaxViT blocks are replaced whole, because their attention sees
windows only while a mixer wants the map; their norms and perceptrons are kept the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

from attnctl.backbones.grid import GridSource
from attnctl.backbones.mixers.base import Mixer, join_heads
from attnctl.errors import ConfigError

__all__ = [
    "CosineMapHost", "Host", "MapHost", "MaxViTHost", "PVTHost", "SwinHost", "SwinV2CrHost", "SwinV2Host", "TokenHost",
    "put", "split_qkv",
]  # fmt: skip


class Host(nn.Module):
    """Takes the place of a module, its original, and keeps it outside the module tree.

    `parameters()` and `state_dict()` show the swapped form alone. What changes a whole model must reach the original
    all the same, or `restored` would bring back stale weights: so casts and moves, weights loaded by the original's
    names and other image sizes go on to it.
    """

    def keep(self, original: nn.Module) -> None:
        """Take over from an original, of which this module already holds some children under their names."""
        ids = {id(m) for m in self.modules()}
        shared = [n for n, m in original.named_modules() if id(m) in ids]
        self._shared = tuple(n for n in shared if not any(n.startswith(f"{outer}.") for outer in shared))
        self._original = (original,)  # in a tuple, which hides it from the module tree
        self._trainable = self._shared_flags()

    @property
    def original(self) -> nn.Module:
        """Return the module that was here before."""
        return self._original[0]

    def restored(self) -> nn.Module:
        """Return the original as if it had never left: with the children that this module now holds in its stead,
        in this module's training state, and frozen or trainable as the shared weights have become.

        Raises: ConfigError where the original's own weights have no data.
        """
        alone = self._alone()
        weights = [p for m in alone.values() for p in m.parameters(recurse=False)]
        if any(p.is_meta for p in weights) and not any(p.is_meta for p in self.parameters()):
            raise ConfigError(
                "The weights that the swap had set aside lost their data when the model was on the meta device. "
                "Load a state dict of the unswapped model first: model.load_state_dict(state, strict=False)."
            )
        for name in self._shared:
            put(self.original, name, self.get_submodule(name))
        flags = self._shared_flags()
        for parameter in weights if len(flags) == 1 and flags != self._trainable else ():
            parameter.requires_grad_(*flags)
        for module in alone.values():
            module.training = self.training
        return self.original

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state_dict has, where the original has some; timm calls this."""
        for module in self._alone().values():
            compute = getattr(module, "init_non_persistent_buffers", None)
            if compute is not None:
                compute()

    def _shared_flags(self) -> set[bool]:
        return {p.requires_grad for name in self._shared for p in self.get_submodule(name).parameters()}

    def _alone(self) -> dict[str, nn.Module]:
        """Find the modules of the original that this one has not taken over, by their names in it."""
        below = tuple(f"{name}." for name in self._shared)
        return {n: m for n, m in self.original.named_modules() if n not in self._shared and not n.startswith(below)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Host:
        super()._apply(fn, recurse)
        for module in self._alone().values() if recurse else ():
            module._apply(fn, recurse=False)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        metadata, _, _, _, errors = rest
        for name, module in self._alone().items():
            at = f"{prefix}{name}." if name else prefix
            module._load_from_state_dict(state_dict, at, metadata, False, [], [], errors)
            for key in (*module._parameters, *module._buffers):
                state_dict.pop(at + key, None)  # or the children of this module would call it unexpected
        super()._load_from_state_dict(state_dict, prefix, *rest)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def split_qkv(qkv: Tensor, heads: int, head_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection [B, N, 3 C] into q, k, v [B, H, N, D]; head_first: [head][q k v] channel order."""
    b, n, c = qkv.shape
    if head_first:
        q, k, v = qkv.reshape(b, n, heads, c // heads).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v
    q, k, v = qkv.reshape(b, n, 3, heads, c // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class TokenHost(Host):
    """The place of `timm.layers.Attention` in ViT and DeiT blocks: tokens [B, prefix + h * w, C]."""

    def __init__(self, old: nn.Module, mixer: Mixer, grid: GridSource, prefix: int) -> None:
        super().__init__()
        self.num_heads, self.grid, self.prefix = int(old.num_heads), grid, prefix  # type: ignore[arg-type]
        self.qkv, self.proj, self.proj_drop = old.qkv, old.proj, old.proj_drop
        self.q_norm, self.k_norm = old.q_norm, old.k_norm
        self.norm = getattr(old, "norm", None) or nn.Identity()
        self.gate = getattr(old, "gate", None)
        self.mixer = mixer

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens. Raises: ConfigError for a mask, and for tokens that do not fit the grid."""
        if attn_mask is not None or is_causal:
            raise ConfigError("attn_mask or is_causal was given; a swapped attention mixes by the grid, without masks.")
        n = x.shape[1] - self.prefix
        grid = self.grid(n)
        if n != grid[0] * grid[1]:
            raise ConfigError(
                f"{n} patch tokens were given, but the grid is {grid[0]}x{grid[1]}. Build the model with "
                "dynamic_img_size=True before swapping, or call set_input_size on it, or give grid=(h, w)."
            )
        q, k, v = split_qkv(self.qkv(x), self.num_heads)  # type: ignore[operator]
        out = self.mixer(self.q_norm(q), self.k_norm(k), v, x, grid)  # type: ignore[operator]
        out = self.norm(join_heads(out))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[operator]


class PVTHost(Host):
    """The place of PVTv2's attention: tokens and their grid come as arguments; keys keep the full resolution."""

    def __init__(self, old: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.num_heads = int(old.num_heads)  # type: ignore[arg-type]
        self.q, self.kv, self.proj, self.proj_drop = old.q, old.kv, old.proj, old.proj_drop
        self.mixer = mixer

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        """Mix tokens [B, h * w, C] of a grid (h, w)."""
        qkv = torch.cat([self.q(x), self.kv(x)], dim=-1)  # type: ignore[operator]
        out = self.mixer(*split_qkv(qkv, self.num_heads), x, (int(feat_size[0]), int(feat_size[1])))
        return self.proj_drop(self.proj(join_heads(out)))  # type: ignore[operator]


class MapHost(nn.Module):
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
        q, k, v = split_qkv(self.qkv(tokens), self.num_heads, self.head_first)  # type: ignore[operator]
        out = self.mixer(q, k, v, tokens, (h, w))
        return self.proj_drop(self.proj(join_heads(out))).reshape(b, h, w, c)  # type: ignore[operator]


class SwinHost(Host):
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

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Resize the windows of the original; mixers fit themselves to the map."""
        self.original.set_input_size(*args, **kwargs)  # type: ignore[operator]


class CosineMapHost(nn.Module):
    """Cosine attention over a whole map [B, H, W, C], with the projections of Swin V2's windows.

    Queries and keys have length 1 and carry the learned factor of their head, so that mixers scale logits by 1.
    """

    def __init__(self, old: Any, mixer: Mixer) -> None:
        super().__init__()
        self.num_heads = int(old.num_heads)
        self.qkv, self.proj, self.proj_drop = old.qkv, old.proj, old.proj_drop
        self.logit_scale = old.logit_scale
        self.q_bias, self.v_bias = getattr(old, "q_bias", None), getattr(old, "v_bias", None)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        qkv = self.qkv(tokens)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = split_qkv(qkv, self.num_heads)
        factor = self.logit_scale.reshape(1, -1, 1, 1).clamp(max=_LARGEST).exp().to(q.dtype)
        q, k = F.normalize(q, dim=-1) * factor.sqrt(), F.normalize(k, dim=-1) * factor.sqrt()
        out = self.mixer(q, k, v, tokens, (h, w))
        return self.proj_drop(self.proj(join_heads(out))).reshape(b, h, w, c)


class WholeMapHost(Host):
    """A block that cuts windows in a method of its own, which here hands attention the map.."""

    attn: nn.Module

    def settle(self, old: nn.Module, mixer: Mixer) -> None:
        """Take the attributes of the original over, with its children but attention."""
        nn.Module.__init__(self)
        hooks = {name for name in vars(self) if name.endswith("hooks")}
        state = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        for name, value in vars(old).items():
            if name not in hooks:
                vars(self)[name] = value.copy() if name in state else value
        self._buffers["attn_mask"] = None
        self.attn = CosineMapHost(old.attn, mixer)

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Resize the windows of the original; mixers fit themselves to the map."""
        self.original.set_input_size(*args, **kwargs)  # type: ignore[operator]


class SwinV2Host(WholeMapHost, SwinTransformerV2Block):
    """The place of a block of Swin V2."""


class SwinV2CrHost(WholeMapHost, SwinTransformerV2CrBlock):
    """The place of a block of Swin V2's other release."""


_LARGEST = math.log(100.0)  # of Swin V2's learned factors


class MaxViTHost(Host):
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

    def set_partition_size(self, *args: Any) -> None:
        """Resize the partition of the original; mixers fit themselves to the map."""
        self.original.set_partition_size(*args)  # type: ignore[operator]
