"""Attention sinks among the tokens of a text: which tokens they are, and their attention given to the others."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_sinks", "without_sinks"]


def find_sinks(maps: Tensor, times: float, spared: Tensor | None = None) -> Tensor:
    """Find the tokens that receive attention from everywhere, far more than the usual token.

    Args:
        maps: How much each place of the image attends to each token, [T, N].
        times: A token is a sink where its mean over the image is more than so many times the median of all tokens.
        spared: Tokens that are no sinks whatever they receive, bool [T].

    Returns:
        Whether each token is a sink, bool [T].
    """
    means = maps.mean(-1)
    sinks = means > times * means.median()
    return sinks if spared is None else sinks & ~spared


def without_sinks(maps: Tensor, sinks: Tensor) -> Tensor:
    """Give the attention of sinks to all other keys, in proportion: p_t / (1 - the sum of p over the sinks).

    This is the softmax without the columns of the sinks. Shapes: maps [T, N], sinks bool [T] -> [T, N], in which the
    sinks themselves are 0.
    """
    rest = (1 - maps[sinks].sum(0)).clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(sinks[:, None], torch.zeros_like(maps), maps / rest)
