"""StyleAligned: every picture of a batch attends to the first one, in the first one's statistics.

"Style Aligned Image Generation via Shared Attention", arXiv 2312.02133, section 4.2: at every self-attention

    q <- AdaIN(q, q_1), k <- AdaIN(k, k_1);   softmax([q k^T, q k_1^T + bias] / sqrt(d)) [v, v_1]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.processors.sharing.share_attention import ShareAttention

__all__ = ["StyleAligned"]


@dataclass(frozen=True, kw_only=True)
class StyleAligned(ShareAttention):
    """Give the pictures of a batch the style of the first one (arXiv 2312.02133).

    Attributes:
        adain: Which of "q", "k" and "v" receive the first picture's mean and deviation; the paper's are q and k.
    """

    adain: tuple[str, ...] = knob(("q", "k"), kind="free", values="some of q, k, v")

    about: ClassVar[About] = About(
        does="gives the pictures of a batch the style of the first one",
        page="share_attention",
        goal="make pictures of a batch agree",
        paper="arXiv 2312.02133",
        cite=("Hertz et al., *Style Aligned Image Generation via Shared Attention*, arXiv 2312.02133",),
        group="Sharing",
        offered=False,
        sites="every self- and joint attention",
        needs=("several pictures in one batch",),
    )
