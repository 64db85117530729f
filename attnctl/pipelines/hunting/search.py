"""HeadHunter: find the attention heads whose perturbation serves an objective, on one machine or many.

"Fine-Grained Perturbation Guidance via Attention Head Selection", arXiv 2506.10978, Algorithm 1. The work of a stage is
cut into pipeline calls that depend on the plan alone; processes take them in turn, tell each other the marks, and come
to the same choice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctl.core.hosts.listing import denoisers_of, find_sites
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError
from attnctl.pipelines.hunting.groups import deal, worth
from attnctl.pipelines.hunting.log import HuntLog, fingerprint_of, key_of
from attnctl.pipelines.hunting.plan import Head, HuntPlan
from attnctl.pipelines.hunting.results import Hunted, Round
from attnctl.pipelines.hunting.work import Row, Scorer, Unit, cut, draw, first_change, marks_of, units
from attnctl.pipelines.refusals import check_pipeline
from attnctl.pipelines.workers import Workers
from attnctl.plans import HeadSet

__all__ = ["hunt", "seconds_of"]


def hunt(
    pipe: Any,
    plan: HuntPlan,
    scorer: Scorer,
    *,
    log: str | Path | None = None,
    model: str | None = None,
    objective: str | None = None,
    quiet: bool = False,
) -> Hunted:
    """Search for the heads that matter.

    Args:
        pipe: A text-to-image pipeline.
        plan: What to search, and what to save.
        scorer: Objective: called with a list of images and a list of prompts, returns one number each, more is better.
        log: Folder in which every mark is kept. A search that was stopped goes on from there, on any number of
            processes; None keeps nothing.
        model: Name of the model, for the head set.
        objective: Name of the objective; None for the scorer's own name.
        quiet: Show no progress bar.

    Returns:
        The chosen heads, with the marks of all candidates.

    Raises:
        ConfigError: The plan does not fit the pipeline, or the scorer returns something else than finite numbers.
        SiteError: The pool is empty, or names heads that do not exist.
        PlanError: The log is of another model or plan, or damaged.
        LogError: The log cannot be written.

    Example:
        >>> plan = HuntPlan(pairs=(("a red circle on gray", 0),), k=3)
        >>> found = hunt(pipe, plan, scorer, log="runs/hunt")  # doctest: +SKIP
        >>> found.heads.save_pretrained("heads")  # doctest: +SKIP
    """
    if not callable(scorer):
        raise ConfigError(f"scorer={scorer!r} was given; expected a callable (images, prompts) -> numbers.")
    if not isinstance(plan, HuntPlan):
        raise ConfigError(f"plan={plan!r} was given; expected a HuntPlan.")
    check_pipeline(pipe, "hunt")
    sites = find_sites(pipe)
    pool = plan.pool(sites)
    plan.estimate(pool)
    name = str(objective or getattr(scorer, "__name__", type(scorer).__name__))
    denoiser = next(iter(denoisers_of(pipe).values()))
    about = {
        "plan": plan.to_dict(), "objective": name, "model": model, "pool": [list(h) for h in pool],
        "fingerprint": fingerprint_of(denoiser),
    }  # fmt: skip
    crew = Workers(next(denoiser.parameters()).device.type)
    history = HuntLog(None if log is None else Path(log), about, crew.rank)
    try:
        history.merge(crew.share, everything=True)
        search = _Search(pipe, plan, scorer, pool, history, crew, quiet)
        return search.run(model, name, max(s.depth for s in sites) + 1)
    finally:
        history.close()


def seconds_of(pipe: Any, plan: HuntPlan) -> float:
    """Time one picture of the search on this machine, in seconds: two short runs of one call, put on all steps."""
    sites = {s.name: s for s in find_sites(pipe)}
    pool = plan.pool(tuple(sites.values()))
    layer = pool[len(pool) // 2][0]
    heads = [(h,) for h in pool if h[0] == layer]
    (unit, *_) = cut(deal(pool, (), plan), plan) if plan.group else units(heads, range(len(plan.pairs)), plan)
    took = []
    for steps in (2, 2, 4):  # the first run also pays for what is only done once
        began = time.perf_counter()
        draw(pipe, plan, unit.rows, steps)
        took.append(time.perf_counter() - began)
    step = max(0.0, took[2] - took[1]) / 2
    return (max(0.0, took[1] - 2 * step) + plan.steps * step) / len(unit.rows)


class _Search:
    """One process's part in a search."""

    def __init__(
        self,
        pipe: Any,
        plan: HuntPlan,
        scorer: Scorer,
        pool: tuple[Head, ...],
        log: HuntLog,
        crew: Workers,
        quiet: bool,
    ) -> None:
        self.pipe, self.plan, self.scorer, self.pool = pipe, plan, scorer, pool
        self.log, self.crew = log, crew
        self.marks: dict[Row, float] = {}
        self.generated = 0
        self.best: tuple[float, str] | None = None
        self.bar = Progress(plan.estimate(pool).marked, "image", "hunt", quiet=quiet or crew.rank > 0)

    def run(self, model: str | None, objective: str, layers: int) -> Hunted:
        plan, began = self.plan, time.perf_counter()
        with self.bar:
            pairs = range(len(plan.pairs))
            if plan.baseline:
                self.mark([()], pairs)
            change = self.first_changes() if plan.prune else {}
            pool = self.kept(change)
            rounds: list[Round] = []
            chosen: tuple[Head, ...] = ()
            for _ in range(plan.rounds):
                result = self.round(pool, chosen)
                chosen = (*chosen, *result.chosen)
                if plan.validate:
                    self.mark([chosen], pairs)
                    result = result.validated(self.mean(chosen, pairs))
                rounds.append(result)
            shown = self.show(chosen)
        heads = HeadSet.from_pairs(
            chosen, model=model, layers=layers, method="HeadHunter, arXiv 2506.10978", u=plan.u, scale=plan.scale,
            objective=objective,
        )  # fmt: skip
        return Hunted(
            heads=heads, pool=self.pool, rounds=tuple(rounds), plan=plan,
            baseline=self.mean((), pairs) if plan.baseline else None, change=change,
            images=len(self.marks) + sum(map(len, shown.values())), generated=self.generated,
            seconds=time.perf_counter() - began, pictures=shown,
        )  # fmt: skip

    def round(self, pool: Sequence[Head], chosen: tuple[Head, ...]) -> Round:
        """Try every head beside the chosen ones and choose the k best."""
        plan = self.plan
        left = [h for h in pool if h not in chosen or not plan.skip_chosen]
        scores: dict[Head, float] = {}
        seen: dict[Head, int] = {}
        if plan.group:
            rows = deal(left, chosen, plan)
            self.mark_units(cut(rows, plan))
            scores = worth(rows, self.marks, left)
            left.sort(key=lambda h: (-scores[h], self.pool.index(h)))
            return Round(tuple(left[: plan.k]), scores, dict.fromkeys(left, len(plan.pairs)), None)
        for pairs, n in plan.stages(len(left)):
            left = left[:n]
            self.mark([(*chosen, h) for h in left], pairs)
            upto = range(pairs.stop)
            for h in left:
                scores[h], seen[h] = self.mean((*chosen, h), upto), pairs.stop
            left.sort(key=lambda h: (-scores[h], self.pool.index(h)))
        best = tuple(h for h in left if h not in chosen)[: plan.k]
        return Round(best, scores, seen, None)

    def mean(self, heads: tuple[Head, ...], pairs: range) -> float:
        return sum(self.marks[heads, i] for i in pairs) / len(pairs)

    def mark(self, candidates: Sequence[tuple[Head, ...]], pairs: range) -> None:
        """Mark candidates on pairs, but for those that are marked."""
        new = [c for c in candidates if any((c, i) not in self.marks for i in pairs)]
        self.mark_units(units(new, pairs, self.plan))

    def mark_units(self, work: Sequence[Unit]) -> None:
        """Generate and mark whatever is not in the log, together with the other processes."""
        todo = [(key_of("marks", unit.rows), unit) for unit in work]
        for key, unit in todo:
            if key in self.log.records:
                self.learn(unit, self.log.marks(key, len(unit.rows)))
        missing = [(key, unit) for key, unit in todo if key not in self.log.records]
        for key, unit in missing[self.crew.rank :: self.crew.size]:
            images = draw(self.pipe, self.plan, unit.rows)
            prompts = [self.plan.pairs[i][0] for _, i in unit.rows]
            marks = marks_of(self.scorer, images, prompts)
            rows = [[[list(h) for h in heads], i] for heads, i in unit.rows]
            self.log.add(key, {"rows": rows, "marks": marks})
            self.generated += len(images)
            self.learn(unit, marks)
        self.log.merge(self.crew.share)
        for key, unit in missing:
            self.learn(unit, self.log.marks(key, len(unit.rows)))

    def learn(self, unit: Unit, marks: Sequence[float]) -> None:
        fresh = [row for row in unit.rows if row not in self.marks]
        self.marks.update(zip(unit.rows, marks, strict=True))
        for heads in dict.fromkeys(heads for heads, _ in fresh):
            whole = [self.marks.get((heads, i)) for i in range(len(self.plan.pairs))]
            if heads and all(m is not None for m in whole):
                mean = sum(m for m in whole if m is not None) / len(whole)
                if self.best is None or mean > self.best[0]:
                    self.best = (mean, "+".join(f"{site}:{h}" for site, h in heads[-1:]))
        if self.best is not None:
            self.bar.describe(f"best {self.best[0]:.3f} {self.best[1]}")
        self.bar.update(len(fresh))

    def first_changes(self) -> dict[Head, float]:
        """Measure what replacing each head changes in the first step's prediction."""
        layers: dict[str, list[int]] = {}
        for site, h in self.pool:
            layers.setdefault(site, []).append(h)
        todo = [(key_of("change", site, heads), site, heads) for site, heads in layers.items()]
        missing = [t for t in todo if t[0] not in self.log.records]
        for key, site, heads in missing[self.crew.rank :: self.crew.size]:
            self.log.add(key, {"site": site, "heads": heads, "marks": first_change(self.pipe, self.plan, site, heads)})
        self.log.merge(self.crew.share)
        return {
            (site, h): value
            for key, site, heads in todo
            for h, value in zip(heads, self.log.marks(key, len(heads)), strict=True)
        }

    def kept(self, change: Mapping[Head, float]) -> tuple[Head, ...]:
        """Drop the heads whose replacement changes least."""
        dropped = int(self.plan.prune * len(self.pool)) if change else 0
        weakest = set(sorted(self.pool, key=lambda h: (change.get(h, 0.0), self.pool.index(h)))[:dropped])
        return tuple(h for h in self.pool if h not in weakest)

    def show(self, chosen: tuple[Head, ...]) -> dict[str, list[Any]]:
        """Draw the first pairs without, with each chosen head, and with all of them."""
        if not self.plan.show or self.crew.rank:
            return {}
        sets: dict[str, tuple[Head, ...]] = {"plain": ()}
        sets |= {f"{site} head {h}": ((site, h),) for site, h in chosen}
        sets["all chosen"] = chosen
        n = self.plan.show
        pictures = {label: draw(self.pipe, self.plan, [(heads, i) for i in range(n)]) for label, heads in sets.items()}
        self.generated += n * len(pictures)
        return pictures
