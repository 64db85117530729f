"""Context mixing: every place weighs the window around it with kernels made of its affinity to 7 x 7 region centres.

"OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (arXiv 2502.20087), the
block that the authors release to be plugged in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.errors import ConfigError, require

__all__ = ["ContMixBlock", "window_places"]

_CENTRES = 7


def window_places(length: int, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """List the places of each place's window along an axis, moved inwards at the borders.

    Returns the places [length, size], and how far each lies from its place, from 0 to 2 size - 2.
    """
    at = torch.arange(length, device=device)
    start = (at - size // 2).clamp(0, length - size)
    places = start[:, None] + torch.arange(size, device=device)
    return places, places - at[:, None] + size - 1


def _mix(weights: Tensor, values: Tensor, size: int, bias: Tensor) -> Tensor:
    """Sum windows of values [B, G, D, H, W] by a softmax of weights [B, G, size * size, H, W] plus a bias."""
    h, w = values.shape[-2:]
    rows, row_apart = window_places(h, size, values.device)
    columns, column_apart = window_places(w, size, values.device)
    near = bias[:, row_apart[:, None, :, None], column_apart[None, :, None, :]]  # [G, H, W, size, size]
    logits = weights.permute(0, 1, 3, 4, 2) + near.flatten(-2)
    windows = values[..., rows[:, None, :, None], columns[None, :, None, :]].flatten(-2)  # [B, G, D, H, W, size^2]
    return torch.einsum("bghwk,bgdhwk->bgdhw", logits.softmax(-1), windows)


class _Norm(nn.LayerNorm):
    """A layer norm over the channels of maps [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Scale(nn.Module):
    """A learned factor and offset per channel of maps [B, C, H, W]."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((dim, 1, 1, 1), start)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class _DilatedKernels(nn.Module):
    """A large depthwise kernel, and small dilated ones beside it, each behind a batch norm of its own, added up."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.lk_origin, self.origin_bn = _depthwise(dim, size, 1), nn.BatchNorm2d(dim)
        self.names: list[str] = []
        for kernel, dilation in _BESIDE[size]:
            name = f"k{kernel}_{dilation}"
            self.add_module(f"dil_conv_{name}", _depthwise(dim, kernel, dilation))
            self.add_module(f"dil_bn_{name}", nn.BatchNorm2d(dim))
            self.names.append(name)

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(x))
        for name in self.names:
            out = out + self.get_submodule(f"dil_bn_{name}")(self.get_submodule(f"dil_conv_{name}")(x))
        return out


def _depthwise(dim: int, size: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, size, padding=dilation * (size // 2), dilation=dilation, groups=dim, bias=False)


# Kernel -> the (kernel, dilation) of those beside it; the block's own 7 is what has been compared.
_BESIDE: dict[int, tuple[tuple[int, int], ...]] = {7: ((5, 1), (3, 1), (3, 2), (3, 3))}


class _Squeeze(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 8, 16)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class _AddedDepthwise(nn.Conv2d):
    """A depthwise 3 x 3 convolution, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _ResponseNorm(nn.Module):
    """Divide each channel's length over the map by the channels' mean length: maps [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, dim, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.gamma * (x * (length / (length.mean(1, keepdim=True) + 1e-6))) + self.beta


def _normed(before: int, after: int, *first: nn.Module) -> nn.Sequential:
    return nn.Sequential(*first, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))


class ContMixBlock(nn.Module):
    """A block of context mixing and a convolutional perceptron: maps [B, C, H, W] -> the same, of any size.

    Args:
        dim: channels. kernel: side of the large kernel, 7. small: of the small one. num_heads: each has a group of
            channels for either kernel. mlp_ratio: hidden channels over channels. init_values: start of the factors on
            the block's input.

    Raises: ConfigError for heads that do not divide, and another large kernel.
    """

    def __init__(
        self, dim: int, kernel: int = 7, small: int = 5, num_heads: int = 2, mlp_ratio: float = 4.0,
        init_values: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        groups = 2 * num_heads
        require(
            dim % (2 * groups) == 0, ConfigError, f"num_heads={num_heads} was given; 4 of it must divide dim={dim}."
        )
        require(
            kernel in _BESIDE,
            ConfigError,
            f"kernel={kernel} was given; expected one of {', '.join(map(str, _BESIDE))}.",
        )
        self.kernel, self.small, self.groups, self.scale = kernel, small, groups, (dim / groups) ** -0.5
        self.rpb1, self.rpb2 = (nn.Parameter(torch.zeros(groups, 2 * s - 1, 2 * s - 1)) for s in (small, kernel))
        self.dwconv1 = _AddedDepthwise(dim)
        self.norm1 = _Norm(dim, eps=1e-6)
        self.weight_query = _normed(dim, dim // 2)
        self.weight_key = _normed(dim, dim // 2, nn.AdaptiveAvgPool2d(_CENTRES))
        self.weight_value = _normed(dim, dim)
        self.weight_proj = nn.Conv2d(_CENTRES**2, kernel**2 + small**2, 1)
        self.fusion_proj = _normed(dim, dim)
        self.lepe = nn.Sequential(_DilatedKernels(dim, kernel), nn.BatchNorm2d(dim))
        self.se_layer = _Squeeze(dim)
        self.gate = nn.Sequential(*_normed(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))
        self.dwconv2 = _AddedDepthwise(dim)
        self.norm2 = _Norm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1), nn.GELU(), _AddedDepthwise(hidden), _ResponseNorm(hidden),
            nn.Conv2d(hidden, dim, 1),
        )  # fmt: skip
        self.ls1, self.ls2 = _Scale(dim, init_values), _Scale(dim, init_values)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of both kernels of every place: [B, C, H, W] -> [B, G, side * side, H, W] each."""
        h, w = x.shape[-2:]
        q = (self.weight_query(x) * self.scale).flatten(2).unflatten(1, (self.groups, -1))
        k = self.weight_key(x).flatten(2).unflatten(1, (self.groups, -1))
        affinity = (q.transpose(-2, -1) @ k).permute(0, 1, 3, 2).flatten(0, 1).unflatten(2, (h, w))
        logits = self.weight_proj(affinity).unflatten(0, (-1, self.groups))
        return logits[:, :, : self.small**2], logits[:, :, self.small**2 :]

    def mix(self, x: Tensor) -> Tensor:
        """Mix places with both kernels, half of the channels each."""
        small, large = self.kernels(x)
        first, second = (y.unflatten(1, (self.groups, -1)) for y in self.weight_value(x).chunk(2, dim=1))
        mixed = _mix(small, first, self.small, self.rpb1), _mix(large, second, self.kernel, self.rpb2)
        return self.fusion_proj(torch.cat([y.flatten(1, 2) for y in mixed], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = self.dwconv1(x)
        size = x.shape[-2:]
        n = self.norm1(x)
        gate, lepe = self.gate(n), self.lepe(n)
        least = min(size)
        larger = (
            (self.kernel * size[0] // least, self.kernel * size[1] // least) if least < self.kernel else tuple(size)
        )
        if larger != size:
            n = F.interpolate(n, larger, mode="bilinear", align_corners=False)
        mixed = self.mix(n)
        if larger != size:
            mixed = F.adaptive_avg_pool2d(mixed, (size[0], size[1]))
        x = self.ls1(x) + self.proj(self.se_layer(mixed + lepe) * gate)
        x = self.dwconv2(x)
        return self.ls2(x) + self.mlp(self.norm2(x))
