"""Multi-axis attention at any size: timm's MaxViT without its size limits, and the module to put elsewhere.

"MaxViT: Multi-Axis Vision Transformer" (arXiv 2204.01697). Maps that the windows do not divide are padded at the bottom
and right, padded keys are left out of the softmax, and the padding is cropped: sizes that divide give timm's output.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.maxxvit import Downsample2d, MaxxVit, PartitionAttentionCl
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Slot, join_heads, split_heads
from attnctl.backbones.mixers.multiaxis import MultiAxisMixer
from attnctl.backbones.modules.attend import attend, check_model
from attnctl.backbones.modules.partition import key_mask, partition, restore
from attnctl.errors import ConfigError, ConflictError, UnsupportedModelError, require

__all__ = ["AnySizePartition", "MultiAxisAttention", "any_size"]


class MultiAxisAttention(nn.Module):
    """Block and grid attention in one module, over tokens [B, prefix + h * w, C] or a map [B, H, W, C].

    Args:
        dim: channels. num_heads: divides dim. window, grid_size: sides of blocks and of the dilated grid.
        prefix: class and register tokens at the start; they see all tokens, and every part sees them.
        mode: "heads" shares the heads out between both axes; "mean" runs both with all heads and averages.

    Raises: ConfigError for heads that do not divide, one head in mode "heads", tokens without a grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        grid_size: int = 7,
        *,
        prefix: int = 0,
        mode: str = "heads",
        qkv_bias: bool = True,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        self.num_heads, self.prefix = num_heads, prefix
        slot = Slot(dim, num_heads, prefix=prefix, scale=(dim // num_heads) ** -0.5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.mixer = MultiAxisMixer(slot, window=window, grid_size=grid_size, mode=mode, backend=backend)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Mix tokens of a grid (h, w), or a map."""
        shape = x.shape
        if x.ndim == 4:
            grid = (shape[1], shape[2])
            x = x.flatten(1, 2)
        if grid is None or x.shape[1] != self.prefix + grid[0] * grid[1]:
            raise ConfigError(
                f"Tokens {tuple(shape)} and grid={grid} were given; expected grid=(h, w) with {self.prefix} + h * w "
                "tokens, or a map [B, H, W, C]."
            )
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(join_heads(self.mixer(q, k, v, x, grid))).reshape(shape)


class AnySizePartition(nn.Module):
    """MaxViT's block or grid attention with its perceptron, over maps [B, H, W, C] of any size."""

    def __init__(self, old: PartitionAttentionCl, backend: str = "auto") -> None:
        super().__init__()
        self.partition_block, self.partition_size = old.partition_block, tuple(old.partition_size)
        self.norm1, self.attn, self.ls1, self.drop_path1 = old.norm1, old.attn, old.ls1, old.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = old.norm2, old.mlp, old.ls2, old.drop_path2
        self.backend = backend
        self.training = old.training

    def _mix(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        block, size, grid = self.partition_block, self.partition_size, (x.shape[1], x.shape[2])
        parts = partition(x, size, block)
        b, n, _ = parts.shape
        qkv = attn.qkv(parts)
        if attn.head_first:
            q, k, v = qkv.reshape(b, n, attn.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        else:
            q, k, v = qkv.reshape(b, n, 3, attn.num_heads, -1).transpose(1, 3).unbind(2)
        bias = None if attn.rel_pos is None else attn.rel_pos.get_bias().to(q.dtype)
        real = key_mask(grid, size, block, x.device)
        if real is not None:
            blocked = torch.zeros(real.shape, dtype=q.dtype, device=q.device)
            blocked = blocked.masked_fill(~real, float("-inf")).repeat(b // real.shape[0], 1)[:, None, None]
            bias = blocked if bias is None else bias + blocked
        drop = attn.attn_drop.p if self.training else 0.0
        out = attend(q, k, v, bias, None, drop, self.backend).transpose(1, 2).reshape(b, n, -1)
        return restore(attn.proj_drop(attn.proj(out)), size, block, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        x = x + self.drop_path1(self.ls1(self._mix(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def set_partition_size(self, size: tuple[int, int]) -> None:
        """Resize the partition, and its position bias with it; timm's set_input_size calls this."""
        self.partition_size = (size[0], size[1])
        rel_pos: Any = self.attn.rel_pos
        if rel_pos is not None:
            rel_pos.set_window_size(self.partition_size)


def any_size(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Make a timm MaxViT take images of any size, in place: windows keep their size, state_dict keys their names.

    backend: a kernel of `attnctl.attention` for block and grid attention.

    Raises: UnsupportedModelError for a model without MaxViT's channels-last partition attention, ConflictError for one
    with swapped attention.
    """
    check_model(model)
    if "_attnctl_swaps" in vars(model):
        raise ConflictError("This model has swapped attention: call any_size before swap, or attnctl.unswap first.")
    places = [(n, m) for n, m in model.named_modules() if isinstance(m, PartitionAttentionCl)]
    if not places:
        hint = "it has no partition attention" if isinstance(model, MaxxVit) else "it is no MaxViT"
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be made to run at any size: {hint}. Give one of timm's 'maxvit_*' models."
        )
    for name, old in places:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, AnySizePartition(old, backend))
    for module in model.modules():
        # The convolution beside this shortcut rounds up; so must the pooling. Even sizes are unchanged.
        if isinstance(module, Downsample2d) and type(module.pool) is nn.AvgPool2d:
            module.pool.ceil_mode = True
    return model
