"""Searching for the block to perturb: which layer serves an objective, under which guidance.

Papers publish one layer for each model that they try (PAG the mid block, SLG blocks 7 to 9 of SD3.5, STG one block of
each video model), found by looking at pictures. Here every candidate, a guidance at one layer, draws the same few
prompt-seed pairs; an objective marks them, and successive halving leaves the worse half out after the first pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from attnctl.core.control import Guidance
from attnctl.core.hosts.listing import denoisers_of, find_sites
from attnctl.core.sites import Site, select
from attnctl.data.progress import Progress
from attnctl.errors import AttnctlError, ConfigError, SiteError, nearest
from attnctl.pipelines.hunting.log import HuntLog, fingerprint_of, key_of
from attnctl.pipelines.hunting.plan import Pictures
from attnctl.pipelines.hunting.work import Scorer, marks_of, pictures
from attnctl.pipelines.workers import Workers
from attnctl.plans.writing import check_free, publish
from attnctl.processors.pag import PAG, SoftPAG
from attnctl.processors.seg import SEG
from attnctl.processors.slg import SLG

__all__ = ["BlockHunt", "Candidate", "RankedBlocks", "hunt_blocks"]

Candidate: TypeAlias = tuple[str, str]
"""A method and the name of a site."""

_KINDS = ("self", "joint")
METHODS: dict[str, Callable[..., Guidance]] = {
    "PAG": PAG,
    "SEG": SEG,
    "SLG": lambda **fields: SLG(start=0.0, stop=1.0, **fields),
    # The attention of the block gives back its values (STG-A); leaving the block out whole, STG-R, is SLG.
    "STG": lambda **fields: SoftPAG(u=1.0, scope="all", **fields),
}
"""The guidance of each method at one layer, at work in the whole run."""


@dataclass(frozen=True, kw_only=True)
class BlockHunt(Pictures):
    """Describe a search for the block to perturb.

    Attributes:
        methods: Which guidance to try at each layer: PAG, SEG, SLG and STG (attention that gives back its values).
    """

    methods: tuple[str, ...] = tuple(METHODS)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.methods
        if isinstance(given, str) or not given:
            raise ConfigError(f"methods={given!r} was given; expected at least one of {', '.join(METHODS)}.")
        for name in given:
            if name not in METHODS:
                raise ConfigError(f"Unknown method {name!r}; known: {', '.join(METHODS)}.{nearest(name, METHODS)}")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(given)))
        if not self.baseline:
            raise ConfigError("baseline=False was given, but a block is worth what it adds to plain pictures.")

    def candidates(self, sites: Sequence[Site]) -> tuple[Candidate, ...]:
        """List what to try, in execution order: each method at each layer; one that skips blocks, at each block.

        Raises:
            SiteError: There is none.
        """
        pool = [s for s in sites if s.kind in _KINDS]
        if self.sites is not None:
            pool = list(select(sites, self.sites, kinds=_KINDS, what="the pool"))
        blocks = {s.name.rpartition(".")[0]: s.name for s in reversed(pool)}
        firsts = set(blocks.values())
        pairs = tuple((m, s.name) for s in pool for m in self.methods if m != "SLG" or s.name in firsts)
        if not pairs:
            raise SiteError(
                "There is no block to try: the model has no self- or joint-attention that the plan's sites leave. "
                "attnctl.find_sites(pipe) lists what there is."
            )
        return pairs

    def control(self, candidate: Candidate) -> Guidance:
        """Return a candidate as a control."""
        method, site = candidate
        return METHODS[method](scale=self.scale, sites=site)

    def images(self, candidates: int) -> int:
        """Count the pictures of the search."""
        return len(self.pairs) + sum(len(pairs) * left for pairs, left in self.stages(candidates))


@dataclass(frozen=True, kw_only=True)
class RankedBlocks:
    """Hold the result of a search for the block to perturb.

    Attributes:
        ranking: Candidates, the best first: those that have seen more pairs before the others.
        gains: What each adds to the mark of plain pictures: mean over its pairs, and its standard error.
        seen: How many pairs that were.
        refused: What could not be tried, and why.
        baseline: Mean mark of plain pictures.
        plan: The search.
        images: Pictures that the result rests on.
    """

    ranking: tuple[Candidate, ...]
    gains: Mapping[Candidate, tuple[float, float]]
    seen: Mapping[Candidate, int]
    refused: Mapping[Candidate, str]
    baseline: float
    plan: BlockHunt
    images: int

    def control(self) -> Guidance | None:
        """Return the best candidate as a control; None where no candidate has bettered plain pictures."""
        if not self.ranking or self.gains[self.ranking[0]][0] <= 0:
            return None
        return self.plan.control(self.ranking[0])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        best = self.control()
        return {
            "control": None if best is None else best.describe(), "baseline": self.baseline, "images": self.images,
            "plan": self.plan.to_dict(),
            "ranking": [
                {
                    "method": method, "site": site, "gain": self.gains[method, site][0],
                    "error": self.gains[method, site][1], "pairs": self.seen[method, site],
                }
                for method, site in self.ranking
            ],
            "refused": [{"method": m, "site": s, "reason": reason} for (m, s), reason in self.refused.items()],
        }  # fmt: skip

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the ranking into a folder.

        Raises:
            FileExists: It is there already, and `force` is not set.
        """
        path = Path(folder) / "blocks.json"
        check_free([path], force=force)
        publish({path: json.dumps(self.to_dict(), indent=1).encode()}, force=force)
        return path


