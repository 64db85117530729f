"""BiFormer: a pyramid of convolutions and bi-level routing attention.

"BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810). Weights of the authors' release
load by name. Maps that the windows do not divide are padded (`pad`), so that any image size runs.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.plain import MapAttention
from attnctl.backbones.modules.routing import BiLevelRoutingAttention
from attnctl.errors import ConfigError

__all__ = ["BiFormer", "BiFormerBlock"]


class ConvMixer(nn.Sequential):
    """The convolutional stand-in for attention (topk = 0): 1x1, depthwise 5x5, 1x1, over [B, H, W, C]."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        # The first and last entries are placeholders that keep the indices of the released weights.
        super().__init__(
            nn.Identity(),
            nn.Conv2d(dim, dim, 1, device=device, dtype=dtype),
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype),
            nn.Conv2d(dim, dim, 1, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, H, W, C]."""
        x = x.permute(0, 3, 1, 2)
        for layer in self:
            x = layer(x)
        return x.permute(0, 2, 3, 1)


class MapConv(nn.Module):
    """A depthwise 3x3 convolution inside the perceptron, over [B, H, W, C]."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map [B, H, W, C]."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormerBlock(nn.Module):
    """One block over [B, C, H, W]: depthwise position encoding, attention, perceptron.

    Args:
        topk: above 0 bi-level routing attention with `num_heads`; -1 plain attention and -2 attention with a
            depthwise branch, both with `plain_heads`; 0 convolutions.
        pos_dwconv: 3, or 0 for none. layer_scale: start of the branch gains, None for none.
    """

    has_pos: Final[bool]
    has_scale: Final[bool]
    pre_norm: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        n_win: int = 7,
        window_size: int | None = None,
        topk: int = 4,
        qk_dim: int | None = None,
        mlp_ratio: float = 4.0,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        pos_dwconv: int = 3,
        layer_scale: float | None = None,
        pre_norm: bool = True,
        plain_heads: int = 8,
        pad: str = "pre",
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pos_dwconv not in (0, 3):
            raise ConfigError(f"pos_dwconv={pos_dwconv} was given; expected 3, or 0 for none.")
        if topk < -2:
            raise ConfigError(f"topk={topk} was given; expected a count of windows, 0, -1 or -2.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.has_pos, self.has_scale, self.pre_norm = pos_dwconv > 0, layer_scale is not None, pre_norm
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_dwconv else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        shared: dict[str, Any] = {"attn_drop": attn_drop, "backend": backend} | dd
        self.attn: nn.Module
        if topk > 0:
            self.attn = BiLevelRoutingAttention(
                dim, num_heads, n_win, topk=topk, window_size=window_size, qk_dim=qk_dim, side_dwconv=side_dwconv,
                pad=pad, **shared,
            )  # fmt: skip
        elif topk == 0:
            self.attn = ConvMixer(dim, **dd)
        else:
            if backend == "flex":  # which is about routed windows
                shared["backend"] = "auto"
            self.attn = MapAttention(dim, plain_heads, side_dwconv=side_dwconv if topk == -2 else 0, **shared)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, **dd),
            MapConv(hidden, **dd) if mlp_dwconv else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, dim, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
        else:
            self.gamma1 = self.gamma2 = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map [B, C, H, W]."""
        if self.has_pos:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        if self.pre_norm:
            x = x + self.drop_path(self._gain(self.attn(self.norm1(x)), self.gamma1))
            x = x + self.drop_path(self._gain(self.mlp(self.norm2(x)), self.gamma2))
        else:
            x = self.norm1(x + self.drop_path(self._gain(self.attn(x), self.gamma1)))
            x = self.norm2(x + self.drop_path(self._gain(self.mlp(x), self.gamma2)))
        return x.permute(0, 3, 1, 2)

    def _gain(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return x if gamma is None else x * gamma


class BiFormer(Pyramid):
    """BiFormer over images of any size (arXiv 2303.08810, table 1).

    Args:
        depths: one value a stage, and so for dims, mlp_ratios, num_heads (head_dim 32 if None) and topks.
        n_win: windows per side; window_size: their size in tokens instead. pad: see BiLevelRoutingAttention.
        plain_heads: heads of stages with topk -1 or -2. stem: "conv3" (two overlapping convolutions) or "patch4".

    Raises: ConfigError for lists of different lengths and settings that the attention refuses.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        mlp_ratios: tuple[float, ...] = (3.0, 3.0, 3.0, 3.0),
        topks: tuple[int, ...] = (1, 4, 16, -2),
        head_dim: int = 32,
        num_heads: tuple[int, ...] | None = None,
        plain_heads: int = 8,
        n_win: int = 7,
        window_size: int | None = None,
        pad: str = "pre",
        stem: str = "conv3",
        side_dwconv: int = 5,
        pos_dwconv: int = 3,
        mlp_dwconv: bool = False,
        layer_scale: float | None = None,
        pre_norm: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        heads = num_heads or tuple(c // head_dim for c in dims)
        exactly(len(dims), depths=depths, mlp_ratios=mlp_ratios, topks=topks, num_heads=heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks = [
                BiFormerBlock(
                    c, heads[i], n_win=n_win, window_size=window_size, topk=topks[i], mlp_ratio=mlp_ratios[i],
                    mlp_dwconv=mlp_dwconv, side_dwconv=side_dwconv, pos_dwconv=pos_dwconv, layer_scale=layer_scale,
                    pre_norm=pre_norm, plain_heads=plain_heads, pad=pad, drop_path=next(rates),
                    attn_drop=attn_drop_rate, backend=backend, **dd,
                )
                for _ in range(depths[i])
            ]  # fmt: skip
            shrink = _stem(stem, in_chans, c, dd) if i == 0 else _merge(stem, dims[i - 1], c, dd)
            stages.append(Stage(shrink, blocks, channels_last=False))
        super().__init__(
            stages, dims, nn.BatchNorm2d(dims[-1], **dd), num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_linear)


def _stem(kind: str, in_chans: int, dim: int, dd: dict[str, Any]) -> nn.Sequential:
    if kind == "patch4":
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4, **dd), nn.BatchNorm2d(dim, **dd))
    if kind != "conv3":
        raise ConfigError(f"stem={kind!r} was given; expected 'conv3' or 'patch4'.")
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _merge(kind: str, dim: int, out: int, dd: dict[str, Any]) -> nn.Sequential:
    if kind == "patch4":
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out, 2, 2, **dd))
    return nn.Sequential(nn.Conv2d(dim, out, 3, 2, 1, **dd), nn.BatchNorm2d(out, **dd))


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints; weights saved from this model pass unchanged."""
    out = {}
    for key, value in take_state(state).items():
        part = key.split(".")
        if part[0] == "downsample_layers":
            key = ".".join(["stages", part[1], "downsample", *part[2:]])
        elif part[0] == "stages" and part[2].isdigit():
            key = ".".join(["stages", part[1], "blocks", *part[2:]])
        elif part[0] == "extra_norms":
            continue  # norms of the dense-prediction wrapper: a decoder's business
        # The authors' STL variants have no place for a convolution in the perceptron; ours is a GELU there.
        out[key.replace(".mlp.2.", ".mlp.3.")] = value
    return load_filter(out, model)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "biformer_tiny": {},  # 13.1, 2.2
    "biformer_small": {"depths": (4, 4, 18, 4)},  # 25.5, 4.5
    "biformer_base": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768)},  # 56.8, 9.8
    "biformer_stl": {  # the layout of Swin-T: 28.4, 4.6
        "depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratios": (4.0, 4.0, 4.0, 4.0), "stem": "patch4",
        "pos_dwconv": 0,
    },
    "biformer_micro": {  # 0.12 M, for demos and tests on 32 px images, as every micro model
        "depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "head_dim": 16, "n_win": 2, "topks": (1, 2, 4, -2),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.0", classifier="head")
register(__name__, BiFormer, LAYOUTS, checkpoint_filter_fn)
