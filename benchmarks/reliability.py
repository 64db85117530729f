"""What attaching costs, what detaching leaves, and how the package is made: `python benchmarks/reliability.py`.

inactive    a control that is attached and switched off, on tiny models: whether the output is the same bit for bit, for
            every method; processor time of a call beside the plain model (median of rounds, in turn), bytes held
restore     attach, run, stop at every step by an exception, a KeyboardInterrupt, a lost handle; detach; compare output
            and the variables of every module. Beside it, diffusers' own PAG pipeline, which leaves its processors
promises    what tests hold for single cases, here for all: two threads on one denoiser, waits for the device after the
            first step, kernels launched at the shapes of real models, block outputs that prefix replay holds
counts      families, pairs, cases of property tests, tests, lines
suite       all tests, in as many processes as there are processors: how many, how long, which share of the package's
            statements they run (not counted: what runs in processes that tests start)

The table goes to stderr, the JSON to stdout; `--only promises counts` measures some parts and leaves the others as
recorded. Each part has the date and the versions of its measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "reliability.json"
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  (first: offline, quiet, one thread)
import pairs  # noqa: E402
import processes  # noqa: E402
import pytest  # noqa: E402
import test_launches  # noqa: E402
import test_roads_replay  # noqa: E402
import test_roads_threads  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
import zoo_pipelines as pipes  # noqa: E402
from contract import snapshot  # noqa: E402

import attnctl  # noqa: E402
from attnctl.core.conflicts import conflict_between  # noqa: E402
from attnctl.data.provenance import versions  # noqa: E402
from attnctl.data.specs import methods  # noqa: E402
from attnctl.processors import PAG  # noqa: E402


def _tensor_bytes() -> int:
    gc.collect()
    held = {}
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, torch.nn.Parameter):
            held[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(held.values())


@torch.no_grad()
def inactive(rounds: int) -> dict[str, Any]:
    """Measure what a control costs that does not act."""
    exact = {}
    for host in (pairs.unet(), pairs.joint()):
        plain = host.plain(())
        for name, control in host.first.items():
            if name == "FateZero":
                continue  # an edit of its own call
            with attnctl.control(host.pipe, control) as handle:
                handle.enabled = False
                exact[f"{name}, {host.name}"] = bool(torch.equal(pairs.run(host, ()), plain))
    return {
        "exact": sum(exact.values()),
        "of": len(exact),
        "not_exact": [k for k, v in exact.items() if not v],
        **cost(rounds),
    }


@torch.no_grad()
def cost(rounds: int) -> dict[str, Any]:
    """Compare calls of a tiny UNet, plain and under a control that is switched off, in processor time."""
    model, inputs = zoo.build("sd15")
    control = PAG(sites="mid")

    def attached() -> attnctl.Handle:
        handle = attnctl.control(model, control, layout="cond")
        handle.enabled = False
        return handle

    attached().detach()
    zoo.call(model, inputs)
    before = _tensor_bytes()
    handle = attached()
    zoo.call(model, inputs)
    held = _tensor_bytes() - before
    handle.detach()

    def least() -> float:
        seconds = []
        for _ in range(5):
            begin = time.process_time()
            zoo.call(model, inputs)
            seconds.append(time.process_time() - begin)
        return min(seconds)

    added, plain = [], []
    for i in range(rounds):
        spent = {}
        for off in (True, False) if i % 2 else (False, True):  # neither is always the first
            on = attached() if off else None
            spent[off] = least()
            if on is not None:
                on.detach()
        added.append(spent[True] - spent[False])
        plain.append(spent[False])
    return {
        "us_per_call": round(1e6 * statistics.median(added), 1),
        "us_plain_call": round(1e6 * statistics.median(plain), 1),
        "bytes": held,
    }


@torch.no_grad()
def restore() -> dict[str, Any]:
    """Count ways of ending a run after which everything is as before."""
    cases = restored = left = 0
    for host in (pairs.unet(), pairs.joint()):
        model, scheduler = pipes.denoiser(host.pipe), host.pipe.scheduler
        plain = host.plain(())
        before = snapshot(model, scheduler)
        for name in ("PAG", "SLG", "AStar", "Capture", "PARO", "NAG", "BroadWay"):
            control = host.first.get(name)
            if control is None:
                continue
            for error in (None, RuntimeError, KeyboardInterrupt):
                for at in range(pairs.STEPS if error else 1):
                    _end(host, control, error, at)
                    after = snapshot(model, scheduler)
                    residue = [k for k in before.keys() | after.keys() if before.get(k) is not after.get(k)]
                    same = bool(torch.equal(pairs.run(host, ()), plain))
                    cases, restored, left = cases + 1, restored + (same and not residue), left + len(residue)
    return {"cases": cases, "restored": restored, "left_over": left, "diffusers_pag_pipeline": _theirs()}


def _end(host: pairs.Host, control: Any, error: type[BaseException] | None, at: int) -> None:
    """Run a pipeline under a control to its end, or to an error in a step."""

    def stop(pipe: Any, step: int, t: Any, values: Any) -> Any:
        if error is not None and step == at:
            raise error
        return values

    kwargs = {k: v for k, v in host.kwargs.items() if k != "editing"}
    attnctl.control(host.pipe, control)  # the handle is lost
    try:
        pipes.run(host.pipe, kwargs, callback_on_step_end=stop)
    except (RuntimeError, KeyboardInterrupt):
        pass
    finally:
        gc.collect()
        handle = attnctl.handle_of(host.pipe)
        assert handle is not None
        handle.detach()


def _theirs() -> dict[str, Any]:
    """Stop diffusers' own PAG pipeline in a step; count the processors that it leaves changed, and compare the UNet."""
    plain, kwargs = pipes.build("sd")
    twin = pipes.pag_twin(plain)
    reference = pipes.run(plain, kwargs)
    before = {name: type(p).__name__ for name, p in plain.unet.attn_processors.items()}

    def stop(*_: Any) -> Any:
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        pipes.run(twin, kwargs, pag_scale=3.0, callback_on_step_end=stop)
    after = {name: type(p).__name__ for name, p in plain.unet.attn_processors.items()}
    changed = sum(before[name] != after[name] for name in before)
    try:
        same = bool(torch.equal(pipes.run(plain, kwargs), reference))
    except Exception as error:
        return {"left_over": changed, "plain_pipeline_after": f"raises {type(error).__name__}"}
    return {"left_over": changed, "plain_pipeline_after": "same" if same else "differs"}


