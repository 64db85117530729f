"""What a search for heads shall do, how much it costs, and how much of the published cost it saves.

HeadHunter ("Fine-Grained Perturbation Guidance via Attention Head Selection", arXiv 2506.10978, Algorithm 1): in each
of R rounds every head of the pool joins the chosen ones in turn, M prompt-seed pairs are generated, an objective marks
them, and the k heads with the best mean are chosen. That is M |pool| R images. Every saving below is a
field of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from attnctl.core.sites import Selector, Site, select
from attnctl.errors import ConfigError, SiteError
from attnctl.plans import HeadSet

__all__ = ["STYLE_CONTENTS", "Estimate", "Head", "HuntPlan", "Pictures", "Savings", "halvings"]

Head: TypeAlias = tuple[str, int]
"""A site's name and a head of it."""

_KINDS = ("self", "joint")
_PORTRAIT = "a photo of beautiful girl"
STYLE_CONTENTS = (
    "an elderly man in a wool coat",
    "a young woman in a red dress",
    "a teenage boy with headphones on a rooftop",
    "a smiling girl with a cat in a flower garden",
    "a man against a brick wall",
)
"""The five subjects of the published style search, in words of our own."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How a search makes and marks its pictures, whatever it tries.

    Attributes:
        pairs: (prompt, seed) of the M pictures that judge a candidate.
        scale: Guidance weight w during the search.
        steps: Denoising steps of a picture.
        guidance: Classifier-free guidance scale during the search; 0 is off, as published.
        sites: Selector of the layers to try; None for every self- and joint-attention.
        call: Other arguments of the pipeline, such as height.
        halving: Successive halving over pairs: ((m1, n1), (m2, n2), ...): after m1 pairs keep the best n1 candidates,
            and so on; those that are left see all pairs. Empty for none.
        batch: Pictures in one pipeline call.
        replay: Let the perturbed pass reuse what comes before the first layer that it changes.
        baseline: Mark the M pictures without any perturbation too.
    """

    pairs: tuple[tuple[str, int], ...]
    scale: float = 3.0
    steps: int = 20
    guidance: float = 0.0
    sites: Selector | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    halving: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    replay: bool = True
    baseline: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", _checked_pairs(self.pairs))
        for name in ("steps", "batch"):
            self._whole(name, 1)
        self._number("scale", lambda x: math.isfinite(x) and x != 0, "a finite number other than 0")
        self._number("guidance", lambda x: 0 <= x < math.inf, "a number of 0 or more")
        object.__setattr__(self, "halving", self._checked_halving())

    @property
    def least(self) -> int:
        """Return how many candidates must be left after every stage."""
        return 1

    @property
    def _least(self) -> str:
        return str(self.least)

    def stages(self, n: int) -> list[tuple[range, int]]:
        """List the stages of a round over n candidates: the pairs that each adds, and how many candidates see them."""
        stages, seen, left = [], 0, n
        for upto, keep in self.halving:
            if keep < left:  # a later round's pool may be this small already
                stages.append((range(seen, upto), left))
                seen, left = upto, keep
        return [*stages, (range(seen, len(self.pairs)), left)]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["sites"] = None if self.sites is None else repr(self.sites)
        values["call"] = repr(sorted(self.call.items()))
        return values

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} was given; expected a whole number, {least} or more.")

    def _number(self, name: str, fits: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            raise ConfigError(f"{name}={value!r} was given; expected {wanted}.")

    def _checked_halving(self) -> tuple[tuple[int, int], ...]:
        seen, left = 0, math.inf
        stages = tuple(tuple(stage) for stage in self.halving)
        for stage in stages:
            whole = len(stage) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in stage)
            if not whole or not seen < stage[0] < len(self.pairs) or not self.least <= stage[1] < left:
                raise ConfigError(
                    f"halving={self.halving!r} was given; expected (pairs, candidates to keep) with pairs that grow "
                    f"and stay below {len(self.pairs)}, and candidates that shrink and stay at {self._least} or more."
                )
            seen, left = stage
        return stages  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a search for heads leaves out of the published one, or puts together.

    Attributes:
        skip_chosen: Do not generate again with heads that are chosen already (the first authors' code does).
        prune: Share of the pool to drop before the first round, by the smallest change of the first step's
            prediction; in [0, 1).
        prune_pairs: Pairs that this change is measured on.
        group: Heads that act together in a picture, told apart by least squares; 0 tries each alone.
        repeats: How often the heads are dealt out into groups for each pair.
    """

    skip_chosen: bool = True
    prune: float = 0.0
    prune_pairs: int = 2
    group: int = 0
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class HuntPlan(Pictures, Savings):
    """Describe a search for heads: the pictures, what is saved, and these.

    Attributes:
        rounds: R; heads chosen in one round act in the next ones.
        k: Heads chosen in a round.
        u: Strength of the perturbation during the search, in (0, 1].
        heads: Restricts the pool to a `HeadSet` or to pairs (site name or depth, head).
        validate: Mark the M pictures of the chosen set after each round, as published.
        show: Pairs to draw at the end without, with each chosen head, and with the whole set.
    """

    rounds: int = 1
    k: int = 24
    u: float = 0.25
    heads: HeadSet | Sequence[tuple[str | int, int]] | None = None
    validate: bool = False
    show: int = 0

    def __post_init__(self) -> None:
        self._whole("k", 1)  # what halving must leave
        super().__post_init__()
        if self.heads is not None and not isinstance(self.heads, HeadSet):
            object.__setattr__(self, "heads", HeadSet.from_pairs(self.heads).pairs)
        for name, least in (("rounds", 1), ("prune_pairs", 1), ("show", 0), ("group", 0), ("repeats", 1)):
            self._whole(name, least)
        for name in ("prune_pairs", "show"):
            if (name != "prune_pairs" or self.prune) and getattr(self, name) > len(self.pairs):
                raise ConfigError(
                    f"{name}={getattr(self, name)} is out of range: there are {len(self.pairs)} prompt-seed pairs."
                )
        self._number("u", lambda x: 0 < x <= 1, "a number above 0, up to 1")
        self._number("prune", lambda x: 0 <= x < 1, "the share of the pool to drop, from 0 to below 1")
        if self.halving and not self.skip_chosen:
            raise ConfigError("halving ranks new heads only: use it with skip_chosen=True.")
        self._check_group()

    @property
    def least(self) -> int:
        return self.k

    @property
    def _least(self) -> str:
        return f"{self.k} (k)"

    def _check_group(self) -> None:
        if not self.group and self.repeats > 1:
            raise ConfigError(f"repeats={self.repeats} deals out groups of heads: give group too (12, for instance).")
        if self.group == 1:
            raise ConfigError("group=1 was given; a group has two heads or more. 0 tries every head alone.")
        if self.group and (self.halving or not self.skip_chosen):
            raise ConfigError(
                "group marks many heads in each picture: there is nothing to halve, and no chosen head to draw again. "
                "Use it with halving=() and skip_chosen=True."
            )

    @classmethod
    def quality(cls, prompts: Sequence[str], *, portrait: str | None = _PORTRAIT, **changes: Any) -> HuntPlan:
        """Return the published search for general quality: seed 0 of each prompt (ten there), and ten of a portrait.

        Args:
            prompts: What the objective shall hold for.
            portrait: The prompt of seeds 0 to 9; None leaves these pairs out.
            changes: Fields to change.
        """
        pairs = [(p, 0) for p in _texts(prompts)] + [(portrait, s) for s in range(10) if portrait is not None]
        return cls(**{"pairs": tuple(pairs), "rounds": 1, "k": 24, "u": 0.25, "scale": 3.0, "steps": 20, **changes})

    @classmethod
    def style(cls, style: str, contents: Sequence[str] = STYLE_CONTENTS, **changes: Any) -> HuntPlan:
        """Return the published search for a style: "style, content" for each content, the seed being its index."""
        pairs = [(f"{style}, {text}", i) for i, text in enumerate(_texts(contents))]
        return cls(
            **{
                "pairs": tuple(pairs),
                "rounds": 5,
                "k": 3,
                "u": 1.0,
                "scale": 3.0,
                "steps": 20,
                "validate": True,
                **changes,
            }
        )

    def pool(self, sites: Sequence[Site]) -> tuple[Head, ...]:
        """List the heads to search among, in execution order.

        Raises:
            SiteError: Nothing is left, or a head does not exist.
        """
        if self.heads is None:
            attention = [s for s in sites if s.kind in _KINDS]
            if self.sites is not None:
                attention = list(select(sites, self.sites, kinds=_KINDS, what="the pool"))
            heads = tuple((s.name, h) for s in attention for h in range(s.heads))
        else:
            heads = self._named(sites)
        if not heads:
            raise SiteError(
                "The pool is empty: the model has no self- or joint-attention that the plan's sites and heads leave. "
                "attnctl.find_sites(pipe) lists what there is."
            )
        return heads

    def _named(self, sites: Sequence[Site]) -> tuple[Head, ...]:
        pairs = self.heads.pairs if isinstance(self.heads, HeadSet) else tuple(self.heads or ())
        allowed = {s.name for s in select(sites, self.sites, kinds=_KINDS, what="the pool")} if self.sites else None
        named = []
        for where, head in pairs:
            (site, *more) = select(sites, where, kinds=_KINDS, what="the pool")
            if more or not 0 <= head < site.heads:
                raise SiteError(
                    f"The pool names head {head} of {where!r}, which is out of range: {site.name} has heads 0 to "
                    f"{site.heads - 1}" + (f", and {len(more)} more sites match." if more else ".")
                )
            if allowed is None or site.name in allowed:
                named.append((site.name, head))
        order = {s.name: i for i, s in enumerate(sites)}
        return tuple(sorted(set(named), key=lambda p: (order[p[0]], p[1])))

    def groups(self, n: int) -> int:
        """Count the groups that n heads are dealt out into: of nearly equal size, none larger than `group`."""
        return -(-n // self.group)

    def estimate(self, pool: Sequence[Head]) -> Estimate:
        """Count what the search will generate.

        Raises:
            ConfigError: The pool has fewer heads than the rounds choose, or fewer than two groups.
        """
        n, m = len(pool), len(self.pairs)
        remaining = n - int(self.prune * n)
        if self.rounds * self.k > remaining:
            raise ConfigError(
                f"{self.rounds} rounds of k={self.k} choose {self.rounds * self.k} heads, but the pool has {remaining}"
                f"{f' ({n} before pruning)' if remaining < n else ''}: choose fewer, or widen the pool."
            )
        sizes = [remaining - (self.k * r if self.skip_chosen else 0) for r in range(self.rounds)]
        if self.group and self.groups(min(sizes)) < 2:
            raise ConfigError(
                f"group={self.group} leaves the pool of {min(sizes)} heads undivided, so that no head can be told from "
                f"another: give group={max(2, min(sizes) // 4)} or so."
            )
        if self.group:
            searched = tuple(m * self.repeats * self.groups(size) for size in sizes)
        else:
            searched = tuple(sum(len(pairs) * left for pairs, left in self.stages(size)) for size in sizes)
        layers = len({site for site, _ in pool})
        chosen = self.rounds * self.k
        rows = 2 + (self.guidance > 1)
        shown = self.show * (2 + chosen)
        checked = m * self.rounds if self.validate and self.k > 1 else 0  # a set of one was marked as a candidate
        marked = sum(searched) + m * self.baseline + checked
        guided = sum(searched) + checked + self.show * (1 + chosen)
        plain = m * self.baseline + self.show
        first = self.prune_pairs * (layers * (rows - 1) + n) if self.prune else 0
        return Estimate(
            search=searched, marked=marked, shown=shown,
            passes=self.steps * (guided * rows + plain * (rows - 1)) + first,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.group:  # logs of searches by single heads stay readable
            del values["group"], values["repeats"]
        if isinstance(self.heads, HeadSet):
            values["heads"] = self.heads.to_dict()
        return values


@dataclass(frozen=True)
class Estimate:
    """Hold the cost of a search.

    Attributes:
        search: Images of each round.
        marked: All images that the objective marks: the rounds, the baseline, the validations.
        shown: Images for the grid at the end.
        passes: Rows that go through the denoiser; a perturbed pass that is replayed in part counts whole.
    """

    search: tuple[int, ...]
    marked: int
    shown: int
    passes: int

    @property
    def images(self) -> int:
        """Count all images."""
        return self.marked + self.shown


def halvings(n: int, pairs: int, k: int, *, first: int = 2, factor: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Choose stages of successive halving: pairs grow and heads shrink by `factor`, never below k.

    Example:
        >>> halvings(48, 16, 6)
        ((2, 24), (4, 12), (8, 6))
    """
    stages: list[tuple[int, int]] = []
    seen, left = float(first), n / factor
    while round(seen) < pairs and n > k:
        keep = max(k, math.ceil(left))
        if stages and keep >= stages[-1][1]:
            break
        stages.append((round(seen), keep))
        seen, left = seen * factor, left / factor
    return tuple(stages)


def _texts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ConfigError(f"Expected a list of prompts that are not empty, got {prompts!r}.")
    return tuple(prompts)


def _checked_pairs(pairs: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise ConfigError(f"pairs={pairs!r} was given; expected at least one (prompt, seed).")
    checked = []
    for pair in pairs:
        fine = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
        if not fine or isinstance(pair[1], bool) or not isinstance(pair[1], int) or not 0 <= pair[1] < 2**63:
            raise ConfigError(
                f"The pair {pair!r} is out of range; expected (prompt, seed) with a seed from 0 to 2**63 - 1."
            )
        if (pair[0], pair[1]) in checked:
            raise ConfigError(f"The pair {pair!r} is there twice; the same picture would count double.")
        checked.append((pair[0], pair[1]))
    return tuple(checked)
