"""DiNAT_s, a Swin whose windows slide, and isotropic NAT: one stage of neighbourhoods, or of the whole map with biases.

"Dilated Neighborhood Attention Transformer" (arXiv 2209.15001).
"""

from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.models.nat import NATBlock
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.resize import pad_to

__all__ = ["DiNATs", "NATIsotropic"]


class _Patches(nn.Module):
    def __init__(self, before: int, after: int, size: int, **dd: Any) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(before, after, size, size, **dd)
        self.norm = nn.LayerNorm(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to(x, self.size)).permute(0, 2, 3, 1))


class _Merging(nn.Module):
    """Join 2 x 2 tokens, norm and project them: [B, C, H, W] -> [B, H / 2, W / 2, C']; odd sides are padded."""

    def __init__(self, before: int, after: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * before, **dd)
        self.reduction = nn.Linear(4 * before, after, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, 2).permute(0, 2, 3, 1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class DiNATs(Pyramid):
    """DiNAT_s with timm's interface. dim: channels of the first stage. dilations: per stage, repeated over blocks."""

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        dilations: tuple[tuple[int, ...], ...] = ((1, 8), (1, 4), (1, 2), (1,)),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(len(depths), depths=depths, num_heads=num_heads, dilations=dilations)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        dims = tuple(dim * 2**i for i in range(len(depths)))
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            steps = [dilations[i][j % len(dilations[i])] for j in range(depths[i])]
            blocks = [NATBlock(c, num_heads[i], window, e, mlp_ratio, next(rates), None, **dd) for e in steps]
            step = _Merging(dims[i - 1], c, **dd) if i else _Patches(common.get("in_chans", 3), c, 4, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, LayerNorm2d(dims[-1], eps=1e-5, **dd), **common)
        self.apply(init_linear)


class NATIsotropic(Pyramid):
    """A vision transformer without class token whose blocks see neighbourhoods; one stage, patches of 16 px.

    window: as large as the map for full attention with a bias by offset. dilations: repeated over the blocks.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        window: int = 7,
        dilations: tuple[int, ...] = (1,),
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        rates = drop_rates(drop_path_rate, depth)
        blocks = [
            NATBlock(dim, num_heads, window, dilations[j % len(dilations)], mlp_ratio, rates[j], None, **dd)
            for j in range(depth)
        ]
        step = _Patches(common.get("in_chans", 3), dim, patch_size, **dd)
        norm = LayerNorm2d(dim, eps=1e-5, **dd)
        super().__init__([Stage(step, blocks, channels_last=True)], (dim,), norm, **common)
        self.feature_info[0]["reduction"] = patch_size
        self.apply(init_linear)


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints."""
    out = {}
    for key, value in take_state(state).items():
        part, _, rest = key.partition(".")
        if part == "patch_embed":
            key = f"stages.0.downsample.{rest}"
        elif part == "layers" and isinstance(model, NATIsotropic):
            key = f"stages.0.blocks.{rest}"
        elif part == "layers":
            index, _, below = rest.partition(".")
            key = f"stages.{int(index) + below.startswith('downsample.')}.{below}"
        out[key] = value
    return load_filter(out, model)


_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2)}
SWIN_LIKE: dict[str, dict[str, Any]] = {  # parameters in M
    "dinat_s_tiny": {},  # 28.3
    "dinat_s_small": _DEEP,  # 49.6
    "dinat_s_base": _DEEP | {"dim": 128, "num_heads": (4, 8, 16, 32)},  # 87.8
    "dinat_s_large": _DEEP | {"dim": 192, "num_heads": (6, 12, 24, 48)},  # 196.5
    "dinat_s_micro": {
        "dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window": 3,
        "dilations": ((1, 2), (1,), (1,), (1,)),
    },
}  # fmt: skip
_BASE: dict[str, Any] = {"dim": 768, "num_heads": 24}
ISOTROPIC: dict[str, dict[str, Any]] = {
    "nat_isotropic_small": {},  # 22.0
    "nat_isotropic_base": _BASE,  # 86.5
    "dinat_isotropic_small": {"dilations": (1, 2)},  # 22.0
    "dinat_isotropic_base": _BASE | {"dilations": (1, 2)},  # 86.5
    "vitrpb_small": {"window": 14},  # 22.1
    "vitrpb_base": _BASE | {"window": 14},  # 86.6
    "nat_isotropic_micro": {"dim": 32, "depth": 2, "num_heads": 2, "window": 3, "patch_size": 4},
}
default_cfgs: dict[str, Any] = {}
for _layouts in (SWIN_LIKE, ISOTROPIC):
    default_cfgs.update(
        size_cfgs(_layouts, first_conv="stages.0.downsample.proj", classifier="head")
        if _layouts is SWIN_LIKE
        else size_cfgs(_layouts, first_conv="stages.0.downsample.proj", classifier="head", pool_size=None)
    )
register(__name__, DiNATs, SWIN_LIKE, checkpoint_filter_fn)
register(__name__, NATIsotropic, ISOTROPIC, checkpoint_filter_fn, out_indices=(0,), flatten_sequential=True)
