"""Hand hostile records and lists of prompts to the shipped model: only the project's errors, no crash, little memory.

    python benchmarks/hostile_records.py --count 1000

Half of them are records, read and made again as `attnctl generate --from` does; half are lists, read and checked as
`attnctl generate --prompts` does. What is not refused is broken off after two steps. One process does it all; where it
is brought down, the case is named, and another process goes on. Fails if anything but an error of the project's came
out, at any crash, or if more than 2 GB of memory were needed. The JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_MIB = 2000
STEPS = 2


class Enough(BaseException):
    """Break a run off that has begun."""


def attempt(case: Callable[[], None]) -> str:
    """Tell what came of a case: "runs", "refused", or the name of a foreign error."""
    from attnctl.errors import AttnctlError

    try:
        case()
    except Enough:
        return "runs"
    except AttnctlError:
        return "refused"
    except Exception as error:
        return f"foreign {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "runs"


def cases(folder: Path) -> Callable[[int, int], Callable[[], None]]:
    """Load the model, and return what makes one case of a seed and a number."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hostile_records import prompt_file, record_file

    from attnctl.app.commands.batch import controls_of
    from attnctl.data.prompt_files import read_prompts
    from attnctl.data.record import read
    from attnctl.pipelines.batches import Column, jobs_of
    from attnctl.pipelines.generate import Call, sample
    from attnctl.pipelines.models import device_and_dtype, load
    from attnctl.pipelines.repeat import sample_again

    loaded = load("shapes:text2image")
    few = Call(prompts=("a red circle on gray",), seeds=(0,), steps=1)
    sound = sample(loaded, few).record.to_dict()

    def stopper() -> Callable[[], None]:
        left = [STEPS]

        def step() -> None:
            left[0] -= 1
            if not left[0]:
                raise Enough

        return step

    def again(path: Path) -> None:
        for record in read(path):
            device_and_dtype(record.device, record.dtype)
            sample_again(loaded, record, stopper())

    def listed(path: Path) -> None:
        lines = read_prompts(path)
        plain = [Column("plain", ())]
        jobs = jobs_of(lines, plain, few, seed=0, num=1, out=folder / "out", controls_of=controls_of(lines, ()))
        sample(loaded, jobs[0].call, stopper())

    def one(seed: int, i: int) -> Callable[[], None]:
        rng = random.Random(f"{seed}.{i}")
        if i % 2:
            return lambda: listed(prompt_file(rng, folder, i))
        return lambda: again(record_file(rng, sound, folder / f"{i}.json"))

    return one


def child(seed: int, first: int, count: int, note: Path) -> None:
    """Run cases from a number on, and print what came of them as JSON."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()  # prompts of 100,000 characters are cut off at great length
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make, found, slowest = cases(Path(folder)), Counter[str](), (0.0, -1)
        for i in range(first, count):
            note.write_text(str(i), encoding="utf-8")
            began = time.perf_counter()
            came = attempt(make(seed, i))
            slowest = max(slowest, (time.perf_counter() - began, i))
            found[
                f"{'list' if i % 2 else 'record'} {came}" + (f" (case {i})" if came.startswith("foreign") else "")
            ] += 1
            for path in Path(folder).glob(f"{i}.*"):
                path.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"found": found, "peak": round(peak), "slowest": slowest}))


def main() -> int:
    """Run children until all cases are through; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.seed, int(args.child[0]), args.count, Path(args.child[1]))
        return 0
    total: Counter[str] = Counter()
    crashes: list[dict[str, Any]] = []
    peak, slowest, first, began = 0, (0.0, -1), 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "case"
        while first < args.count:
            note.write_text(str(first), encoding="utf-8")
            command = [sys.executable, __file__, "--count", str(args.count), "--seed", str(args.seed), "--child"]
            done = subprocess.run([*command, str(first), str(note)], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0:
                part = json.loads(done.stdout.splitlines()[-1])
                total.update(part["found"])
                peak, slowest, first = max(peak, part["peak"]), max(slowest, tuple(part["slowest"])), args.count
                continue
            at = int(note.read_text(encoding="utf-8"))
            crashes.append({"case": at, "code": done.returncode})
            print(f"case {at} ended the process with {done.returncode}", file=sys.stderr, flush=True)
            first = at + 1
    foreign = {name: n for name, n in total.items() if "foreign" in name}
    with contextlib.suppress(BrokenPipeError):
        print(
            json.dumps({
                "cases": args.count, "crashes": crashes, "found": dict(sorted(total.items())),
                "foreign": sum(foreign.values()), "peak_mib": peak, "slowest": slowest,
                "seconds": round(time.perf_counter() - began, 1),
            }, indent=1)
        )  # fmt: skip
    return int(bool(crashes or foreign or peak > MOST_MIB))


if __name__ == "__main__":
    sys.exit(main())
