"""MOAT: inverted residual convolutions and attention in one block, without perceptrons.

"MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models" (arXiv 2210.01820). The release is
TensorFlow's: padding falls to the bottom and right, batch norms have an epsilon of 1e-3. `from_tensorflow` turns its
arrays into weights of these classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_conv2d, pad_same, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.routing import merge_windows, split_windows
from attnctl.errors import ConfigError, require

__all__ = ["MOAT", "MOATAttention2d", "MOATBlock", "from_tensorflow"]


@register_notrace_module
class MOATAttention2d(nn.Module):
    """Softmax attention of maps [B, H, W, C] with a bias by offset, [heads, 2 P - 1, 2 P - 1], resized to the map.

    window: side of windows, None for the whole map. Raises: ConfigError for heads that do not divide, and for maps that
    windows do not divide.
    """

    def __init__(
        self, dim: int, head: int = 32, places: int | None = 14, window: int | None = None, backend: str = "auto",
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim % head == 0, ConfigError, f"heads of {head} channels were given; they must divide dim={dim}.")
        self.num_heads, self.window, self.biased, self.backend = dim // head, window or 0, places is not None, backend
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        side = 2 * (places or 1) - 1
        self.relative_position_embedding = nn.Parameter(torch.empty(self.num_heads, side, side, **dd))
        trunc_normal_(self.relative_position_embedding, std=0.02)
        if places is None:
            del self.relative_position_embedding

    def bias(self, h: int, w: int) -> Tensor:
        """Compute the bias [1, H, h * w, h * w]; entry (h - 1, w - 1) of the table is a place's own."""
        table: Tensor = self.relative_position_embedding
        if table.shape[1] != 2 * h - 1 or table.shape[2] != 2 * w - 1:
            table = F.interpolate(table[None], [2 * h - 1, 2 * w - 1], mode="bilinear", align_corners=False)[0]
        y, x = torch.arange(h, device=table.device), torch.arange(w, device=table.device)
        rows, columns = y[None, :] - y[:, None] + h - 1, x[None, :] - x[:, None] + w - 1
        return table[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(1, -1, h * w, h * w)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        size = self.window
        wh, ww = (size, size) if 0 < size < max(h, w) else (h, w)
        if not torch.jit.is_scripting():
            require(
                h % wh == 0 and w % ww == 0, ConfigError, f"A map of {h}x{w} was given; windows of {size} do not fit."
            )
        parts = split_windows(x, wh, ww).flatten(0, 1)
        n, t = parts.shape[0], parts.shape[1]
        qkv = self.qkv(parts).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        mask: Tensor | None = None
        if self.biased:
            mask = self.bias(wh, ww).to(x.dtype)
        out = attend(qkv[0], qkv[1], qkv[2], mask, None, 0.0, self.backend).transpose(1, 2).reshape(n, t, c)
        return merge_windows(self.proj(out).reshape(b, -1, t, c), wh, ww, h, w)


class _SqueezeExcite(nn.Module):
    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, hidden, 1, **dd)
        self.expand = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean(dim=[2, 3], keepdim=True)))).sigmoid()


