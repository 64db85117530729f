"""Guidance with heads of each row's own: several candidates of a search in one pipeline call.

Every row runs SoftPAG, A' = (1 - u) A + u I on its own heads (arXiv 2506.10978, eq. 6), so a batch of candidates gives
the pictures that each of them gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.linear import is_linear
from attnctl.core.sites import Site
from attnctl.errors import SiteError, UnsupportedModelError
from attnctl.kernels.checks import repeat_heads

__all__ = ["RowHeads"]


@dataclass(frozen=True, kw_only=True)
class RowHeads(Guidance, abstract=True):
    """Perturb other heads in every prompt row.

    Attributes:
        rows: For each prompt row the (site name, head) pairs that lean towards the identity.
        u: Strength in [0, 1].
    """

    rows: tuple[tuple[tuple[str, int], ...], ...] = ()
    u: float = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        names = {name for row in self.rows for name, _ in row}
        chosen = tuple(s for s in sites if s.name in names)
        if len(chosen) != len(names) or not names:
            missing = sorted(names - {s.name for s in chosen})
            raise SiteError(f"No attention site {missing[0] if missing else '(none was named)'} in this model.")
        return chosen

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        tables: dict[str, torch.Tensor] = {}
        for site in sites:
            if is_linear(type(getattr(site.module, "processor", None))):
                raise UnsupportedModelError(f"{site.name} is linear attention, whose heads cannot be told apart here.")
            table = torch.zeros(len(self.rows), site.heads)
            for i, row in enumerate(self.rows):
                for name, head in row:
                    if name == site.name:
                        table[i, head] = self.u
            tables[site.name] = table

        def own_heads(call: AttnCall, proceed: Proceed) -> torch.Tensor:
            out = proceed(call)
            if call.q.shape[-2] != call.v.shape[-2]:
                raise UnsupportedModelError(
                    f"{call.site.name} attends to other tokens than its own: it has no identity."
                )
            table = tables[call.site.name]
            if table.device != out.device:  # once a run, not once a call
                table = tables[call.site.name] = table.to(out.device)
            n, rest = divmod(out.shape[0], len(table))
            if rest:
                raise UnsupportedModelError(
                    f"{call.site.name} runs {out.shape[0]} rows for {len(table)} prompts: they cannot be told apart. "
                    "Search with batch=1."
                )
            weight = table.repeat_interleave(n, 0).to(out.dtype)[:, :, None, None]
            return torch.lerp(out, repeat_heads(call.v, out.shape[1]).to(out.dtype), weight)

        return Branch(("heads of rows", self.rows, self.u), sites, own_heads)
