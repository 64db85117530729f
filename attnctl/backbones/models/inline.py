"""InLine-DeiT, -PVT, -Swin and -CSwin: known networks with InLine attention.

"Bridging the Divide: Reconsidering Softmax and Linear Attention" (arXiv 2412.06590). Names and options are those of the
agent models, whose networks these are with another attention and other widths.
"""

from typing import Any

from timm.layers import DropPath, register_notrace_module
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from attnctl.backbones.models import agent_cswin, agent_pvt, agent_swin
from attnctl.backbones.models.config import load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import FeedForward, take_state
from attnctl.backbones.modules.inline import InLineAttention2d, inline, local_convolution, local_kernels

__all__ = ["InLineCSwin", "InLineCSwinBlock", "InLinePVT", "InLineSwinTransformer", "InLineVisionTransformer"]


class InLineVisionTransformer(VisionTransformer):
    """A vision transformer with InLine attention; everything else as timm's VisionTransformer, with a square grid."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        for block in self.blocks:
            old = block.attn
            attn = InLineAttention2d(
                self.embed_dim, old.num_heads, self.num_prefix_tokens, qkv_bias=old.qkv.bias is not None,
                proj_drop=old.proj_drop.p, **dd,
            )  # fmt: skip
            attn.qkv, attn.proj = old.qkv, old.proj  # timm has drawn their weights
            block.attn = attn


class InLinePVT(agent_pvt.AgentPVT):
    """InLine-PVT: as `AgentPVT`, with "I" for InLine and "S" for PVT's own attention in `attn_type`."""

    form = "I"

    def __init__(self, attn_type: str = "IIII", num_heads: tuple[int, ...] = (2, 4, 10, 16), **kwargs: Any) -> None:
        super().__init__(attn_type=_letters(attn_type), num_heads=num_heads, **kwargs)


class InLineSwinTransformer(agent_swin.AgentSwinTransformer):
    """InLine-Swin: as `AgentSwinTransformer`, with "I" for InLine and "S" for Swin's windows in `attn_type`."""

    form = "I"

    def __init__(self, attn_type: str = "IIIS", **kwargs: Any) -> None:
        super().__init__(attn_type=_letters(attn_type), **kwargs)


