"""`attnctl bench`: run the project's benchmarks in one go, or show what they have measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, say, table
from attnctl.data.progress import in_words
from attnctl.errors import nearest

__all__ = ["Bench", "Benchmark", "catalogue", "command_of", "figures_of", "told"]

_CATALOGUE = "bench.toml"
_SILENCE = 30.0  # seconds until a line says that a script still runs


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Describe one benchmark, as benchmarks/bench.toml does.

    Attributes:
        name: What `--only` takes.
        script: File in the benchmarks' folder.
        about: What it measures.
        args: Arguments of a full run; `{work}` stands for a folder that is removed afterwards.
        quick: Arguments of a smoke run, or None where there is none.
        needs: What must be there besides the package, or "".
        out: File in results/ that holds the project's own run, or "".
        figures: Headline numbers: label and place in the JSON, keys and indices joined by "/".
    """

    name: str
    script: str
    about: str
    args: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None
    needs: str = ""
    out: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)


def catalogue(folder: Path) -> tuple[Benchmark, ...]:
    """Read the list of benchmarks in a folder."""
    data = tomllib.loads((folder / _CATALOGUE).read_text(encoding="utf-8"))
    made = []
    for name, entry in data.items():
        quick = entry.pop("quick", None)
        entry = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        made.append(Benchmark(name=name, quick=None if quick is None else tuple(quick), **entry))
    return tuple(made)


def figures_of(benchmark: Benchmark, data: Any) -> dict[str, Any]:
    """Look the headline numbers of a result up; those that this run did not measure are left out."""
    figures = {}
    for label, place in benchmark.figures.items():
        value = data
        try:
            for key in place.split("/"):
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            continue
        figures[label] = value
    return figures


def command_of(benchmark: Benchmark, quick: bool = False) -> str:
    """Write the command line that runs a benchmark."""
    arguments = (benchmark.quick or ()) if quick else benchmark.args
    return " ".join(["python", f"benchmarks/{benchmark.script}", *arguments]).replace("{work}", "WORK")


def told(figures: Mapping[str, Any]) -> str:
    """Put headline numbers into one line."""

    def short(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{label} {short(value)}" for label, value in figures.items())


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Run the project's benchmarks in one go, or show what they have measured. Needs a clone of the repository."""

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: all)")] = ()
    """Run these."""

    quick: bool = False
    """Smoke settings: everything that has them, in minutes. The figures mean nothing."""

    list: bool = False
    """Name the benchmarks and run none."""

    show: bool = False
    """Show the results that the repository holds, and run nothing."""

    out: Path = Path("out/bench.json")
    """File for the results of all runs."""

    force: bool = False
    """Overwrite that file."""

    folder: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: the clone's)")] = None
    """Folder of the benchmarks."""

    def run(self, command: str) -> Result:
        """Run, list or show."""
        folder = _found(self.folder)
        catalogued = {b.name: b for b in catalogue(folder)}
        for name in self.only:
            if name not in catalogued:
                raise UsageError(
                    f"There is no benchmark {name!r}.{nearest(name, catalogued)} `attnctl bench --list` names them."
                )
        chosen = [b for b in catalogued.values() if b.name in self.only or not self.only]
        if self.list:
            rows = [(b.name, b.about, b.needs, "yes" if b.quick is not None else "") for b in chosen]
            return Result(
                [vars(b) | {"figures": dict(b.figures)} for b in chosen],
                table(("name", "measures", "needs", "quick"), rows),
            )
        if self.show:
            return _recorded(folder, chosen)
        return self._measure(folder, chosen, command)

    def _measure(self, folder: Path, chosen: Sequence[Benchmark], command: str) -> Result:
        from attnctl.data.provenance import hardware, versions
        from attnctl.plans.writing import check_free, publish

        if self.quick:
            chosen = [b for b in chosen if b.quick is not None]
        elif not self.only:  # what needs more than the package is run where it is asked for
            chosen = [b for b in chosen if not b.needs]
        if not chosen:
            raise UsageError("None of these benchmarks has smoke settings: leave out --quick.")
        check_free([self.out], force=self.force)
        say(f"{len(chosen)} benchmark(s) to run")
        runs = []
        for i, benchmark in enumerate(chosen, 1):
            say(f"[{i}/{len(chosen)}] {benchmark.name}: {benchmark.about}")
            runs.append(_run(folder, benchmark, self.quick))
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "command": command,
            "quick": self.quick,
            "machine": {"platform": platform.platform(), "hardware": hardware(), "cpus": os.cpu_count()},
            "versions": versions(),
            "runs": runs,
        }
        publish({self.out: (json.dumps(facts, indent=1) + "\n").encode()}, force=self.force)
        rows = [(r["name"], "ok" if r["code"] == 0 else "failed", r["seconds"], told(r["figures"])) for r in runs]
        text = table(("benchmark", "", "seconds", "figures"), rows) + f"\n\nwrote {self.out}"
        return Result(facts, text, 0 if all(r["code"] == 0 for r in runs) else 1)


def _found(folder: Path | None) -> Path:
    """Find the benchmarks of the clone that this package is installed from, or that is the working folder."""
    places = [folder] if folder is not None else [Path(__file__).parents[3] / "benchmarks", Path("benchmarks")]
    for place in places:
        if (place / _CATALOGUE).is_file():
            return place.resolve()
    raise UsageError(
        f"There are no benchmarks in {places[-1]}: they are part of the repository, and not of the installed package. "
        "Clone it, and run `attnctl bench` in it or give --folder."
    )


def _run(folder: Path, benchmark: Benchmark, quick: bool) -> dict[str, Any]:
    """Run one script: its talk goes on to stderr, its JSON is kept."""
    arguments = (benchmark.quick or ()) if quick else benchmark.args
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        filled = [a.replace("{work}", work) for a in arguments]
        command = [sys.executable, str(folder / benchmark.script), *filled]
        with subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True) as process:
            text = _output(process, benchmark.name, began)
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    code = process.returncode or (1 if data is None else 0)
    return {
        "name": benchmark.name,
        "command": command_of(benchmark, quick),
        "code": code,
        "seconds": round(time.perf_counter() - began, 1),
        "figures": figures_of(benchmark, data),
        "result": data,
    }


def _output(process: subprocess.Popen[str], name: str, began: float) -> str:
    """Return what a script prints, and say now and then that it still runs."""
    while True:
        try:
            return process.communicate(timeout=_SILENCE)[0]
        except subprocess.TimeoutExpired:
            say(f"  {name} runs since {in_words(time.perf_counter() - began)}")
        except BaseException:
            process.kill()
            raise


def _recorded(folder: Path, chosen: Sequence[Benchmark]) -> Result:
    """Show the project's own runs: figures, versions, and the command that repeats each."""
    facts, rows = [], []
    for benchmark in chosen:
        file = folder / "results" / benchmark.out
        if not benchmark.out or not file.is_file():
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        figures = figures_of(benchmark, data)
        facts.append(
            {"name": benchmark.name, "file": benchmark.out, "figures": figures, "command": command_of(benchmark)}
        )
        rows.append((benchmark.name, told(figures), command_of(benchmark)))
    return Result(facts, table(("benchmark", "figures", "command"), rows))
