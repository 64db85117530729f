"""Why the attention of some of timm's classes cannot be read, told by class name."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["refusal_of"]

_CHANNELS = "weighs channels against each other, so no map over places exists"
_SUMMARY = "sums the keys up before queries meet them, so no weight belongs to a pair of places"
_REASONS: dict[str, str] = {
    "XCA": _CHANNELS,
    "CrossCovarianceAttn": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
    "LinearSelfAttention": _SUMMARY,
    "EfficientAdditiveAttention": _SUMMARY,
    "MultiScaleAttentionPoolFirst": "does not run in timm 1.0.31",
    "BilinearAttnTransform": "attends to rows and columns of one channel group at a time",
    "NonLocalAttn": "has one head over a map of another size",
    "SpatialAttention": "gates places, which weighs no tokens against each other",
    "AggregatedAttention2d": "takes values of neighbours and of a pooled map in one softmax",
    "SoftmaxFreeAttention2d": "reaches its keys through landmarks",
    "LambdaLayer": _SUMMARY,
}
_ATTENTION = re.compile(r"attention|attn|MHSA", re.IGNORECASE)


def refusal_of(model: nn.Module) -> str:
    """Say which attention was found in a model that cannot be read, and why as far as it is known here."""
    names = list(dict.fromkeys(type(m).__name__ for m in model.modules()))
    reasons = [f"{name} {_REASONS[name]}" for name in names if name in _REASONS]
    others = [n for n in names if n not in _REASONS and _ATTENTION.search(n) and not n.endswith(("Block", "Stage"))]
    if others:
        reasons.append(f"how {', '.join(others)} lay{'s' if len(others) == 1 else ''} out places is not known here")
    return f"Found here: {'; '.join(reasons)}." if reasons else "It has no attention."
