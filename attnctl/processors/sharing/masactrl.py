"""MasaCtrl: the queries of every picture look at the first picture's keys and values.

"MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing", arXiv 2304.08465,
eq. 3: from step S and layer L on, softmax(q k_1^T / sqrt(d)) v_1. The layout is a picture's own, because its queries
are, and the contents are the first picture's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnctl.core.hosts.families import Family
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.processors.sharing.share_attention import ShareAttention, Take

__all__ = ["MasaCtrl"]


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(ShareAttention):
    """Paint every picture of a batch with the contents of the first one (arXiv 2304.08465).

    Attributes:
        take: "replace", the paper's; with "append" a picture attends to its own contents, too.
        start: Fraction of the run at which the control begins: the layout is made before. The paper's: step 4 of 50.
    """

    take: Take = knob("replace", options=Take)
    start: float = knob(0.08, 0.0, 1.0, shown=True, last=True)

    about: ClassVar[About] = About(
        does="paints a changed layout with the contents of the first picture",
        page="share_attention",
        goal="make pictures of a batch agree",
        paper="arXiv 2304.08465",
        cite=("Cao et al., *MasaCtrl: Tuning-Free Mutual Self-Attention Control*, arXiv 2304.08465",),
        group="Sharing",
        offered=False,
        sites="the last 6 of 16 self- or joint attentions, in other models proportionally",
        needs=("several pictures in one batch",),
    )

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        chosen = super().default_sites(sites, family)
        return chosen[len(chosen) * 10 // 16 :]
