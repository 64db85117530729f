"""Lists of prompts for `attnctl generate`: a picture for every line, column and seed, shared between processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.commands.common import Result, UsageError, say, table
from attnctl.app.commands.pictures import check_controls, write_pictures
from attnctl.data.files import below, slug
from attnctl.plans.writing import FileExists, check_writable, publish

if TYPE_CHECKING:
    from attnctl.data.prompt_files import PromptLine
    from attnctl.pipelines.batches import Column, Job, Run
    from attnctl.pipelines.generate import Call
    from attnctl.pipelines.workers import Workers

__all__ = ["Batch", "make_many"]

_SHOWN = 20  # rows of the table that are printed


@dataclass(frozen=True)
class Batch:
    """A list of prompts on its way: what is asked for, and how.

    Attributes:
        usual: The call whose settings hold where a line has none of its own.
        columns: What every prompt is made with.
        jobs: The pictures.
        batch: Pictures per call.
        out: Their folder.
        table: Name of the table, without its ending.
        force: Make what is there again.
        sheets: Draw a sheet per prompt.
        fps: Frames per second of videos.
    """

    usual: Call
    columns: Sequence[Column]
    jobs: Sequence[Job]
    batch: int
    out: Path
    table: str
    force: bool
    sheets: bool
    fps: float

    def run(self, model: str, revision: str | None, device: str, dtype: str) -> Result:
        """Make what is missing, with the other processes, then write the table and the sheets."""
        from attnctl.pipelines.batches import runs_of
        from attnctl.pipelines.models import device_and_dtype, load
        from attnctl.pipelines.workers import Workers

        device, dtype = device_and_dtype(device, dtype)
        crew = Workers(device)
        if crew.size > 1 and device == "cuda":
            device = f"cuda:{crew.local}"
        if not crew.rank:
            say(f"Loading {model} ({device}, {dtype})")
        loaded = load(model, revision=revision, device=device, dtype=dtype)
        runs = runs_of(self._fitted(loaded.pipe, crew), self.batch)
        missing = self._missing(runs, loaded, crew)
        started = time.perf_counter()
        failed = [
            failure for share in crew.share([self._make(missing[crew.rank :: crew.size], loaded, crew)]) for failure in
            share["failed"]
        ]  # fmt: skip
        if crew.rank:
            crew.wait()
            return Result(None, "")
        say(f"{sum(len(run.jobs) for run in missing)} picture(s) in {time.perf_counter() - started:.1f} s")
        result = self._result(runs, failed)
        crew.wait()
        return result

    def _fitted(self, pipe: Any, crew: Workers) -> list[Job]:
        """Return the pictures with sizes that the pipeline takes, and say once what becomes of each other size."""
        from attnctl.pipelines.generate import fitted

        said: set[str] = set()

        def announce(text: str) -> None:
            if not crew.rank and text not in said:
                say(text)
            said.add(text)

        return [replace(job, call=fitted(pipe, job.call, announce)) for job in self.jobs]

    def _missing(self, runs: Sequence[Run], loaded: Any, crew: Workers) -> list[Run]:
        """Return the runs whose pictures are not all there, and refuse to replace others."""
        from attnctl.pipelines.batches import unlike

        if self.force:
            return list(runs)
        reasons = {path: reason for run in runs for path, reason in unlike(run, loaded).items()}
        other = {path: reason for path, reason in reasons.items() if reason}
        crew.wait()  # nobody writes before all have looked
        if other:
            path, reason = next(iter(other.items()))
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            raise FileExists(
                f"{path}{more} is there, but not as it would be made now: {reason}. Choose another folder, or pass "
                "--force."
            )
        missing = [run for run in runs if any(job.path in reasons for job in run.jobs)]
        there = len(self.jobs) - sum(len(run.jobs) for run in missing)
        if there and not crew.rank:
            say(f"{there} of {len(self.jobs)} picture(s) are there with an equal record, and stay.")
        return missing

    def _make(self, runs: Sequence[Run], loaded: Any, crew: Workers) -> dict[str, Any]:
        """Make this process's share; what is refused is said, and the rest goes on."""
        from attnctl.data.progress import Progress
        from attnctl.errors import AttnctlError
        from attnctl.pipelines.generate import sample
        from attnctl.pipelines.stepping import steps_of

        each = [steps_of(loaded.pipe, run.call.steps) for run in runs]
        total = None if None in each else sum(n or 0 for n in each)
        count, done = sum(len(run.jobs) for run in runs), 0
        label = "generate" if crew.size == 1 else f"generate, process {crew.rank + 1} of {crew.size}"
        failed: list[dict[str, Any]] = []
        with Progress(total, "step", label) as bar:
            for run in runs:
                bar.describe(f"picture {done + 1} of {count}")
                try:
                    made = sample(loaded, run.call, bar.update)
                except AttnctlError as error:
                    failed.append({"lines": sorted({job.line for job in run.jobs}), "error": str(error)})
                    say(f"Line {', '.join(map(str, failed[-1]['lines']))} is left out: {error}")
                    continue
                finally:
                    done += len(run.jobs)
                write_pictures(made, [job.path for job in run.jobs], self.fps, force=True)
        return {"failed": failed}

    def _result(self, runs: Sequence[Run], failed: list[dict[str, Any]]) -> Result:
        """Write the table and the sheets of all processes."""
        from attnctl.data.record import read
        from attnctl.pipelines.batches import table_of, table_row

        places = {job.path: i for run in runs for i, job in enumerate(run.jobs)}
        there = [job for job in self.jobs if job.path.exists()]
        rows = [table_row(job, read(job.path)[0], places[job.path]) for job in there]
        as_csv, as_lines = table_of(rows)
        files = {below(self.out, f"{self.table}.csv"): as_csv, below(self.out, f"{self.table}.jsonl"): as_lines}
        if rows:
            publish(files, force=True)
        sheets = self._sheets() if self.sheets else []
        shown = [(row["line"], row["column"], row["seed"], row["path"]) for row in rows[:_SHOWN]]
        text = table(("line", "column", "seed", "path"), shown)
        if len(rows) > _SHOWN:
            text += f"\n... {len(rows) - _SHOWN} more in {self.table}.csv"
        lines = [text, *(str(path) for path in (*files, *sheets) if rows)]
        names = {"table": [str(path) for path in files], "sheets": [str(path) for path in sheets]}
        data = {"pictures": rows, "failed": failed, **names}
        return Result(data, "\n".join(lines), 1 if failed else 0)

    def _sheets(self) -> list[Path]:
        from attnctl.data.record import save_image
        from attnctl.pipelines.batches import comparison, sheet_name

        labels = [column.label for column in self.columns]
        by_line: dict[int, list[Job]] = {}
        for job in self.jobs:
            by_line.setdefault(job.line, []).append(job)
        paths = []
        for jobs in by_line.values():
            sheet, records = comparison(jobs, labels)
            if sheet is not None:
                paths.append(below(self.out, sheet_name(jobs)))
                save_image(sheet, paths[-1], records, force=True)
        return paths


