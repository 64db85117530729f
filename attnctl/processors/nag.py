"""NAG: a negative prompt inside cross-attention, without an extra pass of the model.

"Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models", arXiv 2505.21179, eq. 7 to 9:

    z = z+ + s (z+ - z-)                    extrapolate, z- = attention of the same queries to the negative prompt
    z = z min(r, tau) / r, r = |z|_1 / |z+|_1   bring the norm back, per token
    z = alpha z + (1 - alpha) z+            blend

z- needs the negative prompt's keys and values. They are read off the negative rows of the same call, so the pipeline
must run with classifier-free guidance in one batch (a guidance_scale just above 1 is enough).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import UnsupportedModelError

__all__ = ["NAG", "normalized_guidance"]


def normalized_guidance(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float
) -> torch.Tensor:
    """Extrapolate away from the negative attention output, bounded in norm (arXiv 2505.21179, eq. 7 to 9).

    Args:
        positive: z+ [B, H, N, D].
        negative: z- [B, H, N, D].
        scale: Extrapolation s.
        tau: Bound of the norm ratio, 1 or more.
        alpha: Blend, 0 to 1.

    Returns:
        z [B, H, N, D], computed in float32, norms over heads and channels of each token.
    """
    p, n = positive.float(), negative.float()
    z = p + scale * (p - n)
    ratio = z.abs().sum((1, 3), keepdim=True) / p.abs().sum((1, 3), keepdim=True).clamp_min(1e-12)
    z = z * ratio.clamp_max(tau) / ratio.clamp_min(1e-12)
    return (alpha * z + (1 - alpha) * p).to(positive.dtype)


@dataclass(frozen=True, kw_only=True)
class NAG(Control):
    """Push cross-attention away from the negative prompt (arXiv 2505.21179).

    Attributes:
        scale: Extrapolation s; 0 switches the control off.
        tau: Bound of the norm ratio, 1 or more.
        alpha: Blend with the unguided output, 0 to 1.
    """

    scale: float = knob(2.0, 0.0, span=(0.0, 10.0, 0.1), shown=True)
    tau: float = knob(2.5, 1.0, span=(1.0, 10.0, 0.1), shown=True)
    alpha: float = knob(0.5, 0.0, 1.0, shown=True)

    kinds: ClassVar[tuple[str, ...]] = ("cross",)
    about: ClassVar[About] = About(
        does="a negative prompt inside cross-attention, without an extra pass",
        page="nag",
        goal="keep something out",
        paper="arXiv 2505.21179",
        cite=(
            "Chen et al., *Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models*, "
            "arXiv 2505.21179",
        ),
        sites="every cross-attention",
        needs=("a negative prompt in the same batch",),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("NAG", "site", "the second would take the prompt rows that the first cuts out for all rows"),
        Conflict(
            "WordEdit",
            "site",
            "both compute the cross-attention of chosen rows, which the other takes for all",
        ),
    )

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        return select(sites, "cross", kinds=self.kinds, what="NAG")

    def in_window(self, state: object) -> bool:
        return self.scale != 0 and self.alpha != 0 and super().in_window(state)  # type: ignore[arg-type]

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        # Text keys and values do not depend on the image: a guidance branch's pass, which runs the prompt rows alone,
        # takes the negative ones that the base pass saw. Without them its c - p would hold NAG's own effect.
        negatives: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

        def guided(call: AttnCall, proceed: Proceed) -> torch.Tensor:
            if call.index > 0:
                return proceed(call)  # image prompts have no negative
            rows = call.state.rows
            m = call.q.shape[0] // rows.total  # frames folded into rows
            cond = slice(rows.cond.start * m, rows.cond.stop * m)
            if call.state.phase == "base":
                negatives[call.site.name] = self._negative(call, m)
            k, v, mask = negatives[call.site.name]
            out = proceed(call)
            away = proceed(call.with_(q=call.q[cond], k=k, v=v, mask=mask))
            moved = normalized_guidance(out[cond], away, self.scale, self.tau, self.alpha)
            return torch.cat([out[: cond.start], moved, out[cond.stop :]])

        return guided

    @staticmethod
    def _negative(call: AttnCall, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys, values and mask of the negative rows."""
        rows = call.state.rows
        if rows.uncond is None or rows.role != "both":
            raise UnsupportedModelError(
                "NAG reads the negative prompt off the negative rows of a batched call, and this call has none. Run "
                "the pipeline with a negative prompt and guidance_scale above 1. Pipelines that call the denoiser "
                "twice (Wan, Qwen-Image, FLUX) are not supported."
            )
        uncond = slice(rows.uncond.start * m, rows.uncond.stop * m)
        mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[uncond]
        return call.k[uncond], call.v[uncond], mask
