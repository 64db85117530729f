"""EMOv2: inverted residual blocks whose expansion is attention inside windows and inside a dilated grid, added.

"EMOv2: Pushing 5M Vision Model Frontier" (arXiv 2412.06674).
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, register_notrace_module
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.attend import attend, ceil_div
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.groups import merge_groups, split_groups
from attnctl.errors import ConfigError, require

__all__ = ["EMOv2", "HybridAttention2d", "InvertedResidual"]


class HybridMix(nn.Module):
    """Attention inside windows and inside the grid of tokens spread over a map, with the same heads, added.

    kind: "close" for windows alone, "remote" for the grid alone, "hybrid" for both.
    """

    def __init__(self, window: int, kind: str, backend: str) -> None:
        super().__init__()
        self.window, self.kind, self.backend = window, kind, backend

    def _grouped(self, x: Tensor, h: int, w: int, far: bool) -> Tensor:
        """Cut heads into groups: [B, H, h * w, D] -> [B * groups, H, window ** 2, D]."""
        b, m, _, d = x.shape
        g = self.window
        parts = split_groups(x.transpose(1, 2).reshape(b, h, w, m * d), g, h // g if far else 1, w // g if far else 1)
        return parts.reshape(-1, g * g, m, d).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, h: int, w: int, far: bool) -> Tensor:
        b, m, n, d = v.shape
        g = self.window
        parts = [self._grouped(y, h, w, far) for y in (q, k, v)]
        out = attend(parts[0], parts[1], parts[2], None, q.shape[-1] ** -0.5, 0.0, self.backend)
        out = out.transpose(1, 2).reshape(b, -1, g * g, m * d)
        out = merge_groups(out, g, h // g if far else 1, w // g if far else 1, h, w)
        return out.reshape(b, n, m, d).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, h: int, w: int) -> Tensor:
        """Mix [B, H, h * w, D]; the values may be wider than the keys."""
        if self.kind == "close":
            return self._attend(q, k, v, h, w, False)
        if self.kind == "remote":
            return self._attend(q, k, v, h, w, True)
        return self._attend(q, k, v, h, w, True) + self._attend(q, k, v, h, w, False)


class _Projection(nn.Module):
    def __init__(self, before: int, after: int, bias: bool = True, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 1, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Convolution(nn.Module):
    def __init__(self, conv: nn.Conv2d, norm: bool, act: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=1e-6, **dd) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@register_notrace_module
class HybridAttention2d(nn.Module):
    """Attention of a map [B, C, H, W] -> [B, width, H, W] with an activation on its values.

    dim_head: channels of a head of queries and keys; heads of values are width / dim times as wide. The map is padded
    with zeros, at the bottom and right, to whole windows; padded tokens count. kind: as in `HybridMix`.
    Raises: ConfigError for heads that do not divide.
    """

    def __init__(
        self, dim: int, width: int, dim_head: int, window: int, kind: str = "hybrid", backend: str = "auto", **dd: Any
    ) -> None:
        super().__init__()
        heads = dim // dim_head
        require(
            heads >= 1 and dim % dim_head == 0 and width % heads == 0,
            ConfigError,
            f"dim_head={dim_head} was given; it must divide dim={dim}, and the {heads} heads width={width}.",
        )
        require(
            kind in ("close", "remote", "hybrid"),
            ConfigError,
            f"kind={kind!r} was given; expected 'close', 'remote' or 'hybrid'.",
        )
        self.num_heads, self.window, self.width = heads, window, width
        self.qk = _Projection(dim, 2 * dim, **dd)
        self.v = _Projection(dim, width, **dd)
        self.act = nn.GELU()
        self.mixer = HybridMix(window, kind, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        h, w = x.shape[2], x.shape[3]
        ph, pw = ceil_div(h, self.window) * self.window, ceil_div(w, self.window) * self.window
        x = F.pad(x, [0, pw - w, 0, ph - h])
        b, c = x.shape[0], x.shape[1]
        m = self.num_heads
        qk = self.qk(x).reshape(b, 2, m, c // m, ph * pw).transpose(3, 4)
        v = self.act(self.v(x)).reshape(b, m, self.width // m, ph * pw).transpose(2, 3)
        out = self.mixer(qk[:, 0], qk[:, 1], v, ph, pw)
        return out.transpose(2, 3).reshape(b, self.width, ph, pw)[:, :, :h, :w]


class LayerScale2d(nn.Module):
    """A learned factor per channel of a map."""

    def __init__(self, dim: int, init: float, **dd: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, dim, 1, 1), init, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Scale a map."""
        return x * self.gamma


