"""Measure how long each command is silent: until its first line, and between two lines, in a terminal and outside one.

    python benchmarks/first_line.py
    python benchmarks/first_line.py --only generate maps --whole

Each command is started as a user starts it, on small inputs that are made here. What is measured is the time from its
start until it shows anything (and with --whole the longest time without anything new), and the seconds that imports
take: those of the command line alone, and those of PyTorch, diffusers and transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPT = "a red circle and a blue square on gray"


def commands(work: Path) -> dict[str, list[str]]:
    """List one call of each command, on inputs below a folder."""
    few = ["--steps", "2"]
    words = ["--source", "a red circle on gray", "--target", "a blue circle on gray"]
    return {
        "demo": ["demo", "--out", str(work / "demo")],
        "generate": ["generate", "--prompt", PROMPT, *few, "--out", str(work / "generate")],
        "edit": ["edit", str(work / "clip"), *words, *few, "--out", str(work / "edited")],
        "maps": ["maps", "--prompt", PROMPT, *few, "--out", str(work / "maps")],
        "calibrate": ["calibrate", "--prompt", PROMPT, *few, "--block", "16", "--out", str(work / "plan")],
        "hunt": ["hunt", "--pairs", "1", "--k", "1", "--group", "12", *few, "--out", str(work / "heads")],
        "classify": ["classify", str(work / "classes"), "--epochs", "1", "--size", "64", "--out", str(work / "run")],
        "segment": ["segment", str(work / "masks"), "--epochs", "1", "--size", "64", "--out", str(work / "run2")],
        "predict": ["predict", str(work / "run"), str(work / "classes"), "--out", str(work / "answers")],
        "reproduce": ["reproduce", "pag", "--toy", "--pictures", "1", "--out", str(work / "reproduced")],
        "bench": ["bench", "--only", "calls", "--quick", "--out", str(work / "bench.json")],
        "sites": ["sites"],
        "models": ["models"],
        "controls": ["controls"],
        "env": ["env"],
    }


def prepare(work: Path) -> None:
    """Make the inputs: a folder of frames, one of classes, one of pictures and masks."""
    rng = np.random.default_rng(0)

    def picture(path: Path, high: int = 256) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, high, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values if high > 2 else values[..., 0]).save(path)

    for i in range(2):
        picture(work / "clip" / f"{i}.png")
    for i in range(8):
        for name in ("cats", "dogs"):
            picture(work / "classes" / name / f"{i}.png")
        picture(work / "masks" / "images" / f"{i}.png")
        picture(work / "masks" / "masks" / f"{i}.png", 2)


def watched(arguments: Sequence[str], terminal: bool, most: float, whole: bool) -> dict[str, Any]:
    """Run a command until it shows something, or as a whole, and note when something new is shown."""
    began = time.perf_counter()
    if terminal:
        master, slave = pty.openpty()
    else:
        master, slave = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "attnctl", *arguments], stdout=slave, stderr=slave, stdin=subprocess.DEVNULL
    )
    os.close(slave)
    times, text = [], b""
    while time.perf_counter() - began < most:
        if not select.select([master], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            more = os.read(master, 65536)
        except OSError:  # the end of a terminal
            break
        if not more:
            break
        text += more
        times.append(time.perf_counter() - began)
        if not whole:
            break
    stopped = process.poll() is None and (not whole or time.perf_counter() - began >= most)
    if stopped:
        process.kill()
    process.wait()
    os.close(master)
    seconds = time.perf_counter() - began
    gaps = [b - a for a, b in zip([0.0, *times], [*times, seconds], strict=True)]
    lines = text.decode(errors="replace").replace("\r", "\n").splitlines()
    return {
        "first": round(times[0], 2) if times else None,
        "line": next((line for line in lines if line.strip()), ""),
        "longest": round(max(gaps), 2),
        "seconds": round(seconds, 1),
        "code": None if stopped else process.returncode,
    }


def import_seconds(code: str) -> float:
    """Time a Python that imports something and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--whole", action="store_true", help="run each command to its end, for the longest silence")
    parser.add_argument("--seconds", type=float, default=120.0, help="most seconds that a command may run")
    args = parser.parse_args()
    imports = {
        "command line": import_seconds("import attnctl.app.cli"),
        "diffusers": import_seconds("import torch, diffusers, transformers; diffusers.StableDiffusionPipeline"),
        "timm": import_seconds("import torch, timm"),
    }
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, terminal in (("pipe", False), ("terminal", True)):
            work = Path(folder) / kind
            prepare(work)
            for name, arguments in commands(work).items():
                if args.only and name not in args.only:
                    continue
                seen = watched(arguments, terminal, args.seconds, args.whole)
                seen["line"] = seen["line"].replace(str(work), "WORK")
                rows.setdefault(name, {})[kind] = seen
                print(name, kind, rows[name][kind], file=sys.stderr, flush=True)
    first = {f"{n}, {k}": r["first"] for n, row in rows.items() for k, r in row.items()}
    over = {name: s for name, s in first.items() if s is None or s - imports["command line"] > 2}
    latest = max((s for s in first.values() if s is not None), default=None)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"imports": imports, "latest": latest, "over": over, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
