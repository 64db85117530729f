"""Gates for maps and tokens: polarized and subspace attention, Gaussian adaptive attention, NiNformer's block.

"Polarized Self-Attention" (arXiv 2107.00782), "ULSAM" (arXiv 2006.15102), "Gaussian Adaptive Attention" (arXiv
2401.11143), "NiNformer" (arXiv 2403.02411). The first two go behind a stage of a convolutional network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.errors import ConfigError, require

__all__ = ["ULSAM", "GaussianAttention", "NiNformerBlock", "PolarizedAttention"]


class PolarizedAttention(nn.Module):
    """Polarized self-attention of maps [B, C, H, W]: a gate over channels and a gate over places.

    sequential: the second gate acts on what the first gave, as the release's PSA_s; otherwise both results are added,
    as PSA_p. C is even, a multiple of 8 for the sequential form. Raises: ConfigError.
    """

    def __init__(self, dim: int, sequential: bool = False, **dd: Any) -> None:
        super().__init__()
        divisor = 8 if sequential else 2
        require(dim % divisor == 0, ConfigError, f"dim={dim} was given; expected a multiple of {divisor}.")
        half = dim // 2
        self.sequential = sequential
        self.conv_q_right = nn.Conv2d(dim, 1, 1, bias=False, **dd)
        self.conv_v_right, self.conv_q_left, self.conv_v_left = (
            nn.Conv2d(dim, half, 1, bias=False, **dd) for _ in range(3)
        )
        self.conv_up: nn.Module = nn.Conv2d(half, dim, 1, bias=False, **dd)
        if sequential:
            self.conv_up = nn.Sequential(
                nn.Conv2d(half, half // 4, 1, **dd), nn.LayerNorm([half // 4, 1, 1], **dd), nn.ReLU(),
                nn.Conv2d(half // 4, dim, 1, **dd),
            )  # fmt: skip
        for conv in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(conv.weight)

    def _channels(self, x: Tensor) -> Tensor:
        weights = self.conv_q_right(x).flatten(2).softmax(dim=-1)  # [B, 1, H * W]
        z = self.conv_v_right(x).flatten(2) @ weights.transpose(1, 2)
        return x * self.conv_up(z.unsqueeze(-1)).sigmoid()

    def _places(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        mean = self.conv_q_left(x).mean(dim=(2, 3)).unsqueeze(1)  # [B, 1, C / 2]
        values = self.conv_v_left(x).flatten(2)
        gate = mean @ values.softmax(dim=-1) if self.sequential else (mean @ values).softmax(dim=-1)
        return x * gate.sigmoid().reshape(b, 1, h, w)

    def forward(self, x: Tensor) -> Tensor:
        """Gate a map."""
        if self.sequential:
            return self._places(self._channels(x))
        return self._places(x) + self._channels(x)


class _Subspace(nn.Module):
    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.bn_dws = nn.BatchNorm2d(dim, **dd)
        self.conv_point = nn.Conv2d(dim, 1, 1, **dd)
        self.bn_point = nn.BatchNorm2d(1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, 1, 1)
        y = F.relu(self.bn_point(self.conv_point(y)))
        return x + x * y.flatten(2).softmax(dim=-1).reshape(y.shape)


class ULSAM(nn.Module):
    """Subspace attention of maps [B, C, H, W]: each group of channels is weighed by a map of its own, and added.

    groups: divides C. Raises: ConfigError.
    """

    def __init__(self, dim: int, groups: int = 4, **dd: Any) -> None:
        super().__init__()
        require(groups >= 1 and dim % groups == 0, ConfigError, f"groups={groups} was given; it must divide dim={dim}.")
        self.subspaces = nn.ModuleList(_Subspace(dim // groups, **dd) for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        """Weigh a map."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([space(part) for space, part in zip(self.subspaces, parts, strict=True)], dim=1)


class GaussianAttention(nn.Module):
    """Weigh entries along an axis by a product of Gaussian densities of their standard score; weights sum to one.

    gaussians: how many; each has a learned offset of the mean and a width. axis: along which entries compete.
    """

    def __init__(self, gaussians: int = 3, axis: int = -1, **dd: Any) -> None:
        super().__init__()
        self.axis = axis
        self.mean_offsets = nn.Parameter(torch.zeros(gaussians, **dd))
        self.c = nn.Parameter(torch.exp(torch.randn(gaussians, **dd)))

    def weights(self, x: Tensor) -> Tensor:
        """Compute the weights, of the shape of x."""
        mean = x.mean(dim=self.axis, keepdim=True)
        deviation = (x.var(dim=self.axis, keepdim=True) + 1e-8).sqrt()
        score = (x - mean).unsqueeze(0) - self.mean_offsets.reshape(-1, *[1] * x.ndim)
        score = score / deviation.unsqueeze(0)
        c = self.c.reshape(-1, *[1] * x.ndim)
        density = (-(score**2) / (2 * c**2)).exp() / (2 * torch.pi * c**2).sqrt()
        product = density.prod(dim=0)
        return product / product.sum(dim=self.axis, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh x."""
        return x * self.weights(x)


def _perceptron(dim: int, hidden: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden, **dd), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim, **dd))


class NiNformerBlock(nn.Module):
    """A block of tokens [B, N, C], N fixed: a token mixer gates a linear layer; gate and perceptron share a norm."""

    def __init__(self, dim: int, hidden: int, tokens: int, **dd: Any) -> None:
        super().__init__()
        self.norm, self.token_norm, self.channel_norm = (nn.LayerNorm(dim, **dd) for _ in range(3))
        self.proj = nn.Linear(dim, dim, **dd)
        self.token_mix, self.channel_mix = _perceptron(tokens, hidden, **dd), _perceptron(dim, hidden, **dd)
        self.ffn = _perceptron(dim, hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        u = self.norm(x)
        mixed = u + self.token_mix(self.token_norm(u).transpose(1, 2)).transpose(1, 2)
        mixed = mixed + self.channel_mix(self.channel_norm(mixed))
        x = x + self.proj(u) * mixed
        return x + self.ffn(self.norm(x))