def hunt_blocks(
    pipe: Any,
    plan: BlockHunt,
    scorer: Scorer,
    *,
    log: str | Path | None = None,
    model: str | None = None,
    objective: str | None = None,
    quiet: bool = False,
) -> RankedBlocks:
    """Rank the blocks of a model by what guidance away from each adds to an objective.

    Args:
        pipe: A text-to-image pipeline.
        plan: What to try, and on which prompts.
        scorer: Objective: called with a list of images and a list of prompts, returns one number each, more is better.
        log: Folder in which every mark is kept. A search that was stopped goes on from there; None keeps nothing.
        model: Name of the model, for the log.
        objective: Name of the objective; None for the scorer's own name.
        quiet: Show no progress.

    Raises:
        ConfigError: The plan does not fit the pipeline, or the scorer returns something else than finite numbers.
        SiteError: There is no block to try.
        PlanError: The log is of another model or plan, or damaged.
        LogError: The log cannot be written.

    Example:
        >>> plan = BlockHunt(pairs=(("a red circle on gray", 0),), methods=("SLG",))
        >>> ranked = hunt_blocks(pipe, plan, scorer)  # doctest: +SKIP
        >>> ranked.control()  # doctest: +SKIP
    """
    if not callable(scorer):
        raise ConfigError(f"scorer={scorer!r} was given; expected a callable (images, prompts) -> numbers.")
    if not isinstance(plan, BlockHunt):
        raise ConfigError(f"plan={plan!r} was given; expected a BlockHunt.")
    candidates = plan.candidates(find_sites(pipe))
    denoiser = next(iter(denoisers_of(pipe).values()))
    about = {
        "plan": plan.to_dict(), "model": model, "pool": [list(c) for c in candidates],
        "objective": str(objective or getattr(scorer, "__name__", type(scorer).__name__)),
        "fingerprint": fingerprint_of(denoiser),
    }  # fmt: skip
    crew = Workers(next(denoiser.parameters()).device.type)
    history = HuntLog(None if log is None else Path(log), about, crew.rank)
    try:
        history.merge(crew.share, everything=True)
        return _Search(pipe, plan, scorer, history, crew, len(candidates), quiet).run(candidates)
    finally:
        history.close()


