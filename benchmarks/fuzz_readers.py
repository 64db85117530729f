"""Feed every reader of files with tampered files for some minutes: only the project's errors, and how much memory.

    python benchmarks/fuzz_readers.py --minutes 10 --seed 1

One process reads; where a decoder brings it down, the case is named, and another process goes on. Fails if anything but
an error of the project's came out, or if more than 2 GB of memory were needed. The table goes to stderr, the JSON to
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_MIB = 2000


def child(seed: int, first: int, seconds: float, note: Path) -> None:
    """Read tampered files until the time is over, and print what came out as JSON."""
    sys.path.insert(0, str(ROOT / "tests"))
    from reader_fuzz import Found, attempt, readers

    every = readers()
    found = {name: Found() for name in every}
    began, i, slowest = time.perf_counter(), first, (0.0, "")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.perf_counter() - began < seconds:
            for name, reader in every.items():
                case = f"{name} {seed}.{i}"
                note.write_text(json.dumps([i, case]), encoding="utf-8")
                start = time.perf_counter()
                attempt(reader, case, found[name], Path(folder))
                slowest = max(slowest, (time.perf_counter() - start, case))
            i += 1
    counts = {name: [f.read, f.refused, f.foreign] for name, f in found.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"counts": counts, "peak": peak, "slowest": slowest, "next": i}))


def main() -> int:
    """Run children until the time is over; print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first, seconds, note = args.child
        child(args.seed, int(first), float(seconds), Path(note))
        return 0
    total: dict[str, list] = {}
    end, first, peak, slowest, crashes = time.monotonic() + 60 * args.minutes, 0, 0.0, (0.0, ""), []
    env = os.environ | {"OPENCV_FFMPEG_LOGLEVEL": "-8", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "case.json"
        while (left := end - time.monotonic()) > 1:
            command = [sys.executable, __file__, "--seed", str(args.seed), "--child", str(first), str(left), str(note)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
            if done.returncode:
                at, case = json.loads(note.read_text(encoding="utf-8"))
                crashes.append(f"{case}: the process ended with {done.returncode}")
                first = at + 1
                continue
            data = json.loads(done.stdout.splitlines()[-1])
            for name, (read, refused, foreign) in data["counts"].items():
                row = total.setdefault(name, [0, 0, []])
                total[name] = [row[0] + read, row[1] + refused, row[2] + foreign]
            peak, slowest, first = max(peak, data["peak"]), max(slowest, tuple(data["slowest"])), data["next"]
    print(f"{'reader':<20}{'files':>9}{'read':>9}{'refused':>9}{'other':>7}", file=sys.stderr)
    for name, (read, refused, foreign) in total.items():
        files = read + refused + len(foreign)
        print(f"{name:<20}{files:>9}{read:>9}{refused:>9}{len(foreign):>7}", file=sys.stderr)
    wrong = [text for _, _, foreign in total.values() for text in foreign] + crashes
    peaks = f"peak memory {peak:.0f} MiB; slowest file {slowest[0]:.2f} s ({slowest[1]})"
    print(peaks, *wrong[:50], sep="\n", file=sys.stderr)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "seed": args.seed,
        "minutes": args.minutes,
        "readers": {name: {"read": read, "refused": refused} for name, (read, refused, _) in total.items()},
        "files": sum(read + refused + len(foreign) for read, refused, foreign in total.values()) + len(crashes),
        "wrong": wrong,
        "other": len(wrong),
        "peak_mib": round(peak),
        "slowest_seconds": round(slowest[0], 2),
    }
    print(json.dumps(result, indent=1))
    return int(bool(wrong) or peak > MOST_MIB)


if __name__ == "__main__":
    sys.exit(main())