@torch.no_grad()
def promises(*, quick: bool) -> dict[str, Any]:
    """Hold what is promised of threads, waits, launches and memory, with the code of the tests."""
    ends = test_roads_threads.trials(20 if quick else 200)
    families = zoo.NAMES[:1] if quick else (*zoo.NAMES, "pipelines")
    waits = {name: _waits(name) for name in _shown(families, "waits of")}
    passes = {
        f"{what}, {name}": n
        for name, shape in test_launches.SHAPES.items()
        for what, n in test_launches.launched_by_passes(shape).items()
    }
    cases = itertools.product(test_launches.SHAPES.values(), test_launches.LOOKS)
    looks = [test_launches.launched_by_calibration(shape, look) for shape, look in cases]
    held = {name: _held(name) for name in _shown(zoo.NAMES[:1] if quick else zoo.NAMES, "outputs held by")}
    most = max(passes, key=lambda what: passes[what])
    return {
        "threads": ends,
        "waits": sum(map(len, waits.values())),
        "waits_of": len(waits),
        "waits_found": {name: found for name, found in waits.items() if found},
        "launches_of_a_pass": passes[most],
        "launches_of_a_pass_at": most,
        "launches_of_calibration": max(looks),
        "block_outputs_held": max(held.values()),
        "block_outputs_held_by": held,
    }


