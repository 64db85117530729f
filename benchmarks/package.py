"""What the package weighs: its wheel, what it needs, its import, one picture: `python benchmarks/package.py`.

wheel       size of the wheel with the models in it, and of the package when it is installed
hard        packages that `pip install attnctl` asks for by name
import      processor time of `import attnctl` and its core, beyond torch and diffusers: the least of three
picture     `attnctl generate --model shapes:text2image` in 25 steps: seconds, and the most memory that it takes

`--before COMMIT` measures another commit too, in a copy of it. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORT = """
import time, torch, diffusers
began = time.process_time()
import attnctl, attnctl.core.handle
print(time.process_time() - began)
"""
PICTURE = """
import resource, sys
from attnctl.app.cli import main
main(["generate", "--model", "shapes:text2image", "--prompt", "a red ring", "--steps", "25", "--out", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def package(source: Path, *, quick: bool = False) -> dict[str, Any]:
    """Weigh the package that lies in a folder."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = [p for p in (source / "attnctl").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            "version": project["version"],
            "wheel_kib": None if quick else wheel_size(source, Path(folder)),
            "installed_mib": round(sum(p.stat().st_size for p in files) / 2**20, 1),
            "import_cpu_seconds": round(min(float(run(source, "-c", IMPORT)) for _ in range(1 if quick else 3)), 3),
            "hard_dependencies": len(project["dependencies"]),
            "dependencies": [re.split(r"[><=; ]", d)[0] for d in project["dependencies"]],
        }
        if not quick:
            began = time.perf_counter()
            peak = run(source, "-c", PICTURE, folder)
            result["picture_seconds"] = round(time.perf_counter() - began, 1)
            result["picture_peak_mib"] = round(int(peak.split()[-1]) / 1024)
    return result


def wheel_size(source: Path, folder: Path) -> int | None:
    """Build the wheel out of a copy, since building leaves files that a later wheel would hold; return its KiB."""
    shutil.copytree(source / "attnctl", folder / "copy" / "attnctl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, folder / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", str(folder / "copy"), "--no-deps", "-q", "-w", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    made = list(folder.glob("*.whl"))
    if not made:
        print(done.stderr[-500:], file=sys.stderr)
    return round(made[0].stat().st_size / 1024) if made else None


def run(source: Path, *command: str) -> str:
    """Run Python with a folder's package, offline and in one thread; return what it prints."""
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=env).stdout


def main() -> int:
    """Weigh this checkout, and another commit beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="weigh another commit, too")
    parser.add_argument("--quick", action="store_true", help="no wheel and no picture")
    options = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
    if options.before:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(
                ["git", "archive", options.before], cwd=ROOT, capture_output=True, check=True
            ).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            result["before"] = package(Path(folder), quick=options.quick)
    result["after"] = package(ROOT, quick=options.quick)
    for when in ("before", "after"):
        for key, value in result.get(when, {}).items():
            print(f"{when:8}{key:24}{value}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
