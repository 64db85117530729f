"""NAG: a negative prompt inside attention, for models that run with and without classifier-free guidance.

"Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models", arXiv 2505.21179, eq. 7 to 9:

    z = z+ + s (z+ - z-)                    extrapolate, z- = attention of the same queries to the negative prompt
    z = z min(r, tau) / r, r = |z|_1 / |z+|_1   bring the norm back, per token, over all heads
    z = alpha z + (1 - alpha) z+            blend

The norm is L1 in the paper and in the authors' later files, L2 in their first file for FLUX (`norm=2`). z+ and z- are
outputs of attention before its last projection, of the image's queries; the text's stay as they are. The authors' code
counts the scale as S = s + 1. Where z- comes from, `attnctl.processors.negative.live` tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.ghost import equal
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError
from attnctl.kernels.checks import wide_dtype
from attnctl.processors.negative.live import Form, LiveNegative

__all__ = ["NAG", "normalized_guidance"]


def normalized_guidance(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float, norm: int = 1
) -> torch.Tensor:
    """Extrapolate away from the negative attention output, bounded in norm (arXiv 2505.21179, eq. 7 to 9).

    Args:
        positive: z+ [B, H, N, D].
        negative: z- [B, H, N, D].
        scale: Extrapolation s.
        tau: Bound of the norm ratio, 1 or more.
        alpha: Blend, 0 to 1.
        norm: Norm that r compares, 1 or 2.

    Returns:
        z [B, H, N, D], computed in float32 (float64 stays), norms over heads and channels of each token.
    """
    wide = wide_dtype(positive.dtype)
    p, n = positive.to(wide), negative.to(wide)
    z = p + scale * (p - n)
    over, under = (torch.linalg.vector_norm(x, norm, (1, 3), keepdim=True) for x in (z, p))
    ratio = over / under.clamp_min(1e-12)
    z = z * ratio.clamp_max(tau) / ratio.clamp_min(1e-12)
    return (alpha * z + (1 - alpha) * p).to(positive.dtype)


@dataclass(frozen=True, kw_only=True)
class NAG(Control):
    """Push attention away from the negative prompt (arXiv 2505.21179).

    Attributes:
        scale: Extrapolation s; 0 switches the control off. The authors' nag_scale is s + 1.
        tau: Bound of the norm ratio, 1 or more.
        alpha: Blend with the unguided output, 0 to 1.
        negative_prompt: Text to keep away from; None for the negative prompt of the pipeline's call.
        negative_embeds: Embeddings of the negative prompt, under the names of the pipeline's arguments for those of the
            prompt ("prompt_embeds"), or of the denoiser's ("encoder_hidden_states"); None to encode the text.
        norm: Norm of z that tau bounds, over all heads and channels of a token: 1 as in the paper and the authors'
            later files, 2 as in their first file for FLUX.
        form: How joint attention gets the negative prompt: "stream" (its text beside the prompt's), "rows" (a whole
            row of its own), "auto" (stream where the image can be cut off).
    """

    scale: float = knob(2.0, 0.0, span=(0.0, 10.0, 0.1), shown=True)
    tau: float = knob(2.5, 1.0, span=(1.0, 10.0, 0.1), shown=True)
    alpha: float = knob(0.5, 0.0, 1.0, shown=True)
    negative_prompt: str | None = knob(None, values="text", hint="blank: the call's")
    negative_embeds: Mapping[str, Any] | None = knob(None, values="tensors by name", compare=False, repr=False)
    norm: Literal[1, 2] = knob(1, options=Literal[1, 2])
    form: Form = knob("auto", options=Form)

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    about: ClassVar[About] = About(
        does="a negative prompt inside attention, with and without classifier-free guidance",
        page="nag",
        goal="keep something out",
        paper="arXiv 2505.21179",
        cite=(
            "Chen et al., *Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models*, "
            "arXiv 2505.21179",
        ),
        sites="every cross-attention; without any, every joint attention",
        needs=("a negative prompt",),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("NAG", "site", "the second would take the prompt rows that the first cuts out for all rows"),
        Conflict(
            "WordEdit",
            "site",
            "both compute the cross-attention of chosen rows, which the other takes for all",
        ),
        Conflict(
            ("BroadWay", "PARO", "SparseAttention"),
            "site",
            "it would change the attention to the prompt alone, and NAG would push that difference too",
        ),
    )

    presets: ClassVar[tuple[Preset, ...]] = (Preset("shapes:text2image", "NAG(scale=10.0, tau=3.5)"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(f"NAG: negative_prompt={self.negative_prompt!r:.80} is no text.")
        embeds = self.negative_embeds
        if embeds is not None and (not isinstance(embeds, Mapping) or not embeds):
            raise ConfigError(
                f"NAG: negative_embeds={type(embeds).__name__} is no mapping of argument names to tensors, such as "
                "{'prompt_embeds': ..., 'pooled_prompt_embeds': ...}."
            )
        if embeds is not None and self.negative_prompt is not None:
            raise ConfigError("NAG: negative_prompt and negative_embeds were both given; give one of them.")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and equal(vars(self), vars(other))

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        cross = any(site.kind == "cross" for site in sites)
        return select(sites, "cross" if cross else "joint", kinds=self.kinds, what="NAG")

    def in_window(self, state: object) -> bool:
        return self.scale != 0 and self.alpha != 0 and super().in_window(state)  # type: ignore[arg-type]

    def is_off(self) -> bool:
        return self.scale == 0 or self.alpha == 0

    def needs_prompt(self) -> bool:
        return True

    def describe(self) -> str:
        if self.negative_embeds is None:
            return super().describe()
        shown = dataclasses.replace(self, negative_embeds=None).describe().removesuffix(")")
        return f"{shown}{'' if shown.endswith('(') else ', '}negative_embeds={{{', '.join(self.negative_embeds)}}})"

    def guide(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Compute z of z+ and z-, [B, H, N, D]."""
        return normalized_guidance(positive, negative, self.scale, self.tau, self.alpha, self.norm)

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveNegative:
        return LiveNegative(self, sites, denoiser)