def _shown(names: Iterable[str], what: str) -> Iterator[str]:
    """Give the names one after the other, and print each with its seconds when the next is asked for."""
    for name in names:
        began = time.perf_counter()
        yield name
        print(f"{what} {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _waits(family: str) -> list[str]:
    """Return the lines that the pretend device prints of a family: waits after the first step, or other results."""
    done = processes.run("import stalling, sys; sys.exit(stalling.main())", family)
    if done.returncode:
        raise SystemExit(f"{family}: {done.stderr[-1000:]}")
    return done.stdout.splitlines()


def _held(family: str) -> float:
    """Return how many outputs of a block prefix replay holds, in bytes of the largest."""
    model, inputs = test_roads_replay.build(family)
    held = test_roads_replay.held(model, inputs, test_roads_replay.last_site(model), pytest.MonkeyPatch())
    return round(max(held) / test_roads_replay.largest(model, inputs), 2)


def counts() -> dict[str, Any]:
    """Count what is tested, without running it."""
    known = methods()
    allowed = [names for names in pairs.PAIRS if conflict_between(known[names[0]], known[names[1]]) is None]
    together = sum(bool(pairs.hosts_of(names)) for names in allowed)
    text = (ROOT / "tests" / "test_properties.py").read_text(encoding="utf-8")
    cases = sum(map(int, re.findall(r"^@cases\((\d+)\)", text, re.MULTILINE)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    collected = re.search(r"(\d+) tests collected", done.stdout)

    def lines(folder: str) -> int:
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / folder).rglob("*.py"))

    return {
        "methods": len(known),
        "denoisers": len(zoo.NAMES),
        "pipelines": len(pipes.NAMES),
        "pairs": len(pairs.PAIRS),
        "pairs_refused": len(pairs.PAIRS) - len(allowed),
        "pairs_without_common_model": len(allowed) - together,
        "pairs_together": together,
        "property_cases": cases,
        "property_cases_at_night": 20 * cases,
        "tests": int(collected[1]) if collected else None,
        "lines": {folder: lines(folder) for folder in ("attnctl", "tests", "benchmarks", "examples")},
    }


def suite() -> dict[str, Any]:
    """Run the tests, and count the statements of the package that they reach."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "-p", "no:cacheprovider"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(Path(folder) / "coverage")}
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--cov=attnctl", "--cov-report", f"json:{report}"],
            cwd=ROOT, env=env, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        if not report.is_file():
            raise SystemExit(f"The tests gave no coverage report: {(done.stdout + done.stderr)[-500:]}")
        totals = json.loads(report.read_text(encoding="utf-8"))["totals"]
    ends = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed|errors?)\b", done.stdout)}
    return {
        "passed": ends.get("passed", 0),
        "skipped": ends.get("skipped", 0),
        "failed": ends.get("failed", 0) + ends.get("error", 0) + ends.get("errors", 0),
        "seconds": round(seconds),
        "processes": os.cpu_count(),
        "statements": totals["num_statements"],
        "covered_percent": round(totals["percent_covered"], 1),
    }


def main() -> int:
    """Measure everything; exit with 1 where something is not exact, not restored, or a test fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no tests")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the timing")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "inactive": lambda: inactive(2 if options.quick else options.rounds),
        "restore": restore,
        "promises": lambda: promises(quick=options.quick),
        "counts": counts,
        "suite": suite,
    }
    parser.add_argument(
        "--only", nargs="+", choices=list(parts), help="measure these parts; take the others from the last result"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if options.only else {}
    result |= {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    about = {"date": time.strftime("%Y-%m-%d"), "versions": versions()}
    for part in options.only or (["inactive", "restore", "promises"] if options.quick else parts):
        result[part] = parts[part]() | about
        for key, value in result[part].items():
            print(f"{part:10}{key:48}{value}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    good = not result["inactive"]["not_exact"] and result["restore"]["restored"] == result["restore"]["cases"]
    return 0 if good and not result.get("suite", {}).get("failed") else 1


if __name__ == "__main__":
    sys.exit(main())
