"""Softmax attention over a whole map, with the depthwise branch of BiFormer's last stage."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.modules.attend import attend
from attnctl.errors import ConfigError, require

__all__ = ["MapAttention"]


@register_notrace_module
class MapAttention(nn.Module):
    """Multi-head attention of a map [B, H, W, C], plus a depthwise convolution of the input or of the values.

    Args:
        dim: channels. num_heads: divides dim. side_dwconv: kernel of the depthwise branch, 0 for none.
        side: what it convolves: "input" as in the released weights, or "v" as in the refactored release.
        qkv_bias: off in the released weights.

    Raises: ConfigError for heads that do not divide and an unknown side.
    """

    num_heads: Final[int]
    has_lepe: Final[bool]
    side: Final[str]
    backend: Final[str]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        side_dwconv: int = 0,
        side: str = "input",
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        require(side in ("input", "v"), ConfigError, f"side={side!r} was given; expected 'input' or 'v'.")
        self.num_heads, self.side, self.backend = num_heads, side, backend
        self.attn_drop = attn_drop
        self.has_lepe = side_dwconv > 0
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, device=device, dtype=dtype)
            if side_dwconv
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map: [B, H, W, C] -> [B, H, W, C]."""
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = attend(q, k, v, None, None, self.attn_drop if self.training else 0.0, self.backend)
        out = out.transpose(1, 2).reshape(b, h, w, c)
        if self.has_lepe:
            base = x if self.side == "input" else v.transpose(1, 2).reshape(b, h, w, c)
            out = out + self.lepe(base.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)
