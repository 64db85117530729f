"""Controls as knobs: which fields of a method a page shows, as what, and the control that they add up to.

Everything is read off the dataclasses: a field's type says what its knob is, its default where it stands. Only the
order, and the range that a slider spans, are written down here.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from attnctl.data.specs import control_from_dict, control_to_dict, methods, parse_control
from attnctl.errors import ConfigError, JudgeError

__all__ = ["Knob", "about", "control_of", "knobs_of", "nouns", "preset", "selector"]

Kind = Literal["slider", "number", "choice", "switch", "text"]

# In the order shown; fields that are not named here are for the short form.
_MAIN = (
    *("scale", "u", "sigma", "target", "scope", "concepts", "step_size", "grad_transform", "seg", "ret"),
    *("tau", "alpha", "beta", "motion", "ratio", "agent_ratio", "sites", "start", "stop", "every"),
)
_SHARE = (0.0, 1.0, 0.05)
_RANGES = {
    **dict.fromkeys(("u", "alpha", "start", "stop", "ratio", "agent_ratio"), _SHARE),
    **dict.fromkeys(("seg", "ret"), (0.0, 5.0, 0.1)),
    "scale": (0.0, 10.0, 0.1),
    "step_size": (0.0, 40.0, 0.1),
    "tau": (1.0, 10.0, 0.1),
    "motion": (0.0, 4.0, 0.1),
    "every": (1, 10, 1),
}
_HINTS = {
    "sites": "blank: published",
    "concepts": "blank: the nouns",
    "sigma": "tokens; inf: the mean",
}


@dataclass(frozen=True)
class Knob:
    """Describe one field of a method as something to turn.

    Attributes:
        method: The method's name.
        field: The field's name.
        kind: What it is shown as.
        default: Where it stands: a number, a choice, or text.
        span: Lowest and highest value and the step, of a slider.
        choices: What a choice is made from.
        hint: What blank means.
    """

    method: str
    field: str
    kind: Kind
    default: Any
    span: tuple[float, float, float] = (0.0, 1.0, 0.05)
    choices: tuple[str, ...] = ()
    hint: str = ""

    @property
    def name(self) -> str:
        """Return the name of its argument in a call of the page from a program: PAG_scale."""
        return f"{self.method}_{self.field}"


@cache
def knobs_of(method: str) -> tuple[Knob, ...]:
    """List the main knobs of a method.

    Raises:
        ConfigError: there is no such method.
    """
    cls = _class(method)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return tuple(_knob(method, fields[name], _choices(cls, fields[name])) for name in _MAIN if name in fields)


def about(method: str) -> str:
    """Say in the first line of its docstring what a method does."""
    return (_class(method).__doc__ or "").strip().split("\n")[0]


@cache
def preset(model: str, method: str) -> dict[str, Any]:
    """Return the fields in which a method's setting for a model differs from its defaults.

    For shipped models this is the setting of `attnctl demo`, for others nothing: the defaults are the published ones.
    """
    from attnctl.app.commands.demo import SHEETS

    forms = [c for s in SHEETS if s.model == model for p in s.panels for c in p.controls] + _PRESETS.get(model, [])
    for form in forms:
        if form.partition("(")[0] == method:
            control = parse_control(form.replace("NOUNS", '("a", "b")'))
            plain = dataclasses.fields(control)
            values = control_to_dict(control)
            return {f.name: values[f.name] for f in plain if getattr(control, f.name) != f.default} | _open(form)
    return {}


# For methods that the demo does not show: how far its latent guidances move latents of this scale.
_PRESETS = {
    "shapes:mmdit": [
        'AStar(concepts=NOUNS, grad_transform="l2", step_size=1.0, stop=0.1)',
        'AttendExcite(concepts=NOUNS, grad_transform="l2", step_size=0.5, thresholds=())',
        "SEG(scale=2.5, sites=6)",
        "TPG(scale=2.5, sites=6)",
    ],
}


def control_of(method: str, values: Mapping[str, Any], model: str = "", prompt: str = "") -> Any:
    """Make a control of what its knobs say, on top of the setting for the model.

    Args:
        method: The method's name.
        values: Knob values by field; None and blank text leave a field at its default.
        model: The model, whose setting holds for fields without a knob.
        prompt: The prompt, whose nouns are the concepts where none are named.

    Raises:
        ConfigError: a value is refused, by the control's own words.
    """
    found = {"method": method, **preset(model, method)}
    for knob in knobs_of(method):
        if knob.field in values:
            found.pop(knob.field, None)
            value = _read(knob, values[knob.field])
            if value is not None:
                found[knob.field] = value
    if any(knob.field == "concepts" for knob in knobs_of(method)) and not found.get("concepts"):
        found["concepts"] = nouns(prompt)
    return control_from_dict(found)


def selector(text: Any) -> Any:
    """Read "up.0, 6" as a selector of sites: names and depths, one alone as it is, blank text as None."""
    parts = _parts(text)
    return parts[0] if len(parts) == 1 else parts or None


def _parts(text: Any) -> tuple[str | int, ...]:
    parts = [part.strip() for part in str(text or "").split(",") if part.strip()]
    return tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)


def nouns(prompt: str) -> tuple[str, ...]:
    """Name the shapes of a prompt of the shapes world.

    Raises:
        ConfigError: it is another prompt, whose concepts must be named.
    """
    from attnctl.app.commands.demo import nouns as of_prompt

    try:
        return of_prompt(prompt)
    except JudgeError:
        raise ConfigError(
            f"Name the concepts, words of the prompt such as cat, dog: they are found by themselves only in prompts "
            f"of the shapes world, and {prompt!r:.200} is none."
        ) from None


def _open(form: str) -> dict[str, Any]:
    """Leave the concepts open where a setting takes them from the prompt."""
    return {"concepts": []} if "NOUNS" in form else {}


def _class(method: str) -> type:
    known = methods()
    if method not in known:
        raise ConfigError(f"There is no method {method!r}; there are {', '.join(known)}.")
    return known[method]


def _choices(cls: type, field: Any) -> tuple[str, ...]:
    """List the values of a field whose type is a named Literal."""
    owner = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {}))
    named = getattr(sys.modules[owner.__module__], str(field.type), None)
    return get_args(named) if get_origin(named) is Literal else ()


def _knob(method: str, field: Any, choices: tuple[str, ...]) -> Knob:
    name, default = field.name, field.default
    said = _HINTS.get(name, "")
    if choices:
        return Knob(method, name, "choice", default, choices=choices)
    if isinstance(default, bool):
        return Knob(method, name, "switch", default)
    if name in _RANGES:
        low, high, step = _RANGES[name]
        top = max(high, default if isinstance(default, (int, float)) else high)
        return Knob(method, name, "slider", low if default is None else default, (low, top, step), hint=said)
    if isinstance(default, (int, float)) and math.isfinite(default):
        return Knob(method, name, "number", default, hint=said)
    return Knob(method, name, "text", "" if default is None or default == () else str(default), hint=said)


def _read(knob: Knob, value: Any) -> Any:
    """Turn what a knob holds into what its field takes."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if knob.field == "sites":
        return selector(value)
    if knob.field == "concepts":
        return _parts(value)
    if knob.kind == "text":
        return _number(knob, value)
    return int(value) if knob.kind == "slider" and isinstance(knob.default, int) else value


def _number(knob: Knob, text: Any) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{knob.method}: {knob.field}={text!r} is not a number; inf is one.") from None
