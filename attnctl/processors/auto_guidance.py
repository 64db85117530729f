"""AutoGuidance: guidance away from a worse version of the same model, for the same prompt.

    pred = base + w (c - p),   p: the prediction with a share of some attentions' outputs dropped

"Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, eq. 4 (its weight is w + 1), where the bad
version is a smaller or less trained model. Dropout as its stand-in is that of diffusers' guider `AutoGuidance`. The
dropped values are the same at every step and in every row, so that there is one bad model and not a new one each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About

__all__ = ["AutoGuidance", "dropped"]


def dropped(out: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Set a share of an attention's outputs to 0 and scale the others up, alike in all rows.

    Args:
        out: Output [B, H, N, D].
        share: Share to drop, in [0, 1).
        seed: Which; the global generators are left alone.
    """
    generator = torch.Generator(out.device).manual_seed(seed)
    mask = torch.rand(1, *out.shape[1:], generator=generator, device=out.device) >= share
    return out * mask / (1 - share)


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(Guidance):
    """Guide away from the prediction of a model made worse by dropout (arXiv 2406.02507).

    Attributes:
        scale: Guidance weight w; 0 switches the control off. The paper's weight is w + 1.
        dropout: Share of the outputs of the chosen attentions that is dropped.
        seed: Seed that chooses the dropped outputs.

    Example:
        >>> AutoGuidance(dropout=0.2).describe()
        'AutoGuidance(dropout=0.2)'
    """

    scale: float = 1.0
    dropout: float = knob(0.1, 0.0, below=1.0, span=(0.0, 0.9, 0.05), shown=True)
    seed: int = knob(0, 0)

    about: ClassVar[About] = About(
        does="guides away from a version of the model that dropout has made worse",
        page="auto_guidance",
        goal="sharpen structure",
        paper="arXiv 2406.02507",
        cite=("Karras et al., *Guiding a Diffusion Model with a Bad Version of Itself*, arXiv 2406.02507",),
    )

    def weight(self, state: object) -> float:
        return 0.0 if self.dropout == 0 else super().weight(state)  # type: ignore[arg-type]

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        key = ("dropout", self.dropout, self.seed, tuple(site.name for site in sites))
        return Branch(key, sites, self._worse)

    def _worse(self, call: AttnCall, proceed: Proceed) -> torch.Tensor:
        seed = self.seed * 10_007 + 101 * call.site.depth + call.index
        return dropped(proceed(call), self.dropout, seed)
