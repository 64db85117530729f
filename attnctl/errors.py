"""Every error attnctl raises on purpose, and the checks of values that raise the commonest of them.

A message says what was given, what was expected and what to do. A check returns the value that a frozen object may
hold: scalars of numpy and torch count as numbers, and are returned as Python's own, which JSON can hold.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "AttnctlError",
    "BackendError",
    "ConfigError",
    "ConflictError",
    "JudgeError",
    "NeverApplied",
    "PlanError",
    "SiteError",
    "UnsupportedModelError",
    "check_fields",
    "check_short",
    "choice",
    "missing_package",
    "nearest",
    "number",
    "require",
    "shown",
    "unboxed",
    "whole",
    "window",
]


class AttnctlError(ValueError):
    """Base class: catch this to catch everything that attnctl raises on purpose."""


class ConfigError(AttnctlError):
    """A field of a control, or an argument of a public call, is out of range or of the wrong type."""


class SiteError(AttnctlError):
    """A selector matches no attention site, or a head or token range does not exist there."""


class UnsupportedModelError(AttnctlError):
    """The model, its processors or the way it is run cannot be controlled exactly, for the reason given."""


class ConflictError(AttnctlError):
    """Two controls claim the same decision, or a handle is used out of order."""


class NeverApplied(AttnctlError):
    """A control was attached and active, but no denoiser call reached the attention it selected."""


class PlanError(AttnctlError):
    """A saved head set or block plan is damaged, of another schema, or made for another model."""


class BackendError(AttnctlError):
    """A kernel was asked for by name that cannot run here."""


class JudgeError(AttnctlError):
    """An image or a prompt is outside the shapes world, so the judge cannot mark it."""


# The extra of attnctl that installs a package, by the name that is imported.
_EXTRAS = {
    "accelerate": "models",
    "av": "video",
    "cv2": "models",
    "gradio": "ui",
    "matplotlib": "plot",
    "sklearn": "vision",
    "timm": "backbones",
    "torchmetrics": "vision",
    "transformers": "models",
}


def missing_package(error: ImportError) -> str | None:
    """Say which extra installs a package that could not be imported; None where it is not attnctl's to say."""
    name = (error.name or "").split(".")[0]
    extra = _EXTRAS.get(name)
    return None if extra is None else f"{name} is not installed, and this needs it: pip install 'attnctl[{extra}]'."


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Name the closest candidates to a misspelt name, ready to be put in an error message."""
    close = difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.3) if isinstance(name, str) else ()
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def require(ok: bool, error: type[AttnctlError], message: str) -> None:
    """Raise error(message) unless ok."""
    if not ok:
        raise error(message)


def shown(value: Any, most: int = 80) -> str:
    """Write what was given into an error, on one line and cut short: a class by its name, a long object by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = value.describe() if hasattr(value, "describe") else " ".join(repr(value).split())
    long = len(text) > most and not isinstance(value, (str, list, tuple, dict))
    return f"a {type(value).__name__}" if long else text if len(text) <= most else f"{text[: most - 3]}..."


def unboxed(value: Any) -> Any:
    """Return Python's own number for a scalar of numpy or torch, a list for a row of them; all else as it is."""
    if getattr(value, "ndim", None) in (0, 1) and callable(getattr(value, "tolist", None)):
        try:
            return value.tolist()
        except RuntimeError:  # a tensor without data, on the meta device
            return value
    return value


def number(
    value: Any,
    what: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> int | float:
    """Check a real number.

    Args:
        value: What was given.
        what: What the error calls it, such as "PAG: scale".
        low: The least value.
        high: The greatest value.
        above: A value that it must exceed, in place of `low`.
        below: A value that it must stay under, in place of `high`.
        infinite: Whether inf is a value too, where `high` is.

    Raises:
        ConfigError: It is no number, or out of range.
    """
    x = unboxed(value)
    real = isinstance(x, numbers.Real) and not isinstance(x, bool)
    inside = real and low <= x <= high and (above is None or x > above) and (below is None or x < below)
    if not inside:
        raise ConfigError(f"{what}={value!r:.60} is out of range: give {_range(low, high, above, below)}.")
    if abs(x) > sys.float_info.max and not (infinite and x == math.inf):
        raise ConfigError(f"{what}={value!r:.40} is infinite: give a finite number.")
    return int(x) if isinstance(x, numbers.Integral) else float(x)


def _range(low: float, high: float, above: float | None, below: float | None) -> str:
    least = "" if math.isinf(low) and above is None else f" from {low:g}" if above is None else f" above {above:g}"
    if below is not None:
        return f"a number{least}, below {below:g}"
    if math.isinf(high):
        return f"a number{least}" if least else "a finite number"
    return f"a number{least}{' to' if least and above is None else ' up to'} {high:g}"


def whole(
    value: Any,
    what: str,
    low: int | None = 0,
    high: int | None = None,
    *,
    of: str = "",
    error: type[AttnctlError] = ConfigError,
) -> int:
    """Check a whole number.

    Args:
        value: What was given.
        what: What the error calls it, such as "PAG: every".
        low: The least value, or None for no limit.
        high: The greatest value, or None for no limit.
        of: What is counted, such as "steps".
        error: The class of the error.

    Raises:
        AttnctlError: It is no whole number, or out of range.
    """
    x = unboxed(value)
    fits = isinstance(x, numbers.Integral) and not isinstance(x, bool)
    if not fits or (low is not None and x < low) or (high is not None and x > high):
        least = "" if low is None else f", {low} or more" if high is None else f" from {low} to {high}"
        most = f", {high} or less" if low is None and high is not None else ""
        raise error(f"{what}={value!r:.40} must be a whole number{f' of {of}' if of else ''}{least}{most}.")
    return int(x)


_MOST_NUMBERS = 10_000


def check_short(value: Any, what: str) -> None:
    """Raise ConfigError for a range of more numbers than anything has, before somebody makes a list of it."""
    if isinstance(value, range) and len(value[: _MOST_NUMBERS + 1]) > _MOST_NUMBERS:
        raise ConfigError(f"{what}={value!r:.60} is out of range: give at most {_MOST_NUMBERS} numbers.")


def check_fields(cls: Any, names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no argument of a dataclass."""
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in names:
        if name not in fields:
            raise ConfigError(
                f"{cls.__name__} has no field {name!r}. It has {', '.join(fields)}.{nearest(name, fields)}"
            )


def choice(value: Any, what: str, options: Sequence[Any]) -> Any:
    """Check that a value is one of several.

    Raises:
        ConfigError: It is none of them.
    """
    x = unboxed(value)
    if isinstance(x, bool) or not any(type(x) is type(option) and x == option for option in options):
        listing = ", ".join(str(option) for option in options)
        close = nearest(x, [o for o in options if isinstance(o, str)], 1) if isinstance(x, str) else ""
        raise ConfigError(f"{what}={value!r:.60} is unknown. Choose one of {listing}.{close}")
    return x


def window(value: Any, what: str) -> tuple[float, float]:
    """Read a window of fractions of the run: a number b means (0, b).

    Raises:
        ConfigError: It is no number or pair from 0 to 1 in order.
    """
    pair = tuple(map(unboxed, value)) if isinstance(value, (tuple, list)) else (0.0, unboxed(value))
    real = all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in pair)
    if len(pair) != 2 or not real or not 0 <= pair[0] <= pair[1] <= 1:
        raise ConfigError(f"{what}={value!r}: give a fraction of the run from 0 to 1, or a pair (start, end) of them.")
    return float(pair[0]), float(pair[1])
