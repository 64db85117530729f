"""Consistent: pictures of one batch attend to a random share of each other's tokens (StoryDiffusion).

"StoryDiffusion: Consistent Self-Attention for Long-Range Image and Video Generation", arXiv 2405.01434, section 3.1:

    softmax(q_i [k_i, S_i]^T / sqrt(d)) [v_i, S_i],   S_i: tokens of the other pictures, drawn at each step and site

A picture's own tokens are always whole. The first step is plain; later a site shares with probability `chance`, and
with `late_chance` from 2/5 of the run on. With a bank, S_i of later runs are the tokens that a first run drew of its
pictures, at the same step and site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnctl.core.call import CallState
from attnctl.core.hosts.families import Family
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.processors.sharing.bank import Banked
from attnctl.processors.sharing.share_attention import Sources

__all__ = ["Consistent"]

_LATE = 0.4  # step 20 of the paper's 50


@dataclass(frozen=True, kw_only=True)
class Consistent(Banked):
    """Keep a subject the same over the pictures of a batch (arXiv 2405.01434).

    Attributes:
        sources: "others": each picture attends to all the others.
        share: Share of the others' tokens, above 0, to 1.
        chance: Probability that a site shares in a step before 2/5 of the run, 0 to 1; the first step is plain.
        late_chance: The probability after that, 0 to 1.
        bank: Keeps the keys of a first run's pictures; the pictures of later runs attend to these instead of to each
            other's.
    """

    sources: Sources = knob("others", kind="free", values="first, previous, others, a number or one per picture")
    share: float = knob(0.5, high=1.0, above=0.0, shown=True, span=(0.05, 1.0, 0.05))
    chance: float = knob(0.7, 0.0, 1.0)
    late_chance: float = knob(0.9, 0.0, 1.0)

    about: ClassVar[About] = About(
        does="keeps a subject the same over the pictures of a batch",
        page="share_attention",
        goal="make pictures of a batch agree",
        paper="arXiv 2405.01434",
        cite=("Zhou et al., *StoryDiffusion: Consistent Self-Attention*, arXiv 2405.01434",),
        group="Sharing",
        offered=False,
        sites="every self-attention in the up blocks of a UNet, every self- and joint attention elsewhere",
        needs=("several pictures in one batch",),
    )

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        chosen = super().default_sites(sites, family)
        up = tuple(site for site in chosen if site.name.startswith("up_blocks"))
        return up or chosen

    def is_off(self) -> bool:
        return self.chance == 0 and self.late_chance == 0

    def needs_steps(self) -> bool:
        return True

    def _chance(self, state: CallState) -> float:
        if state.step == 0:
            return 0.0
        return self.chance if state.progress < _LATE else self.late_chance
