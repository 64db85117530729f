"""`attnctl models`: which control acts on which denoiser class of the installed diffusers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table

__all__ = ["Models"]

_MARKS = {"acts": "+", "refused": "-", "fault": "x", "unknown": "?"}


@dataclass(frozen=True, kw_only=True)
class Models(Common):
    """List the denoiser classes of the installed diffusers, with the controls that act on each."""

    name: tyro.conf.Positional[str] = ""
    """A class or a family to tell the reasons of; all classes are listed without one."""

    def run(self, command: str) -> Result:
        """Read what benchmarks/coverage.py has found; nothing is built."""
        importing()
        from attnctl.core.hosts.classes import denoiser_classes
        from attnctl.core.hosts.families import FAMILIES
        from attnctl.data.controls import controls
        from attnctl.data.coverage import Row, stored

        classes = denoiser_classes()
        coverage = stored()
        if self.name:
            chosen = _chosen(self.name, classes, {f.name: f.classes for f in FAMILIES})
            classes = tuple(c for c in classes if c in chosen)
        unknown = Row("unknown", (), {}, "unknown", (), {})
        rows = {cls: coverage.get(cls, unknown) for cls in classes}
        names = [n for n in controls("attnctl") if any(n in row.cells for row in coverage.values())]
        if not self.json and (left := [n for n in controls("attnctl") if n not in names]):
            say(f"Not run on the classes, and so not in the table: {', '.join(left)}.")
        data: dict[str, Any] = {
            cls: {"family": row.family, "controls": {n: dataclasses.asdict(row.cell(n)) for n in names}}
            for cls, row in rows.items()
        }
        if self.name:
            return Result({"models": data}, "\n\n".join(_described(cls, row, names) for cls, row in rows.items()))
        if not self.json:
            say("+ acts, - refuses in words (`attnctl models CLASS` says why), x fault, ? not run.")
        lines = [(cls, row.family, *(_MARKS[row.cell(n).state] for n in names)) for cls, row in rows.items()]
        return Result({"models": data}, table(("class", "family", *names), lines))


def _chosen(name: str, classes: tuple[str, ...], families: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Find the classes that a name means.

    Raises:
        UsageError: It is the name of no class and of no family.
    """
    from attnctl.errors import nearest

    if name in classes:
        return (name,)
    if name in families:
        return families[name]
    close = nearest(name, [*classes, *families])
    raise UsageError(f"{name!r} is no denoiser class of the installed diffusers, and no family.{close}")


def _described(cls: str, row: Any, names: list[str]) -> str:
    """Tell of one class what every control did."""
    sites = ", ".join(f"{n} {kind}" for kind, n in row.sites.items()) or "none seen"
    lines = [f"{cls}: family {row.family}, sites of its tiny model: {sites}"]
    if not row.cells:
        return f"{cls}: unknown: attnctl has not been run on it. `attnctl.control` refuses what cannot be."
    return "\n".join([*lines, table(("control", "", "why"), [(n, row.cell(n).state, row.cell(n).why) for n in names])])
