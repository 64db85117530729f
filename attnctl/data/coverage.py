"""Which control acts on which denoiser class of diffusers: what `benchmarks/coverage.py` has run.

The result lies beside this file. A class has a state for each control: "acts", or why not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["STORED", "Cell", "Row", "stored"]

STORED = Path(__file__).parent / "coverage.json"
_WORST = {"fault": 0, "acts": 1, "refused": 2, "unknown": 3}  # of several models of a class, the first in this order

State = Literal["acts", "refused", "fault", "unknown"]


@dataclass(frozen=True)
class Cell:
    """What happened when one control met one class.

    Attributes:
        state: "acts", "refused" (in words), "fault", or "unknown" where it was not run.
        why: The error of attnctl, or "".
    """

    state: State
    why: str = ""


@dataclass(frozen=True)
class Row:
    """What was run on one class.

    Attributes:
        family: The family's name in attnctl's table.
        models: The tiny models that stand for the class.
        sites: Number of sites by kind, of the first of them.
        through: "exact" where wrapping every site changes no bit, else what went wrong.
        wrong: Sites whose text rows PAG changed, with the reason.
        cells: What happened by control.
    """

    family: str
    models: tuple[str, ...]
    sites: Mapping[str, int]
    through: str
    wrong: tuple[str, ...]
    cells: Mapping[str, Cell]

    def cell(self, control: str) -> Cell:
        """Return what happened with one control."""
        return self.cells.get(control, Cell("unknown"))


@cache
def stored() -> dict[str, Row]:
    """Read the stored result, by class, sorted."""
    result = json.loads(STORED.read_text(encoding="utf-8"))
    reasons: list[str] = result["reasons"]
    models: dict[str, dict[str, Any]] = {
        name: one | {"cells": {n: (state, *(reasons[i] for i in why)) for n, (state, *why) in one["cells"].items()}}
        for name, one in result["models"].items()
    }
    by_class: dict[str, list[str]] = {}
    for name, one in models.items():
        by_class.setdefault(one["class"], []).append(name)
    return {cls: _row([models[n] for n in names], names) for cls, names in sorted(by_class.items())}


def _row(models: list[Mapping[str, Any]], names: list[str]) -> Row:
    first = models[0]
    controls = dict.fromkeys(name for one in models for name in one["cells"])
    return Row(
        family=first["family"],
        models=tuple(names),
        sites=first["sites"],
        through=next((one["through"] for one in models if one["through"] != "exact"), "exact"),
        wrong=tuple(line for one in models for line in one["roles"]["wrong"]),
        cells={name: _first(Cell(*one["cells"][name]) for one in models if name in one["cells"]) for name in controls},
    )


def _first(cells: Iterable[Cell]) -> Cell:
    return min(cells, key=lambda cell: _WORST[cell.state])
