"""Which versions of diffusers, timm and torch attnctl runs on: `python benchmarks/host_matrix.py`.

    python benchmarks/host_matrix.py --list
    python benchmarks/host_matrix.py --only diffusers-0.38.0 timm-1.0.30

Each host gets a virtual environment of its own, removed afterwards: the package is installed in the version asked for
with what that version pins, everything else is the environment's that runs this script. Then a part of the tests runs
in it. Results are written after each host, so that a run can be cut; a host that is there already is measured anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "host_matrix.json"
FAMILIES = "sd15 or sd35 or wan"
SUITES: dict[str, tuple[str, ...]] = {
    "lifecycle": ("tests/test_lifecycle.py",),
    "contract": ("tests/test_contract_models.py", "-k", f"({FAMILIES}) and not checkpointing and not gradients"),
    "pipelines": ("tests/test_contract_pipelines.py", "-k", "guided_run_is_exact or equal_to_diffusers_pag"),
    "pag": (
        "tests/test_pag_parity.py",
        "tests/test_seg.py",
        "tests/test_slg.py",
        "tests/test_tpg.py",
        "tests/test_nag.py",
    ),
    "maps": ("tests/test_maps.py", "-k", "sd15 or sd3 or flux or second_run or several"),
    "swap": ("tests/test_swap.py",),
    "compile": ("tests/test_compile.py",),
    "backbones": ("tests/test_backbones.py", "-k", "timm_interface or official_keys"),
}
_DENOISERS = ("lifecycle", "contract", "pipelines", "pag", "maps")


@dataclass(frozen=True)
class Host:
    """One combination of versions.

    Attributes:
        name: What results call it.
        requires: What pip installs over the environment's packages.
        suites: Which parts of the tests run.
        note: Why it is here, or needs more than the package itself.
        known: What fails there for a reason of the host's own: a part of the test's name, and the reason.
    """

    name: str
    requires: tuple[str, ...] = ()
    suites: tuple[str, ...] = tuple(SUITES)
    note: str = ""
    known: tuple[tuple[str, str], ...] = ()


HOSTS = (
    Host("newest"),
    Host(
        "diffusers-0.38.0", ("diffusers==0.38.0", "huggingface-hub<2", "httpx<1"), _DENOISERS,
        "the oldest that is supported; asks for huggingface-hub below 2 and httpx",
    ),
    Host(
        "diffusers-0.40.0", ("diffusers==0.40.0", "huggingface-hub<2", "httpx<1"), _DENOISERS,
        "asks for huggingface-hub below 2 and httpx",
    ),
    Host("transformers-5.23.0", ("transformers==5.23.0",), _DENOISERS, "the oldest that is supported"),
    Host("timm-1.0.30", ("timm==1.0.30",), ("swap", "backbones"), "the oldest that is supported"),
    Host("torch-2.10.0", ("torch==2.10.0", "torchvision==0.25.0"), note="the oldest that is supported"),
)  # fmt: skip

VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("torch", "diffusers", "transformers", "timm", "huggingface_hub", "accelerate", "numpy", "peft")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


def environment(folder: Path, host: Host) -> Path:
    """Make a virtual environment that sees this one behind its own packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    # A line of a .pth file comes behind the folder that holds it: what is installed here wins.
    (own / "behind.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    if host.requires:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *host.requires], check=True)
    return python


def suite(python: Path, arguments: tuple[str, ...], limit: float) -> dict[str, Any]:
    """Run a part of the tests; return counts, seconds, and the first lines of what failed."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *arguments]
    # Wide enough for the reason behind the name of a test.
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "320"}
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": [f"not done after {limit:.0f} s"]}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    why = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) and not why:
        why = (done.stdout + done.stderr).strip().splitlines()[-3:]
    clean = [line.replace(str(ROOT), ".").replace(str(python.parents[1]), "env")[:300] for line in why[:12]]
    return {"ok": done.returncode == 0, **counts, "seconds": round(time.perf_counter() - began, 1), "why": clean}


def judge(host: Host, result: dict[str, Any]) -> dict[str, Any]:
    """Set apart what fails for a reason that is known to be the host's own."""
    for part in result.get("suites", {}).values():
        reasons = [next((why for name, why in host.known if name in line), None) for line in part["why"]]
        part["known"] = [why for why in dict.fromkeys(reasons) if why is not None]
        part["ok"] = part.get("failed", 0) + part.get("error", 0) + part.get("errors", 0) == sum(map(bool, reasons))
        part["ok"] = part["ok"] and "passed" in part
    result["ok"] = bool(result.get("suites")) and all(part["ok"] for part in result["suites"].values())
    return result


def measure(host: Host, limit: float) -> dict[str, Any]:
    """Build one host, run its suites, and take it away again."""
    with tempfile.TemporaryDirectory(prefix="attnctl-host-") as folder:
        try:
            python = environment(Path(folder) / "venv", host)
            told = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout
        except subprocess.CalledProcessError as error:
            return {"ok": False, "note": host.note, "why": [f"the environment could not be made: {error}"]}
        results = {}
        for name in host.suites:
            results[name] = suite(python, SUITES[name], limit)
            print(f"{host.name:20}{name:12}{results[name]}", file=sys.stderr, flush=True)
    return {"note": host.note, "requires": host.requires, "versions": json.loads(told), "suites": results}


def markdown(result: dict[str, Any]) -> str:
    """Write versions against suites."""
    lines = ["| host | " + " | ".join(SUITES) + " |", "|---" * (len(SUITES) + 1) + "|"]
    reasons = []
    for name, host in result["hosts"].items():
        cells = []
        for part in SUITES:
            found = host.get("suites", {}).get(part)
            if found is None:
                cells.append("")
                continue
            cells.append(f"{found.get('passed', 0)} passed" + "".join(
                f", {found[k]} {k}" for k in ("failed", "skipped", "error", "errors") if found.get(k)
            ))  # fmt: skip
            reasons += [f"- {name}, {part}: {line}" for line in (*found["why"], *found.get("known", ()))]
        reasons += [f"- {name}: {line}" for line in host.get("why", [])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def main() -> int:
    """Measure hosts and write the table to stderr, the JSON to stdout and into results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[h.name for h in HOSTS], help="these hosts")
    parser.add_argument("--list", action="store_true", help="name the hosts and suites")
    parser.add_argument("--table", action="store_true", help="measure nothing: print what is recorded")
    parser.add_argument("--limit", type=float, default=900, help="most seconds of one suite")
    parser.add_argument("--out", type=Path, default=RESULT, help="file that is read and written again")
    options = parser.parse_args()
    if options.list:
        for host in HOSTS:
            print(f"{host.name:20}{', '.join(host.suites)}")
        return 0
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"hosts": {}}
    result |= {"machine": platform.machine(), "system": platform.system()}
    result["suites"] = {name: shlex.join(arguments) for name, arguments in SUITES.items()}
    for host in HOSTS:
        if not options.table and (not options.only or host.name in options.only):
            result["hosts"][host.name] = measure(host, options.limit) | {"date": time.strftime("%Y-%m-%d")}
        result["hosts"] = {h.name: judge(h, result["hosts"][h.name]) for h in HOSTS if h.name in result["hosts"]}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result), file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0 if all(h["ok"] for h in result["hosts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
