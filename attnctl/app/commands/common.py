"""What every command shares: two flags, a result for people and for machines, tables and proportions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnctl.data.proportions import wilson
from attnctl.errors import ConfigError

__all__ = ["Common", "Result", "UsageError", "importing", "say", "table", "tally", "wilson"]


class UsageError(ConfigError):
    """The command line asks for something that cannot be: exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Hold the flags of every command."""

    json: bool = False
    """Print the result as JSON."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Result:
    """Hold what a command found: `data` for --json, `text` for people, and the exit code."""

    data: Any
    text: str
    code: int = 0


def say(text: str) -> None:
    """Tell the user something on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def importing(package: str = "diffusers") -> None:
    """Say that PyTorch, and a package that needs it, are imported, which takes the first seconds of a command."""
    if package not in sys.modules:
        say("Importing PyTorch" if package == "torch" else f"Importing PyTorch and {package}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align columns: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) and bool(rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def tally(marks: Sequence[bool]) -> dict[str, float]:
    """Count what is true: k of n, the share, and its 95 % Wilson interval."""
    k, n = sum(marks), len(marks)
    low, high = wilson(k, n)
    return {"k": k, "n": n, "share": k / n, "low": low, "high": high}
