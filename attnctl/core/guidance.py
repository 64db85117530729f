"""Extra guidance passes: replay what is shared, run the rest perturbed, add the difference to the prediction.

For every guidance branch the denoiser runs once more on the prompt rows, with some attention (or some blocks)
perturbed, giving p. With c the unperturbed prediction of the same rows, delta = w (c - p) is added to the prompt and
to the negative prediction; classifier-free guidance u + s (c - u) is affine, so the sum receives exactly delta.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.hosts.arguments import Rows
from attnctl.core.sites import Site

__all__ = ["Branch", "added", "combine", "difference", "overridden", "scaled"]

BlockOverride = Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Branch:
    """One perturbed pass.

    Attributes:
        key: Two branches with equal keys perturb alike and share one pass.
        sites: Attention sites that `perturb` wraps.
        perturb: Outermost wrapper at those sites in the perturbed pass.
        blocks: Modules whose forward is replaced in the perturbed pass, each with the maker of its replacement.
        begin: Called before each perturbed pass, with the state of the call that it belongs to.
    """

    key: Any
    sites: tuple[Site, ...] = ()
    perturb: Wrapper | None = None
    blocks: Mapping[torch.nn.Module, BlockOverride] = field(default_factory=dict)
    begin: Callable[[CallState], None] | None = None

    @property
    def targets(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that this branch perturbs."""
        return tuple(s.module for s in self.sites if s.module is not None) + tuple(self.blocks)


def difference(c: Any, p: Any) -> Any:
    """Compute c - p in float32 (float64 stays), for tensors or lists of tensors."""
    if isinstance(c, (list, tuple)):
        return [difference(a, b) for a, b in zip(c, p, strict=True)]
    wide = torch.promote_types(c.dtype, torch.float32)
    return c.to(wide) - p.to(wide)


def scaled(delta: Any, weight: float) -> Any:
    """Multiply a difference by a guidance weight."""
    return [scaled(d, weight) for d in delta] if isinstance(delta, list) else delta * weight


def added(a: Any, b: Any) -> Any:
    """Add two differences; None counts as zero."""
    if a is None:
        return b
    return [added(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


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


@contextlib.contextmanager
def overridden(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of some modules for the length of one pass."""
    before: list[tuple[torch.nn.Module, Any, Any]] = []
    try:
        for module, forward in forwards.items():
            # A compiled module is called through its compiled forward: set that aside too.
            before.append((module, vars(module).get("forward", _MISSING), module._compiled_call_impl))
            module._compiled_call_impl = None
            module.forward = forward
        yield
    finally:
        for module, forward, compiled in reversed(before):
            if forward is _MISSING:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
            if compiled is not None:
                module._compiled_call_impl = compiled
            else:
                vars(module).pop("_compiled_call_impl", None)


_MISSING = object()
