"""The log of a long job: one line of JSON for every pipeline call that was marked, so that nothing is ever done twice.

A folder holds a header (`hunt.json`: the plan and the model) and one `marks-*.jsonl` for every process that ever worked
on it. A process appends to its own file only and starts a new one when it is run again; a line that a kill left
unfinished is the last of its file, and is ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnctl.errors import AttnctlError, PlanError
from attnctl.plans.reading import Expected, check_regular, parse_json, read_json
from attnctl.plans.writing import WriteError, publish, recover

__all__ = ["HuntLog", "LogError", "fingerprint_of", "key_of"]

SCHEMA = 1
_OTHER = {"plan": "plan", "objective": "plan", "seed": "seed", "prompts": "list of prompts"}  # by fact
_CURE = "Delete that file: its pictures are generated again, the others are kept."
_EXPECTED = Expected("the header of a search log", PlanError, 4 << 20)
_MARKS = Expected("marks of a search log", PlanError, 256 << 20)
_LINE = Expected("a line of marks", PlanError, 1 << 20)


class LogError(AttnctlError):
    """The log of a search cannot be written."""


def key_of(*what: Any) -> str:
    """Name a piece of work by its content."""
    return hashlib.sha256(json.dumps(what, separators=(",", ":")).encode()).hexdigest()[:16]


def fingerprint_of(denoiser: torch.nn.Module) -> str:
    """Identify a denoiser by the names, shapes and first values of its parameters."""
    digest = hashlib.sha256(type(denoiser).__name__.encode())
    for name, p in denoiser.named_parameters():
        digest.update(f"{name}:{tuple(p.shape)}:".encode())
        digest.update(p.detach().flatten()[:8].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


class HuntLog:
    """Records of a search, or of another job, by their key, in a folder or in memory alone.

    Args:
        folder: Where to keep them; None to keep nothing.
        about: What the job is: it must be the same whenever the folder is used again.
        rank: Which of the processes this one is; the first writes the header.
        header: Name of the file that says what the job is.
        noun: What the job is called in errors.
    """

    def __init__(
        self,
        folder: Path | None,
        about: Mapping[str, Any],
        rank: int = 0,
        *,
        header: str = "hunt.json",
        noun: str = "search",
    ) -> None:
        self.folder, self.header, self.noun = folder, header, noun
        self.records: dict[str, dict[str, Any]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._rank, self._file = rank, -1
        self._about = json.loads(json.dumps(dict(about)))
        if folder is None:
            return
        self._attempt(self._claim)
        for path in sorted(folder.glob("marks-*.jsonl")):
            for record in _lines(path):
                self.records.setdefault(record["key"], record)

    def _claim(self) -> None:
        assert self.folder is not None
        path = self.folder / self.header
        recover(self.folder)  # a header that a killed run was just placing is written anew
        if not path.exists():
            content = json.dumps({"schema": SCHEMA, **self._about}, indent=1).encode()
            publish({path: content}, force=True)  # processes that start together write the same
        recorded = read_json(path, _EXPECTED, schema=SCHEMA)
        for name, value in self._about.items():
            if recorded.get(name) != value:
                other = _OTHER.get(name, "model")
                raise PlanError(
                    f"The log in {self.folder.name} belongs to another {other}: "
                    f"{_difference(name, recorded.get(name), value)}. Choose another folder, or run the {self.noun} "
                    "as before."
                )

    def marks(self, key: str, count: int) -> list[float]:
        """Return the marks of a record.

        Raises:
            PlanError: The log holds more or fewer for it than were asked for.
        """
        marks: list[float] = self.records[key]["marks"]
        if len(marks) != count:
            raise PlanError(
                f"The log holds {len(marks)} marks under {key}, and {count} are needed: it is damaged. Choose another "
                "folder for the log."
            )
        return marks

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record; when this returns it survives a kill.

        Raises:
            LogError: The disk is full, or the folder cannot be written.
        """
        record = {"key": key, **record}
        self._own[key] = self.records[key] = record
        if self.folder is not None:
            self._attempt(lambda: self._append(json.dumps(record, allow_nan=False) + "\n"))

    def _append(self, line: str) -> None:
        assert self.folder is not None
        fresh = self._file < 0
        if fresh:
            self._file = _create(self.folder, self._rank)
        data = line.encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, WriteError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or error
            raise LogError(
                f"The log of the {self.noun} cannot be written ({reason}): free some space or choose "
                "another folder, and run again. What is in the log stays, and is not generated again."
            ) from None

    def merge(
        self, share: Callable[[list[dict[str, Any]]], Sequence[dict[str, Any]]], *, everything: bool = False
    ) -> None:
        """Learn what the other processes have found; `share` gives each process the records of all."""
        records = list((self.records if everything else self._own).values())
        for record in share(records):
            self.records.setdefault(record["key"], record)
        self._own = {}

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)


def _create(folder: Path, rank: int) -> int:
    for n in range(1_000_000):
        try:
            return os.open(folder / f"marks-{rank:03d}-{n:03d}.jsonl", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue
    raise OSError("too many files")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of one file.

    Raises:
        PlanError: A line that is not the last one is damaged.
    """
    parsed = []
    size = check_regular(path, _MARKS).st_size
    if size > _MARKS.limit:
        raise PlanError(f"{path.name} holds {size} bytes; a file of marks has at most {_MARKS.limit}. {_CURE}")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LINE.limit + 1):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) > _LINE.limit:
                    raise PlanError(f"Line {number} of {path.name} is damaged: it does not end. {_CURE}")
                break  # a kill left it unfinished
            parsed.append(_record(line, f"Line {number} of {path.name}"))
    return parsed


def _record(line: bytes, name: str) -> dict[str, Any]:
    """Check one line of marks: an object with a key and finite numbers."""
    try:
        record = parse_json(line, name, _LINE)
    except PlanError:
        record = None
    if isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("marks"), list):
        marks = record["marks"]
        if all(type(x) in (int, float) and math.isfinite(x) for x in marks):
            return {**record, "marks": [float(x) for x in marks]}
    raise PlanError(f"{name} is damaged. {_CURE}")


def _difference(name: str, recorded: Any, requested: Any) -> str:
    if isinstance(recorded, dict) and isinstance(requested, dict):
        for key in {**recorded, **requested}:
            if recorded.get(key) != requested.get(key):
                return f"{key} was {_short(recorded.get(key))} and is {_short(requested.get(key))}"
    return f"{name} was {_short(recorded)} and is {_short(requested)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