@register_notrace_module
class InLineFull(nn.Module):
    """InLine attention of a whole map between a block's projections, with a depthwise convolution of the values."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.residual = local_kernels(dim, num_heads, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> Tensor:
        """Mix q, k, v [B, H, W, C]; mean: of what the block was given, [B, C]."""
        b, h, w, c = q.shape
        m = self.num_heads
        side = self.get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        heads = [y.reshape(b, h * w, m, c // m).transpose(1, 2) for y in (q, k, v)]
        out = inline(heads[0], heads[1], heads[2], (c // m) ** -0.5).transpose(1, 2).reshape(b, h * w, c)
        out = out + local_convolution(v.flatten(1, 2), self.residual(mean.unsqueeze(-1)), h, w)
        return out.reshape(b, h, w, c) + side


class InLineCSwinBlock(nn.Module):
    """CSwin's block with InLine attention of the whole map: [B, H, W, C] -> the same.

    The mean that makes the local kernels is taken before the first norm, as in the release. Arguments that only stripes
    and agents read are taken and not used.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, int], kind: str = "A", split: int = 7, full: bool = True,
        num_agents: int = 49, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop: float = 0.0,
        attn_drop: float = 0.0, drop_path: float = 0.0, backend: str = "auto", **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.attns = nn.ModuleList([InLineFull(dim, num_heads, **dd)])
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        out = self.attns[0](q, k, v, x.mean(dim=(1, 2)))
        x = x + self.drop_path(self.proj_drop(self.proj(out)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class InLineCSwin(agent_cswin.AgentCSwin):
    """InLine-CSwin: as `AgentCSwin`, with "I" for InLine and "S" for softmax stripes in `attn_type`."""

    block = InLineCSwinBlock

    def __init__(self, attn_type: str = "IISS", **kwargs: Any) -> None:
        super().__init__(attn_type=_letters(attn_type), **kwargs)


def _letters(attn_type: str) -> str:
    """Spell a type of InLine in the letters of the agent models."""
    return attn_type.replace("B", "?").replace("A", "?").replace("I", "A").replace("S", "B")


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints, or take this model's own."""
    if isinstance(model, InLineVisionTransformer):
        return load_filter(vit_filter(take_state(state), model), model, resize=True)
    host = {InLinePVT: agent_pvt, InLineSwinTransformer: agent_swin, InLineCSwin: agent_cswin}[type(model)]
    return host.checkpoint_filter_fn(state, model)


_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = _DEEP | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "attn_type": "IIMS2"}
_CSWIN: dict[str, Any] = {"depths": (3, 6, 29, 2), "dim": 96, "num_heads": (4, 8, 16, 32)}
DEIT: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one image in G
    "inline_deit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 6},  # 6.5, 1.1
    "inline_deit_small": {"img_size": 288, "embed_dim": 320, "depth": 12, "num_heads": 10},  # 16.7, 5.0
    "inline_deit_base": {"img_size": 448, "embed_dim": 384, "depth": 12, "num_heads": 12},  # 23.8, 17.2
    "inline_deit_micro": {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
}
PVT: dict[str, dict[str, Any]] = {
    "inline_pvt_tiny": {},  # 12.0, 2.0
    "inline_pvt_small": {"depths": (3, 4, 6, 3)},  # 21.6, 3.9
    "inline_pvt_medium": {"depths": (3, 4, 18, 3)},  # 37.6, 6.9
    "inline_pvt_large": {"depths": (3, 8, 27, 3)},  # 51.2, 10.2
    "inline_pvt_micro": {
        "img_size": 32, "depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (4.0, 4.0, 2.0, 2.0),
    },
}  # fmt: skip
SWIN: dict[str, dict[str, Any]] = {
    "inline_swin_tiny": {},  # 29.2, 4.5
    "inline_swin_small": _DEEP | {"attn_type": "IISS"},  # 49.8, 8.7
    "inline_swin_base": _BASE,  # 88.4, 15.4
    "inline_swin_base_384": _BASE | {"img_size": 384},  # 88.5, 46.3
    "inline_swin_micro": {
        "img_size": 32, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "attn_type": "IIMS1",
        "window_size": 2,
    },
}  # fmt: skip
CSWIN: dict[str, dict[str, Any]] = {
    "inline_cswin_tiny": {},  # 20.6, 4.3
    "inline_cswin_small": {"depths": (3, 6, 29, 2)},  # 33.0, 6.8
    "inline_cswin_base": _CSWIN,  # 73.4, 14.9
    "inline_cswin_base_384": _CSWIN | {"img_size": 384, "split_sizes": (1, 2, 12, 12)},  # 73.4, 46.2
    "inline_cswin_micro": {
        "img_size": 32, "depths": (1, 1, 1, 1), "dim": 16, "num_heads": (2, 2, 4, 4), "split_sizes": (1, 2, 1, 1),
    },
}  # fmt: skip
LAYOUTS = DEIT | PVT | SWIN | CSWIN
default_cfgs: dict[str, Any] = {}
for _layouts, _options in (
    (DEIT, {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True, "pool_size": None}),
    (PVT, {"first_conv": "stages.0.downsample.proj", "classifier": "head"}),
    (SWIN, {"first_conv": "patch_embed.proj", "classifier": "head.fc", "fixed_input_size": True}),
    (CSWIN, {"first_conv": "stages.0.downsample.proj", "classifier": "head"}),
):
    default_cfgs.update(size_cfgs(_layouts, **_options))
register(__name__, InLineVisionTransformer, DEIT, checkpoint_filter_fn, out_indices=3, feature_cls="getter")
register(__name__, InLinePVT, PVT, checkpoint_filter_fn)
register(__name__, InLineSwinTransformer, SWIN, checkpoint_filter_fn)
register(__name__, InLineCSwin, CSWIN, checkpoint_filter_fn)
