"""Agent-PVT: the pyramid vision transformer with agent attention ("Agent Attention", arXiv 2312.08874, table 9).

A pyramid of non-overlapping patches with learned positions at every stage, no class token and no last norm.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_function, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs, stage_types
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.inline import InLineAttention2d
from attnctl.backbones.modules.resize import pad_to
from attnctl.errors import ConfigError

__all__ = ["AgentPVT", "PVTBlock", "ReducedAttention"]


@register_notrace_function
def fit_positions(pos: Tensor, h0: int, w0: int, h: int, w: int) -> Tensor:
    """Resize learned positions [1, h0 * w0, C] to a map: [1, h, w, C] (bilinear)."""
    grid = pos.reshape(1, h0, w0, -1)
    if h == h0 and w == w0:
        return grid
    grid = F.interpolate(grid.permute(0, 3, 1, 2).float(), [h, w], mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).to(pos.dtype)


class PatchStep(nn.Module):
    """Cut a map into patches, norm them and add positions: [B, C, H, W] -> [B, H / k, W / k, C']."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch: int,
        grid: tuple[int, int],
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(in_chans, dim, patch, patch, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, device=device, dtype=dtype))
        trunc_normal_(self.pos_embed, std=0.02)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Run the step; a size that the patches do not divide is padded with zeros."""
        x = self.proj(pad_to(x, self.patch))
        x = self.norm(x.permute(0, 2, 3, 1))
        return self.drop(x + fit_positions(self.pos_embed, self.grid[0], self.grid[1], x.shape[1], x.shape[2]))

    @torch.jit.ignore
    def set_feature_size(self, grid: tuple[int, int]) -> None:
        """Resize the learned positions."""
        with torch.no_grad():
            new = fit_positions(self.pos_embed, *self.grid, *grid).flatten(1, 2).contiguous()
        self.pos_embed = nn.Parameter(new.clone(), requires_grad=self.pos_embed.requires_grad)
        self.grid = grid


@register_notrace_module
class ReducedAttention(nn.Module):
    """PVT's attention of [B, H, W, C]: keys and values from a map reduced sr_ratio times."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} was given; it must divide dim={dim}.")
        self.num_heads, self.attn_drop, self.backend = num_heads, attn_drop, backend
        self.reduce = sr_ratio > 1
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, device=device, dtype=dtype) if self.reduce else nn.Identity()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype) if self.reduce else nn.Identity()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr_ratio = sr_ratio

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]; one that the reduction does not divide is padded with zeros before it."""
        b, h, w, c = x.shape
        d = c // self.num_heads
        q = self.q(x).reshape(b, h * w, self.num_heads, d).transpose(1, 2)
        small = x
        if self.reduce:
            small = self.sr(pad_to(x.permute(0, 3, 1, 2), self.sr_ratio)).permute(0, 2, 3, 1)
            small = self.norm(small)
        kv = self.kv(small).reshape(b, -1, 2, self.num_heads, d).permute(2, 0, 3, 1, 4)
        out = attend(q, kv[0], kv[1], None, None, self.attn_drop if self.training else 0.0, self.backend)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, h, w, c)))


class PVTBlock(nn.Module):
    """One block over [B, H, W, C]: agent attention (kind "A"), InLine ("I") or PVT's own ("B"), then a perceptron."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        kind: str = "A",
        num_agents: int = 49,
        agent_grid: tuple[int, int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        norm_eps: float = 1e-6,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"attn_drop": attn_drop, "proj_drop": drop, "backend": backend}
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attn: nn.Module
        if kind == "A":
            self.attn = AgentAttention2d(
                dim, num_heads, grid, num_agents, qkv_bias=qkv_bias, split_qkv=True, sr_ratio=sr_ratio,
                agent_grid=agent_grid, **drops, **dd,
            )  # fmt: skip
        elif kind == "I":
            self.attn = InLineAttention2d(dim, num_heads, split_qkv=True, qkv_bias=qkv_bias, proj_drop=drop, **dd)
        else:
            self.attn = ReducedAttention(dim, num_heads, qkv_bias, sr_ratio, **drops, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AgentPVT(Pyramid):
    """Agent-PVT over images of any size (arXiv 2312.08874).

    Args:
        img_size: size that positions and axis biases are made for; other sizes resize them on the fly.
        attn_type: four letters, "A" for agent attention and "B" for PVT's own, one a stage.
        num_agents: square numbers; agent_grids: pool to other (height, width) agents, as for dense prediction.
        agent_sr_ratios: reductions of keys and values in A stages.
        sr_ratios: the same in B stages.

    Raises: ConfigError for lists of other lengths, unknown letters, heads that do not divide.
    """

    form: ClassVar[str] = "A"
    """Kind of the blocks that the letter A stands for."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        dims: tuple[int, ...] = (64, 128, 320, 512),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        num_agents: tuple[int, ...] = (9, 16, 49, 49),
        agent_grids: tuple[tuple[int, int], ...] | None = None,
        attn_type: str = "AAAA",
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        agent_sr_ratios: tuple[int, ...] = (1, 1, 1, 1),
        qkv_bias: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n = len(dims)
        exactly(n, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, num_agents=num_agents)
        exactly(n, sr_ratios=sr_ratios, agent_sr_ratios=agent_sr_ratios, agent_grids=agent_grids or dims)
        kinds = stage_types(attn_type, depths)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        grids = self.grids(size)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks = [
                PVTBlock(
                    c, num_heads[i], grids[i], self.form if kind == "A" else kind, num_agents[i],
                    agent_grids[i] if agent_grids else None, mlp_ratios[i], qkv_bias,
                    agent_sr_ratios[i] if kind == "A" else sr_ratios[i],
                    drop=proj_drop_rate, attn_drop=attn_drop_rate, drop_path=next(rates), backend=backend, **dd,
                )
                for kind in kinds[i]
            ]  # fmt: skip
            step = PatchStep(dims[i - 1] if i else in_chans, c, 2 if i else 4, grids[i], proj_drop_rate, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(
            stages, dims, nn.Identity(), num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
            drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_linear)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints and resize positions and axis biases to the model's size."""
    out = {}
    for key, value in take_state(state).items():
        name, _, rest = key.partition(".")
        stem, number = name.rstrip("1234"), name[-1]
        if stem == "patch_embed" and number.isdigit():
            key = f"stages.{int(number) - 1}.downsample.{rest}"
        elif stem == "pos_embed" and number.isdigit():
            key = f"stages.{int(number) - 1}.downsample.pos_embed"
        elif stem == "block" and number.isdigit():
            key = f"stages.{int(number) - 1}.blocks.{rest}"
        out[key] = value
    return load_filter(out, model, resize=True)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "agent_pvt_tiny": {},  # 11.6, 2.0
    "agent_pvt_small": {"depths": (3, 4, 6, 3)},  # 20.6, 4.0
    "agent_pvt_medium": {"depths": (3, 4, 18, 3)},  # 35.9, 7.0
    "agent_pvt_large": {"depths": (3, 8, 27, 3)},  # 48.7, 10.4
    "agent_pvt_micro": {
        "img_size": 32, "depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (4.0, 4.0, 2.0, 2.0), "num_agents": (9, 4, 4, 1),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj", classifier="head")
register(__name__, AgentPVT, LAYOUTS, checkpoint_filter_fn)
