"""NAT and DiNAT: pyramids whose tokens see a neighbourhood, in DiNAT every other block a dilated one.

"Neighborhood Attention Transformer" (arXiv 2204.07143), "Dilated Neighborhood Attention Transformer" (arXiv
2209.15001).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, take_state
from attnctl.errors import ConfigError
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import axes_of

__all__ = ["NAT", "NeighborhoodAttention2d"]


def visible(length: int, window: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Tell along an axis which key each query sees, and the places between them plus window - 1, [length, length]."""
    at = torch.arange(length)
    group, place = at % dilation, torch.div(at, dilation, rounding_mode="floor")
    count = torch.div(length - group + dilation - 1, dilation, rounding_mode="floor")
    start = torch.minimum((place - window // 2).clamp(min=0), count - window)
    seen = (place[None, :] >= start[:, None]) & (place[None, :] < start[:, None] + window)
    seen = seen & (group[None, :] == group[:, None])
    return seen, (place[None, :] - place[:, None] + window - 1).clamp(0, 2 * window - 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, h: int, w: int, window: int, dilation: int, rpb: Tensor) -> Tensor:
    """Compute neighbourhood attention with a mask over all pairs of places; a script cannot call the kernel."""
    rows, dy = visible(h, window, dilation)
    columns, dx = visible(w, window, dilation)
    bias = rpb[:, dy.to(q.device)][:, :, :, dx.to(q.device)].permute(0, 1, 3, 2, 4).reshape(-1, h * w, h * w)
    seen = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(h * w, h * w).to(q.device)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    return logits.masked_fill(seen.logical_not(), float("-inf")).softmax(dim=-1) @ v


@register_notrace_module
class NeighborhoodAttention2d(nn.Module):
    """Neighbourhood attention of maps [B, H, W, C] with a bias by relative position.

    window: odd. dilation: step between the tokens seen. Maps smaller than window * dilation are padded with zeros at
    the bottom and right before the projection, as the release does. Raises: ConfigError for heads that do not divide.
    """

    def __init__(self, dim: int, num_heads: int, window: int = 7, dilation: int = 1, **dd: Any) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} was given; it must divide dim={dim}.")
        self.num_heads, self.window, self.dilation = num_heads, window, dilation
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1, **dd))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        h, w = x.shape[1:3]
        least = self.window * self.dilation
        x = F.pad(x, [0, 0, 0, max(0, least - w), 0, max(0, least - h)])
        b, ph, pw, c = x.shape
        qkv = self.qkv(x).reshape(b, ph * pw, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        if torch.jit.is_scripting():
            out = written_out(qkv[0], qkv[1], qkv[2], ph, pw, self.window, self.dilation, self.rpb)
        else:
            axes = axes_of((ph, pw), self.window, 1, self.dilation)
            out = neighborhood(qkv[0], qkv[1], qkv[2], axes, bias=self.rpb)
        return self.proj(out.transpose(1, 2).reshape(b, ph, pw, c))[:, :h, :w]


class NATBlock(nn.Module):
    """Attention and a perceptron of maps [B, H, W, C], each behind a norm and added. init: of layer scales, or None."""

    scaled: Final[bool]

    def __init__(
        self, dim: int, heads: int, window: int, dilation: int, mlp_ratio: float, drop_path: float, init: float | None,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention2d(dim, heads, window, dilation, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.scaled = init is not None
        if init is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(init), **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        mixed = self.attn(self.norm1(x))
        if self.scaled:
            mixed = self.gamma1 * mixed
        x = x + self.drop_path(mixed)
        mapped = self.mlp(self.norm2(x))
        if self.scaled:
            mapped = self.gamma2 * mapped
        return x + self.drop_path(mapped)


class Tokenizer(nn.Module):
    """Two convolutions of 3 x 3 that shrink images four times, and a norm: [B, 3, H, W] -> [B, H / 4, W / 4, C]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd), nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the tokenizer."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Halve a map by a convolution of 3 x 3, and norm it: [B, C, H, W] -> [B, H / 2, W / 2, C']."""

    def __init__(self, before: int, after: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(before, after, 3, 2, 1, bias=False, **dd)
        self.norm = nn.LayerNorm(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the reduction."""
        return self.norm(self.reduction(x).permute(0, 2, 3, 1))


class NAT(Pyramid):
    """NAT and DiNAT with timm's interface.

    Args:
        dim: channels of the first stage, doubled at every other. depths, num_heads: per stage. window: odd.
        dilations: per stage, repeated over its blocks. mlp_ratio: hidden channels over channels.
        init_values: start of the layer scales, None for none.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 6, 5),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        window: int = 7,
        dilations: tuple[tuple[int, ...], ...] = ((1,), (1,), (1,), (1,)),
        mlp_ratio: float = 3.0,
        init_values: float | None = None,
        img_size: int | tuple[int, int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        exactly(len(depths), depths=depths, num_heads=num_heads, dilations=dilations)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = tuple(dim * 2**i for i in range(len(depths)))
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            steps = [dilations[i][j % len(dilations[i])] for j in range(depths[i])]
            blocks = [NATBlock(c, num_heads[i], window, e, mlp_ratio, next(rates), init_values, **dd) for e in steps]
            step = Downsample(dims[i - 1], c, **dd) if i else Tokenizer(in_chans, c, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(
            stages, dims, LayerNorm2d(dims[-1], eps=1e-5, **dd), num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that should not decay: the position biases."""
        return {n for n, _ in self.named_parameters() if n.endswith("rpb")}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints."""
    out = {}
    for key, value in take_state(state).items():
        part, _, rest = key.partition(".")
        if part == "patch_embed":
            key = f"stages.0.downsample.{rest}"
        elif part == "levels":
            index, _, below = rest.partition(".")
            key = f"stages.{int(index) + below.startswith('downsample.')}.{below}"
        out[key] = value
    return load_filter(out, model)


_DEEP = {"depths": (3, 4, 18, 5)}
_SMALL: dict[str, Any] = {"dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, **_DEEP}
_BASE: dict[str, Any] = {"dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "init_values": 1e-5, **_DEEP}
_DILATED: dict[str, Any] = {"dilations": ((1, 8, 1), (1, 4, 1, 4), (1, 2), (1,))}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M
    "nat_mini": {},  # 20.0
    "nat_tiny": _DEEP,  # 27.9
    "nat_small": _SMALL | {"init_values": 1e-5},  # 50.7
    "nat_base": _BASE,  # 89.8
    "nat_micro": {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window": 3},
    "dinat_mini": _DILATED,  # 20.0
    "dinat_tiny": _DEEP | _DILATED,  # 27.9
    "dinat_small": _SMALL | _DILATED,  # 50.7
    "dinat_base": _BASE | _DILATED,  # 89.8
    "dinat_large": {"dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, **_DEEP, **_DILATED},  # 200.9
    "dinat_micro": {
        "dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window": 3,
        "dilations": ((1, 2), (1,), (1,), (1,)),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj.0", classifier="head")
register(__name__, NAT, LAYOUTS, checkpoint_filter_fn)
