"""What a control declares of its fields and conflicts, and the table that its class enters when it is defined.

What a control tells readers about itself is in `data.about`; looking controls up by name is in `data.controls`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from attnctl.errors import ConfigError, choice, number, unboxed, whole, window

__all__ = ["CONTROLS", "HOMES", "Bounds", "Conflict", "Where", "declared", "knob", "register"]

Where = Literal["site", "block", "model"]
Kind = Literal["number", "whole", "choice", "window", "free"]
_KEY = "attnctl"


@dataclass(frozen=True)
class Conflict:
    """A control, or several, that another cannot act together with; it is declared on either side.

    Attributes:
        others: Class names of the other controls or of their bases; the declaring class for a control beside itself.
        where: What both must share: an attention site, a transformer block, or nothing but the model.
        reason: Why they cannot act together.
    """

    others: str | tuple[str, ...]
    where: Where
    reason: str

    def __post_init__(self) -> None:
        choice(self.where, "Conflict: where", get_args(Where))
        if not self.names or not self.reason.strip():
            raise ConfigError(f"Conflict: others={self.others!r}, reason={self.reason!r}: give names and a reason.")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the class names of the others."""
        return (self.others,) if isinstance(self.others, str) else tuple(self.others)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a field of a control may hold, and how a page shows it; made by `knob`.

    Attributes:
        kind: "number", "whole", "choice", "window" (a fraction of the run, or a pair of them), or "free" where a check
            of the control's own decides.
        low: The least number.
        high: The greatest number.
        above: A number that the value must exceed.
        below: A number that the value must stay under.
        infinite: Whether inf is a value.
        none: Whether None is a value.
        choices: The values of a choice.
        unit: What a number counts.
        values: What a free field may hold, in words.
        hint: What a page says beside the field.
        span: Lowest and highest value and the step of a page's slider.
        shown: Whether a page shows the field; others are for the short form.
        last: Whether a page shows it after the method's own fields.
    """

    kind: Kind = "free"
    low: float = -math.inf
    high: float = math.inf
    above: float | None = None
    below: float | None = None
    infinite: bool = False
    none: bool = False
    choices: tuple[Any, ...] = ()
    unit: str = ""
    values: str = ""
    hint: str = ""
    span: tuple[float, float, float] | None = None
    shown: bool = False
    last: bool = False

    def checked(self, value: Any, what: str) -> Any:
        """Return a value as the field holds it.

        Raises:
            ConfigError: The field cannot hold it.
        """
        if self.kind == "free" or (value is None and self.none):
            return value
        if self.kind == "choice":
            return choice(value, what, self.choices)
        if self.kind == "window":
            window(value, what)
            return type(value)(map(unboxed, value)) if isinstance(value, (tuple, list)) else unboxed(value)
        if self.kind == "whole":
            low, high = (None if math.isinf(x) else int(x) for x in (self.low, self.high))
            return whole(value, what, low, high, of=self.unit)
        return number(value, what, self.low, self.high, above=self.above, below=self.below, infinite=self.infinite)


_BOUNDS = {f.name for f in dataclasses.fields(Bounds)}


def knob(
    default: Any = dataclasses.MISSING,
    low: float | None = None,
    high: float | None = None,
    *,
    options: Any = None,
    kind: Kind | None = None,
    span: tuple[float, float, float] | None = None,
    **more: Any,
) -> Any:
    """Declare a field of a control, what it may hold and how a page shows it.

    `Control.__post_init__` checks the value. A whole default makes a field of whole numbers, and a default of inf
    allows inf; a default of None allows None, and the limits then say which numbers are taken.

    Args:
        default: The default.
        low: The least number; give -math.inf for no limit.
        high: The greatest number; none if it is left out.
        options: The values of a choice: a Literal, or a tuple.
        kind: "window" for a fraction of the run or a pair of them, "free" for a check of your own.
        span: Lowest and highest value and the step of a page's slider; by default the limits, in steps of 0.05.
        **more: Further attributes of `Bounds` (above, below, unit, values, hint, shown, last) and arguments of
            `dataclasses.field`.

    Raises:
        ConfigError: A number has no range, or the default lies outside of it.
    """
    measured = [x for x in (default, low, more.get("above")) if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if options is not None:
        kind, options = "choice", tuple(options) if isinstance(options, (tuple, list)) else get_args(options)
    elif kind is None and measured:
        kind = "whole" if isinstance(measured[0], int) else "number"
    if kind in ("number", "whole") and low is None and more.get("above") is None:
        raise ConfigError(f"knob({default!r}): the field has no range. Give low= (-math.inf for no limit), or above=.")
    if span is None and more.get("shown") and low is not None and high is not None and not math.isinf(high - low):
        span = (low, high, 0.05 if kind == "number" else 1)
    described = {name: more.pop(name) for name in tuple(more) if name in _BOUNDS}
    bounds = Bounds(
        kind=kind or "free",
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        infinite=default == math.inf,
        none=default is None,
        choices=options or (),
        span=span,
        **described,
    )
    if default is not dataclasses.MISSING:
        bounds.checked(default, "the default of knob()")
    return field(default=default, metadata={_KEY: bounds}, **more)


def _declared(cls: type) -> dict[str, Bounds | None]:
    """Return the fields of a control with what each may hold: declared there, or by the first base that declares it.

    Raises:
        ConfigError: It has fields that no dataclass takes.
    """
    fields = [n for n, a in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(a)]
    params: Any = vars(cls).get("__dataclass_params__")
    if fields and (params is None or not params.frozen):
        raise ConfigError(
            f"{cls.__name__} has fields ({', '.join(fields)}) but is no frozen dataclass: write "
            f"@dataclass(frozen=True, kw_only=True) above class {cls.__name__}."
        )
    tables = [vars(c).get("__dataclass_fields__", {}) for c in cls.__mro__]
    bounds: dict[str, Bounds | None] = {}
    for name in (f.name for f in dataclasses.fields(cls)):
        metadata = (table[name].metadata for table in tables if name in table)
        bounds[name] = next((m[_KEY] for m in metadata if _KEY in m), None)
    return bounds


declared: Callable[[type], dict[str, Bounds | None]] = functools.cache(_declared)
"""Looks the fields of each class up once."""


CONTROLS: dict[str, type] = {}
HOMES: dict[str, str] = {}
"""Modules of controls that are imported when they are looked up, by the control's name."""


def register(cls: type) -> None:
    """Enter a class of control under its name; a class that is defined again takes its former place.

    Raises:
        ConfigError: Its name is no name, or that of another control; or it belongs to the package and says nothing
            about itself.
    """
    name = cls.__name__
    if not name.isidentifier():
        raise ConfigError(f"A control is called {name!r}: give its class a name that records can hold, such as PAG.")
    other = CONTROLS.get(name)
    if other is not None and "<locals>" not in other.__qualname__:
        home = other.__module__, other.__qualname__
    else:
        home = HOMES.get(name, cls.__module__), cls.__qualname__
    if home != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f"Two controls are called {name}: one of {home[0]}, one of {cls.__module__}. Records find a "
            "control by its name: give one of them another."
        )
    if cls.__module__.startswith("attnctl.") and vars(cls).get("about") is None:
        raise ConfigError(f"{name} says nothing about itself: declare about = About(does=..., page=...) in its class.")
    CONTROLS[name] = cls
