"""Many pictures of a list of prompts, under one or several settings: which there are, which are there, and their table.

A picture's file is named by its prompt, what acts on it, its seed, and six digits of whatever else differs from the
pipeline's own settings. What is there with an equal record is not made again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnctl.data.files import below, slug
from attnctl.data.prompt_files import PromptLine
from attnctl.data.record import Record, RecordError, pixels_sha256, read
from attnctl.data.specs import control_to_dict
from attnctl.errors import ConfigError
from attnctl.pipelines.bounds import MOST, check_pixels_asked, check_wholes
from attnctl.pipelines.generate import Call, settings_of
from attnctl.pipelines.models import Loaded
from attnctl.plans.writing import recover

__all__ = [
    "COLUMNS",
    "Column",
    "Job",
    "Run",
    "comparison",
    "jobs_of",
    "runs_of",
    "sheet_name",
    "table_of",
    "table_row",
    "unlike",
]

COLUMNS = (
    "line", "prompt", "column", "seed", "path", "width", "height", "steps", "guidance", "negative", "controls", "model",
    "sha256",
)  # fmt: skip
"""The columns of the table, in order."""

_SETTINGS = ("steps", "guidance", "negative", "width", "height")
_TILE = 512  # pixels that a picture has on a sheet at most


@dataclass(frozen=True)
class Column:
    """One setting that every prompt is made with: what it is called, and its controls."""

    label: str
    controls: tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """One picture: the call that makes it alone, its file, its line in the list, and its column."""

    call: Call
    path: Path
    line: int
    column: str


@dataclass(frozen=True)
class Run:
    """Pictures that one call of the pipeline makes together."""

    jobs: tuple[Job, ...]

    @property
    def call(self) -> Call:
        """Return the call of all of them."""
        calls = [job.call for job in self.jobs]
        prompts, seeds = tuple(c.prompts[0] for c in calls), tuple(c.seeds[0] for c in calls)
        return replace(calls[0], prompts=prompts, seeds=seeds)


def jobs_of(
    lines: Sequence[PromptLine],
    columns: Sequence[Column],
    usual: Call,
    *,
    seed: int,
    num: int,
    out: Path,
    controls_of: Mapping[int, tuple[Any, ...]],
) -> tuple[Job, ...]:
    """List the pictures: every line with every column, each with the same seeds.

    Args:
        lines: The prompts, with settings of their own.
        columns: What each is made with.
        usual: The call whose settings hold where a line has none.
        seed: The first seed of every line that has none.
        num: Pictures per line and column.
        out: Their folder.
        controls_of: The controls of lines that have some, by their number.

    Raises:
        ConfigError: A line asks for what cannot be, two lines are the same, or there are too many pictures.
    """
    jobs: dict[Path, Job] = {}
    for line in lines:
        where = f"line {line.number}: "
        values = {name: getattr(line, name) for name in ("seed", "num", "steps", "width", "height")}
        check_wholes(values, ConfigError, where)
        settings = {name: value for name in _SETTINGS if (value := getattr(line, name)) is not None}
        base = replace(usual, prompts=(line.prompt,), **settings)
        check_pixels_asked(base.width, base.height, ConfigError)
        first = seed if line.seed is None else line.seed
        for column in columns:
            acting = controls_of.get(line.number, column.controls)
            for n in range(num if line.num is None else line.num):
                call = replace(base, seeds=(first + n,), controls=acting)
                path = below(out, f"{_name(call)}-{first + n}.png")
                if path in jobs:
                    raise ConfigError(
                        f"Line {line.number} asks for the same picture as line {jobs[path].line} ({line.prompt!r:.60}, "
                        f"seed {first + n}, {column.label}): drop one of them, or give it another seed."
                    )
                jobs[path] = Job(call, path, line.number, column.label)
                if len(jobs) > MOST["pictures"]:
                    raise ConfigError(f"More than {MOST['pictures']} pictures were asked for: cut the list in parts.")
    return tuple(jobs.values())


def _name(call: Call) -> str:
    """Name what a call shows but for its seed: prompt, methods, and a mark of settings that are not the usual ones."""
    methods = "".join(f"-{type(control).__name__.lower()}" for control in call.controls)
    settings: dict[str, Any] = {n: v for n in _SETTINGS if (v := getattr(call, n)) is not None}
    plain = tuple(control for control in call.controls if control == _as_made(control))
    if plain != call.controls:
        settings["controls"] = [control_to_dict(control) for control in call.controls]
    if call.options:
        settings["options"] = dict(call.options)
    return f"{slug(call.prompts[0])}{methods}" + (f"-{_mark(settings)}" if settings else "")


def _as_made(control: Any) -> Any:
    """Return a control of the same class with its defaults; None where it needs fields."""
    try:
        return type(control)()
    except (TypeError, ValueError):
        return None


def _mark(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def runs_of(jobs: Sequence[Job], batch: int) -> tuple[Run, ...]:
    """Put neighbours with the same settings into calls of at most `batch` pictures."""
    groups: list[list[Job]] = []
    for job in jobs:
        last = groups[-1] if groups else []
        if last and len(last) < batch and _alike(last[0].call, job.call):
            last.append(job)
        else:
            groups.append([job])
    return tuple(Run(tuple(group)) for group in groups)


def _alike(a: Call, b: Call) -> bool:
    return replace(a, prompts=b.prompts, seeds=b.seeds) == b


def unlike(run: Run, loaded: Loaded) -> dict[Path, str]:
    """Name the pictures of a run that are not there as it would make them, and why; "" where there is nothing.

    Raises:
        ConfigError: as `settings_of`.
    """
    expected = settings_of(loaded, run.call)
    for folder in dict.fromkeys(job.path.parent for job in run.jobs):
        recover(folder)  # a picture that a killed run was just placing is none: the next one's writing would undo it
    reasons: dict[Path, str] = {}
    for i, job in enumerate(run.jobs):
        if not job.path.exists():
            reasons[job.path] = ""
        elif reason := _difference(job.path, i, expected, run.call):
            reasons[job.path] = reason
    return reasons


def _difference(path: Path, place: int, expected: Mapping[str, Any], call: Call) -> str:
    """Say what a file's record has otherwise than expected; "" for an equal one that belongs to its pixels."""
    from PIL import Image

    try:
        (record,) = read(path)
        with Image.open(path) as image:
            pixels = pixels_sha256(image)
    except (RecordError, ValueError, OSError) as error:
        return str(error)
    if record.shows != (place,) or record.sha256[place : place + 1] != (pixels,):
        return "its record is of another picture"
    size = {name: value for name in ("width", "height") if (value := getattr(call, name)) is not None}
    for name, value in {**expected, **size}.items():
        given = getattr(record, name)
        if name == "device":  # processes that share a list have a device each
            given, value = given.partition(":")[0], value.partition(":")[0]
        if _plain(given) != _plain(value):
            return f"{name} is {given!r:.80}, and would be {value!r:.80}"
    return ""


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back, in which there are no tuples."""
    return json.loads(json.dumps(value))


def table_row(job: Job, record: Record, place: int) -> dict[str, Any]:
    """Describe one picture for the table."""
    facts = {name: getattr(record, name) for name in ("width", "height", "steps", "guidance", "negative", "model")}
    return {
        "line": job.line,
        "prompt": record.prompts[place],
        "column": job.column,
        "seed": record.seeds[place],
        "path": job.path.name,
        **facts,
        "controls": json.dumps(list(record.controls)) if record.controls else "",
        "sha256": record.sha256[place],
    }


def table_of(rows: Sequence[Mapping[str, Any]]) -> tuple[bytes, bytes]:
    """Write the table as CSV and as JSON lines."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = "".join(json.dumps({name: row[name] for name in COLUMNS}) + "\n" for row in rows)
    return text.getvalue().encode(), lines.encode()


