"""Sharpening word maps by the image's own attention: places that look at each other share their words.

    A' = S^k A        S: self-attention of the same block, its heads averaged; A: one map a column

As IR-Diffusion (arXiv 2411.19261) finds the places of subjects, from powers of self-attention times cross-attention. In
joint attention S is the image's part of the same map, its rows made to sum to 1. S is applied to all maps at once as
attention whose values they are, so that no N by N tensor is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.sites import Grid, Site
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels.maps import SelfMap
from attnctl.processors.capture.fields import CaptureFields
from attnctl.processors.capture.recorder import Recorder

__all__ = ["RefiningRecorder", "partners", "refined"]


def refined(maps: Tensor, self_map: SelfMap, times: int) -> Tensor:
    """Apply self-attention to maps `times` times: S^k A, in float32.

    Shapes: maps [B, H, N, C] (H heads of the text attention, not mixed) -> the same. Values stay within the range of
    each map, and a constant map stays constant.

    Raises:
        ConfigError: The self-attention has another number of tokens.
    """
    batch, heads, n, words = maps.shape
    if self_map.q.shape[2] != n or self_map.q.shape[0] != batch:
        raise ConfigError(
            f"maps of {batch} x {n} tokens cannot be refined by self-attention of {self_map.q.shape[0]} x "
            f"{self_map.q.shape[2]} tokens."
        )
    values = maps.permute(0, 2, 1, 3).flatten(2)
    for _ in range(times):
        values = self_map.of(values)
    return values.unflatten(2, (heads, words)).permute(0, 2, 1, 3)


def partners(chosen: Sequence[Site], sites: Sequence[Site], what: str = "Capture") -> dict[str, Site]:
    """Find for each cross-attention site the self-attention of its block, which runs before it.

    Raises:
        SiteError: A block has none.
    """
    by_site: dict[str, Site] = {}
    for site in chosen:
        if site.kind != "cross":
            continue
        block = site.name.rpartition(".")[0]
        candidates: list[Any] = [
            s for s in sites if s.kind == "self" and s.name.rpartition(".")[0] == block and s.depth < site.depth
        ]
        if not candidates:
            use = "so its maps cannot be refined" if what == "Capture" else "which its loss asks for"
            cure = ", or refine=0" if what == "Capture" else ""
            raise SiteError(
                f"{what}: the block of {site.name} has no self-attention before it, {use}. Choose other sites{cure}."
            )
        by_site[site.name] = candidates[-1]
    return by_site


class RefiningRecorder(Recorder):
    """Collects word maps, each refined by the self-attention of its block."""

    def __init__(self, capture: CaptureFields, sites: Sequence[Site], pipe: Any) -> None:
        text = [s for s in sites if s.kind in capture.kinds]
        self.before_text = {name: s.name for name, s in partners(text, sites).items()}
        super().__init__(capture, text, pipe)

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Note a self-attention, or record the maps of a text attention."""
        if call.site.kind != "self":
            return super().wrap(call, proceed)
        out = proceed(call)
        rows = self._rows(call.state.rows)
        if rows is not None and call.state.phase == "base" and call.index == 0:
            part = call.rows(rows)
            # Until the block's cross-attention, which comes next, takes it.
            call.state.scratch[id(self), call.site.name] = part.with_(q=part.q.detach(), k=part.k.detach()).self_map()
        return out

    def _probabilities(self, call: AttnCall, rows: slice) -> tuple[Tensor, int, Grid]:
        maps, m, grid = super()._probabilities(call, rows)
        if call.site.kind != "cross":
            return refined(maps, call.rows(rows).self_map(), self.capture.refine), m, grid
        self_map = call.state.scratch.pop((id(self), self.before_text[call.site.name]), None)
        if self_map is None:
            raise UnsupportedModelError(
                f"Capture: {self.before_text[call.site.name]} did not run before {call.site.name}, so its maps "
                "cannot be refined. A cache that skips blocks does that: switch it off, or set refine=0."
            )
        return refined(maps, self_map, self.capture.refine), m, grid
