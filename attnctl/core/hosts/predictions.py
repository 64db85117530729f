"""Sums of predictions: a tensor [rows, ...] or, of some denoisers, a list with a tensor per row."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.core.hosts.arguments import Rows

__all__ = ["combine", "difference", "with_share"]


def difference(c: Any, p: Any) -> Any:
    """Compute c - p in float32 (float64 stays), for tensors or lists of tensors."""
    if isinstance(c, (list, tuple)):
        return [difference(a, b) for a, b in zip(c, p, strict=True)]
    wide = torch.promote_types(c.dtype, torch.float32)
    return c.to(wide) - p.to(wide)


def with_share(total: Any, delta: Any, weight: float) -> Any:
    """Compute total + weight * delta, for tensors or lists of tensors; a total of None counts as zero."""
    if isinstance(delta, list):
        return [with_share(*pair, weight) for pair in zip(total or [None] * len(delta), delta, strict=True)]
    return delta * weight if total is None else total + delta * weight


def combine(pred: Any, delta: Any, rows: Rows, rescale_safe: float | None) -> Any:
    """Add guidance to a prediction.

    Args:
        pred: Prediction of all rows of the call, a tensor [rows, ...] or a list with a tensor a row.
        delta: w (c - p) for the prompt rows, or for the negative rows' partners in a sequential pair.
        rows: Which rows are which.
        rescale_safe: None to add delta to every row. A CFG scale s to leave the prompt rows alone and take
            delta / (s - 1) off the negative ones: u + s (c - u) receives the same delta, and what the pipeline
            derives from c (guidance rescale) stays what it was.

    Returns:
        The guided prediction, in the dtype of `pred`.
    """
    if rows.role == "thirds":  # u + s (c - i) + t (i - u): what all three rows receive, the sum receives
        return _plus(pred, torch.cat([delta] * 3))
    if isinstance(pred, (list, tuple)):
        parts = list(pred)
        share = delta if rescale_safe is None else [d / (1 - rescale_safe) for d in delta]
        if rows.uncond is not None:
            for r, d in zip(range(rows.total)[rows.uncond], share, strict=True):
                parts[r] = _plus(parts[r], d)
        if rescale_safe is None:
            for r, d in zip(range(rows.total)[rows.cond], delta, strict=False):
                parts[r] = _plus(parts[r], d)
        return parts
    if rows.role == "both" and rows.uncond is not None:
        c, u = pred[rows.cond], pred[rows.uncond]
        u = _plus(u, delta if rescale_safe is None else delta / (1 - rescale_safe))
        c = _plus(c, delta) if rescale_safe is None else c
        return torch.cat([u, c] if rows.uncond.start == 0 else [c, u])
    if rescale_safe is None:
        return _plus(pred, delta)
    return _plus(pred, delta / (1 - rescale_safe)) if rows.role == "uncond" else pred


def _plus(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return (x.to(d.dtype) + d).to(x.dtype)
