"""Lists of prompts in files: plain text, JSON lines, or CSV, in which a line may have settings of its own.

    prompt,seed,negative,control
    a red circle on gray,7,,
    a blue square on white,,blurry,PAG(scale=3.0) + SEG

A text file has one prompt per line. Nothing here is evaluated, and the size of everything is bounded before it is used.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctl.errors import AttnctlError, nearest
from attnctl.plans.reading import Expected, parse_json, read_bytes

__all__ = ["PromptFileError", "PromptLine", "read_prompts"]

_MOST_LINES = 10_000
_LONGEST = 10_000  # characters of a prompt, and of everything else in a line but controls
_LONGEST_CONTROL = 100_000
_DIGITS = 25


class PromptFileError(AttnctlError):
    """A list of prompts is missing, damaged, or asks for what cannot be."""


_FILE = Expected("a list of prompts", PromptFileError, 16 << 20)


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """Hold one line of a list; None leaves a setting to the command line.

    Attributes:
        number: Its number in the file, from 1.
        prompt: What to show.
        seed: Seed of its first picture.
        num: Pictures of it.
        steps: Denoising steps.
        guidance: Guidance scale.
        negative: What not to show.
        width: In pixels.
        height: In pixels.
        control: Controls in their short form.
    """

    number: int
    prompt: str
    seed: int | None = None
    num: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    control: tuple[str, ...] | None = None


def read_prompts(path: str | Path) -> tuple[PromptLine, ...]:
    """Read a list of prompts; the ending says which kind it is: .txt, .jsonl, .csv or .tsv.

    Raises:
        PromptFileError: It is missing, too large or damaged, of another kind, or has a line that cannot be used.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise PromptFileError(
            f"{path.name or path} is no list of prompts by its name: expected {', '.join(_READERS)}, with one prompt "
            "per line, one JSON object per line, or a table with a column 'prompt'."
        )
    try:
        text = read_bytes(path, _FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path.name} is no text in UTF-8 (byte {error.start}): save it as UTF-8.") from None
    lines: list[PromptLine] = []
    for number, given in _READERS[kind](text, path.name):
        if len(lines) >= _MOST_LINES:
            raise PromptFileError(f"{path.name} has more than {_MOST_LINES} prompts: cut it into several files.")
        lines.append(_line(given, f"Line {number} of {path.name}", number))
    if not lines:
        raise PromptFileError(f"{path.name} holds no prompt.")
    return tuple(lines)


Given = Iterator[tuple[int, Mapping[str, Any]]]


def _plain(text: str, name: str) -> Given:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _json_lines(text: str, name: str) -> Given:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"Line {number} of {name}"
            data = parse_json(line, where, _FILE)
            if not isinstance(data, dict):
                raise PromptFileError(f'{where} is no JSON object; expected such as {{"prompt": "a cat", "seed": 7}}.')
            yield number, data


def _table(separator: str) -> Callable[[str, str], Given]:
    def read(text: str, name: str) -> Given:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header: list[str] = []
        try:
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if not header:
                    header = _header(row, name)
                    continue
                where = f"Line {reader.line_num} of {name}"
                if len(row) != len(header):
                    raise PromptFileError(
                        f"{where} has {len(row)} cells, and the first line names {len(header)} columns: put cells with "
                        f"{separator!r} in them into quotes."
                    )
                yield reader.line_num, {c: _number(c, cell, where) for c, cell in zip(header, row, strict=True) if cell}
        except csv.Error as error:
            raise PromptFileError(f"Line {reader.line_num} of {name} cannot be read: {error}.") from None

    return read


def _header(row: list[str], name: str) -> list[str]:
    header = [cell.strip().lower() for cell in row]
    if "prompt" not in header or len(set(header)) < len(header):
        raise PromptFileError(
            f"The first line of {name} is {','.join(header)!r:.120}; expected names of columns, each once: 'prompt' "
            f"and some of {', '.join(_KINDS)}."
        )
    return header


_READERS: dict[str, Callable[[str, str], Given]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


def _number(column: str, cell: str, where: str) -> Any:
    """Read a cell of a column of numbers."""
    kind = _KINDS.get(column, str)
    if kind is str or column == "control":
        return cell
    try:
        if len(cell.strip()) > _DIGITS:
            raise ValueError
        return kind(cell.strip())
    except ValueError:
        raise PromptFileError(f"{where}: {column}={cell!r:.60} is no {_NOUNS[kind]}.") from None


_KINDS: dict[str, type] = {
    "seed": int, "num": int, "steps": int, "guidance": float, "negative": str, "width": int, "height": int,
    "control": str,
}  # fmt: skip
_NOUNS = {int: "whole number", float: "number", str: "text"}


def _line(given: Mapping[str, Any], where: str, number: int) -> PromptLine:
    """Check the types of what a line says."""
    names = ("prompt", *_KINDS)
    for name in given:
        if name not in names:
            raise PromptFileError(
                f"{where} has {name!r:.60}; expected some of {', '.join(names)}." + nearest(str(name), names)
            )
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptFileError(f"{where} has the prompt {prompt!r:.60}: expected a text that is not empty.")
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(values.get("control"), str):
        values["control"] = (values["control"],)
    for name, value in values.items():
        _check(name, value, where)
    if "control" in values:
        values["control"] = tuple(values["control"])
    return PromptLine(number=number, **values)


def _check(name: str, value: Any, where: str) -> None:
    if name == "control":
        if not isinstance(value, (list, tuple)) or len(value) > 100 or not all(isinstance(v, str) for v in value):
            raise PromptFileError(f"{where}: control={value!r:.60} is no text and no short list of texts.")
        if sum(map(len, value)) > _LONGEST_CONTROL:
            raise PromptFileError(f"{where}: its controls have more than {_LONGEST_CONTROL} characters.")
        return
    kind = _KINDS.get(name, str)
    kinds = (int, float) if kind is float else (kind,)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, kinds) or isinstance(value, bool) or not finite:
        raise PromptFileError(f"{where}: {name}={value!r:.60} is no {_NOUNS[kind]}.")
    if isinstance(value, str) and (len(value) > _LONGEST or "\0" in value):
        raise PromptFileError(f"{where}: {name} has {len(value)} characters or a null character; at most {_LONGEST}.")
