"""What the controls declare, gathered for readers: `attnctl controls` prints it, and the reference pages hold it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from dataclasses import dataclass
from typing import Any

from attnctl.core.control import Control
from attnctl.core.hosts.families import FAMILIES
from attnctl.core.hosts.published import published_in
from attnctl.core.registry import Bounds, Conflict, declared
from attnctl.data.about import About, Preset
from attnctl.data.controls import controls

__all__ = ["Entry", "FieldEntry", "conflicts_of", "entry", "presets_for", "range_in_words"]

_PLACES = {"site": "at one site", "block": "in one block", "model": "in one model"}


@dataclass(frozen=True)
class FieldEntry:
    """Describe one field: its name, default and range as text, and its meaning."""

    name: str
    default: str
    range: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """Describe one control.

    Attributes:
        name: The name of its class.
        about: What it says about itself; None for a control of a user's own that says nothing.
        summary: The first line of its docstring.
        module: Where it is defined.
        fields: Its fields, its own before those of its bases.
        sites: Pairs (family, published place) of the families that have one.
        conflicts: Triples (other control, where, reason).
        presets: Its settings for the shipped models.
    """

    name: str
    about: About | None
    summary: str
    module: str
    fields: tuple[FieldEntry, ...]
    sites: tuple[tuple[str, str], ...]
    conflicts: tuple[tuple[str, str, str], ...]
    presets: tuple[Preset, ...]

    @property
    def does(self) -> str:
        """Return in half a sentence what it does."""
        return self.about.does if self.about is not None else self.summary


def entry(cls: type[Control]) -> Entry:
    """Gather what a control declares."""
    about = vars(cls).get("about")
    general = {f.name for base in cls.__mro__[1:] if base.__module__.startswith("attnctl.core.") for f in _own(base)}
    fields = sorted(dataclasses.fields(cls), key=lambda f: f.name in general)
    meanings = _meanings(cls)
    return Entry(
        name=cls.__name__,
        about=about,
        summary=(inspect.getdoc(cls) or "").split("\n")[0],
        module=cls.__module__,
        fields=tuple(
            FieldEntry(f.name, _default(f), range_in_words(declared(cls)[f.name]), meanings.get(f.name, ""))
            for f in fields
        ),
        sites=_published(cls),
        conflicts=tuple((name, _PLACES[c.where], c.reason) for name, c in conflicts_of(cls)),
        presets=tuple(vars(cls).get("presets", ())),
    )


def _own(cls: type) -> tuple[Any, ...]:
    return tuple(vars(cls).get("__dataclass_fields__", {}).values())


def _published(cls: type[Control]) -> tuple[tuple[str, str], ...]:
    """List the families whose published sites the control takes for `sites=None`: none where a rule chooses them."""
    rule = isinstance(cls.about, About) and cls.about.sites and not cls.published
    pairs = [(family.name, published_in(cls, family)) for family in FAMILIES]
    return () if rule else tuple((name, default.describe()) for name, default in pairs if default is not None)


def conflicts_of(cls: type[Control]) -> list[tuple[str, Conflict]]:
    """List the controls that one cannot act together with, and why, whoever of the two declares it."""
    from attnctl.core.conflicts import conflict_between

    pairs = [(name, conflict_between(cls, other)) for name, other in controls().items()]
    return [(name, conflict) for name, conflict in pairs if conflict is not None]


def presets_for(model: str) -> dict[str, Preset]:
    """List the settings that controls declare for a model, by method."""
    declared = [preset for cls in controls().values() for preset in vars(cls).get("presets", ())]
    return {preset.method: preset for preset in declared if preset.model == model}


def range_in_words(bounds: Bounds | None) -> str:
    """Say what a field may hold; "" where a check of the control's own decides."""
    if bounds is None:
        return ""
    if bounds.kind in ("free", "choice"):
        text = ", ".join(repr(option) for option in bounds.choices) or bounds.values
    elif bounds.kind == "window":
        text = "0 to 1, or a pair of them"
    else:
        low, high = bounds.low, bounds.high
        text = f"above {bounds.above:g}" if bounds.above is not None else "" if math.isinf(low) else f"{low:.10g}"
        if bounds.below is not None:
            text += f", below {bounds.below:g}"
        elif not math.isinf(high):
            text += f" to {high:.10g}"
        elif text and bounds.above is None:
            text += " or more"
        text = f"{'whole, ' if bounds.kind == 'whole' else ''}{text or 'any'}"
        text += f" ({bounds.unit})" if bounds.unit else ""
    return f"{text}, or None" if text and bounds.none else text


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    return repr(field.default)


def _meanings(cls: type) -> dict[str, str]:
    """Read what fields mean off the sections "Attributes" of a class and its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(
            r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(vars(base).get("__doc__") or ""), re.M
        )
        if section is not None:
            parts = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1], re.M)
            meanings |= {name: " ".join(meaning.split()) for name, meaning in parts}
    return meanings