class InvertedResidual(nn.Module):
    """EMOv2's block i2RMB: expand, convolve depthwise, project; attention or a convolution expands.

    stride: 2 for the first block of a stage, which adds nothing of what came in. kind: of the attention, None for a
    convolution. early: batch norm and SiLU as in the first stages, otherwise layer norm and GELU.
    """

    def __init__(
        self, before: int, after: int, width: int, stride: int = 1, kind: str | None = None, early: bool = False,
        dim_head: int = 16, window: int = 7, kernel: int = 5, init: float = 1e-6, drop_path: float = 0.0, **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.skip = stride == 1 and before == after
        self.norm = nn.BatchNorm2d(before, eps=1e-6, **dd) if early else LayerNorm2d(before, eps=1e-6, **dd)
        expand: nn.Module
        if kind is None:
            act = nn.SiLU() if early else nn.GELU()
            net = _Convolution(nn.Conv2d(before, width, 1, **dd), False, act)
            expand = nn.Sequential(OrderedDict(net=net))
        else:
            expand = HybridAttention2d(before, width, dim_head, window, kind, **dd)
        self.eops = nn.ModuleList([expand])
        conv = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False, **dd)
        self.conv_local = _Convolution(conv, True, nn.SiLU(), **dd)
        self.proj = _Projection(width, after, bias=False, **dd)
        self.ls = LayerScale2d(after, init, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [B, C, H, W] -> [B, C', H / stride, W / stride]."""
        a = self.eops[0](self.norm(x))
        if self.skip:
            return x + self.drop_path(self.ls(self.proj(a + self.conv_local(a))))
        return self.ls(self.proj(self.conv_local(a)))


class _First(nn.Module):
    def __init__(self, in_chans: int, dim: int, block: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _Convolution(nn.Conv2d(in_chans, dim, 3, 2, 1, **dd), True, nn.SiLU(), **dd),
            _Convolution(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False, **dd), True, nn.SiLU(), **dd),
            _Convolution(nn.Conv2d(dim, dim, 1, bias=False, **dd), False, nn.Identity()),
        )
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class EMOv2(Pyramid):
    """EMOv2 with timm's interface.

    `dims`, `depths` and `dim_heads` are per stage; `expansions` is the width of a block over its channels, twice that
    for the first. `attention_stages` names the stages with attention, `window` is the side of windows and grids.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (48, 72, 160, 288),
        depths: tuple[int, ...] = (3, 3, 9, 3),
        expansions: tuple[float, ...] = (2.0, 3.0, 4.0, 4.0),
        dim_heads: tuple[int, ...] = (16, 24, 32, 32),
        attention_stages: tuple[int, ...] = (2, 3),
        window: int = 7,
        kernel: int = 5,
        init: float = 1e-6,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(4, dims=dims, depths=depths, expansions=expansions, dim_heads=dim_heads)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            before, early = dims[i - 1] if i else dims[0] // 2, i < 2
            shared = {"kernel": kernel, "init": init, "early": early, **dd}
            wide = int(before * expansions[i] * 2)
            step: nn.Module = InvertedResidual(before, c, wide, 2, drop_path=next(rates), **shared)
            kind = "hybrid" if i in attention_stages else None
            blocks = [
                InvertedResidual(
                    c, c, int(c * expansions[i]), 1, kind, dim_head=dim_heads[i], window=window,
                    drop_path=next(rates), **shared,
                )
                for _ in range(depths[i] - 1)
            ]  # fmt: skip
            if not i:
                step = _First(common.get("in_chans", 3), before, step, **dd)
            stages.append(Stage(step, blocks, channels_last=False))
        super().__init__(stages, dims, LayerNorm2d(dims[-1], eps=1e-6, **dd), **common)
        self.apply(init_linear)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints."""
    out = {}
    for key, value in take_state(state).items():
        part, _, rest = key.partition(".")
        if part == "stage0":
            key = f"stages.0.downsample.stem.{rest}"
        elif part.startswith("stage") and part[5:].isdigit():
            stage = int(part[5:]) - 1
            index, _, below = rest.partition(".")
            below = below.replace("norm.norm.", "norm.", 1) if below.startswith("norm.") else below
            first = "downsample.block" if stage == 0 else "downsample"
            key = (
                f"stages.{stage}.{first}.{below}" if index == "0" else f"stages.{stage}.blocks.{int(index) - 1}.{below}"
            )
        elif part == "norm":
            key = key.replace("norm.norm.", "norm.")
        out[key] = value
    return load_filter(out, model)


_TINY: dict[str, Any] = {"expansions": (2.0, 2.5, 3.0, 3.5), "dim_heads": (16, 16, 20, 20)}
_WIDE: dict[str, Any] = {"dim_heads": (16, 32, 32, 32)}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "emov2_1m": _TINY | {"dims": (32, 48, 80, 180), "depths": (2, 2, 8, 3)},  # 1.5, 0.3
    "emov2_2m": _TINY | {"dims": (32, 48, 120, 200)},  # 2.4, 0.5
    "emov2_5m": {},  # 5.1, 1.0
    "emov2_20m": _WIDE | {"dims": (64, 128, 320, 448), "depths": (3, 3, 13, 3)},  # 20.2, 4.0
    "emov2_50m": _WIDE | {"dims": (64, 128, 384, 512), "depths": (5, 8, 20, 7)},  # 49.8, 8.8
    "emov2_micro": {
        "dims": (16, 24, 32, 48), "depths": (1, 2, 2, 2), "expansions": (2.0, 2.0, 2.0, 2.0),
        "dim_heads": (8, 8, 8, 8), "window": 2, "kernel": 3, "init": 1.0,
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.stem.0.conv", classifier="head")
register(__name__, EMOv2, LAYOUTS, checkpoint_filter_fn)
