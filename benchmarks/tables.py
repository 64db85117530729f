"""Write the page of benchmarks from recorded results: `python benchmarks/tables.py > docs/results/benchmarks.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import host_matrix

from attnctl.app.commands.bench import catalogue, command_of, figures_of, told

__all__ = ["markdown"]

FOLDER = Path(__file__).resolve().parent
HEAD = """\
# Benchmarks

Every figure is printed by the command beside it, in a clone of the repository; `attnctl bench` runs them all, and
`attnctl bench --show` prints the first table. The results lie in `benchmarks/results`, and the pages of the methods
say what they mean. This page is written by `python benchmarks/tables.py > docs/results/benchmarks.md`.

## Methods

| benchmark | measures | figures | command |
|---|---|---|---|"""
TESTED = """\
What has no figure is a test: methods against recordings of the authors' code (`pytest tests/test_pag_parity.py
tests/test_fatezero_parity.py tests/test_backbones_parity.py` and the others named after methods), two hundred runs
without growth and two hash seeds (`pytest tests/test_leaks.py`), that no selected site is passed over in silence
(`pytest tests/test_contract_tools.py -k skips_attention`), and that nothing is fetched unasked (`pytest
tests/test_network.py tests/test_examples.py`)."""
FIDELITY = """\
### Fidelity

What the package computes in float32, against the formula in float64 with every map written out, on the same random
numbers: the largest difference of any element, and the largest element (`python benchmarks/fidelity.py`).

| method | formula | difference | largest element |
|---|---|---|---|"""
CALLS = """\
### Calls

What one call goes through (`python benchmarks/calls.py --before FOLDER`, where FOLDER is a checkout of the other
commit): functions of the package, the files they lie in, and the moves, which are calls into another file than the call
before. Times are those of the shipped text2image model with one thread: medians of rounds that take turns."""
TIMES = {
    "attach PAG": "attaching PAG",
    "plain": "a step without control",
    "PAG": "a step under PAG",
    "switched off": "a step under PAG that is switched off",
    "Capture": "a step under Capture",
    "import": "importing attnctl and PAG after torch, diffusers and transformers",
}
ENDED = "whole runs, exceptions and KeyboardInterrupt in every step, with the handle lost"


def recorded(name: str) -> dict[str, Any]:
    """Read a result of the project's own runs; empty where there is none yet."""
    path = FOLDER / "results" / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def measured(data: dict[str, Any]) -> list[str]:
    """Say when the parts of reliability.json were measured, and with which versions."""
    days: dict[str, list[str]] = {}
    for name, part in data.items():
        if isinstance(part, dict):
            about = part["versions"]
            where = f"Python {about['python']}, torch {about['torch']}, diffusers {about['diffusers']}"
            days.setdefault(f"on {part['date']} ({where})", []).append(name)
    return [f"{', '.join(parts)} {when}" for when, parts in days.items()]


def reliability(data: dict[str, Any]) -> list[tuple[str, str]]:
    """List what is measured about switching off, detaching and packaging, and the value."""
    rows: list[tuple[str, str]] = []
    if "inactive" in data:
        i = data["inactive"]
        rows += [
            ("switched off: the same output bit for bit", f"{i['exact']} of {i['of']} methods x models"),
            (
                "switched off: processor time added to a call (below 0 is noise)",
                f"{i['us_per_call']} us (tiny UNet, {i['us_plain_call']} us plain)",
            ),
            ("switched off: tensors held", f"{i['bytes']} bytes"),
        ]
    if "restore" in data:
        r, theirs = data["restore"], data["restore"]["diffusers_pag_pipeline"]
        rows += [
            (f"detached: output and variables as before ({ENDED})", f"{r['restored']} of {r['cases']}"),
            ("detached: variables left on modules and scheduler", f"{r['left_over']}"),
            ("diffusers' PAG pipeline after an exception: processors left", f"{theirs['left_over']}"),
            (
                "diffusers' PAG pipeline after an exception: its UNet in a plain pipeline",
                theirs["plain_pipeline_after"],
            ),
        ]
    if "promises" in data:
        p = data["promises"]
        ends = ", ".join(f"{n} {how}" for how, n in p["threads"].items())
        rows += [
            ("two threads on one denoiser (`tests/test_roads_threads.py`): how requests ended", ends),
            (
                "waits for the device after the first step (`tests/test_stalls.py`)",
                f"{p['waits']}, over {p['waits_of']} kinds of model",
            ),
            (
                "launches of a perturbed pass per site, at most (`tests/test_launches.py`)",
                f"{p['launches_of_a_pass']} ({p['launches_of_a_pass_at']})",
            ),
            ("launches of calibration per site and step, at most", f"{p['launches_of_calibration']}"),
            (
                "block outputs that prefix replay holds, at most (`tests/test_roads_replay.py`)",
                f"{p['block_outputs_held']}",
            ),
        ]
    if "counts" in data:
        c = data["counts"]
        split = f"{c['pairs_together']}, {c['pairs_refused']}, {c['pairs_without_common_model']} of {c['pairs']}"
        rows += [
            ("kinds of denoiser, and pipelines, of the contract suites", f"{c['denoisers']}, {c['pipelines']}"),
            (
                "[pairs of controls](../reference/pairs.md) together, refused with the reason, without a common model",
                split,
            ),
            ("random cases in every run, and at night", f"{c['property_cases']}, {c['property_cases_at_night']}"),
            ("lines of Python", ", ".join(f"{k} {v}" for k, v in c["lines"].items())),
        ]
    if "suite" in data:
        t = data["suite"]
        rows += [
            (
                f"all tests, in {t['processes']} processes, statements counted",
                f"{t['passed']} passed, {t['skipped']} skipped, {t['failed']} failed in {t['seconds']} s",
            ),
            ("statements of the package that the tests run", f"{t['covered_percent']} % of {t['statements']}"),
        ]
    return rows


def calls(data: dict[str, Any]) -> list[str]:
    """Lay out what one call goes through, and what it takes, at each commit."""
    sides = [data[side] for side in ("before", "after") if side in data]
    commits = [side["commit"] for side in sides]
    lines = [CALLS, "", f"| functions (files; moves) | {' | '.join(commits)} |", f"|---|{'---|' * len(sides)}"]
    for name in sides[0]["counts"]:
        counts = [side["counts"][name] for side in sides]
        cells = [f"{c['functions']} ({c['files']}; {c['moves']})" for c in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| milliseconds | {' | '.join(commits)} |", f"|---|{'---|' * len(sides)}"]
    for name in sides[0]["milliseconds"]:
        lines.append(f"| {TIMES[name]} | {' | '.join(str(side['milliseconds'][name]) for side in sides)} |")
    return [*lines, ""]


def kept(data: dict[str, Any]) -> list[tuple[str, str]]:
    """List what recorded maps weigh and how much is annotated, and the value."""
    if not data:
        return []
    maps, source = data["maps"], data["source"]
    return [
        (
            f"a recorded word after {maps['steps']} steps of the shipped mmdit, and the maps behind it",
            f"{maps['held'] / 1024:.0f} KiB, {maps['maps_one_by_one'] / 2**20:.0f} MiB",
        ),
        ("functions with every parameter and result annotated", f"{source['annotated']} of {source['functions']}"),
    ]


def markdown() -> str:
    """Lay out everything that is recorded."""
    data, hosts, near = (recorded(f"{name}.json") for name in ("reliability", "host_matrix", "fidelity"))
    lines = [HEAD]
    for benchmark in catalogue(FOLDER):
        found = recorded(benchmark.out) if benchmark.out else {}
        if found and benchmark.name not in ("reliability", "host_matrix"):
            figures = told(figures_of(benchmark, found)) or f"in `benchmarks/results/{benchmark.out}`"
            lines.append(f"| {benchmark.name} | {benchmark.about} | {figures} | `{command_of(benchmark)}` |")
    lines += ["", "## Reliability", ""]
    if data:
        command = "`python benchmarks/reliability.py`"
        lines += [f"Measured with one thread on {data['machine']}: {'; '.join(measured(data))}.", ""]
        lines += ["| figure | value | command |", "|---|---|---|"]
        lines += [f"| {what} | {value} | {command} |" for what, value in reliability(data)]
        lines += [f"| {what} | {value} | `python benchmarks/fidelity.py` |" for what, value in kept(near)]
        lines += [""]
    if near:
        rows = near["rows"].items()
        lines += [
            FIDELITY,
            *(f"| {n} | {r['formula']} | {r['difference']:.1e} | {r['largest']:.3g} |" for n, r in rows),
        ]
        lines += [""]
    if followed := recorded("calls.json"):
        lines += calls(followed)
    lines += [TESTED, "", "## Host versions", ""]
    if not hosts:
        return "\n".join([*lines, "Measured by `python benchmarks/host_matrix.py`; nothing is recorded yet.", ""])
    lines += ["Each host in an environment of its own, by `python benchmarks/host_matrix.py`; the parts of the tests:"]
    lines += ["", *(f"- {name}: `pytest {part}`" for name, part in hosts["suites"].items()), ""]
    lines += [host_matrix.markdown(hosts), ""]
    notes = [f"- {name}: {h['note']}." for name, h in hosts["hosts"].items() if h.get("note")]
    return "\n".join([*lines, *notes, *([""] if notes else [])])


if __name__ == "__main__":
    sys.stdout.write(markdown())
