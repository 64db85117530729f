"""Softmax-free attention: a Gaussian kernel between tokens, through landmarks and a Newton inverse.

"SOFT: Softmax-free Transformer with Linear Complexity" (arXiv 2110.11945), and its normalised form (arXiv 2207.03341).
"""

from typing import Any

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from attnctl.errors import ConfigError, require

__all__ = ["SoftmaxFreeAttention2d", "gaussian", "newton_inverse"]


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Compute exp(-|a_i - b_j|^2 / 2): a [..., N, D], b [..., M, D] -> [..., N, M]."""
    squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1, keepdim=True).transpose(-2, -1)
    return (-0.5 * (squares - 2 * a @ b.transpose(-2, -1)).clamp(min=0)).exp()


@register_notrace_function
def newton_inverse(a: Tensor, normed: bool = False, iterations: int = 20) -> Tensor:
    """Approximate the inverse of symmetric positive matrices [B, H, M, M] by V <- 2 V - V A V.

    Adds 0.01 to the diagonal; normed: adds nothing, takes one step size for the whole batch, and scales the result by
    the roots of the row sums. Gradients are those of the inverse that was found, not of the iterations.
    """
    largest = a.abs().sum(-1).amax(-1) ** 2
    start = 1.8 / largest[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    fixed = a
    if normed:
        start = (2 / largest.max()).reshape(1, 1, 1, 1)
        for _ in range(10):
            error = (eye - start * (a @ a)).abs().sum(-2).max()
            start = torch.where(error > 1.01, start / 2, start)
    else:
        fixed = a + 0.01 * eye
    matrix = fixed.detach()
    v = start.detach() * matrix
    for _ in range(iterations):
        v = 2 * v - v @ matrix @ v
    v = v - v @ (fixed - matrix) @ v  # the value of v, with the gradient of an inverse
    if normed:
        root = a.sum(-1).rsqrt()
        v = root[..., :, None] * v * root[..., None, :]
    return v


class _Landmarks(nn.Module):
    """What a head shares: landmarks of its queries, and a convolution of its values."""

    def __init__(self, heads: int, d: int, ratio: int, kernel: int, **dd: Any) -> None:
        super().__init__()
        self.Qlandmark_op = nn.Conv2d(d, d, ratio, ratio, bias=False, **dd)
        self.Qnorm_act = nn.Sequential(nn.LayerNorm(d, **dd), nn.GELU())
        self.conv = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False, **dd)


@register_notrace_module
class SoftmaxFreeAttention2d(nn.Module):
    """Softmax-free attention of maps [B, H, W, C]; keys are the queries.

    ratio: sides of the patches that landmarks are made of. kernel: of the depthwise convolution over heads. normed: the
    normalised form, whose output depends weakly on the other images of a batch.
    Raises: ConfigError for heads that do not divide.
    """

    def __init__(
        self, dim: int, num_heads: int, ratio: int, kernel: int, normed: bool = False, iterations: int = 20, **dd: Any
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        self.num_heads, self.normed, self.iterations = num_heads, normed, iterations
        self.W_q, self.W_v, self.ff = (nn.Linear(dim, dim, **dd) for _ in range(3))
        self.attn = _Landmarks(num_heads, dim // num_heads, ratio, kernel, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        b, h, w, c = x.shape
        m, d = self.num_heads, c // self.num_heads
        q = (self.W_q(x) / d**0.25).reshape(b, h * w, m, d).transpose(1, 2)
        v = self.W_v(x).reshape(b, h * w, m, d).transpose(1, 2)
        marks = self.attn.Qlandmark_op(q.transpose(2, 3).reshape(b * m, d, h, w))
        marks = self.attn.Qnorm_act(marks.flatten(2).transpose(1, 2)).reshape(b, m, -1, d)
        near = gaussian(q.float(), marks.float())  # [B, H, N, landmarks]
        inverse = newton_inverse(gaussian(marks.float(), marks.float()), self.normed, self.iterations)
        out = (near @ (inverse @ (near.transpose(-2, -1) @ v.float()))).to(v.dtype)
        maps = v.permute(0, 3, 1, 2).reshape(b * d, m, h, w)
        out = out + self.attn.conv(maps).reshape(b, d, m, h * w).permute(0, 2, 3, 1)
        return self.ff(out.transpose(1, 2).reshape(b, h, w, c))
