"""Agent-CSwin: cross-shaped windows with agent attention in the first stages ("Agent Attention", arXiv 2312.08874).

The host design is "CSWin Transformer" (arXiv 2107.00652): projections belong to the block, attention works in stripes
of the map, and a depthwise convolution of the values inside each stripe carries the position.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs, stage_types
from attnctl.backbones.modules.agent import AgentCore
from attnctl.backbones.modules.attend import attend, ceil_div
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.routing import merge_windows, split_windows
from attnctl.errors import ConfigError

__all__ = ["AgentCSwin", "AgentStripes", "CSwinBlock", "Stripes"]


def stripe_of(shape: str, split: int, h: int, w: int) -> tuple[int, int]:
    """Tell the stripe (height, width) on an h x w map: "full", "columns" (h, split) or "rows" (split, w)."""
    if shape == "full":
        return h, w
    return (h, split) if shape == "columns" else (split, w)


@register_notrace_module
class Stripes(nn.Module):
    """Softmax attention inside stripes of a map; q, k, v and the result are [B, H, W, C].

    A map that the stripes do not divide is padded, and padded keys are left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shape: str,
        split: int,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} was given; it must divide dim={dim}.")
        self.num_heads, self.shape, self.split = num_heads, shape, split
        self.attn_drop, self.backend = attn_drop, backend
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def _heads(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        return x.reshape(n, t, self.num_heads, c // self.num_heads).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix inside stripes."""
        b, h, w, c = q.shape
        sh, sw = stripe_of(self.shape, self.split, h, w)
        ph, pw = ceil_div(h, sh) * sh, ceil_div(w, sw) * sw
        mask: torch.Tensor | None = None
        if ph != h or pw != w:
            pad = [0, 0, 0, pw - w, 0, ph - h]
            q, k, v = F.pad(q, pad), F.pad(k, pad), F.pad(v, pad)
            real = F.pad(torch.ones([1, h, w, 1], dtype=torch.bool, device=q.device), pad)
            mask = split_windows(real, sh, sw).expand(b, -1, -1, -1).reshape(-1, 1, 1, sh * sw)
        q = split_windows(q, sh, sw).flatten(0, 1)
        k = split_windows(k, sh, sw).flatten(0, 1)
        v = split_windows(v, sh, sw).flatten(0, 1)
        side = self.get_v(v.transpose(1, 2).reshape(-1, c, sh, sw)).flatten(2).transpose(1, 2)
        drop = self.attn_drop if self.training else 0.0
        out = attend(self._heads(q), self._heads(k), self._heads(v), mask, None, drop, self.backend)
        out = out.transpose(1, 2).reshape(q.shape) + side
        return merge_windows(out.reshape(b, -1, sh * sw, c), sh, sw, ph, pw)[:, :h, :w]


@register_notrace_module
class AgentStripes(AgentCore):
    """Agent attention inside stripes of a map; q, k, v and the result are [B, H, W, C].

    Raises: ConfigError for a map that the stripes do not divide (agents average every token, padding included).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shape: str,
        split: int,
        grid: tuple[int, int],
        num_agents: int,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        stripe = stripe_of(shape, split, grid[0], grid[1])
        super().__init__(
            dim, num_heads, stripe, num_agents, attn_drop=attn_drop, backend=backend, device=device, dtype=dtype
        )
        self.shape, self.split = shape, split
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix inside stripes."""
        b, h, w, c = q.shape
        sh, sw = stripe_of(self.shape, self.split, h, w)
        if not torch.jit.is_scripting() and (h % sh or w % sw):
            raise ConfigError(
                f"A map of {h}x{w} tokens was given, but stripes of {sh}x{sw} do not divide it. "
                "Resize the input, or use full stripes."
            )
        q = split_windows(q, sh, sw).flatten(0, 1)
        k = split_windows(k, sh, sw).flatten(0, 1)
        v = split_windows(v, sh, sw).flatten(0, 1)
        side = self.get_v(v.transpose(1, 2).reshape(-1, c, sh, sw)).flatten(2).transpose(1, 2)
        out = self.mix(q, k, v, sh, sw, sh, sw) + side
        return merge_windows(out.reshape(b, -1, sh * sw, c), sh, sw, h, w)

    @torch.jit.ignore
    def set_feature_size(self, grid: tuple[int, int]) -> None:
        """Resize the axis biases for another map."""
        self.set_grid(stripe_of(self.shape, self.split, grid[0], grid[1]))


class CSwinBlock(nn.Module):
    """One block over [B, H, W, C]: rows and columns in two halves of the channels, or one full window.

    Args:
        kind: "A" for agent attention, "B" for softmax. split: width of the stripes. full: one window for all.
    """

    branches: Final[int]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        kind: str = "A",
        split: int = 7,
        full: bool = False,
        num_agents: int = 49,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = 1 if full else 2
        if dim % num_heads or num_heads % self.branches:
            raise ConfigError(
                f"num_heads={num_heads} was given; it must divide dim={dim} and be a multiple of {self.branches}."
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        part, heads = dim // self.branches, num_heads // self.branches
        shapes = ("full",) if full else ("columns", "rows")
        drops: dict[str, Any] = {"attn_drop": attn_drop, "backend": backend}
        self.attns = nn.ModuleList(
            AgentStripes(part, heads, s, split, grid, num_agents, **drops, **dd)
            if kind == "A"
            else Stripes(part, heads, s, split, **drops, **dd)
            for s in shapes
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        qs, ks, vs = q.chunk(self.branches, dim=-1), k.chunk(self.branches, dim=-1), v.chunk(self.branches, dim=-1)
        parts: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            parts.append(attn(qs[i], ks[i], vs[i]))
        x = x + self.drop_path(self.proj_drop(self.proj(torch.cat(parts, dim=-1))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_function
def at_least(x: Tensor, size: int) -> Tensor:
    """Return a map [B, C, H, W] that is large enough. Raises: ConfigError for one that is not."""
    if not torch.jit.is_scripting() and (x.shape[2] < size or x.shape[3] < size):
        raise ConfigError(f"A map of {x.shape[2]}x{x.shape[3]} was given; expected {size}x{size} or more. Resize it.")
    return x


class ConvStep(nn.Module):
    """Shrink a map by an overlapping convolution, then norm: [B, C, H, W] -> [B, H', W', C']."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel: int,
        stride: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        padding = 2 if kernel == 7 else kernel // 2
        self.least = kernel - 2 * padding
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Run the step."""
        return self.norm(self.proj(at_least(x, self.least)).permute(0, 2, 3, 1))


class AgentCSwin(Pyramid):
    """Agent-CSwin over images of any size (arXiv 2312.08874).

    Args:
        img_size: size that the axis biases are made for; it also decides which stages have one full window.
        attn_type: four letters, "A" for agent attention and "B" for softmax stripes, one a stage.
        split_sizes: stripe widths of B stages; agent_split_sizes: of A stages, the whole map if None.

    Raises: ConfigError for lists of other lengths, unknown letters, heads that do not divide.
    """

    block: ClassVar[type[nn.Module]] = CSwinBlock
    """Class of the blocks that the letter A stands for."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: tuple[int, ...] = (2, 4, 18, 1),
        dim: int = 64,
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        split_sizes: tuple[int, ...] = (1, 2, 7, 7),
        agent_split_sizes: tuple[int, ...] | None = None,
        num_agents: tuple[int, ...] = (9, 16, 49, 49),
        attn_type: str = "AABB",
        mlp_ratio: float = 4.0,
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
        n = len(depths)
        exactly(n, num_heads=num_heads, split_sizes=split_sizes, num_agents=num_agents)
        exactly(n, agent_split_sizes=agent_split_sizes or depths)
        kinds = stage_types(attn_type, depths)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = tuple(dim * 2**i for i in range(n))
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        grids = self.grids(size)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks = []
            for kind in kinds[i]:
                split = split_sizes[i] if kind == "B" else (agent_split_sizes[i] if agent_split_sizes else 0)
                full = i == n - 1 or split == 0 or grids[i] == (split, split)
                blocks.append(
                    (self.block if kind == "A" else CSwinBlock)(
                        c, num_heads[i], grids[i], kind, split, full, num_agents[i], mlp_ratio, qkv_bias,
                        proj_drop_rate, attn_drop_rate, next(rates), backend, **dd,
                    )
                )  # fmt: skip
            step = ConvStep(dims[i - 1], c, 3, 2, **dd) if i else ConvStep(in_chans, c, 7, 4, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(
            stages, dims, LayerNorm2d(dims[-1], eps=1e-5, **dd), num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_linear)

    @staticmethod
    def grids(img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Tell the map size (height, width) of each stage: the 7x7 stem with padding 2 rounds down near its edge."""
        sizes = [((img_size[0] - 3) // 4 + 1, (img_size[1] - 3) // 4 + 1)]
        for _ in range(3):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        return sizes


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints and resize axis biases to the model's size."""
    out = {}
    for key, value in take_state(state).items():
        name, _, rest = key.partition(".")
        if name == "stage1_conv_embed":
            key = "stages.0.downsample." + rest.replace("0.", "proj.", 1).replace("2.", "norm.", 1)
        elif name.startswith("stage") and name[5:].isdigit():
            key = f"stages.{int(name[5:]) - 1}.blocks.{rest}"
        elif name.startswith("merge") and name[5:].isdigit():
            key = f"stages.{name[5:]}.downsample." + rest.replace("conv.", "proj.", 1)
        out[key] = value
    return load_filter(out, model, resize=True)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "agent_cswin_tiny": {},  # 20.5, 4.3
    "agent_cswin_small": {"depths": (3, 6, 29, 2)},  # 32.8, 6.7
    "agent_cswin_base": {"depths": (3, 6, 29, 2), "dim": 96, "num_heads": (4, 8, 16, 32)},  # 73.2, 14.9
    "agent_cswin_micro": {
        "img_size": 32, "depths": (1, 1, 1, 1), "dim": 16, "num_heads": (2, 2, 4, 4), "num_agents": (9, 4, 4, 1),
        "split_sizes": (1, 2, 1, 1),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj", classifier="head")
register(__name__, AgentCSwin, LAYOUTS, checkpoint_filter_fn)
