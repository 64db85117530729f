"""MoH-DiT: diffusion transformers on latents whose tokens choose their heads, with other head counts by depth.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), "Scalable Diffusion Models with
Transformers" (arXiv 2212.09748). They make latents and no classes, so timm does not have their names: `moh_dit(name)`
builds one. The load balance of a training step is `attnctl.backbones.mixers.moh.balance(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from attnctl.backbones.hosts import split_qkv
from attnctl.backbones.mixers.base import Slot, join_heads
from attnctl.backbones.mixers.moh import MoHMixer
from attnctl.backbones.models.config import exactly, load_filter
from attnctl.backbones.modules.blocks import take_state
from attnctl.errors import ConfigError, nearest

__all__ = ["LAYOUTS", "MoHDiT", "moh_dit"]


class MoHAttention(nn.Module):
    """A mixture of heads over tokens [B, N, C] -> the same, with heads of any width."""

    def __init__(self, dim: int, heads: int, head_dim: int, shared: int, topk: int, side: int, norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim) if norm else nn.Identity() for _ in range(2))
        self.mixer = MoHMixer(
            Slot(heads * head_dim, heads, (side, side), 0, head_dim**-0.5, width=dim), shared=shared, topk=topk
        )
        self.proj = nn.Linear(heads * head_dim, dim)
        self.grid = (side, side)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        return self.proj(join_heads(self.mixer(self.q_norm(q), self.k_norm(k), v, x, self.grid)))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class MoHDiTBlock(nn.Module):
    """Attention and a perceptron, shifted, scaled and gated by the condition: x [B, N, C], c [B, C] -> [B, N, C]."""

    def __init__(self, dim: int, attention: MoHAttention, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = attention
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the block."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(_modulated(self.norm1(x), shift, scale))
        return x + gate_mlp[:, None] * self.mlp(_modulated(self.norm2(x), shift_mlp, scale_mlp))


class _Steps(nn.Module):
    """Embed diffusion steps: [B] -> [B, C]."""

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class _Labels(nn.Module):
    """Embed classes, the last of which is none: [B] -> [B, C]."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Final(nn.Module):
    """Bring tokens back to patches: x [B, N, C], c [B, C] -> [B, N, patch]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(_modulated(self.norm_final(x), shift, scale))


class MoHDiT(nn.Module):
    """A DiT of mixtures of heads: latents [B, C, S, S], steps [B] and classes [B] -> noise and variance [B, 2 C, S, S].

    Args:
        dim: channels. heads, shared, topk: per block, as in `MoHMixer`; topk 0 where every head is shared.
        head_dim: width of a head, whatever dim / heads is. input_size: side of the latents. qk_norm: norm queries and
            keys per head.

    Raises: ConfigError for lists of other lengths, and as `MoHMixer`.
    """

    def __init__(
        self, dim: int, heads: Sequence[int], shared: Sequence[int], topk: Sequence[int], head_dim: int, *,
        input_size: int = 32, patch_size: int = 2, in_channels: int = 4, mlp_ratio: float = 4.0,
        num_classes: int = 1000, qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        exactly(len(heads), heads=heads, shared=shared, topk=topk)
        self.patch, self.out_channels, side = patch_size, 2 * in_channels, input_size // patch_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, dim)
        self.t_embedder, self.y_embedder = _Steps(dim), _Labels(num_classes, dim)
        self.pos_embed = nn.Parameter(_places(side, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            MoHDiTBlock(dim, MoHAttention(dim, h, head_dim, s, k, side, qk_norm), mlp_ratio)
            for h, s, k in zip(heads, shared, topk, strict=True)
        )
        self.final_layer = _Final(dim, patch_size**2 * self.out_channels)
        self._start()

    def _start(self) -> None:
        """Initialise: blocks that change nothing, small embeddings, the rest as Xavier's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        small: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        parts: list[Any] = [*self.blocks, self.final_layer]
        for layer in (self.final_layer.linear, *(part.adaLN_modulation[-1] for part in parts)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance."""
        side = x.shape[-1] // self.patch
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        out = self.final_layer(tokens, c).unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _places(side: int, dim: int) -> Tensor:
    """Compute sines and cosines of places, [1, side * side, C]: the first half of the channels tells the column."""
    rates = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    at = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([at.sin(), at.cos()], dim=1)
    column, row = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, -1)[..., :dim].float()


def moh_dit(name: str, **options: Any) -> MoHDiT:
    """Build a published model: "moh_dit_{s,b,l,xl}_2_{90,75}". options: of `MoHDiT`. Raises: ConfigError."""
    if name not in LAYOUTS:
        raise ConfigError(f"name={name!r} was given; expected one of {', '.join(LAYOUTS)}.{nearest(name, LAYOUTS)}")
    return MoHDiT(**(LAYOUTS[name] | options))


def checkpoint_filter_fn(state: Mapping[str, Any], model: MoHDiT) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints. Raises: UnsupportedModelError for weights of another model."""
    names = {"attn.wg.": "route.", "attn.wg_0.": "split.", "attn.wg_1.": "share."}
    out = {}
    for key, value in take_state(dict(state)).items():
        for theirs, gate in names.items():
            key = key.replace(theirs, f"attn.mixer.gates.{gate}")
        out[key] = value
    return load_filter(out, model)


def _layout(dim: int, head_dim: int, **lists: str) -> dict[str, Any]:
    """Spell out lists per block: "3x8 6x4" is eight times 3, then four times 6."""
    parts = {n: [p.partition("x")[::2] for p in text.split()] for n, text in lists.items()}
    spelled = {n: tuple(int(v) for v, times in some for _ in range(int(times or 1))) for n, some in parts.items()}
    return {"dim": dim, "head_dim": head_dim, **spelled}


_XL, _L = {"heads": "8x9 16x10 24x9"}, {"heads": "8x8 16x8 24x8"}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M
    "moh_dit_xl_2_90": _layout(1152, 72, **_XL, shared="8x9 16x10 16x9", topk="0x9 0x10 3x9"),  # 675.7
    "moh_dit_xl_2_75": _layout(1152, 72, **_XL, shared="8x9 10x10 14x9", topk="0x9 2x10 2x9"),  # 675.7
    "moh_dit_l_2_90": _layout(1024, 64, **_L, shared="8x8 16x8 16x8", topk="0x8 0x8 3x8"),  # 458.5
    "moh_dit_l_2_75": _layout(1024, 64, **_L, shared="8x8 8x8 12x8", topk="0x8 4x8 4x8"),  # 458.5
    "moh_dit_b_2_90": _layout(768, 64, heads="12x12", shared="6x5 7x5 12x2", topk="4x10 0x2"),  # 130.6
    "moh_dit_b_2_75": _layout(768, 64, heads="12x12", shared="4x2 6x8 12x2", topk="2x2 3x8 0x2"),  # 130.6
    "moh_dit_s_2_90": _layout(384, 64, heads="6x12", shared="3x8 6x4", topk="2x8 0x4"),  # 33.0
    "moh_dit_s_2_75": _layout(384, 64, heads="6x12", shared="2x2 3x8 6x2", topk="1x6 2x4 0x2"),  # 33.0
}
