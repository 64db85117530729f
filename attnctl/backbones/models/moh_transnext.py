"""MoH-TransNeXt: the pyramid of TransNeXt whose tokens choose their heads.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), "TransNeXt" (arXiv 2311.17132). The load
balance of a training step is `attnctl.backbones.mixers.moh.balance(model)`.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.blocks import Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.backbones.modules.transnext import AggregatedAttention2d, CosineAttention2d

__all__ = ["MoHTransNeXt", "TransNeXtBlock"]


class ConvolutionalGLU(nn.Module):
    """A gated perceptron: gelu(depthwise 3 x 3 of one half) times the other half: [B, H, W, C] -> the same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the perceptron."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * value)


class TransNeXtBlock(nn.Module):
    """Attention and a gated perceptron, each behind a norm and added: [B, H, W, C] -> the same.

    sr_ratio: how much the pooled keys are pooled; 1 for attention over the whole map. shared, topk: as in `HeadGates`.
    """

    def __init__(
        self, dim: int, heads: int, shared: int, topk: int, sr_ratio: int, mlp_ratio: float, drop_path: float = 0.0,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = (
            CosineAttention2d(dim, heads, shared, topk, **dd)
            if sr_ratio == 1
            else AggregatedAttention2d(dim, heads, shared, topk, sr_ratio, **dd)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvolutionalGLU(dim, int(2 * int(dim * mlp_ratio) / 3), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, after, kernel, stride, kernel // 2, **dd)
        self.norm = nn.LayerNorm(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class MoHTransNeXt(Pyramid):
    """MoH-TransNeXt with timm's interface.

    `dims`, `depths`, `num_heads`, `mlp_ratios` and `sr_ratios` are per stage. `shared` counts the heads that every
    token takes, `topk` the routed heads that a token takes: 0 where all of the stage's heads are shared.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (72, 144, 288, 576),
        depths: tuple[int, ...] = (5, 5, 22, 5),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        shared: tuple[int, ...] = (3, 6, 3, 4),
        topk: tuple[int, ...] = (0, 0, 6, 12),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        n = len(dims)
        exactly(n, dims=dims, depths=depths, num_heads=num_heads, shared=shared, topk=topk)
        exactly(n, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            blocks: list[nn.Module] = [
                TransNeXtBlock(c, num_heads[i], shared[i], topk[i], sr_ratios[i], mlp_ratios[i], next(rates), **dd)
                for _ in range(depths[i])
            ]
            blocks.append(nn.LayerNorm(c, eps=1e-6, **dd))
            step = _Patches(dims[i - 1], c, 3, 2, **dd) if i else _Patches(common.get("in_chans", 3), c, 7, 4, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, nn.Identity(), **common)
        self.apply(init_linear)


_GATES = {"wg.": "gates.route.", "wg_0.": "gates.split.", "wg_1.": "gates.share."}


def checkpoint_filter_fn(state: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints; tables of offsets are computed here."""
    out = {}
    for key, value in take_state(state).items():
        name, _, rest = key.partition(".")
        kind, stage = name[:-1], int(name[-1]) - 1 if name[-1:].isdigit() else -1
        if "relative_pos_index" in key or "relative_coords_table" in key or "local_seq_length" in key:
            continue
        if stage >= 0 and kind == "patch_embed":
            key = f"stages.{stage}.downsample.{rest}"
        elif stage >= 0 and kind == "norm":
            depth = len(model.stages[stage].blocks) - 1
            key = f"stages.{stage}.blocks.{depth}.{rest}"
        elif stage >= 0 and kind == "block":
            for theirs, gate in _GATES.items():
                rest = rest.replace(f"attn.{theirs}", f"attn.{gate}")
            key = f"stages.{stage}.blocks.{rest.replace('dwconv.dwconv.', 'dwconv.')}"
        out[key] = value
    return load_filter(out, model)


_BASE: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32)}
LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "moh_transnext_small_75": {},  # 49.9, 10.4
    "moh_transnext_small_80": {"shared": (3, 6, 3, 8)},  # 49.9, 10.4
    "moh_transnext_base_75": _BASE | {"shared": (4, 8, 4, 5), "topk": (0, 0, 8, 16)},  # 90.0, 18.4
    "moh_transnext_base_50": _BASE | {"shared": (2, 2, 2, 4), "topk": (2, 4, 6, 8)},  # 90.0, 18.4
    "moh_transnext_micro": {
        "dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 3, 4), "shared": (2, 2, 2, 1),
        "topk": (0, 0, 1, 2), "mlp_ratios": (3.0, 3.0, 3.0, 3.0), "sr_ratios": (4, 2, 1, 1),
    },
}  # fmt: skip
default_cfgs = size_cfgs(LAYOUTS, first_conv="stages.0.downsample.proj", classifier="head")
register(__name__, MoHTransNeXt, LAYOUTS, checkpoint_filter_fn)
