"""Attention that computes a part of the map: blocks chosen while the model runs, windows of neighbours, or a plan.

The softmax of every query runs over the keys that are computed; text attends and is attended to in full. What is
computed is said by `select`: see `attnctl.plans.Online`, `Neighborhood`, `SlidingTile`, `Radial` and `BlockPlan`.
Blocks that `Online(rest="mean")` leaves out count as one key and one value each, their means, with the logarithm of
their size added to the logit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.live import LiveControl
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError
from attnctl.kernels.sparse.dispatch import check_sparse
from attnctl.plans import BlockPlan, ModelPlan, Neighborhood, Online, Radial, SlidingTile
from attnctl.processors.paro import PARO
from attnctl.processors.sparse.live import LiveSparse

__all__ = ["SparseAttention"]

Selector = Online | Neighborhood | SlidingTile | Radial | ModelPlan | BlockPlan | str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Control):
    """Compute only a part of every attention map between image tokens.

    Attributes:
        select: Part of the map to compute: `Online`, `Neighborhood`, `SlidingTile`, `Radial` of `attnctl.plans`, or a
            plan as `PARO` takes it.
        dense_steps: Steps at the beginning of the run that stay dense.
        dense_layers: Sites at the beginning of the model that stay dense.
        kernel: Block-sparse kernel by name, or "auto"; windows of neighbours have a kernel of their own.

    A call whose tokens `select` cannot be used on stays dense, and a warning says so once.
    """

    select: Selector = field(default=Online(), kw_only=False)
    dense_steps: int = knob(0, 0, unit="steps")
    dense_layers: int = knob(0, 0, unit="sites")
    kernel: str = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    about: ClassVar[About] = About(
        does="computes a part of the attention map, chosen online, by windows or by a plan",
        page="sparse",
        goal="compute less",
        title="Sparse attention",
        paper="arXiv 2502.18137",
        cite=(
            "Zhang et al., *SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model "
            "Inference*, arXiv 2502.18137",
            "Xu et al., *XAttention: Block Sparse Attention with Antidiagonal Scoring*, arXiv 2503.16428",
            "Hassani et al., *Generalized Neighborhood Attention*, arXiv 2504.16922",
            "Zhang et al., *Fast Video Generation with Sliding Tile Attention*, arXiv 2502.04507",
            "Li et al., *Radial Attention*, arXiv 2506.19852",
        ),
        group="Speed",
        offered=False,
        sites="all self- and joint attention",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(("SparseAttention", "PARO"), "site", "each brings the kernel, and one kernel computes an attention"),
        Conflict("AgentAttention", "site", "blocks go by the places of tokens, which merging takes away"),
        Conflict(
            "ShareAttention", "site", "blocks are of the picture's own keys, and other pictures' are appended there"
        ),
        Conflict("TPG", "block", "the one shuffles the tokens of the block, the other goes by their places"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparse(self.kernel)
        if isinstance(self.select, (ModelPlan, BlockPlan, str, os.PathLike)):
            plan = PARO(
                self.select, sites=self.sites, start=self.start, stop=self.stop, dense_steps=self.dense_steps,
                dense_layers=self.dense_layers, kernel=self.kernel,
            )  # fmt: skip
            object.__setattr__(self, "_plan", plan)
        elif not isinstance(self.select, (Online, Neighborhood, SlidingTile, Radial)):
            raise ConfigError(
                f"SparseAttention: select={self.select!r:.80} was given; expected Online, Neighborhood, SlidingTile or "
                "Radial of attnctl.plans, a BlockPlan, a ModelPlan, or the folder of one."
            )

    @property
    def _by_plan(self) -> PARO | None:
        """Return the control of the plan that was given, or None where none was."""
        plan: PARO | None = vars(self).get("_plan")
        return plan

    @property
    def first_step(self) -> int:
        """Return the number of steps at the beginning that stay dense."""
        steps = self.select.dense_steps if isinstance(self.select, Online) else None
        return self.dense_steps if steps is None else steps

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if self._by_plan is not None:
            return self._by_plan.default_sites(sites, family)
        kinds = [k for k in self.kinds if any(s.kind == k for s in sites)] or "self"
        return select(sites, kinds, what=self._label)

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if self._by_plan is not None:
            return self._by_plan.resolve(sites, family)
        chosen = super().resolve(sites, family)
        if self.dense_layers >= len(chosen):
            raise ConfigError(
                f"SparseAttention: dense_layers={self.dense_layers} leaves none of the {len(chosen)} sites."
            )
        return chosen[self.dense_layers :]

    def needs_steps(self) -> bool:
        if self._by_plan is not None:
            return self._by_plan.needs_steps()
        scheduled = isinstance(self.select, Online) and bool(self.select.schedule)
        return super().needs_steps() or self.first_step > 0 or scheduled

    def in_window(self, state: CallState) -> bool:
        return super().in_window(state) and state.step >= self.first_step

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper | None:
        return None if self._by_plan is None else self._by_plan.wrapper(sites)

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl | None:
        if isinstance(self.select, (Online, Neighborhood, SlidingTile, Radial)):
            return LiveSparse(self.select, sites, self.kernel, self.first_step, self.start)
        return None
