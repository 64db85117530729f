"""InLine attention: linear attention whose weights sum to one and tell queries apart, with a local part.

"Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.jit import Final

from attnctl.errors import ConfigError, require

__all__ = ["InLineAttention2d", "inline", "local_convolution", "local_kernels"]


@register_notrace_function
def inline(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute q (k^T v) s / n + (1 - s q mean(k)^T) mean(v): weights that sum to one, some negative.

    Shapes: q [B, H, N, D], k, v [B, H, Nk, D] -> [B, H, N, D]. Sums in float32.
    """
    qf, kf, vf = q.float(), k.float(), v.float()
    k_mean, v_mean = kf.mean(dim=2, keepdim=True), vf.mean(dim=2, keepdim=True)
    mixed = qf @ (kf.transpose(-2, -1) @ vf) * (scale / k.shape[2])
    return (mixed + (1 - scale * (qf * k_mean).sum(dim=-1, keepdim=True)) * v_mean).to(v.dtype)


def local_kernels(dim: int, heads: int, **dd: Any) -> nn.Sequential:
    """Build what makes a 3 x 3 kernel per channel of the mean token: [B, C, 1] -> [B, 9 C, 1], per head."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=heads, **dd), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads, **dd)
    )


@register_notrace_function
def local_convolution(v: Tensor, weight: Tensor, h: int, w: int) -> Tensor:
    """Convolve the values of each image with its own kernels: v [B, h * w, C], weight [B, 9 C, 1] -> [B, h * w, C]."""
    b, _, c = v.shape
    maps = v.transpose(1, 2).reshape(1, b * c, h, w)
    out = F.conv2d(maps, weight.reshape(b * c, 1, 3, 3), padding=1, groups=b * c)
    return out.reshape(b, c, h * w).transpose(1, 2)


@register_notrace_module
class InLineAttention2d(nn.Module):
    """InLine attention of maps [B, H, W, C], or of tokens [B, prefix + h * w, C] with a square grid.

    prefix: class and register tokens, which take part but are not convolved. split_qkv: separate layers q and kv, as in
    PVT. Raises: ConfigError for heads that do not divide.
    """

    split_qkv: Final[bool]

    def __init__(
        self, dim: int, num_heads: int, prefix: int = 0, split_qkv: bool = False, qkv_bias: bool = True,
        proj_drop: float = 0.0, **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        self.dim, self.num_heads, self.prefix, self.split_qkv = dim, num_heads, prefix, split_qkv
        if split_qkv:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.residual = local_kernels(dim, num_heads, **dd)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens; masks are refused."""
        if not torch.jit.is_scripting():
            require(
                attn_mask is None and not is_causal, ConfigError, "A mask was given; InLine attention takes no mask."
            )
        shape = x.shape
        h, w = (x.shape[1], x.shape[2]) if x.dim() == 4 else (0, 0)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        else:
            h = w = int((x.shape[1] - self.prefix) ** 0.5 + 0.5)
        b, n, c = x.shape
        if self.split_qkv:
            q, k, v = torch.cat([self.q(x), self.kv(x)], dim=-1).chunk(3, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        m = self.num_heads
        heads = [y.reshape(b, n, m, c // m).transpose(1, 2) for y in (q, k, v)]
        out = inline(heads[0], heads[1], heads[2], (c // m) ** -0.5).transpose(1, 2).reshape(b, n, c)
        weight = self.residual(x.mean(dim=1).unsqueeze(-1))
        local = local_convolution(v[:, self.prefix :], weight, h, w)
        out = torch.cat([out[:, : self.prefix], out[:, self.prefix :] + local], dim=1)
        return self.proj_drop(self.proj(out)).reshape(shape)
