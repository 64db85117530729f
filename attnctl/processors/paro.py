"""PARO: block-sparse attention over reordered tokens, by a plan that was calibrated once for a model.

"PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation Models",
arXiv 2506.16054. The tokens of each head are laid out in the order in which those that it looks at lie side by side,
after rotary embedding; blocks that hold little of the map are skipped; the output is put back in order. Text is dense.
A plan comes from `attnctl.pipelines.calibrate`.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError, PlanError, SiteError, UnsupportedModelError, nearest
from attnctl.kernels.sparse.dispatch import block_sparse, check_sparse
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.processors.sparse.calls import OnceWarned, TextMasks, words_of

__all__ = ["PARO"]


@dataclass(frozen=True, kw_only=True)
class PARO(Control):
    """Compute only the blocks of attention that a plan keeps (arXiv 2506.16054).

    Attributes:
        plan: Plans of a model's sites, or one plan for every selected site, or the folder or Hub id of either.
        dense_steps: Steps at the beginning of the run that stay dense; the paper has none.
        dense_layers: Sites at the beginning of the model that stay dense; the paper has none.
        kernel: Block-sparse kernel by name, or "auto".

    A call of another resolution than the plan's, or with a mask over the image, stays dense and says so once.
    """

    plan: ModelPlan | BlockPlan | str | os.PathLike[str] = field(kw_only=False)
    dense_steps: int = knob(0, 0, unit="steps")
    dense_layers: int = knob(0, 0, unit="sites")
    kernel: str = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    about: ClassVar[About] = About(
        does="reordered block-sparse attention by a calibrated plan",
        page="paro",
        goal="compute less",
        paper="arXiv 2506.16054",
        cite=(
            "Zhao et al., *PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in "
            "Visual Generation Models*, arXiv 2506.16054",
        ),
        group="Speed",
        offered=False,
        sites="the sites of its plan",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("PARO", "site", "each brings the kernel, and one kernel computes an attention"),
        Conflict("AgentAttention", "site", "a block plan goes by the places of tokens, which merging takes away"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The field keeps the folder's name, which a record can hold.
        plan = ModelPlan.from_pretrained(self.plan) if isinstance(self.plan, (str, os.PathLike)) else self.plan
        object.__setattr__(self, "_plans", plan)
        if not isinstance(plan, (ModelPlan, BlockPlan)):
            raise ConfigError(
                f"PARO: plan={type(plan).__name__} was given; expected an attnctl.plans.ModelPlan or BlockPlan, or "
                "the folder of one. attnctl.pipelines.calibrate makes one."
            )
        check_sparse(self.kernel)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        plans = self._by_site
        if set(plans) == {""}:
            return select(sites, [k for k in self.kinds if any(s.kind == k for s in sites)] or "self", what="PARO")
        names = [s.name for s in sites]
        missing = [name for name in plans if name not in names]
        if missing:
            raise PlanError(
                f"The plan is for another model: {family.name} has no site {missing[0]!r} ({len(missing)} of "
                f"{len(plans)} are missing).{nearest(missing[0], names)}"
            )
        return tuple(s for s in sites if s.name in plans)

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        chosen = super().resolve(sites, family)
        for site in chosen:
            plan = self._plan_of(site)
            if site.heads != plan.heads:
                raise PlanError(
                    f"The plan is for another model: {site.name} has {site.heads} heads, its plan {plan.heads}."
                )
        if self.dense_layers >= len(chosen):
            raise ConfigError(
                f"PARO: dense_layers={self.dense_layers} leaves none of the {len(chosen)} sites to the plan."
            )
        return chosen[self.dense_layers :]

    @property
    def _by_site(self) -> Mapping[str, BlockPlan]:
        """Return the plans by site; one plan for all stands under ""."""
        plan: ModelPlan | BlockPlan = vars(self)["_plans"]
        return {"": plan} if isinstance(plan, BlockPlan) else plan.plans

    def _plan_of(self, site: Site) -> BlockPlan:
        plans = self._by_site
        plan = plans.get(site.name, plans.get(""))
        if plan is None:
            raise SiteError(f"The plan has none for {site.name}; it has {', '.join(list(plans)[:3])}, ...")
        return plan

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.dense_steps > 0 or any(p.groups > 1 for p in self._by_site.values())

    def in_window(self, state: CallState) -> bool:
        return super().in_window(state) and state.step >= self.dense_steps

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        plans = _copies({site.name: self._plan_of(site) for site in sites})
        masks, warned = TextMasks(), OnceWarned("PARO")

        def sparse(call: AttnCall, proceed: Proceed) -> Tensor:
            plan = plans[call.site.name]
            if call.keys is not None:
                raise UnsupportedModelError(
                    f"PARO: {call.site.name} attends from image tokens alone to image and text, or to reference images "
                    "too, which no plan describes. Choose other sites."
                )
            if call.q.shape[2] != call.k.shape[2]:
                return proceed(call)  # a perturbation that computes the text rows alone, which are dense anyway
            image = call.image or slice(0, call.q.shape[2])
            why = _refusal(plan, call, image, masks)
            if why:
                warned.dense(why)
                return proceed(call)
            group = 0 if plan.groups == 1 else plan.group_at(call.state.step, call.state.steps or 1)
            return proceed(call.with_(kernel=partial(_kernel, call, plan, group, image, self.kernel)))

        return sparse


def _copies(plans: Mapping[str, BlockPlan]) -> dict[str, BlockPlan]:
    """Return plans of this attachment's own, one for all sites whose plans are equal.

    Kernels store their lists with a plan: those of these copies are shared, and go when the control is detached.
    """
    made: dict[Hashable, list[tuple[BlockPlan, BlockPlan]]] = {}
    copies = {}
    for site, plan in plans.items():
        facts = plan.block_q, plan.block_k, plan.order, plan.grid, plan.n_image, plan.n_text, plan.text_first
        alike = made.setdefault((*facts, plan.keep.shape, int(plan.keep.sum())), [])
        copy = next((c for other, c in alike if other is plan or torch.equal(other.keep, plan.keep)), None)
        if copy is None:
            copy = replace(plan)
            alike.append((plan, copy))
        copies[site] = copy
    return copies


def _refusal(plan: BlockPlan, call: AttnCall, image: slice, masks: TextMasks) -> str:
    """Return why a call cannot follow its plan, or ""."""
    n = image.stop - image.start
    if image.start > 0 and image.stop < call.q.shape[2]:
        return "other tokens stand before and behind the image's, where a plan knows of text alone"
    if plan.n_image not in (None, n) or (plan.grid is not None and call.grid not in (None, plan.grid)):
        was = f"a grid of {plan.grid}" if plan.grid is not None else f"{plan.n_image} image tokens"
        return f"the plan was made for {was}, this run has {call.grid or n}"
    return "" if masks.text_only(call, image) else "a mask covers image tokens"


def _kernel(
    call: AttnCall,
    plan: BlockPlan,
    group: int,
    image: slice,
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute what the plan keeps; calls that another control has cut or masked are computed as they are."""
    n = call.q.shape[2]
    if q.shape[1:3] != (plan.heads, n) or k.shape[2] != n or (mask is not None and mask is not call.mask):
        return call.kernel(q, k, v, mask=mask, scale=scale)
    words = None if mask is None else words_of(call, image)
    return block_sparse(q, k, v, plan, group=group, image=image, scale=scale, words=words, backend=kernel)