@register_notrace_module
class _Average(nn.Module):
    """Average places, padded at the bottom and right, without counting the padding."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        kernel, step = [self.size, self.size], [self.stride, self.stride]
        total = F.avg_pool2d(pad_same(x, kernel, step), kernel, step)
        real = pad_same(torch.ones_like(x[:1, :1]), kernel, step)
        return total / F.avg_pool2d(real, kernel, step)


class MOATBlock(nn.Module):
    """An inverted residual convolution, and attention behind it: [B, C, H, W] -> [B, C', H / stride, W / stride].

    expansion: width inside over channels. attention: whether it is there; squeeze and excitation takes its place.
    head, places, window: as in `MOATAttention2d`. pool: side of the shortcut's average where stride is 2.
    """

    def __init__(
        self, before: int, after: int, stride: int = 1, attention: bool = True, expansion: int = 4, head: int = 32,
        places: int | None = 14, window: int | None = None, pool: int = 2, drop_path: float = 0.0, **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        wide = expansion * after
        self.pre_norm = nn.BatchNorm2d(before, eps=1e-3, **dd)
        self.expand_conv = nn.Conv2d(before, wide, 1, bias=False, **dd)
        self.expand_norm = nn.BatchNorm2d(wide, eps=1e-3, **dd)
        self.depthwise_conv = create_conv2d(wide, wide, 3, stride=stride, padding="same", depthwise=True, **dd)
        self.depthwise_norm = nn.BatchNorm2d(wide, eps=1e-3, **dd)
        self.se = nn.Identity() if attention else _SqueezeExcite(wide, after // 4, **dd)
        self.shrink_conv = nn.Conv2d(wide, after, 1, **dd)
        self.pool = _Average(pool, stride) if stride > 1 else nn.Identity()
        self.shortcut_conv = nn.Conv2d(before, after, 1, **dd) if before != after else nn.Identity()
        self.attended = attention
        self.attention_norm = nn.LayerNorm(after, **dd) if attention else nn.Identity()
        self.attention = MOATAttention2d(after, head, places, window, **dd) if attention else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = F.gelu(self.expand_norm(self.expand_conv(self.pre_norm(x))))
        y = self.se(F.gelu(self.depthwise_norm(self.depthwise_conv(y))))
        x = self.shortcut_conv(self.pool(x)) + self.drop_path(self.shrink_conv(y))
        if self.attended:
            mixed = self.attention(self.attention_norm(x.permute(0, 2, 3, 1)))
            x = x + self.drop_path(mixed.permute(0, 3, 1, 2))
        return x


class _First(nn.Module):
    def __init__(self, in_chans: int, dim: int, block: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.conv1 = create_conv2d(in_chans, dim, 3, stride=2, padding="same", bias=True, **dd)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-3, **dd)
        self.conv2 = create_conv2d(dim, dim, 3, padding="same", bias=True, **dd)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class MOAT(Pyramid):
    """MOAT with timm's interface.

    stem: channels of the stem. dims, depths: per stage, the first two without attention. img_size: what the position
    biases are made for; other sizes resize them. windows: sides per stage with attention, None for the whole map.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        stem: int = 64,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 3, 7, 2),
        windows: tuple[int | None, ...] = (None, None),
        head: int = 32,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(4, dims=dims, depths=depths)
        exactly(2, windows=windows)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        side = img_size if isinstance(img_size, int) else max(img_size)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            more: dict[str, Any] = {"attention": i > 1, **dd}
            if i > 1:
                more |= {"places": math.ceil(side / 2 ** (i + 2)), "window": windows[i - 2], "head": head}
            before = dims[i - 1] if i else stem
            step: nn.Module = MOATBlock(before, c, 2, drop_path=next(rates), **more)
            if not i:
                step = _First(common.get("in_chans", 3), stem, step, **dd)
            blocks = [MOATBlock(c, c, drop_path=next(rates), **more) for _ in range(depths[i] - 1)]
            stages.append(Stage(step, blocks, channels_last=False))
        super().__init__(stages, dims, nn.Identity(), **common)
        self.head_norm = nn.LayerNorm(dims[-1], **dd)
        self.apply(init_linear)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, norm and classify: [B, C, h, w] -> [B, num_classes]."""
        if self.global_pool == "avg":
            x = self.head_norm(x.mean(dim=(2, 3)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


_ARRAYS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def from_tensorflow(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the arrays of one block of the release into weights of `MOATBlock`.

    Names are those behind the block's, such as `expand_conv/kernel`; kernels are [height, width, in, out].
    """
    out: dict[str, Tensor] = {}
    for name, value in arrays.items():
        layer, _, leaf = name.rpartition("/")
        layer = layer.replace("se/reduce_conv2d", "se.reduce").replace("se/expand_conv2d", "se.expand")
        if leaf == "depthwise_kernel":
            out[f"{layer}.weight"] = value.permute(2, 3, 0, 1)
        elif leaf == "kernel":
            out[f"{layer}.weight"] = value.permute(3, 2, 0, 1)
        elif layer == "attention":
            out["attention.relative_position_embedding"] = value
        elif layer == "attention/o":
            out[f"attention.proj.{leaf}"] = value.flatten(0, 1).T if leaf == "weight" else value
        elif not layer.startswith("attention/"):
            out[f"{layer}.{_ARRAYS.get(leaf, leaf)}"] = value
    if "attention/q/weight" in arrays:
        each = [arrays[f"attention/{n}/weight"].flatten(1).T for n in "qkv"]
        out["attention.qkv.weight"] = torch.cat(each)
        out["attention.qkv.bias"] = torch.cat([arrays[f"attention/{n}/bias"].flatten() for n in "qkv"])
    return out


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Take this model's own weights; position biases of another image size are resized when they are used."""
    return load_filter(take_state(state), model)


_DEEP = (2, 6, 14, 2)
_NARROW = {"tiny_moat_0": (32, 32), "tiny_moat_1": (40, 40), "tiny_moat_2": (56, 56), "tiny_moat_3": (80, 80)}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M
    "moat_0": {},  # 27.8
    "moat_1": {"depths": _DEEP},  # 41.6
    "moat_2": {"stem": 128, "dims": (128, 256, 512, 1024), "depths": _DEEP},  # 73.4
    "moat_3": {"stem": 160, "dims": (160, 320, 640, 1280), "depths": (2, 12, 28, 2)},
    "moat_4": {"stem": 256, "dims": (256, 512, 1024, 2048), "depths": (2, 12, 28, 2)},
    **{
        name: {"stem": stem, "dims": (c, 2 * c, 4 * c, 8 * c)}  # 3.4, 5.1, 9.8, 19.5
        for name, (stem, c) in _NARROW.items()
    },
    "moat_micro": {"img_size": 32, "stem": 16, "dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head": 16},
}
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.conv1", classifier="head")
register(__name__, MOAT, LAYOUTS, checkpoint_filter_fn)