class _Search:
    """One process's part in a search."""

    def __init__(
        self, pipe: Any, plan: BlockHunt, scorer: Scorer, log: HuntLog, crew: Workers, candidates: int, quiet: bool
    ) -> None:
        self.pipe, self.plan, self.scorer, self.log, self.crew = pipe, plan, scorer, log, crew
        self.marks: dict[tuple[Candidate | None, int], float] = {}
        self.refused: dict[Candidate, str] = {}
        images = -(-plan.images(candidates) // crew.size)
        self.bar = Progress(images, "image", "hunt", quiet=quiet or crew.rank > 0)

    def run(self, candidates: Sequence[Candidate]) -> RankedBlocks:
        with self.bar:
            self.mark([None], range(len(self.plan.pairs)))
            seen = self.try_all(candidates)
        place = {c: i for i, c in enumerate(candidates)}
        tried = [c for c in candidates if c not in self.refused]
        gains = {c: self.gain(c, seen[c]) for c in tried}
        plain = [self.marks[None, i] for i in range(len(self.plan.pairs))]
        return RankedBlocks(
            ranking=tuple(sorted(tried, key=lambda c: (-seen[c], -gains[c][0], place[c]))),
            gains=gains, seen={c: seen[c] for c in tried}, refused=self.refused, baseline=sum(plain) / len(plain),
            plan=self.plan, images=len(self.marks),
        )  # fmt: skip

    def try_all(self, candidates: Sequence[Candidate]) -> dict[Candidate, int]:
        """Mark all candidates on the first pairs, the best of them on more; return how many pairs each has seen."""
        place = {c: i for i, c in enumerate(candidates)}
        left, seen = list(candidates), dict.fromkeys(candidates, 0)
        for pairs, n in self.plan.stages(len(left)):
            left = left[:n]
            self.mark(left, pairs)
            left = [c for c in left if c not in self.refused]
            seen.update(dict.fromkeys(left, pairs.stop))
            left.sort(key=lambda c: (-self.gain(c, seen[c])[0], place[c]))
        return seen

    def gain(self, candidate: Candidate, pairs: int) -> tuple[float, float]:
        """Return the mean of what a candidate adds on the first pairs, and its standard error."""
        differences = [self.marks[candidate, i] - self.marks[None, i] for i in range(pairs)]
        mean = sum(differences) / pairs
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(pairs - 1, 1))
        return mean, spread / math.sqrt(pairs)

    def mark(self, candidates: Sequence[Candidate | None], pairs: range) -> None:
        """Generate and mark whatever is not in the log, together with the other processes."""
        batches = [pairs[i : i + self.plan.batch] for i in range(0, len(pairs), self.plan.batch)]
        work = [(key_of("block", c, list(batch)), c, batch) for c in candidates for batch in batches]
        missing = [unit for unit in work if unit[0] not in self.log.records]
        for key, candidate, batch in missing[self.crew.rank :: self.crew.size]:
            self.bar.describe("plain" if candidate is None else " at ".join(candidate))
            self.log.add(key, self._draw(candidate, batch))
            self.bar.update(len(batch))
        self.log.merge(self.crew.share)
        for key, candidate, batch in work:
            if (reason := self.log.records[key].get("refused")) is not None and candidate is not None:
                self.refused[candidate] = reason
            else:
                self.marks |= {(candidate, i): m for i, m in zip(batch, self.log.marks(key, len(batch)), strict=True)}

    def _draw(self, candidate: Candidate | None, batch: range) -> dict[str, Any]:
        """Return the marks of some pairs, or the reason why a candidate cannot be tried."""
        what = {"candidate": candidate, "pairs": list(batch)}
        if candidate in self.refused:
            return what | {"marks": [], "refused": self.refused[candidate]}
        control = None if candidate is None else self.plan.control(candidate)
        try:
            images = pictures(self.pipe, self.plan, batch, control)
        except AttnctlError as error:
            if candidate is None:
                raise
            return what | {"marks": [], "refused": str(error)}
        return what | {"marks": marks_of(self.scorer, images, [self.plan.pairs[i][0] for i in batch])}
