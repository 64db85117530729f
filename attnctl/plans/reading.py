"""Read files that strangers may have written: regular files of bounded size, shallow JSON, safetensors without holes.

Every reader of the package goes through here, so that a hostile file meets the same checks wherever it is given, and
comes back as the one error that its reader raises.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from attnctl.errors import AttnctlError

__all__ = [
    "Expected",
    "check_regular",
    "check_schema",
    "check_unsealed",
    "open_tensors",
    "parse_json",
    "read_bytes",
    "read_json",
    "sealed",
]

_DEPTH = 50  # levels of lists and objects: no file of the package has ten
_DIGITS = 25  # of a whole number: seeds and byte counts have at most 20
_HEADER = 16 << 20  # bytes of a safetensors header
_SEALED: ContextVar[str] = ContextVar("attnctl_sealed", default="")
_NODE_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


@dataclass(frozen=True)
class Expected:
    """Hold what a file should be.

    Attributes:
        noun: What it is called in errors, such as "a head set".
        error: What is raised where it is something else.
        limit: Most bytes that are read of it.
    """

    noun: str
    error: type[AttnctlError]
    limit: int = 16 << 20


@contextlib.contextmanager
def sealed(reason: str) -> Iterator[None]:
    """Refuse inside the block to read any file, for a reason: what is parsed there names files of this machine."""
    token = _SEALED.set(reason)
    try:
        yield
    finally:
        _SEALED.reset(token)


def check_unsealed(expected: Expected) -> None:
    """Raise the expected error where files may not be read: see `sealed`."""
    if _SEALED.get():
        raise expected.error(f"{_SEALED.get()} Expected {expected.noun} to be given otherwise.")


def check_regular(path: Path, expected: Expected) -> os.stat_result:
    """Raise the expected error unless a path names a regular file: reading a pipe or a device could last for ever."""
    check_unsealed(expected)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # a ValueError is a name with a null byte
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "it does not exist" if missing else getattr(error, "strerror", None) or error
        folder = path.parent.name or "."
        raise expected.error(
            f"{path.name} cannot be read: there is no file of that name in {folder} ({reason}). It is missing or "
            f"damaged; expected {expected.noun}."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for check, name in _NODE_KINDS if check(status.st_mode)), "a device")
        raise expected.error(f"{path.name or path} is {kind}, and no file: expected {expected.noun}. It is not read.")
    return status


def read_bytes(path: Path, expected: Expected) -> bytes:
    """Read a whole file of at most the expected size.

    Raises:
        AttnctlError: The expected error: it is missing, no regular file, too large, or cannot be read.
    """
    check_regular(path, expected)
    try:
        with _opened(path) as file:
            content = file.read(expected.limit + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise expected.error(f"{path.name} cannot be read: {error.strerror or error}.") from None
    if len(content) > expected.limit:
        raise expected.error(
            f"{path.name} holds {size} bytes; {expected.noun} has at most {expected.limit}. It is not read."
        )
    return content


def _opened(path: Path) -> BinaryIO:
    # Where somebody puts a pipe in the file's place after the check, opening it must not wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    return os.fdopen(handle, "rb")


def read_json(path: Path, expected: Expected, *, kind: str | None = None, schema: int | None = None) -> Any:
    """Read a JSON file, and check its kind and schema where they are given.

    Raises:
        AttnctlError: The expected error: see `read_bytes`, `parse_json`, `check_schema`.
    """
    data = parse_json(read_bytes(path, expected), path.name, expected)
    if schema is not None:
        check_schema(data, path.name, expected, kind=kind, schema=schema)
    return data


def parse_json(content: bytes | str, name: str, expected: Expected) -> Any:
    """Parse JSON as the standard has it: without NaN, infinities, long numbers, deep nesting or broken text.

    Args:
        content: UTF-8 bytes or text.
        name: What it is called in errors.
        expected: What it should be.

    Raises:
        AttnctlError: The expected error.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        data = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested thousands deep, or a number that is none
        raise expected.error(
            f"{name} is not JSON, and so not {expected.noun}: it is damaged, or another format under that name. "
            "Nothing was read from it."
        ) from None
    level = [data]
    for _ in range(_DEPTH):
        level = [inner for value in level for inner in _inner(value, name, expected)]
        if not level:
            return data
    raise expected.error(f"{name} is nested more than {_DEPTH} deep, which {expected.noun} is not.")


def _inner(value: Any, name: str, expected: Expected) -> list[Any]:
    """Return what a list or an object holds, its keys among it; raise the expected error for half a character."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise expected.error(f"{name} is damaged: it holds half a character (a lone surrogate).") from None
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError("a number that nothing needs")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not JSON")
    return value


def check_schema(data: Any, name: str, expected: Expected, *, kind: str | None = None, schema: int) -> None:
    """Raise the expected error unless data is an object of a kind and schema that this version reads."""
    if not isinstance(data, dict) or (kind is not None and data.get("kind") != kind):
        of_kind = "" if kind is None else f" with kind {kind!r}"
        raise expected.error(f"{name} is not {expected.noun}: expected a JSON object{of_kind}.")
    given = data.get("schema")
    if given != schema or type(given) is not int:
        raise expected.error(
            f"{name} has schema {given!r:.40}; this attnctl reads schema {schema}. Update attnctl, or make the file "
            "again."
        )


@contextlib.contextmanager
def open_tensors(path: Path, expected: Expected, *, cure: str = "Nothing was used.") -> Iterator[Any]:
    """Open a safetensors file for reading on the CPU; what it lacks inside the block is the expected error too.

    Args:
        path: The file.
        expected: What it should be; its limit is not that of tensors.
        cure: What to do where it is damaged, as a sentence.

    Yields:
        What `safetensors.safe_open` gives.

    Raises:
        AttnctlError: The expected error: it is missing, no regular file, damaged, or claims more than it holds.
    """
    from safetensors import SafetensorError, safe_open

    size = check_regular(path, expected).st_size
    try:
        with _opened(path) as file:
            header = int.from_bytes(file.read(8), "little")
            hole = _first_hole(file.fileno(), size)
        if size < 8 or not 2 <= header <= min(_HEADER, size - 8):
            raise expected.error(f"{path.name} cannot be read (it has no header): it is missing or damaged. {cure}")
        if hole < size:
            raise expected.error(
                f"{path.name} claims {size} bytes and has a hole at {hole}: {expected.noun} is written whole. {cure}"
            )
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise expected.error(f"{path.name} cannot be read ({error}): it is missing or damaged. {cure}") from None


def _first_hole(handle: int, size: int) -> int:
    """Return where the first hole of a file is, which takes no space on the disk; its size where it has none."""
    if not size or not hasattr(os, "SEEK_HOLE"):
        return size
    try:
        return os.lseek(handle, 0, os.SEEK_HOLE)
    except OSError:  # a file system that knows no holes
        return size
