"""Groups of a map: windows of neighbours, or tokens that lie an interval apart, and softmax attention inside them.

"CrossFormer" (arXiv 2108.00154) alternates both kinds, "CrossFormer++" (arXiv 2303.06908) too; L2ViT's local blocks
(arXiv 2501.16182) take the first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.modules.attend import attend, ceil_div
from attnctl.errors import ConfigError, require

__all__ = ["DynamicBias", "GroupAttention2d", "merge_groups", "split_groups"]


def split_groups(x: Tensor, size: int, ih: int, iw: int) -> Tensor:
    """Cut a map into groups of size x size tokens: [B, H, W, C] -> [B, groups, size * size, C].

    ih, iw: steps between the tokens of a group; 1 for windows. H and W are multiples of size times the step.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // (size * ih), size, ih, w // (size * iw), size, iw, c)
    return x.permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(b, -1, size * size, c)


def merge_groups(x: Tensor, size: int, ih: int, iw: int, h: int, w: int) -> Tensor:
    """Undo `split_groups`: [B, groups, size * size, C] -> [B, h, w, C]."""
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, h // (size * ih), ih, w // (size * iw), iw, size, size, c)
    return x.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(b, h, w, c)


class DynamicBias(nn.Module):
    """A bias per head from the offset (dy, dx) between two tokens, by a small perceptron (arXiv 2108.00154, 3.2.2)."""

    def __init__(self, dim: int, heads: int, **dd: Any) -> None:
        super().__init__()
        hidden = max(1, dim // 16)
        self.pos_proj = nn.Linear(2, hidden, **dd)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(hidden, **dd), nn.ReLU(), nn.Linear(hidden, out, **dd))
            for out in (hidden, hidden, heads)
        )

    def forward(self, size: int) -> Tensor:
        """Compute the bias between the tokens of a group: [H, size * size, size * size]."""
        like = self.pos_proj.weight
        steps = torch.arange(1 - size, size, device=like.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2).to(like.dtype)
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        at = torch.arange(size, device=like.device)
        rows = (at[:, None] - at[None, :] + size - 1)[:, None, :, None] * (2 * size - 1)
        index = rows + (at[:, None] - at[None, :] + size - 1)[None, :, None, :]
        return table[index.flatten()].reshape(size * size, size * size, -1).permute(2, 0, 1)


@register_notrace_module
class GroupAttention2d(nn.Module):
    """Softmax attention inside the groups of a map [B, H, W, C], which is padded with zeros to whole groups.

    group: side of a group. interval: step between its tokens, 1 for windows. bias: whether a perceptron of the offset
    adds to the logits. masked: padded keys are left out, and a map as small as a group is one group; otherwise padded
    keys count. both_sides: pad evenly at both ends instead of at the bottom and right.
    Raises: ConfigError for heads that do not divide.
    """

    biased: Final[bool]

    def __init__(
        self, dim: int, num_heads: int, group: int, interval: int = 1, bias: bool = True, masked: bool = True,
        both_sides: bool = False, backend: str = "auto", **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        self.num_heads, self.group, self.interval = num_heads, group, interval
        self.biased, self.masked, self.both_sides, self.backend = bias, masked, both_sides, backend
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.pos = DynamicBias(dim, num_heads, **dd) if bias else nn.Identity()

    def mix(self, x: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
        """Mix groups [N, size * size, C]; mask: additive, [N, 1, 1, size * size]."""
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias: Tensor | None = mask
        if self.biased:
            bias = self.pos(size).unsqueeze(0).to(x.dtype)
            if mask is not None:
                bias = bias + mask
        out = attend(qkv[0], qkv[1], qkv[2], bias, None, 0.0, self.backend)
        return self.proj(out.transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, _ = x.shape
        size, step = self.group, self.interval
        if self.masked and min(h, w) <= size:
            size, step = min(h, w), 1
        ph, pw = ceil_div(h, size * step) * size * step, ceil_div(w, size * step) * size * step
        top, left = ((ph - h) // 2, (pw - w) // 2) if self.both_sides else (0, 0)
        pad = [0, 0, left, pw - w - left, top, ph - h - top]
        mask: Tensor | None = None
        if self.masked and (ph != h or pw != w):
            real = F.pad(torch.ones([1, h, w, 1], dtype=x.dtype, device=x.device), pad)
            absent = 1 - split_groups(real, size, step, step).reshape(-1, 1, 1, size * size)
            mask = (absent * -1e6).repeat(b, 1, 1, 1)  # a group of padding alone would have no key otherwise
        parts = split_groups(F.pad(x, pad), size, step, step)
        out = self.mix(parts.flatten(0, 1), size, mask).reshape(parts.shape)
        return merge_groups(out, size, step, step, ph, pw)[:, top : top + h, left : left + w]
