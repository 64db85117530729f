"""Sharpening word maps by the image's own attention: places that look at each other share their words.

    A' = S^k A        S: self-attention of the same block, its heads averaged; A: one map a column

As IR-Diffusion (arXiv 2411.19261) finds the places of subjects, from powers of self-attention times cross-attention. In
joint attention S is the image's part of the same map, its rows made to sum to 1. S is applied to all maps at once as
attention whose values they are, so that no N by N tensor is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.linear import linear_attention
from attnctl.core.sites import Grid, Site
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels import columns
from attnctl.kernels.checks import rows_of
from attnctl.processors.capture.fields import CaptureFields
from attnctl.processors.capture.recorder import Recorder

__all__ = ["RefiningRecorder", "SelfAttention", "partners", "refined"]


@dataclass(frozen=True)
class SelfAttention:
    """One self-attention: q [B, H, N, D], k [B, Hk, N, D], its mask and scale, and whether it is linear."""

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    linear: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Attend once: [B, N, C] to [B, N, C], the mean over the heads."""
        if not self.linear:
            return columns(self.q, self.k, values, mask=self.mask, scale=self.scale).mean(1)
        spread = values.unsqueeze(1).expand(-1, self.q.shape[1], -1, -1)
        return linear_attention(self.q.float(), self.k.float(), spread).mean(1)


def refined(maps: Tensor, looks: SelfAttention, times: int) -> Tensor:
    """Apply self-attention to maps `times` times: S^k A, in float32.

    Shapes: maps [B, H, N, C] (H heads of the text attention, not mixed) -> the same. Values stay within the range of
    each map, and a constant map stays constant.

    Raises:
        ConfigError: The self-attention has another number of tokens.
    """
    batch, heads, n, words = maps.shape
    if looks.q.shape[2] != n or looks.q.shape[0] != batch:
        raise ConfigError(
            f"maps of {batch} x {n} tokens cannot be refined by self-attention of {looks.q.shape[0]} x "
            f"{looks.q.shape[2]} tokens."
        )
    values = maps.permute(0, 2, 1, 3).flatten(2)
    for _ in range(times):
        values = looks.of(values)
    return values.unflatten(2, (heads, words)).permute(0, 2, 1, 3)


def partners(chosen: Sequence[Site], sites: Sequence[Site], what: str = "Capture") -> dict[str, Site]:
    """Find for each cross-attention site the self-attention of its block, which runs before it.

    Raises:
        SiteError: A block has none.
    """
    found: dict[str, Site] = {}
    for site in chosen:
        if site.kind != "cross":
            continue
        block = site.name.rpartition(".")[0]
        own: list[Any] = [
            s for s in sites if s.kind == "self" and s.name.rpartition(".")[0] == block and s.depth < site.depth
        ]
        if not own:
            use = "so its maps cannot be refined" if what == "Capture" else "which its loss asks for"
            cure = ", or refine=0" if what == "Capture" else ""
            raise SiteError(
                f"{what}: the block of {site.name} has no self-attention before it, {use}. Choose other sites{cure}."
            )
        found[site.name] = own[-1]
    return found


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
            total = call.state.rows.total
            m = call.q.shape[0] // total
            cut = slice(rows.start * m, rows.stop * m)
            mask = call.mask
            if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
                mask = mask[cut]
            linear = call.kernel is linear_attention
            looks = SelfAttention(call.q[cut].detach(), call.k[cut].detach(), mask, call.scale, linear)
            call.state.scratch[id(self), call.site.name] = looks
        return out

    def _probabilities(self, call: AttnCall, rows: slice) -> tuple[Tensor, int, Grid]:
        maps, m, grid = super()._probabilities(call, rows)
        if call.site.kind == "cross":
            looks = call.state.scratch.pop((id(self), self.before_text[call.site.name]), None)
            if looks is None:
                raise UnsupportedModelError(
                    f"Capture: {self.before_text[call.site.name]} did not run before {call.site.name}, so its maps "
                    "cannot be refined. A cache that skips blocks does that: switch it off, or set refine=0."
                )
        else:
            image, _, _ = self._tokens(call)
            image, _ = self._image(call, image)
            total = call.state.rows.total
            cut = slice(rows.start * (call.q.shape[0] // total), rows.stop * (call.q.shape[0] // total))
            q, k, mask = call.q[cut][:, :, image], call.k[cut][:, :, image], call.mask
            if mask is not None:
                mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
                mask = rows_of(mask[cut] if mask.shape[0] > 1 else mask, image)
                mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., image]
            looks = SelfAttention(q, k, mask, call.scale)
        return refined(maps, looks, self.capture.refine), m, grid
