"""What a control declares about itself, and all controls by name.

A class of control enters the registry when it is defined, so a control of a user's own is known as soon as its module
is imported. Modules that bring controls are imported when they are needed: those named by `provide` at the first
look-up, and the entry points of other packages (group `attnctl.controls`) when a name is unknown.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, get_args

from attnctl.errors import ConfigError, choice, nearest, number, unboxed, whole, window

__all__ = [
    "GROUP",
    "About",
    "Bounds",
    "Conflict",
    "Preset",
    "Where",
    "bounds_of",
    "check_fields",
    "control_named",
    "controls",
    "knob",
    "load_entry_points",
    "provide",
    "register",
]

GROUP = "attnctl.controls"
Where = Literal["site", "block", "model"]
Kind = Literal["number", "whole", "choice", "window", "free"]
_KEY = "attnctl"


@dataclass(frozen=True, kw_only=True)
class About:
    """What readers are told about a method, in tables, on its page and by `attnctl controls`.

    Attributes:
        does: What it does, in half a sentence that begins with a verb.
        page: Name of its page in the docs, without the ending.
        goal: What a user wants who takes it, as a verb: "sharpen structure".
        title: Its name in words; empty for the name of the class.
        paper: Where it was published, such as "arXiv 2403.17377"; empty for no publication.
        cite: Authors, title and number of each publication.
        group: The kind of task it is for.
        sites: Its default sites in words, where a rule chooses them and no table of families.
        offered: Whether the page offers it for images; not where it has a tab of its own, or needs what a page cannot
            give.
        needs: What it takes from the pipeline besides attention, such as "the prompt".
    """

    does: str
    page: str
    goal: str = ""
    title: str = ""
    paper: str = ""
    cite: tuple[str, ...] = ()
    group: str = "Guidance"
    sites: str = ""
    offered: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("does", "page"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"About: {name}={value!r} is empty: {_WANTED[name]}.")


_WANTED = {"does": "say what the control does", "page": "name the page that explains the control, such as 'pag'"}


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


@dataclass(frozen=True)
class Preset:
    """A setting of a method for one model: what the page offers, and the demo where `column` is given.

    Attributes:
        model: The model, such as "shapes:mmdit".
        form: The control in its short form; NOUNS stands for the nouns of the prompt.
        column: Its place among the columns of the demo, from 1; 0 for none.
        label: What the demo calls it; empty for the name of the method.
    """

    model: str
    form: str
    column: int = 0
    label: str = ""

    @property
    def method(self) -> str:
        """Return the name of the method."""
        return self.form.partition("(")[0]


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


def knob(
    default: Any = dataclasses.MISSING,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    options: Any = None,
    kind: Kind | None = None,
    unit: str = "",
    values: str = "",
    hint: str = "",
    span: tuple[float, float, float] | None = None,
    shown: bool = False,
    last: bool = False,
    **more: Any,
) -> Any:
    """Declare a field of a control, what it may hold and how a page shows it.

    `Control.__post_init__` checks the value. A whole default makes a field of whole numbers, and a default of inf
    allows inf; a default of None allows None, and the limits then say which numbers are taken.

    Args:
        default: The default.
        low: The least number; give -math.inf for no limit.
        high: The greatest number; none if it is left out.
        above: A number that the value must exceed, in place of `low`.
        below: A number that the value must stay under, in place of `high`.
        options: The values of a choice: a Literal, or a tuple.
        kind: "window" for a fraction of the run or a pair of them, "free" for a check of your own.
        unit: What a number counts, such as "steps".
        values: What a free field may hold, in words.
        hint: What a page says beside the field.
        span: Lowest and highest value and the step of a page's slider; by default the limits, in steps of 0.05.
        shown: Whether a page shows the field.
        last: Whether a page shows it after the method's own fields.
        **more: Further arguments of `dataclasses.field`.

    Raises:
        ConfigError: A number has no range.
    """
    measured = [x for x in (default, low, above) if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if options is not None:
        kind, options = "choice", tuple(options) if isinstance(options, (tuple, list)) else get_args(options)
    elif kind is None and measured:
        kind = "whole" if isinstance(measured[0], int) else "number"
    if kind in ("number", "whole") and low is None and above is None:
        raise ConfigError(f"knob({default!r}): the field has no range. Give low= (-math.inf for no limit), or above=.")
    if span is None and shown and low is not None and high is not None and not math.isinf(high - low):
        span = (low, high, 0.05 if kind == "number" else 1)
    bounds = Bounds(
        kind=kind or "free",
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        above=above,
        below=below,
        infinite=default == math.inf,
        none=default is None,
        choices=options or (),
        unit=unit,
        values=values,
        hint=hint,
        span=span,
        shown=shown,
        last=last,
    )
    return field(default=default, metadata={_KEY: bounds}, **more)


def bounds_of(cls: type, name: str) -> Bounds | None:
    """Find what a field was declared with, by a class or by the base that declares the field first."""
    for c in cls.__mro__:
        declared = vars(c).get("__dataclass_fields__", {}).get(name)
        if declared is not None and _KEY in declared.metadata:
            found: Bounds = declared.metadata[_KEY]
            return found
    return None


_CONTROLS: dict[str, type] = {}
_PROVIDERS: list[str] = []


def provide(module: str) -> None:
    """Name a module to import before controls are looked up, because it defines some."""
    if module not in _PROVIDERS:
        _PROVIDERS.append(module)


def register(cls: type) -> None:
    """Enter a class of control under its name; a class that is defined again takes its former place.

    Raises:
        ConfigError: Its name is no name, or that of another control; or it belongs to the package and says nothing
            about itself.
    """
    name = cls.__name__
    if not name.isidentifier():
        raise ConfigError(f"A control is called {name!r}: give its class a name that records can hold, such as PAG.")
    other = _CONTROLS.get(name)
    lasting = other is not None and "<locals>" not in other.__qualname__
    if other is not None and lasting and _home(other) != _home(cls):
        raise ConfigError(
            f"Two controls are called {name}: one of {other.__module__}, one of {cls.__module__}. Records find a "
            "control by its name: give one of them another."
        )
    if cls.__module__.startswith("attnctl.") and not isinstance(vars(cls).get("about"), About):
        raise ConfigError(f"{name} says nothing about itself: declare about = About(does=..., page=...) in its class.")
    _CONTROLS[name] = cls


def _home(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def check_fields(cls: type) -> None:
    """Raise ConfigError for a control whose annotated fields no dataclass takes."""
    fields = [n for n, a in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(a)]
    params: Any = vars(cls).get("__dataclass_params__")
    if fields and (params is None or not params.frozen):
        raise ConfigError(
            f"{cls.__name__} has fields ({', '.join(fields)}) but is no frozen dataclass: write "
            f"@dataclass(frozen=True, kw_only=True) above class {cls.__name__}."
        )


def controls(package: str = "") -> dict[str, type]:
    """List the controls whose modules are imported, by name; those of one package if it is named."""
    for module in _PROVIDERS:
        importlib.import_module(module)
    found = {name: _CONTROLS[name] for name in sorted(_CONTROLS)}
    return {n: c for n, c in found.items() if not package or c.__module__.partition(".")[0] == package}


def control_named(name: str, module: str | None = None) -> type:
    """Find a control by name, among those imported and those of other packages' entry points.

    Args:
        name: The name of its class.
        module: The module that defined it, where a record says so.

    Raises:
        ConfigError: There is none; or its fields belong to no dataclass.
    """
    known, broken = controls(), ""
    if name not in known:
        try:
            load_entry_points()
        except ConfigError as error:
            broken = f" {error}"
        known = controls()
    if name not in known:
        known = {n: c for n, c in known.items() if "<locals>" not in c.__qualname__}
        bring = f"import {module}" if module else "import the module that defines it"
        hint = nearest(name, known) if module is None else ""
        raise ConfigError(
            f"Unknown method {name!r}; known: {', '.join(known)}.{hint} A control of your own is known once its module "
            f"is imported: {bring} first.{broken}"
        )
    check_fields(known[name])
    return known[name]


def load_entry_points(group: str = GROUP) -> None:
    """Import the controls of other packages that are installed, or what they offer in another group.

    Raises:
        ConfigError: One of them cannot be imported.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "that brings it"
            raise ConfigError(
                f"The entry point {point.name} = {point.value!r} of the group {group} cannot be imported "
                f"({type(error).__name__}: {error}). Mend or remove the package {package}."
            ) from error
