"""How far a reader follows one call through the package, and what the way costs: `python benchmarks/calls.py`.

Counted with `sys.setprofile`, over functions of the package alone and after one run that imports what is needed: the
functions that are called, the files they lie in, and the moves, which are calls into another file than the call before.
Methods that Python runs while it builds a comprehension count as part of their function.

Timed on the shipped text2image model, in processor time where there is one thread: attaching PAG, one step of a
pipeline call plain, under PAG, under PAG switched off and under Capture, and importing attnctl with one method after
torch and diffusers. Every round is a process of its own, and the median over the rounds counts.

`--before FOLDER` does the same with another checkout of the package, in rounds that take turns, and puts both side by
side; without it, what is recorded about the other checkout stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "calls.json"
PROMPT = "a red circle and a blue square on gray"
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<module>"}


def now() -> float:
    """Return the time of this process where one thread computes, which others on the machine hardly change."""
    return time.process_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def followed(action: Callable[[], object], package: str) -> dict[str, int]:
    """Count functions, files and moves between files of the package while an action runs for the second time."""
    action()
    way: list[tuple[str, Any]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and code.co_name not in COMPREHENSIONS:
            way.append((code.co_filename, code))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    files = [file for file, _ in way]
    return {
        "functions": len({code for _, code in way}),
        "files": len(set(files)),
        "moves": sum(a != b for a, b in itertools.pairwise(files)),
        "calls": len(way),
    }


def actions(attnctl: Any, pipe: Any) -> dict[str, Callable[[], object]]:
    """Name what is followed; only what stays attached for a step is attached outside of it."""
    import numpy as np

    from attnctl.pipelines import edit_video
    from attnctl.processors import PAG, Capture

    def attach() -> None:
        attnctl.control(pipe, PAG())

    def step() -> None:
        pipe(PROMPT, num_inference_steps=1, output_type="latent")

    def within(action: Callable[[], object], *controls: Any) -> Callable[[], object]:
        def run() -> dict[str, int]:
            with attnctl.control(pipe, *controls):
                return followed(action, package_of(attnctl))

        return run

    def detached() -> dict[str, int]:
        counts = followed(lambda: (detach(), attach()), package_of(attnctl))
        detach()
        return counts

    def detach() -> None:
        handle = attnctl.handle_of(pipe)
        if handle is not None:
            profiler = sys.getprofile()
            sys.setprofile(None)
            handle.detach()
            sys.setprofile(profiler)

    def edit() -> dict[str, int]:
        frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        words = {"source": "a red circle on gray", "target": "a blue circle on gray"}
        return followed(lambda: edit_video(pipe, frames, **words, steps=3, progress=False), package_of(attnctl))

    return {
        "attach PAG": detached,
        "one step under PAG": within(step, PAG()),
        "one step under Capture": within(step, Capture(words=("circle",))),
        "edit_video of 2 frames in 3 steps": edit,
    }


def package_of(attnctl: Any) -> str:
    """Return the folder of the package, with the separator after it."""
    return str(Path(attnctl.__file__).resolve().parent) + os.sep


def timed(attnctl: Any, pipe: Any, repeats: int) -> dict[str, float]:
    """Time each action: the median of some repeats, in milliseconds."""
    from attnctl.processors import PAG, Capture

    steps = 10
    times: dict[str, list[float]] = {name: [] for name in ("attach PAG", "plain", "PAG", "switched off", "Capture")}

    def run(name: str) -> None:
        start = now()
        pipe(PROMPT, num_inference_steps=steps, output_type="latent")
        times[name].append((now() - start) / steps)

    pipe(PROMPT, num_inference_steps=1, output_type="latent")
    for _ in range(repeats):
        run("plain")
        start = now()
        handle = attnctl.control(pipe, PAG())
        times["attach PAG"].append(now() - start)
        run("PAG")
        handle.enabled = False
        run("switched off")
        handle.detach()
        with attnctl.control(pipe, Capture(words=("circle",))):
            run("Capture")
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def worker(repeats: int) -> dict[str, Any]:
    """Count and time the package that this process imports."""
    import diffusers
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = now()
    import attnctl
    from attnctl.processors import PAG  # noqa: F401

    imported = 1000 * (now() - start)
    pipe = attnctl.load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    diffusers.utils.logging.set_verbosity_error()
    counts = {name: count() for name, count in actions(attnctl, pipe).items()}
    with torch.no_grad():
        milliseconds = timed(attnctl, pipe, repeats) | {"import": imported}
    return {"counts": counts, "milliseconds": milliseconds}


def rounds_of(folders: dict[str, Path], rounds: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Run a process for each checkout and round, by turns, and take the medians of the times."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in folders}
    for number in range(rounds):
        order = list(folders) if number % 2 else list(folders)[::-1]
        for side in order:
            environment = os.environ | {"PYTHONPATH": str(folders[side]), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--repeats", str(repeats)]
            done = subprocess.run(
                command, env=environment, cwd=folders[side], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{side}: {done.stderr[-2000:]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} of {rounds}, {side}", file=sys.stderr)
    sides: dict[str, dict[str, Any]] = {}
    for side, parts in runs.items():
        names = parts[0]["milliseconds"]
        medians = {n: round(statistics.median(part["milliseconds"][n] for part in parts), 3) for n in names}
        sides[side] = {
            "commit": commit_of(folders[side]),
            "counts": parts[-1]["counts"],
            "milliseconds": medians,
            "rounds": rounds,
        }
    if len(runs) == 2:
        pairs = list(zip(runs["after"], runs["before"], strict=True))
        for name in runs["after"][0]["milliseconds"]:
            ratios = [a["milliseconds"][name] / b["milliseconds"][name] for a, b in pairs]
            sides.setdefault("ratio", {})[name] = round(statistics.median(ratios), 3)
    return sides


def commit_of(folder: Path) -> str:
    """Return the commit that is checked out, or "" outside of git."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of the package, to compare with")
    parser.add_argument("--rounds", type=int, default=9, help="processes for each checkout")
    parser.add_argument("--repeats", type=int, default=5, help="repeats within a process")
    parser.add_argument("--worker", action="store_true", help="count and time what this process imports")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.repeats)))
        return 0
    folders = {"after": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    sides = rounds_of(folders, options.rounds, options.repeats)
    recorded = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if "before" not in sides and "before" in recorded:
        sides["before"] = recorded["before"]
    for side in ("before", "after"):
        for name, row in sides.get(side, {}).get("counts", {}).items():
            print(f"{side:7}{name:36}{row}", file=sys.stderr)
        print(side, sides.get(side, {}).get("milliseconds"), file=sys.stderr)
    print(json.dumps(sides | {"python": platform.python_version(), "machine": platform.machine()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
