"""Agent-Swin: Swin with global agent attention in its first stages ("Agent Attention", arXiv 2312.08874, table 10).

timm's SwinTransformer with other blocks where the type says A. A blocks see the whole map; B blocks are timm's own.
"""

from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs, stage_types
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.blocks import FeedForward, drop_rates, take_state
from attnctl.backbones.modules.inline import InLineAttention2d
from attnctl.backbones.modules.routing import merge_windows, split_windows
from attnctl.errors import ConfigError

__all__ = ["AgentSwinBlock", "AgentSwinTransformer"]


class AgentSwinBlock(nn.Module):
    """Agent attention, or InLine attention, and a perceptron over [B, H, W, C].

    Args:
        form: "A" for agents, "I" for InLine.
        grid: (height, width) of the map. window: side of square windows, None for one window over the map.
        shift: roll the map by so many tokens before it is cut; agents ignore the mask that Swin would need then.

    Raises: ConfigError for windows that do not divide the map.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        num_heads: int,
        num_agents: int = 49,
        window: int | None = None,
        shift: int = 0,
        agent_grid: tuple[int, int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        form: str = "A",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if window is not None and window >= min(grid):
            window, shift = None, 0
        self.window, self.shift = window or 0, shift if window else 0
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn: nn.Module
        if form == "I":
            self.attn = InLineAttention2d(dim, num_heads, qkv_bias=qkv_bias, proj_drop=drop, **dd)
        else:
            self.attn = AgentAttention2d(
                dim, num_heads, (window, window) if window else grid, num_agents, qkv_bias=qkv_bias,
                agent_grid=agent_grid, attn_drop=attn_drop, proj_drop=drop, backend=backend, **dd,
            )  # fmt: skip
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop, **dd)

    def _windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        size = self.window
        if not torch.jit.is_scripting() and (h % size or w % size):
            raise ConfigError(
                f"A map of {h}x{w} tokens was given, but windows of {size} do not divide it. "
                "Resize the input, or leave the window out: agents are cheap over the whole map."
            )
        x = torch.roll(x, shifts=[-self.shift, -self.shift], dims=[1, 2])
        parts = self.attn(split_windows(x, size, size).reshape(-1, size, size, c))
        x = merge_windows(parts.reshape(b, -1, size * size, c), size, size, h, w)
        return torch.roll(x, shifts=[self.shift, self.shift], dims=[1, 2])

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        y = self.norm1(x)
        y = self._windows(y) if self.window > 0 else self.attn(y)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def set_input_size(
        self, feat_size: tuple[int, int], window_size: Any = None, always_partition: bool | None = None
    ) -> None:
        """Resize the axis biases to another map; timm's stage calls this."""
        if not self.window and isinstance(self.attn, AgentAttention2d):
            self.attn.set_feature_size((feat_size[0], feat_size[1]))


class AgentSwinTransformer(SwinTransformer):
    """Swin whose blocks attend through agents where `attn_type` says so (arXiv 2312.08874).

    Args:
        attn_type: a letter a stage, "A" agents, "B" Swin's windows, "M" agents in the first blocks: "AAMB2".
        num_agents: square numbers, one a stage; agent_grids: pool to other (height, width) agents.
        window_size: of B blocks, max(7, img_size / 32) if None. Everything else: as timm's SwinTransformer.

    Raises: ConfigError for lists of other lengths and unknown letters.
    """

    form: ClassVar[str] = "A"
    """Form of the blocks that the letter A stands for."""

    def __init__(
        self,
        attn_type: str = "AAAB",
        num_agents: tuple[int, ...] = (9, 16, 49, 49),
        agent_grids: tuple[tuple[int, int], ...] | None = None,
        backend: str = "auto",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        window_size: int | None = None,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        n = len(depths)
        exactly(n, num_heads=num_heads, num_agents=num_agents, agent_grids=agent_grids or depths)
        kinds = stage_types(attn_type, tuple(depths))
        side = img_size if isinstance(img_size, int) else min(img_size)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            window_size=window_size or max(7, side // patch_size // 8),
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            qkv_bias=qkv_bias,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        rates = drop_rates(drop_path_rate, sum(depths))
        for i, stage in enumerate(self.layers):
            for j, kind in enumerate(kinds[i]):
                if kind == "A":
                    stage.blocks[j] = AgentSwinBlock(
                        self.feature_info[i]["num_chs"], tuple(stage.output_resolution), num_heads[i], num_agents[i],
                        agent_grid=agent_grids[i] if agent_grids else None, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
                        drop=proj_drop_rate, attn_drop=attn_drop_rate, drop_path=rates[sum(depths[:i]) + j],
                        form=self.form, backend=backend, device=device, dtype=dtype,
                    )  # fmt: skip
        if kwargs.get("weight_init", "") != "skip":
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that should not decay: attention biases and relative position tables."""
        return {n for n, _ in self.named_parameters() if n.endswith(("_bias", "_bias_table"))}


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints and fit biases and tables to the model's image size.

    timm keeps a downsampling at the start of the next stage and recomputes index buffers and masks.
    """
    weights = take_state(state)
    official = "layers.0.downsample.reduction.weight" in weights
    out = {}
    for key, value in weights.items():
        part = key.split(".")
        if part[-1] in ("relative_position_index", "attn_mask"):
            continue
        if official and part[0] == "layers" and part[2] == "downsample":
            key = ".".join(["layers", str(int(part[1]) + 1), *part[2:]])
        elif part[0] == "head" and len(part) == 2:
            key = f"head.fc.{part[1]}"
        out[key] = value
    return load_filter(out, model, resize=True)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "agent_swin_tiny": {},  # 28.9, 4.5
    "agent_swin_small": {"depths": (2, 2, 18, 2), "attn_type": "AABB"},  # 49.7, 8.7
    "agent_swin_base": {  # 88.1, 15.4
        "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "attn_type": "AAMB2",
    },
    "agent_swin_micro": {
        "img_size": 32, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "attn_type": "AAMB1",
        "num_agents": (9, 4, 4, 1), "window_size": 2,
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="patch_embed.proj", classifier="head.fc", fixed_input_size=True)
register(__name__, AgentSwinTransformer, LAYOUTS, checkpoint_filter_fn)
