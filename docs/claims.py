"""The table of claims: what is claimed of each method, and whether a recorded study shows it here."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from attnctl.app.commands.bench import catalogue, command_of

__all__ = ["Claim", "claims", "shown"]

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OTHERS = {"HeadHunter": "hunt", "backbones": "backbones"}
"""What is no control, and its page."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Hold a claim with what was measured; `gain` is None where the study has no interval.

    Attributes:
        control: A control, or a key of `OTHERS`.
        claim, regime, marks: What is claimed, where it was tried, and what the figures count.
        command: What measures it.
        plain, value: The figures without and with the method; None where there is none.
        gain: The difference (or ratio) and the bounds of its 95 % interval.
        n: How many were counted; None where that means nothing.
        holds: Whether the interval lies where the claim says, or the figure reaches what is wanted.
    """

    control: str
    claim: str
    regime: str
    marks: str
    command: str
    plain: float | None = None
    value: float | None = None
    gain: tuple[float, ...] | None = None
    n: int | None = None
    holds: bool = field(default=False)


def _at(data: Any, place: str) -> Any:
    """Look a value up; keys and indices are joined by "/".

    Raises:
        LookupError: there is nothing.
    """
    for key in place.split("/"):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def _figure(data: Any, place: str | None) -> float | None:
    """Read a share, which may come with its interval; "a * b" is a product."""
    if place and " * " in place:
        return math.prod(_at(data, part) for part in place.split(" * "))
    found = None if not place else _at(data, place)
    return found[0] if isinstance(found, list) else found


def _interval(data: Any, place: str | None) -> tuple[float, ...] | None:
    found = None if not place else _at(data, place)
    if isinstance(found, dict):
        return found["mean"], found["mean"] - found["half"], found["mean"] + found["half"]
    return None if found is None else tuple(found)


@cache
def claims() -> tuple[Claim, ...]:
    """Read every claim whose study has a recorded result.

    Raises:
        LookupError: a claim names a study or a place that is not there.
    """
    studies = {benchmark.name: benchmark for benchmark in catalogue(BENCHMARKS)}
    found = []
    for entry in tomllib.loads((BENCHMARKS / "claims.toml").read_text(encoding="utf-8"))["claim"]:
        study = studies[entry["study"]]
        path = BENCHMARKS / "results" / study.out
        if not path.is_file():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        plain, value = _figure(data, entry.get("plain")), _figure(data, entry.get("with"))
        gain, n = _interval(data, entry.get("gain")), _figure(data, entry.get("n"))
        if "least" in entry:
            holds = value is not None and value >= entry["least"]
        else:
            assert gain is not None
            edge = entry.get("from", 0.0)
            holds = gain[1] > edge if entry["wanted"] == "up" else gain[2] < edge
        facts = {name: entry[name] for name in ("control", "claim", "regime", "marks")}
        found.append(
            Claim(
                **facts,
                command=command_of(study),
                plain=plain,
                value=value,
                gain=gain,
                n=None if n is None else int(n),
                holds=holds,
            )
        )
    return tuple(found)


def shown() -> tuple[int, int]:
    """Count the claims that are shown, and all that were tried."""
    return sum(claim.holds for claim in claims()), len(claims())


def counts(controls: Sequence[str]) -> Iterator[str]:
    """Say how many claims are shown, and for how many methods one is."""
    hold, tried = shown()
    names = [*controls, *OTHERS]
    with_one = {claim.control for claim in claims() if claim.holds}
    without = [name for name in names if name not in {claim.control for claim in claims()}]
    yield (
        f"{hold} of {tried} claims that were tried are shown here, for {len(with_one)} of {len(names)} methods; "
        f"{len(without)} methods have no study."
    )


def rows(controls: Sequence[str], links: dict[str, str]) -> Iterator[str]:
    """Write a row for each claim, in the order of the methods, and one for each method without a study."""
    yield "| method | claim | regime | counted | plain | with | difference [95 %] | n | shown | command |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in (*controls, *OTHERS):
        own = [claim for claim in claims() if claim.control == name]
        cell = f"[`{name}`]({links[name]})" if name in controls else f"[{name}]({links[name]})"
        for c in own:
            sign = "" if c.marks.startswith("times") else "+"
            gain = "" if c.gain is None else f"{c.gain[0]:{sign}.3g} [{c.gain[1]:{sign}.3g}, {c.gain[2]:{sign}.3g}]"
            figures = " | ".join("" if v is None else f"{v:.4g}" for v in (c.plain, c.value))
            yield (
                f"| {cell} | {c.claim} | {c.regime} | {c.marks} | {figures} | {gain} | {c.n or ''} | "
                f"{'yes' if c.holds else 'no'} | `{c.command}` |"
            )
        if not own:
            yield f"| {cell} | | | | | | not measured | | | |"
