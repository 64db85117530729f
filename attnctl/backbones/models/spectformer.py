"""SpectFormer: filters in the frequency domain first, softmax attention behind them.

"SpectFormer: Frequency and Attention is what you need in a Vision Transformer" (arXiv 2304.06446). The plain form is
timm's vision transformer with filters in its first blocks; the pyramid ends in class attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from attnctl.backbones.models.agent_pvt import ReducedAttention
from attnctl.backbones.models.config import exactly, load_filter, register, size_cfgs
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.blocks import FeedForward, Pyramid, Stage, drop_rates, init_linear, take_state
from attnctl.errors import ConfigError

__all__ = ["ClassBlock", "SpectFormer", "SpectralBlock", "SpectralGate", "SpectralVisionTransformer"]


@register_notrace_module
class SpectralGate(nn.Module):
    """Multiply a map's frequencies by learned complex weights: [B, H, W, C] -> the same; float32 inside.

    grid: (height, width) that the weights are learned for; other maps resize them bilinearly, as no release does.
    """

    def __init__(self, dim: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2, **dd) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map."""
        h, w = x.shape[1], x.shape[2]
        weight = self.complex_weight.float()
        if weight.shape[0] != h or weight.shape[1] != w // 2 + 1:
            rows, columns, c, _ = weight.shape
            flat = weight.reshape(1, rows, columns, 2 * c).permute(0, 3, 1, 2)
            flat = F.interpolate(flat, [h, w // 2 + 1], mode="bilinear", align_corners=True)
            weight = flat.permute(0, 2, 3, 1).reshape(h, w // 2 + 1, c, 2)
        spectrum = torch.fft.rfft2(x.float(), dim=[1, 2], norm="ortho") * torch.view_as_complex(weight.contiguous())
        return torch.fft.irfft2(spectrum, s=[h, w], dim=[1, 2], norm="ortho").to(x.dtype)


class _TokenGate(nn.Module):
    """A block of the plain form: x + mlp(norm2(filter(norm1(x)))), one residual for both."""

    def __init__(self, block: Any, dim: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.grid = grid
        self.norm1, self.norm2, self.mlp, self.drop_path2 = block.norm1, block.norm2, block.mlp, block.drop_path2
        self.filter = SpectralGate(dim, grid, **dd)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y = self.filter(self.norm1(x).unflatten(1, self.grid)).flatten(1, 2)
        return x + self.drop_path2(self.mlp(self.norm2(y)))


class SpectralVisionTransformer(VisionTransformer):
    """A vision transformer without class token whose first `spectral` blocks filter; the rest as timm's.

    Raises: ConfigError for more such blocks than there are, and for images of any size (dynamic_img_size).
    """

    def __init__(self, spectral: int = 4, **kwargs: Any) -> None:
        super().__init__(**({"class_token": False, "global_pool": "avg", "fc_norm": False} | kwargs))
        if not 0 <= spectral <= len(self.blocks):
            raise ConfigError(f"spectral={spectral} was given; expected 0 to {len(self.blocks)}, the number of blocks.")
        if kwargs.get("dynamic_img_size"):
            raise ConfigError("dynamic_img_size=True was given; filters are as large as the map. Give img_size.")
        grid = self.patch_embed.grid_size
        for i in range(spectral):
            self.blocks[i] = _TokenGate(
                self.blocks[i], self.embed_dim, grid, device=kwargs.get("device"), dtype=kwargs.get("dtype")
            )


class ConvFeedForward(nn.Module):
    """A perceptron with a depthwise 3 x 3 ahead of its activation: [B, H, W, C] -> the same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the perceptron."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class SpectralBlock(nn.Module):
    """A filter, or softmax attention without grid, and a perceptron, each behind a norm and added: [B, H, W, C]."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, grid: tuple[int, int] | None = None, drop_path: float = 0.0,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd), nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ReducedAttention(dim, heads, **dd) if grid is None else SpectralGate(dim, grid, **dd)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class ClassAttention(nn.Module):
    """What the first token takes of all tokens: [B, N, C] -> [B, 1, C]."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv, self.q, self.proj = (nn.Linear(dim, n * dim, **dd) for n in (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        b, n, c = x.shape
        m = self.num_heads
        kv = self.kv(x).reshape(b, n, 2, m, c // m).permute(2, 0, 3, 1, 4)
        q = self.q(x[:, :1]).reshape(b, 1, m, c // m).transpose(1, 2)
        return self.proj(attend(q, kv[0], kv[1]).transpose(1, 2).reshape(b, 1, c))


class ClassBlock(nn.Module):
    """Class attention and a perceptron of the class token: tokens [B, N, C], the class token first, -> the same."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, **dd: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd), nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ClassAttention(dim, heads, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        first = x[:, :1] + self.attn(self.norm1(x))
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], dim=1)


class _Stem(nn.Module):
    def __init__(self, before: int, hidden: int, after: int, **dd: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, width in enumerate((before, hidden, hidden)):
            kernel, stride = (3, 1) if i else (7, 2)
            layers += [nn.Conv2d(width, hidden, kernel, stride, kernel // 2, bias=False, **dd)]
            layers += [nn.BatchNorm2d(hidden, **dd), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, after, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class _Step(nn.Module):
    def __init__(self, before: int, after: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, after, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(after, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SpectFormer(Pyramid):
    """SpectFormer's pyramid with timm's interface: two stages of filters, two of softmax, class attention.

    The release's blocks are matched; the order of what follows the last stage (a mean token, class attention over all
    tokens, a norm, the head) is from memory, not checked. Its second head, over places, is there for its weights alone.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims: tuple[int, ...] = (64, 128, 320, 448),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_heads: tuple[int, ...] = (2, 4, 10, 14),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        stem: int = 32,
        spectral_stages: tuple[int, ...] = (0, 1),
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        exactly(4, dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        dd: dict[str, Any] = {"device": common.get("device"), "dtype": common.get("dtype")}
        grids = self.grids((img_size, img_size) if isinstance(img_size, int) else img_size)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        stages: list[nn.Module] = []
        for i, c in enumerate(dims):
            grid = grids[i] if i in spectral_stages else None
            blocks: list[nn.Module] = [
                SpectralBlock(c, num_heads[i], mlp_ratios[i], grid, next(rates), **dd) for _ in range(depths[i])
            ]
            if i < 3:
                blocks.append(nn.LayerNorm(c, eps=1e-6, **dd))
            step = _Step(dims[i - 1], c, **dd) if i else _Stem(common.get("in_chans", 3), stem, c, **dd)
            stages.append(Stage(step, blocks, channels_last=True))
        super().__init__(stages, dims, nn.Identity(), **common)
        self.post_network = nn.Sequential(ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1], **dd))
        self.final = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.aux_head = nn.Linear(dims[-1], self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()
        self.apply(init_linear)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Attend from a mean token, norm and classify: [B, C, h, w] -> [B, num_classes]."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.final(self.post_network(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)))
        x = self.head_drop(tokens[:, 0])
        if pre_logits:
            return x
        out = self.head(x)
        if self.num_classes > 0:
            out = out + 0.5 * self.aux_head(tokens[:, 1:]).amax(dim=1)
        return out

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classification layers."""
        super().reset_classifier(num_classes, global_pool)
        like = self.final.weight
        self.aux_head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )


def checkpoint_filter_fn(state: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Rename the keys of the authors' checkpoints."""
    state = take_state(state)
    if isinstance(model, SpectralVisionTransformer):
        return load_filter(vit_filter(state, model), model, resize=True)
    out = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        kind, stage = name[:-1], int(name[-1]) - 1 if name[-1:].isdigit() else -1
        if kind == "patch_embed":
            key = f"stages.{stage}.downsample.{rest}"
        elif kind == "block":
            key = f"stages.{stage}.blocks.{rest.replace('dwconv.dwconv.', 'dwconv.')}"
        elif kind == "norm" and stage >= 0:
            depth = len(model.stages[stage].blocks) - 1
            key = f"final.{rest}" if stage == 3 else f"stages.{stage}.blocks.{depth}.{rest}"
        out[key] = value
    return load_filter(out, model)


PLAIN: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "spectformer_vanilla_ti": {"embed_dim": 256, "depth": 12, "num_heads": 8},  # 9.2; the release's 6 heads do not fit
    "spectformer_vanilla_xs": {"embed_dim": 384, "depth": 12, "num_heads": 6},  # 20.0, 4.0
    "spectformer_vanilla_s": {"embed_dim": 384, "depth": 19, "num_heads": 6},  # 32.4, 6.6
    "spectformer_vanilla_b": {"embed_dim": 512, "depth": 19, "num_heads": 8},  # 57.2; as for ti
    "spectformer_vanilla_micro": {
        "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "spectral": 2,
    },
}  # fmt: skip
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "spectformer_s": {},  # 22.2, 4.1
    "spectformer_b": {"dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "num_heads": (2, 4, 10, 16), "stem": 64},
    "spectformer_l": {"dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3), "num_heads": (3, 6, 12, 16), "stem": 64},
    "spectformer_micro": {
        "img_size": 32, "dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "stem": 8,
        "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
    },
}  # fmt: skip
default_cfgs: dict[str, Any] = {
    **size_cfgs(PLAIN, first_conv="patch_embed.proj", classifier="head", fixed_input_size=True, pool_size=None),
    **size_cfgs(HIERARCHICAL, first_conv="stages.0.downsample.conv.0", classifier=("head", "aux_head")),
}
register(__name__, SpectralVisionTransformer, PLAIN, checkpoint_filter_fn, out_indices=3, feature_cls="getter")
register(__name__, SpectFormer, HIERARCHICAL, checkpoint_filter_fn)
