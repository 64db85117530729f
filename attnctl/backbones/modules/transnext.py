"""TransNeXt's attention with a mixture of heads: cosine logits that grow with the number of keys.

"TransNeXt: Robust Foveal Visual Perception" (arXiv 2311.17132), with the gates of "MoH" (arXiv 2410.11842).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from attnctl.backbones.modules.head_gates import HeadGates

__all__ = ["AggregatedAttention2d", "CosineAttention2d"]


def pooled_offsets(places: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Compute the offsets of places from evenly pooled ones along an axis, in eighths of the map, each once.

    Returns the offsets, squeezed by sign(r) log2(1 + |r|) / log2(8), and which of them belongs to each pair,
    [places, pooled].
    """
    at = torch.arange(places, device="cpu")
    if places % pooled:
        means = F.adaptive_avg_pool1d(at.float().reshape(1, 1, places), pooled).reshape(-1)
        steps = (at[:, None] - means[None, :]).flatten()
        index = torch.arange(places * pooled, device="cpu").reshape(places, pooled)
    else:
        r = places // pooled
        steps = torch.arange(r - places, places, device="cpu") - (r - 1) / 2
        index = at[:, None] - r * torch.arange(pooled, device="cpu")[None, :] + places - r
    steps = steps / max(1, places - 1) * 8
    return steps.sign() * (1 + steps.abs()).log2() / 3, index


class _Cosine(nn.Module):
    """What both kinds share: learned factors and biases, and the gates of the heads."""

    def __init__(self, dim: int, num_heads: int, shared: int, topk: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        d = dim // num_heads
        start = torch.full((num_heads, 1, 1), 1 / 0.24, **dd).exp().sub(1).log()  # softplus gives 1 / 0.24
        self.temperature = nn.Parameter(start)
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, d, **dd))
        trunc_normal_(self.query_embedding, std=0.02)
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)
        self.gates = HeadGates(dim, num_heads, shared, topk, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def bias(self, h: int, w: int, kh: int, kw: int) -> Tensor:
        """Compute the bias [H, h * w, kh * kw] between places and pooled places; equal offsets are computed once."""
        y, rows = pooled_offsets(h, kh)
        x, columns = pooled_offsets(w, kw)
        table = torch.stack([y[:, None].expand(-1, x.shape[0]), x[None, :].expand(y.shape[0], -1)], dim=-1)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(table.to(self.cpb_fc1.weight))))  # [offsets, offsets, H]
        rows, columns = rows.to(table.device), columns.to(table.device)
        bias = table[rows[:, None, :, None], columns[None, :, None, :]]  # [h, w, kh, kw, H]
        return bias.reshape(h * w, kh * kw, -1).permute(2, 0, 1)

    def finish(self, out: Tensor, tokens: Tensor) -> Tensor:
        """Weigh heads [B, H, N, D] by the gates of tokens [B, N, C], and project: [B, N, C]."""
        out = out * self.gates(tokens).transpose(1, 2).unsqueeze(-1).to(out.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))


class CosineMix(nn.Module):
    """Softmax of scaled queries and keys of length 1, with a bias, written out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Mix [B, H, N, D]; bias [H, N, N]."""
        return (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


@register_notrace_module
class CosineAttention2d(_Cosine):
    """Attention over a whole map [B, H, W, C]: logits are cosines times softplus(t) log N, plus a bias by offset."""

    def __init__(self, dim: int, num_heads: int, shared: int, topk: int, **dd: Any) -> None:
        super().__init__(dim, num_heads, shared, topk, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.mixer = CosineMix()

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        qkv = self.qkv(tokens).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        length = torch.log(torch.full([1], float(h * w), device=x.device, dtype=x.dtype))
        q = (F.normalize(qkv[0], dim=-1) + self.query_embedding) * F.softplus(self.temperature) * length
        out = self.mixer(q, F.normalize(qkv[1], dim=-1), qkv[2], self.bias(h, w, h, w))
        return self.finish(out, tokens).reshape(b, h, w, c)


@register_notrace_module
class AggregatedAttention2d(_Cosine):
    """Attention of each place of a map [B, H, W, C] to its 3 x 3 neighbours and to a pooled map, in one softmax.

    sr_ratio: how many times the map is pooled along each side. Learned tokens add weights on the neighbours.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, topk: int, sr_ratio: int, **dd: Any) -> None:
        super().__init__(dim, num_heads, shared, topk, **dd)
        d = dim // num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.relative_pos_bias_local = nn.Parameter(torch.zeros(num_heads, 9, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, d, 9, **dd))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, 9, **dd))
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)

    def _neighbours(self, x: Tensor, h: int, w: int) -> Tensor:
        """Gather the 3 x 3 neighbours of every place, zero outside: [B, H, N, D] -> [B, H, N, 9, D]."""
        b, m, n, d = x.shape
        windows = F.unfold(x.transpose(2, 3).reshape(b, m * d, h, w), 3, padding=1)
        return windows.reshape(b, m, d, 9, n).permute(0, 1, 4, 3, 2)

    def _pooled(self, x: Tensor, kh: int, kw: int) -> Tensor:
        small = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), (kh, kw))
        return self.kv(self.norm(small.flatten(2).transpose(1, 2)))

    def _heads(self, kv: Tensor) -> Tensor:
        b, n, c = kv.shape
        return kv.reshape(b, n, 2, self.num_heads, c // (2 * self.num_heads)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        kh, kw = max(1, h // self.sr_ratio), max(1, w // self.sr_ratio)
        q = F.normalize(self.q(tokens).reshape(b, h * w, self.num_heads, -1).transpose(1, 2), dim=-1)
        near, far = self._heads(self.kv(tokens)), self._heads(self._pooled(x, kh, kw))
        real = F.unfold(torch.ones([1, 1, h, w], device=x.device, dtype=x.dtype), 3, padding=1)[0].transpose(0, 1)
        length = (real.sum(dim=1, keepdim=True) + kh * kw).log()
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * length
        beside = (self._neighbours(F.normalize(near[0], dim=-1), h, w) @ scaled.unsqueeze(-1)).squeeze(-1)
        beside = beside + self.relative_pos_bias_local.unsqueeze(1)
        beside = beside.masked_fill(real == 0, float("-inf"))
        away = scaled @ F.normalize(far[0], dim=-1).transpose(-2, -1) + self.bias(h, w, kh, kw)
        weights = torch.cat([beside, away], dim=-1).softmax(dim=-1)
        local_weights = weights[..., :9] + q @ self.learnable_tokens + self.learnable_bias
        out = (local_weights.unsqueeze(-2) @ self._neighbours(near[1], h, w)).squeeze(-2) + weights[..., 9:] @ far[1]
        return self.finish(out, tokens).reshape(b, h, w, c)
