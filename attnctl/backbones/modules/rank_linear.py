"""Linear attention of RAVLT and MAViT over maps: rotary positions, an output gate, and a convolution of the values.

"Breaking the Low-Rank Dilemma of Linear Attention" (arXiv 2411.07635), "Rectifying Magnitude Neglect in Linear
Attention" (arXiv 2507.00698).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from attnctl.backbones.modules.attend import attend
from attnctl.errors import ConfigError, require

__all__ = ["GatedLinearAttention2d", "mala", "rala", "rotate", "rotation"]


@register_notrace_function
def rotation(h: int, w: int, d: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sine and cosine [h * w, d] of rotary positions: rows turn the first d / 2 channels, columns the rest.

    m = d / 4 frequencies 10000 ** (-t / (m - 1)), both ends included, each for two neighbouring channels. Float32.
    """
    angle = 10000 ** -torch.linspace(0, 1, d // 4, device=like.device)
    angle = angle.repeat_interleave(2)
    rows = torch.arange(h, device=like.device)[:, None, None] * angle
    columns = torch.arange(w, device=like.device)[None, :, None] * angle
    theta = torch.cat([rows.expand(h, w, d // 2), columns.expand(h, w, d // 2)], -1).flatten(0, 1)
    return theta.sin(), theta.cos()


@register_notrace_function
def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels: x [B, H, N, D], sin, cos [N, D]."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


@register_notrace_function
def rala(q: Tensor, k: Tensor, v: Tensor, scale: float, sin: Tensor | None = None, cos: Tensor | None = None) -> Tensor:
    """Compute R(q) (R(k_r)^T v) / (n q mean(k_r)^T), k_r = k weighed by n softmax(s mean(q) k^T), features ELU + 1.

    Shapes: q, k, v [B, H, N, D], sin, cos [N, D] or None -> [B, H, N, D]. The weights raise the rank of the summed
    keys. Without rotation R those of a query sum to one.
    """
    qf, kf, vf = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
    n = k.shape[2]
    alpha = (scale * qf.mean(dim=2, keepdim=True) @ kf.transpose(-2, -1)).softmax(dim=-1) * n
    kf = kf * alpha.transpose(-2, -1)
    z = (qf * kf.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    if sin is not None and cos is not None:
        qf, kf = rotate(qf, sin, cos), rotate(kf, sin, cos)
    return (qf @ (kf.transpose(-2, -1) @ vf) / n / (z + 1e-6)).to(v.dtype)


@register_notrace_function
def mala(q: Tensor, k: Tensor, v: Tensor, scale: float, sin: Tensor | None = None, cos: Tensor | None = None) -> Tensor:
    """Compute (1 + 1 / z) R(q) (R(k)^T v) s / n - z mean(v) with z = s q mean(k)^T and positive features ELU + 1.

    Shapes: as in `rala`. Without rotation R the weights of a query sum to one, and its magnitude sharpens them.
    """
    qf, kf, vf = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
    z = scale * (qf * kf.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    if sin is not None and cos is not None:
        qf, kf = rotate(qf, sin, cos), rotate(kf, sin, cos)
    mixed = qf @ (kf.transpose(-2, -1) @ vf) * (scale / k.shape[2])
    return ((1 + 1 / (z + 1e-6)) * mixed - z * vf.mean(dim=2, keepdim=True)).to(v.dtype)


class RankMix(nn.Module):
    """Rotary attention between projections: [B, H, N, D], sin, cos [N, D] -> [B, H, N, D]."""

    def __init__(self, kind: str, backend: str) -> None:
        super().__init__()
        self.kind, self.backend = kind, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """Mix tokens."""
        scale = q.shape[-1] ** -0.5
        if self.kind == "rala":
            return rala(q, k, v, scale, sin, cos)
        if self.kind == "mala":
            return mala(q, k, v, scale, sin, cos)
        q, k = rotate(q.float(), sin, cos).to(q.dtype), rotate(k.float(), sin, cos).to(k.dtype)
        return attend(q, k, v, None, scale, 0.0, self.backend)


@register_notrace_module
class GatedLinearAttention2d(nn.Module):
    """Attention of a map [B, C, H, W] with rotary positions: proj((mix + lepe(v)) * o).

    kind: "rala", "mala" or "softmax". num_heads: heads of D channels, a multiple of 4.
    Raises: ConfigError for heads that do not divide, and another kind.
    """

    def __init__(self, dim: int, num_heads: int, kind: str = "rala", backend: str = "auto", **dd: Any) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % (4 * num_heads) == 0,
            ConfigError,
            f"num_heads={num_heads} was given; each head of dim={dim} needs a multiple of 4 channels.",
        )
        require(
            kind in ("rala", "mala", "softmax"),
            ConfigError,
            f"kind={kind!r} was given; expected 'rala', 'mala' or 'softmax'.",
        )
        self.num_heads = num_heads
        self.mixer = RankMix(kind, backend)
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, c, h, w = x.shape
        q, k, v, o = self.qkvo(x).chunk(4, dim=1)
        lepe = self.lepe(v)
        heads = [y.reshape(b, self.num_heads, c // self.num_heads, h * w).transpose(2, 3) for y in (q, k, v)]
        sin, cos = rotation(h, w, c // self.num_heads, x)
        out = self.mixer(heads[0], heads[1], heads[2], sin, cos)
        out = out.transpose(2, 3).reshape(b, c, h, w)
        return self.proj((out + lepe) * o)