def sheet_name(jobs: Sequence[Job]) -> str:
    """Name the sheet of one line by its prompt and the pictures that belong on it."""
    return f"{slug(jobs[0].call.prompts[0])}-compare-{_mark({'files': [job.path.name for job in jobs]})}.png"


def comparison(jobs: Sequence[Job], columns: Sequence[str]) -> tuple[Any, list[Record]]:
    """Draw the sheet of one line, seeds below each other and columns side by side; return it and its records."""
    from PIL import Image

    from attnctl.data.pictures import grid

    seeds = list(dict.fromkeys(job.call.seeds[0] for job in jobs))
    by_place = {(job.call.seeds[0], job.column): job for job in jobs if job.path.exists()}
    tiles: list[Any] = []
    records: list[Record] = []
    for seed in seeds:
        for column in columns:
            job = by_place.get((seed, column))
            if job is None:
                tiles.append(None)
                continue
            with Image.open(job.path) as image:
                tile = image.convert("RGB")
            tile.thumbnail((_TILE, _TILE))
            tiles.append(tile)
            records += read(job.path)
    if not records:
        return None, []
    labels = [f"seed {seed}" for seed in seeds]
    return grid(tiles, len(seeds), len(columns), labels, list(columns), title=jobs[0].call.prompts[0]), records
