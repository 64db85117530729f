"""Queries and keys that look like those of a video model's heads, made up: where each head looks is known.

`exact` gives logits that fall off with the distance along some axes exactly, by two channels an axis: right for
layouts, but its large channels are harder to round to 8 bits than any model's. `smooth` gives them by random features,
of sizes as models have: right for rounding and for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HEADS", "Reach", "exact", "smooth"]

Reach = tuple[float | None, float | None, float | None]

HEADS: dict[str, Reach] = {
    "frame": (0.6, None, None),
    "temporal": (None, 0.8, 0.8),
    "row": (None, 0.6, None),
    "column": (None, None, 0.6),
    "frame and row": (0.8, 1.0, None),
    "frame and column": (0.8, None, 1.0),
    "nearby": (1.0, 2.0, 2.0),
    "time and row": (None, 1.0, 4.0),
    "everywhere": (None, None, None),
}
"""How far a head looks along frames, rows and columns, in tokens; None is everywhere."""

_CONTENT = 0.8
"""Size of the channels that hold noise; their logits have a standard deviation of 0.64 where they are all there is."""
_PEAK = 9.0
"""Logit of a token at itself, in `smooth`."""


def exact(
    grid: tuple[int, int, int], reaches: Sequence[Reach], *, text: int = 0, width: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make heads whose logits are -(x - y)^2 / 2 s^2 along each axis they look along, up to a constant of the query.

    Args:
        grid: Frames, rows and columns of the image tokens.
        reaches: s of every head along each axis; None looks everywhere along it.
        text: Text tokens, which stand first; each image token gives them 15 % of its attention, on average.
        width: Channels of a head.
        seed: Of the noise in what is left of the channels, and in the values.

    Returns:
        Queries, keys and values, float32 [1, heads, text + image tokens, width].
    """
    g, place, lift = torch.Generator().manual_seed(seed), _places(grid), width**0.25
    heads = []
    for reach in reaches:
        q, k = (_CONTENT * torch.randn(len(place), width, generator=g) for _ in range(2))
        channel = 0
        for axis, sigma in enumerate(reach):
            if sigma is None:
                continue
            x = place[:, axis]
            q[:, channel], k[:, channel] = lift * x / sigma, lift * x / sigma
            q[:, channel + 1], k[:, channel + 1] = lift, -lift * x**2 / (2 * sigma**2)
            channel += 2
        heads.append((q, k, channel))
    return _joined(heads, text, width, g)


def smooth(
    grid: tuple[int, int, int], reaches: Sequence[Reach], *, text: int = 0, width: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make heads whose logits are about 9 exp(-d^2 / 2 s^2): cosines and sines of random waves, alike in both.

    Three quarters of the channels hold them ("Random Features for Large-Scale Kernel Machines", NeurIPS 2007).
    Args and returns: as in `exact`.
    """
    g, place = torch.Generator().manual_seed(seed), _places(grid)
    waves = 3 * width // 8
    heads = []
    for reach in reaches:
        q, k = (_CONTENT * torch.randn(len(place), width, generator=g) for _ in range(2))
        if any(sigma is not None for sigma in reach):
            inverse = torch.tensor([0.0 if sigma is None else 1 / sigma for sigma in reach])
            angle = place @ (torch.randn(waves, 3, generator=g) * inverse).T
            size = math.sqrt(_PEAK * math.sqrt(width) / waves)
            q[:, : 2 * waves] = k[:, : 2 * waves] = size * torch.cat([angle.cos(), angle.sin()], 1)
        heads.append((q, k, 2 * waves))
    return _joined(heads, text, width, g)


def _places(grid: tuple[int, int, int]) -> Tensor:
    """Return frame, row and column of every token, centred, [tokens, 3]."""
    axes = (torch.arange(float(m)) - (m - 1) / 2 for m in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _joined(
    heads: list[tuple[Tensor, Tensor, int]], text: int, width: int, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Put text tokens in front of every head's, and draw values."""
    parts = [_with_text(q, k, channel, text, g) for q, k, channel in heads] if text else [(q, k) for q, k, _ in heads]
    q, k = (torch.stack(side)[None] for side in zip(*parts, strict=True))
    return q, k, torch.randn(1, len(parts), q.shape[2], width, generator=g)


def _with_text(q: Tensor, k: Tensor, channel: int, text: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give the first free channel to the text: image queries hold a constant there, keys of the text another."""
    words = [_CONTENT * torch.randn(text, q.shape[1], generator=g) for _ in range(2)]
    for x in words:
        x[:, :channel] = 0
    lift = q.shape[1] ** 0.25
    q[:, channel], k[:, channel], words[0][:, channel], words[1][:, channel] = lift, 0, 0, 0
    scale = q.shape[1] ** -0.5
    apart = (q @ words[1].T * scale).logsumexp(1) - (q @ k.T * scale).logsumexp(1)
    low, high = -30.0, 60.0
    for _ in range(40):
        logit = (low + high) / 2
        low, high = (logit, high) if float((apart + logit).sigmoid().mean()) < 0.15 else (low, logit)
    words[1][:, channel] = lift * logit
    return torch.cat([words[0], q]), torch.cat([words[1], k])
