"""Block plans of a whole model: one for every attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from attnctl.errors import PlanError
from attnctl.plans import hub
from attnctl.plans.block_files import read_masks, write_masks
from attnctl.plans.blocks import BlockPlan

__all__ = ["ModelPlan"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelPlan:
    """Hold the block plans of a model.

    Attributes:
        plans: Plan of every site, by its name in the model.
        model: Hub id or name of the model, or None for any.
        about: Facts for people: prompts, metric, density, errors.
    """

    plans: Mapping[str, BlockPlan]
    model: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plans = self.plans
        if not isinstance(plans, Mapping) or not all(isinstance(p, BlockPlan) for p in plans.values()):
            raise PlanError(f"plans={plans!r:.80} was given; expected a BlockPlan for every site, by its name.")
        if not plans:
            raise PlanError("A model's plan needs the plan of at least one site.")
        if not isinstance(self.model, str | None) or not isinstance(self.about, Mapping):
            raise PlanError(f"model={self.model!r:.80}, about={self.about!r:.80}: expected a name or None, and facts.")

    def __repr__(self) -> str:
        """Tell what it is for; the masks themselves fill screens."""
        return f"ModelPlan({self.model or 'any model'}, {len(self.plans)} sites, density {self.density:.3f})"

    @property
    def density(self) -> float:
        """Mean share of the map that is computed, over sites, heads and parts of the run."""
        return sum(p.density for p in self.plans.values()) / len(self.plans)

    @property
    def packed_bytes(self) -> int:
        """Size of the masks in a file: a bit for every block."""
        return sum(-(-p.keep.numel() // 8) for p in self.plans.values())

    def save_pretrained(self, folder: str | os.PathLike[str], *, force: bool = True) -> Path:
        """Write the plans into a folder (JSON and safetensors) and return it; others there are replaced as a whole.

        Raises:
            FileExists: Another plan is there, and `force` is False.
            WriteError: The disk is full, or the folder cannot be written.
        """
        sites = [plan.to_mask(name) for name, plan in self.plans.items()]
        return write_masks(folder, sites, self.model, self.about, force=force)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> ModelPlan:
        """Read the plans of a model from a folder or a Hub repository.

        Raises:
            PlanError: A file is missing, damaged, hostile or of another schema.
        """
        sites, model, about = read_masks(path_or_repo, revision)
        return cls(plans={name: BlockPlan.from_mask(keep, **f) for name, keep, f in sites}, model=model, about=about)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the plans to a Hub repository and return its address."""
        return hub.push(partial(self.save_pretrained, force=True), repo_id, private=private, token=token)