def make_many(options: Any, command: str, model: str) -> Result:
    """Make a list of prompts, with every column of --compare.

    Raises:
        UsageError: The options, or what the list asks for, cannot be.
        PromptFileError: The list cannot be read.
        FileExists: Pictures lie there that are others.
    """
    from attnctl.data.prompt_files import PromptLine, read_prompts

    if options.prompts is not None and options.prompt:
        raise UsageError("--prompts has the prompts in a file: leave out --prompt.")
    if options.compare and options.control:
        raise UsageError("--compare names the controls of each column: put those of --control there.")
    lines = None if options.prompts is None else read_prompts(options.prompts)  # before anything is imported
    call, batch = options.described(command, () if lines is None else ("",)), options.whole("batch", 1)

    from attnctl.errors import ConfigError
    from attnctl.pipelines.batches import Column, jobs_of

    if lines is None:
        lines = tuple(PromptLine(number=i, prompt=text) for i, text in enumerate(options.prompt, 1))
    columns = columns_of(options.compare) or [Column(" + ".join(options.control) or "plain", call.controls)]
    try:
        jobs = jobs_of(
            lines, columns, call, seed=options.whole("seed", 0), num=options.whole("num", 1), out=options.out,
            controls_of=controls_of(lines, options.compare),
        )  # fmt: skip
    except ConfigError as error:
        raise UsageError(str(error)) from None
    seen: list[tuple[Any, ...]] = []
    for job in jobs:
        if job.call.controls not in seen:
            seen.append(job.call.controls)
            check_controls(job.call.controls, batch)
    table = "pictures" if options.prompts is None else f"{slug(options.prompts.stem)}-pictures"
    check_replaceable(options.out, table)
    check_writable(options.out)
    say(f"{len(lines)} prompt(s), {len(jobs)} picture(s)")
    many = Batch(call, columns, jobs, batch, options.out, table, options.force, bool(options.compare), options.fps)
    return many.run(model, options.revision, options.device, options.dtype)


def controls_of(lines: Sequence[PromptLine], compare: Sequence[str]) -> dict[int, tuple[Any, ...]]:
    """Read the controls that lines have of their own, by their number.

    Raises:
        UsageError: They cannot be read, or --compare gives every line the same.
    """
    from attnctl.data.specs import parse_controls
    from attnctl.errors import AttnctlError

    controls: dict[int, tuple[Any, ...]] = {}
    for line in lines:
        if line.control is not None and compare:
            raise UsageError(f"Line {line.number} has controls of its own, and --compare gives every line the same.")
        try:
            if line.control is not None:
                controls[line.number] = tuple(c for text in line.control for c in parse_controls(text))
        except AttnctlError as error:
            raise UsageError(f"Line {line.number}: {error}") from None
    return controls


def check_replaceable(out: Path, name: str) -> None:
    """Refuse a folder in which files lie that have the names of the table, and are none of this command's.

    Raises:
        FileExists: One has other columns.
    """
    from attnctl.pipelines.batches import COLUMNS

    for path, head in ((below(out, f"{name}.csv"), ",".join(COLUMNS)), (below(out, f"{name}.jsonl"), '{"line": ')):
        if path.exists():
            with path.open("rb") as file:
                first = file.readline(1000).decode("utf-8", "replace").strip()
            if not first.startswith(head):
                raise FileExists(f"{path} is a table of something else: choose another folder, or move it away.")


def columns_of(texts: Sequence[str]) -> list[Column]:
    """Read the columns of --compare.

    Raises:
        UsageError: One is no control, or two are the same.
    """
    from attnctl.data.specs import parse_controls
    from attnctl.errors import ConfigError
    from attnctl.pipelines.batches import Column

    if len(set(texts)) < len(texts):
        raise UsageError(f"--compare names {len(texts)} columns, and two of them are the same: drop one.")
    try:
        return [Column(" ".join(text.split()), parse_controls(text)) for text in texts]
    except ConfigError as error:
        raise UsageError(f'--compare takes "plain", controls, and controls with + between them: {error}') from None
