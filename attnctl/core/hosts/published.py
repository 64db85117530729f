"""Where publications act in a family of models, and the sites of one model that this names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnctl.core.sites import Selector, Site, select
from attnctl.errors import SiteError

__all__ = ["Default", "published_in", "unpublished"]

_UNCOUNTED = ("temporal", "dual")  # attention over frames, and the second one of a block: no publication counts them


@dataclass(frozen=True, kw_only=True)
class Default:
    """Sites that a publication acts on in a family, with the source that says so.

    Attributes:
        source: The publication.
        sites: Selector of the sites, or of those that the relative places below count.
        depth: One block of how many, such as (13, 24); in smaller and larger models the proportional one.
        span: First and last block, the last excluded, of how many; in other models the proportional ones.
        reduction: How many times smaller than the latents the token grid is, along a side.
        blocks: The number of blocks of the only size of model that it holds for; None for all sizes.
    """

    source: str
    sites: Selector | None = None
    depth: tuple[int, int] | None = None
    span: tuple[int, int, int] | None = None
    reduction: int | None = None
    blocks: int | None = None

    def fits(self, sites: Sequence[Site], kinds: Sequence[str]) -> bool:
        """Tell whether it holds for a model of this size."""
        counted = [s for s in sites if s.kind in kinds and s.kind not in _UNCOUNTED]
        return self.blocks is None or len(counted) == self.blocks

    def of(self, sites: Sequence[Site], kinds: Sequence[str], what: str) -> tuple[Site, ...]:
        """Choose the sites of a model, among those of some kinds.

        Raises:
            SiteError: The selector matches none, or the model does not expose the size of its latents.
        """
        kinds = [kind for kind in kinds if kind not in _UNCOUNTED]
        blocks = tuple(s for s in sites if s.kind in kinds)
        if self.sites is not None:
            blocks = select(sites, self.sites, kinds=kinds, what=what)
        if not blocks:
            raise SiteError(f"{what}: the model has no {' or '.join(kinds)} attention to act on; pass `sites=`.")
        if self.depth is not None:
            return (blocks[self.depth[0] * len(blocks) // self.depth[1]],)
        if self.span is not None:
            low, high = (place * len(blocks) // self.span[2] for place in self.span[:2])
            return blocks[low : max(high, low + 1)]
        return blocks if self.reduction is None else _at_reduction(sites, blocks, self.reduction, what)

    def describe(self) -> str:
        """Say in words where it is."""
        if self.depth is not None:
            return f"block {self.depth[0]} of {self.depth[1]}"
        if self.span is not None:
            return f"blocks {self.span[0]} to {self.span[1] - 1} of {self.span[2]}"
        if self.reduction is not None:
            return f"layers at 1/{self.reduction} of the latents' side"
        if self.sites == "mid":
            return "mid block"
        return ", ".join(map(str, self.sites)) if isinstance(self.sites, (list, tuple)) else str(self.sites)


def published_in(cls: Any, family: Any, sites: Sequence[Site] = ()) -> Default | None:
    """Find the published sites of a control in a family: its own, else those of the nearest of its bases.

    Args:
        cls: The class of the control.
        family: The family.
        sites: The sites of a model: what holds for models of another size alone is left out.
    """
    for c in cls.__mro__:
        for default in (vars(c).get("published", {}).get(family.name), family.published.get(c.__name__)):
            if default is not None and (not sites or default.fits(sites, cls.kinds)):
                result: Default = default
                return result
    return None


def unpublished(what: str, kinds: Sequence[str], family: str, sites: Sequence[Site]) -> SiteError:
    """Say that no publication names sites of a control, and which it could act on."""
    names = [s.name for s in sites if s.kind in kinds]
    if not names:
        model_kinds = ", ".join(sorted({s.kind for s in sites}))
        return SiteError(f"{what} acts on {', '.join(kinds)} attention; this {family} model has {model_kinds} only.")
    shown = ", ".join(names[:3] + (["...", names[-1]] if len(names) > 3 else []))
    return SiteError(
        f"{what} has no default sites: no publication names any for {family} models, so `sites` must be given. "
        f"Candidates: {shown}. `attnctl.find_sites(pipe)` lists them all."
    )


def _at_reduction(sites: Sequence[Site], blocks: tuple[Site, ...], reduction: int, what: str) -> tuple[Site, ...]:
    """Choose a UNet's layers at 1 / reduction of the latents' side, or at the nearest finer level that it has."""
    finest = max((s.grid for s in sites if s.grid is not None), default=None, key=lambda g: g[1] * g[2])
    levels = {s.grid[1] * s.grid[2] for s in blocks if s.grid is not None}
    if finest is None or not levels:
        raise SiteError(f"{what}: the model does not expose the size of its latents, so `sites` must be given.")
    wanted = math.ceil(finest[1] / reduction) * math.ceil(finest[2] / reduction)
    level = min((n for n in levels if n >= wanted), default=max(levels))
    return tuple(s for s in blocks if s.grid is not None and s.grid[1] * s.grid[2] == level)
