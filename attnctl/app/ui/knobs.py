"""Controls as knobs: which fields of a method a page shows, as what, and the control that they add up to.

Everything is read off the classes of controls: which fields are shown, in which range, with which hint
(`attnctl.core.registry.knob`), and the settings for the shipped models (`Control.presets`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from attnctl.core.registry import Bounds, declared
from attnctl.data.catalogue import presets_for
from attnctl.data.controls import control_named
from attnctl.data.specs import control_from_dict, control_to_dict, parse_control
from attnctl.errors import ConfigError, JudgeError

__all__ = ["Knob", "about", "control_of", "knobs_of", "nouns", "preset", "selector"]

Kind = Literal["slider", "number", "choice", "switch", "text", "numbers"]


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
    cls = control_named(method)
    shown = [(f, bounds) for f in dataclasses.fields(cls) if (bounds := declared(cls)[f.name]) and bounds.shown]
    return tuple(_knob(method, f, bounds) for f, bounds in sorted(shown, key=lambda pair: pair[1].last))


def about(method: str) -> str:
    """Say in the first line of its docstring what a method does."""
    return (control_named(method).__doc__ or "").strip().split("\n")[0]


@cache
def preset(model: str, method: str) -> dict[str, Any]:
    """Return the fields in which a method's setting for a model differs from its defaults.

    Methods declare them for the shipped models; for others the defaults are the published ones.
    """
    offered = presets_for(model).get(method)
    if offered is None:
        return {}
    control = parse_control(offered.form.replace("NOUNS", '("a", "b")'))
    values = control_to_dict(control)
    fields = [f for f in dataclasses.fields(control) if getattr(control, f.name) != f.default]
    setting = {f.name: values[f.name] for f in fields}
    if "NOUNS" in offered.form:
        setting["concepts"] = []  # open: they are taken from the prompt
    return setting


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
    fields = {"method": method, **preset(model, method)}
    for knob in knobs_of(method):
        if knob.field in values:
            fields.pop(knob.field, None)
            value = _read(knob, values[knob.field])
            if value is not None:
                fields[knob.field] = value
    if any(knob.field == "concepts" for knob in knobs_of(method)) and not fields.get("concepts"):
        fields["concepts"] = nouns(prompt)
    return control_from_dict(fields)


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
    from attnctl.app.demo import nouns as of_prompt

    try:
        return of_prompt(prompt)
    except JudgeError:
        raise ConfigError(
            f"Name the concepts, words of the prompt such as cat, dog: they are found by themselves only in prompts "
            f"of the shapes world, and {prompt!r:.200} is none."
        ) from None


def _knob(method: str, field: Any, bounds: Bounds) -> Knob:
    name, default = field.name, field.default
    if isinstance(default, tuple) and default:
        return Knob(method, name, "numbers", ", ".join(f"{x:g}" for x in default), hint=bounds.hint)
    if bounds.choices:
        return Knob(method, name, "choice", default, choices=bounds.choices, hint=bounds.hint)
    if isinstance(default, bool):
        return Knob(method, name, "switch", default, hint=bounds.hint)
    if bounds.span is not None and default is not None:  # a slider cannot be left blank
        low, high, step = bounds.span
        return Knob(method, name, "slider", default, (low, max(high, default), step), hint=bounds.hint)
    if isinstance(default, (int, float)) and math.isfinite(default):
        return Knob(method, name, "number", default, hint=bounds.hint)
    return Knob(method, name, "text", "" if default is None or default == () else str(default), hint=bounds.hint)


def _read(knob: Knob, value: Any) -> Any:
    """Turn what a knob holds into what its field takes."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if knob.field == "sites":
        return selector(value)
    if knob.field == "concepts":
        return _parts(value)
    if knob.kind == "numbers":
        return tuple(_number(knob, part) for part in str(value).split(","))
    if knob.kind == "text":
        return _number(knob, value)
    return int(value) if knob.kind == "slider" and isinstance(knob.default, int) else value


def _number(knob: Knob, text: Any) -> float | str:
    try:
        return float(text)
    except ValueError:
        if knob.kind == "text" and text == knob.default:
            return str(text)  # a word, such as "auto"
        raise ConfigError(f"{knob.method}: {knob.field}={text!r} is not a number; inf is one.") from None
