"""Blurred queries: "Smoothed Energy Guidance", arXiv 2408.00760, q' = G_sigma * q over the token grid.

The Gaussian is applied as one small matrix per grid axis, in float32, so no layout change is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.checks import token_slice, wide_dtype

__all__ = ["MOST_SIGMA", "blur_queries"]

MOST_SIGMA = 10_000.0  # tokens: wider than any grid, and the blur is its mean to the last bit


def blur_queries(q: Tensor, grid: tuple[int, int], sigma: float, image: slice | None = None) -> Tensor:
    """Blur the queries over the token grid (arXiv 2408.00760); text queries stay as they are.

    Gaussian of ceil(6 sigma) rounded up to odd taps, reflect padding, continued for kernels wider than the
    grid; sigma = inf gives the mean, sigma = 0 the queries themselves.
    Shapes: q [B, H, N, D] with grid = (rows, columns) of the image tokens -> new q [B, H, N, D].
    Raises: ConfigError for a negative or NaN sigma, or a grid that does not hold the image tokens.
    """
    if not (0 <= sigma <= MOST_SIGMA or sigma == math.inf):
        raise ConfigError(
            f"sigma={sigma} was given; expected 0 (no blur) to {MOST_SIGMA:g} tokens, or inf (the mean query)."
        )
    rows = token_slice(slice(None) if image is None else image, q.shape[2], "image")
    if grid[0] * grid[1] != rows.stop - rows.start:
        raise ConfigError(
            f"grid={tuple(grid)} was given for {rows.stop - rows.start} image tokens; expected rows x "
            "columns to be that number. Pass image=slice(first, end) where text tokens share the sequence."
        )
    x = q[..., rows, :].to(wide_dtype(q.dtype))
    if math.isinf(sigma):
        x = x.mean(dim=2, keepdim=True).expand_as(x)
    elif sigma > 0:
        x = x.unflatten(2, tuple(grid))
        x = torch.einsum("yi,bhixd->bhyxd", _blur_matrix(grid[0], sigma, x), x)
        x = torch.einsum("xj,bhyjd->bhyxd", _blur_matrix(grid[1], sigma, x), x).flatten(2, 3)
    return torch.cat([q[..., : rows.start, :], x.to(q.dtype), q[..., rows.stop :, :]], dim=2)


def _blur_matrix(n: int, sigma: float, like: Tensor) -> Tensor:
    """Build the n x n matrix of a Gaussian blur along one grid axis; row sums are 1."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    taps = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    source = torch.arange(n, device=like.device)[:, None] + taps.long()
    # Mirror without repeating the edge; the modulus continues the mirror for kernels wider than the grid.
    period = max(1, 2 * (n - 1))
    source = source.remainder(period)
    source = torch.minimum(source, period - source) if n > 1 else source * 0
    matrix = torch.zeros(n, n, device=like.device, dtype=like.dtype)
    matrix.scatter_add_(1, source, (weights / weights.sum()).expand(n, size))
    return matrix
