"""Controls as data: a control to a dictionary and back, and the short form that the command line takes.

A control is a frozen dataclass, and its method is the name of its class. The dictionary holds every field, defaults
too, because a default may change from one version to the next:

    {"method": "PAG", "sites": "mid", "start": 0.0, "stop": 1.0, "scale": 3.0, ...}

That of a control from outside the package has its module under "module", so that an error can name it. Reading is
strict: unknown methods and unknown keys are refused with the nearest names. Nothing is evaluated, and no module is
imported because a record names it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

from attnctl.core.registry import CONTROLS
from attnctl.data.controls import control_named, controls
from attnctl.errors import AttnctlError, ConfigError, check_fields, check_short, nearest, unboxed

__all__ = ["control_from_dict", "control_to_dict", "methods", "parse_control", "parse_controls", "parse_option"]

_LONGEST = 100_000  # characters of a short form
_MOST_TOGETHER = 100  # controls in one text


def methods() -> dict[str, type]:
    """List the controls there are, by method name: those of the package, and others whose modules are imported."""
    return controls()


def control_to_dict(control: Any) -> dict[str, Any]:
    """Write a control as plain JSON values.

    Raises:
        ConfigError: a field holds something that JSON cannot hold exactly, such as a tensor.
    """
    cls = type(control)
    if CONTROLS.get(cls.__name__) is not cls:
        raise ConfigError(f"{control!r} is not a control; expected for example PAG(scale=3.0).")
    home = {} if _is_plain(cls) else {"module": cls.__module__}
    return {"method": cls.__name__, **home, **_fields(control, cls.__name__)}


def control_from_dict(data: Mapping[str, Any]) -> Any:
    """Make the control that `control_to_dict` wrote.

    Raises:
        ConfigError: the method or a key is unknown, or a value is out of range.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise ConfigError(f"A control is an object with a 'method' and its fields, got {data!r}.")
    name, module = data["method"], data.get("module")
    cls = control_named(name, module if isinstance(module, str) else None)
    header = ("method",) if _is_plain(cls) else ("method", "module")
    return _make(cls, name, {key: _decode(value) for key, value in data.items() if key not in header})


