"""`attnctl controls`: which controls there are, and what one of them takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, table

__all__ = ["Controls"]


@dataclass(frozen=True, kw_only=True)
class Controls(Common):
    """List the controls for --control, or describe one: its fields, layers, conflicts and settings."""

    name: tyro.conf.Positional[str] = ""
    """The control to describe, such as PAG; all are listed without one."""

    def run(self, command: str) -> Result:
        """Read the registry, other packages' controls included."""
        importing()
        from attnctl.data.catalogue import entry
        from attnctl.data.controls import control_named, controls, load_entry_points
        from attnctl.errors import ConfigError

        if self.name:
            try:
                one: Any = entry(control_named(self.name))
            except ConfigError as error:
                raise UsageError(str(error)) from None
            return Result(dataclasses.asdict(one), _described(one))
        load_entry_points()
        entries: list[Any] = [entry(cls) for cls in controls().values()]
        rows = [(e.name, e.does, e.about.paper if e.about else e.module) for e in entries]
        data = [{"name": name, "does": does, "paper": paper} for name, does, paper in rows]
        return Result({"controls": data}, table(("control", "what it does", "paper"), rows))


def _described(one: Any) -> str:
    """Lay a control out in sections."""
    lines = [f"{one.name}: {one.does}"]
    if one.about is not None:
        facts = {"paper": one.about.paper, "sites": one.about.sites, "needs": ", ".join(one.about.needs)}
        lines += [f"{name}: {value}" for name, value in facts.items() if value]
    fields = [(f.name, f.default, f.range or "-", f.meaning) for f in one.fields]
    lines += ["", table(("field", "default", "range", "meaning"), fields)]
    if one.sites:
        lines += ["", table(("family", "published layers"), one.sites)]
    if one.conflicts:
        lines += ["", table(("not together with", "", "because"), one.conflicts)]
    if one.presets:
        lines += ["", table(("model", "setting"), [(p.model, p.form) for p in one.presets])]
    return "\n".join(lines)