def parse_control(text: str) -> Any:
    """Read the short form, `PAG(scale=3.0, sites="mid")` or just `PAG`.

    The text is parsed, not evaluated: one method name and keyword arguments whose values are literals.

    Raises:
        ConfigError: the text is not such a call, or the control refuses the values.
    """
    form = 'expected a method and keywords with literal values, such as PAG(scale=3.0, sites="mid")'
    if len(text) > _LONGEST:
        raise ConfigError(f"A control of {len(text)} characters is too long; the limit is {_LONGEST}.")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"Cannot read the control {text!r} ({reason}); {form}.") from None
    if isinstance(node, ast.Name):
        return _make(control_named(node.id), node.id, {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ConfigError(f"Cannot read the control {text!r}; {form}.")
    name = node.func.id
    cls = control_named(name)
    if node.args:
        raise ConfigError(f"{name} takes keywords only, got a positional value in {text!r}; {form}.")
    values: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ConfigError(f"'**' is not taken in {text!r}; {form}.")
        if keyword.arg in values:
            raise ConfigError(f"{name} is given {keyword.arg!r} twice in {text!r}.")
        try:
            values[keyword.arg] = _literal(keyword.value)
        except AttnctlError:
            raise
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            given = ast.unparse(keyword.value)
            raise ConfigError(f"The value of {keyword.arg!r} in {text!r} is not a literal: {given}; {form}.") from None
    return _make(cls, name, values)


def parse_controls(text: str) -> tuple[Any, ...]:
    """Read several controls that act together, `PAG(scale=3.0) + SEG`; "plain" is none.

    Raises:
        ConfigError: as `parse_control`.
    """
    if text.strip() == "plain":
        return ()
    try:
        node = ast.parse(text.strip(), mode="eval").body if len(text) <= _LONGEST and "+" in text else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None  # parse_control says what is wrong
    parts: list[str] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and len(parts) < _MOST_TOGETHER:
        parts.append(ast.get_source_segment(text.strip(), node.right) or "")
        node = node.left
    if not parts or node is None:
        return (parse_control(text),)
    parts.append(ast.get_source_segment(text.strip(), node) or "")
    return tuple(map(parse_control, reversed(parts)))


def parse_option(text: str) -> tuple[str, Any]:
    """Read `name=value`, where a value that is no literal is text.

    Raises:
        ConfigError: there is no name, or the value is nothing that a record can hold.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ConfigError(f"Cannot read the option {text!r}; expected name=value, such as true_cfg_scale=4.0.")
    try:
        literal = ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        literal = value
    return name.strip(), _encode(literal, name.strip())


def _is_plain(cls: type) -> bool:
    """Tell whether a record needs no word about the module: it is the package's, or "module" is a field of its own."""
    return cls.__module__.startswith("attnctl.") or "module" in {f.name for f in dataclasses.fields(cls)}


def _make(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    check_fields(cls, values)
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in values and _is_needed(f)]
    if missing:
        form = ", ".join(f"{field}=..." for field in missing)
        raise ConfigError(
            f"{name} needs {' and '.join(missing)}: give {name}({form}). `attnctl controls` describes it."
        )
    try:
        return cls(**values)
    except AttnctlError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} refuses {dict(values)!r}: {error}.") from None


def _is_needed(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fields(value: Any, where: str) -> dict[str, Any]:
    return {f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value) if f.init}


def _encode(value: Any, where: str) -> Any:
    value = unboxed(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return float(value) if math.isfinite(value) else {"type": "float", "value": str(float(value))}
    if isinstance(value, (tuple, list)):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (range, slice)):
        parts = {name: _encode(getattr(value, name), where) for name in ("start", "stop", "step")}
        return {"type": type(value).__name__, **parts}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        _nested(type(value).__name__, where)
        return {"type": type(value).__name__, **_fields(value, where)}
    if isinstance(value, Mapping) and "type" not in value and all(isinstance(key, str) for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    shape = getattr(value, "shape", None)
    shown = f"{value!r:.80}" if not shape else f"a {type(value).__name__} of shape {tuple(shape)}"
    raise ConfigError(
        f"{where} = {shown} cannot be kept in a record; expected numbers, text, None or tuples of them. Give texts in "
        "place of embeddings, and the name of a file in place of a picture, where the field takes them."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    values = {key: _decode(item) for key, item in value.items() if key != "type"}
    if "type" not in value:
        return values
    if value["type"] == "float" and values in ({"value": "inf"}, {"value": "-inf"}):
        return float(values["value"])
    if value["type"] in ("range", "slice"):
        whole = all(isinstance(v, int) or (v is None and value["type"] == "slice") for v in values.values())
        if sorted(values) != ["start", "step", "stop"] or not whole or values["step"] == 0:
            raise ConfigError(f"Expected whole numbers start, stop and step (not 0), got {dict(value)!r}.")
        parts = values["start"], values["stop"], values["step"]
        return _short(range(*parts)) if value["type"] == "range" else slice(*parts)
    return _make(_nested(value["type"], "a field"), value["type"], values)


def _short(value: range) -> range:
    """Return a range from a file or a text, in which nobody may look for its last number."""
    check_short(value, "A range")
    return value


def _nested(name: Any, where: str) -> type:
    """Find a dataclass that a field may hold: those of `attnctl.plans`, and no other."""
    try:
        module = importlib.import_module("attnctl.plans")
        classes = {n: c for n in module.__all__ if isinstance(c := getattr(module, n), type)}
    except ModuleNotFoundError:
        classes = {}
    classes = {n: c for n, c in classes.items() if dataclasses.is_dataclass(c)}
    if not isinstance(name, str) or name not in classes:
        close = nearest(name, classes)
        raise ConfigError(f"{where} holds an unknown type {name!r:.80}; known: {', '.join(classes) or 'none'}.{close}")
    return classes[name]


def _literal(node: ast.expr) -> Any:
    """Read a literal, inf, a range of whole numbers such as range(4, 8), or a part such as Online(density=0.3)."""
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        numbers = [ast.literal_eval(part) for part in node.args]
        if node.keywords or not 1 <= len(numbers) <= 3 or not all(isinstance(n, int) for n in numbers):
            raise ValueError("a range takes one to three whole numbers")
        return _short(range(*numbers))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        fields = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        if len(fields) != len(node.keywords):
            raise ValueError("'**' is not taken, and no field twice")
        return _make(_nested(node.func.id, "A value"), node.func.id, fields)
    return _tuples(ast.literal_eval(node))


def _tuples(value: Any) -> Any:
    """Turn the lists of a literal into tuples, so that a control stays frozen."""
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
