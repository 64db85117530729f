"""Do what a new user does, from a fresh clone and by the words of README and docs alone.

    python benchmarks/newcomer.py                     # clone, install, then every task
    python benchmarks/newcomer.py --only maps edit
    python benchmarks/newcomer.py --whole-install     # packages of its own too, which takes gigabytes

Commands and blocks of Python are read out of the pages that name them, so a page that changes changes the task.
Weights that would be fetched are replaced by shipped models, and runs are made short; both are listed in the task.
What the page leaves out, such as a seed or a line that saves, is added below a block and counts as the user's own.
Each task is checked: files are there and numbers are right. The table goes to stderr, the JSON to stdout.

Without --whole-install the new environment sees the packages of the one that runs this script, but not its attnctl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import newcomer_checks as checks

ROOT = Path(__file__).resolve().parents[1]
MOST = 1800.0  # seconds of one command
SHAPES = {
    "StableDiffusionXLPipeline.from_pretrained": "attnctl.load_shapes",
    '"stabilityai/stable-diffusion-xl-base-1.0").to("cuda")': '"text2image")',
    "an astronaut riding a horse": "a red circle on gray",
}
SAILOR = {"stabilityai/stable-diffusion-xl-base-1.0": "shapes:text2image", "an old sailor": "a red circle on gray"}
SHIP = {
    '"a cat walks in the snow"': '"a red circle and a blue square on gray"',
    '"a ship in a storm"': '"a red ring on white"',
    '["a dog runs on the beach"]': '["a green ring and a white cross on black"]',
    "density=0.3": "density=0.5, block=16",
    'PARO("plan")': 'PARO("plan2")',
    '"plan"': '"plan2"',
    "plan/measured": "plan2/measured",
    ".frames[0]": ".images[0]",
    "video =": "image =",
}
PHOTO = {'pipe("a photo of a cat"': 'pipe("a red circle on gray", num_inference_steps=4'}
CAT = PHOTO | {'("cat",)': '("circle",)'}


@dataclass(frozen=True)
class Step:
    """One command or block of Python of a page.

    Attributes:
        page: The page, or "" for what is the user's own.
        starts: How its command begins; for Python, a line that the block holds.
        instead: What replaces what.
        before: Python in front of the block.
        after: Python below the block.
    """

    page: str
    starts: str
    instead: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Task:
    """What a new user wants, how the pages say it is done, and what must have come of it."""

    about: str
    steps: Sequence[Step]
    check: str  # a function of newcomer_checks
    beside: str = ""  # a command that runs meanwhile, and prints an address


def own(code: str) -> Step:
    """Make a step of Python that no page holds."""
    return Step("", "", after=code)


FIRST, CLI = "docs/tutorial/first_picture.md", "docs/reference/cli.md"
BATCHES, PICTURES = "docs/howto/batches.md", "docs/howto/own_pictures.md"
SWITCH, COMBINE, PARO = "docs/howto/switch.md", "docs/howto/combine.md", "docs/reference/methods/paro.md"
RING = 'attnctl generate --model shapes:mmdit --prompt "a red ring and a blue cross on teal" --seed 3 --control'
TASKS = {
    "install": Task("install the clone", [Step("README.md", "pip install -e")], "installed"),
    "demo": Task("see what it does", [Step("README.md", "attnctl demo")], "demo"),
    "script": Task(
        "PAG in a script of one's own",
        [
            Step(
                "README.md",
                "with attnctl.control(pipe, PAG(scale=3.0)) as handle:",
                SHAPES | {"guidance_scale=4.0": "guidance_scale=4.0, num_inference_steps=10, generator=seed()"},
                checks.SEED,
                'image.save("own.png")',
            ),
            Step(
                "README.md",
                "attnctl generate --model stabilityai",
                SAILOR,
                after="--steps 10 --guidance 4 --out same",
            ),
        ],
        "script",
    ),
    "undo": Task(
        "take it off and compare",
        [Step(SWITCH, "handle = attnctl.control(pipe, PAG(scale=3.0), words)", CAT, checks.PIPE, checks.UNDO)],
        "said_right",
    ),
    "pictures": Task(
        "train on pictures of one's own",
        [
            Step(PICTURES, "python benchmarks/own_pictures.py --folder data"),
            Step(PICTURES, "attnctl classify data", {"--epochs 15": "--epochs 5"}),
            Step(PICTURES, "attnctl predict run"),
        ],
        "pictures",
    ),
    "plug": Task(
        "diffusers' own plug point",
        [
            Step(
                "docs/howto/processors.md",
                "plain = dict(pipe.transformer.attn_processors)",
                {'pipe("a horse runs along a beach")': "run()"},
                checks.VIDEO,
                checks.PLUG,
            )
        ],
        "said_right",
    ),
    "maps": Task("see where words act", [Step("docs/tutorial/see_words.md", "attnctl maps")], "maps"),
    "edit": Task(
        "change a colour in a clip",
        [own(checks.CLIP), Step("docs/tutorial/edit_clip.md", "attnctl edit in.mp4")],
        "edited",
    ),
    "batch": Task(
        "compare settings on many prompts",
        [
            own(checks.LIST),
            Step(BATCHES, "attnctl generate --prompts prompts.txt --num 4 --compare", {"--num 4": "--num 2 --steps 5"}),
            Step(BATCHES, 'print(table.groupby("column").path.count())'),
            Step(BATCHES, "attnctl generate --prompts prompts.txt --num 4 --compare", {"--num 4": "--num 2 --steps 5"}),
        ],
        "batch",
    ),
    "record": Task(
        "make a picture again from its record",
        [
            Step(FIRST, RING),
            Step(FIRST, "attnctl generate --from"),
        ],
        "record",
    ),
    "combine": Task(
        "combine two controls, and change a scale",
        [
            Step(COMBINE, "with attnctl.control(pipe, PAG(scale=2.0), NAG", CAT, checks.PIPE, checks.COMBINED),
            Step(
                SWITCH,
                "weaker = handle.set(handle.controls[0], scale=1.5)",
                PHOTO,
                checks.PIPE + checks.HANDLE,
                checks.SCALED,
            ),
        ],
        "said_right",
    ),
    "sparse": Task(
        "sparse attention, calibrated",
        [
            Step(CLI, "attnctl calibrate --model shapes:mmdit"),
            Step(
                PARO,
                'with attnctl.control(pipe, PARO("plan")):',
                SHIP,
                checks.MMDIT,
                'image.save("paro.png")',
            ),
        ],
        "sparse",
    ),
    "swap": Task(
        "another attention in a vision transformer",
        [Step("README.md", "vit = attnctl.swap(", after=checks.SWAPPED)],
        "said_right",
    ),
    "page": Task(
        "use the page from a program",
        [
            Step(
                "docs/howto/page.md",
                'page = Client("http://127.0.0.1:7860/")',
                {"http://127.0.0.1:7860/": "{address}", "PAG_scale=2.0": "PAG_scale=2.0, steps=5"},
                after=checks.PAGE,
            )
        ],
        "said_right",
        beside="attnctl ui --no-browser",
    ),
}


def read(clone: Path, step: Step, address: str) -> list[str]:
    """Return the command of a step, or Python's with its code."""
    if not step.page:
        return ["python", "-c", step.after]
    text = (clone / step.page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", "").splitlines()
        found = [line for line in lines if line.startswith(step.starts)]
        if not found:
            continue
        words = found[0] if language == "bash" else block
        for old, new in step.instead.items():
            if old not in words:
                raise SystemExit(f"{step.page} no longer holds {old!r} below {step.starts!r}")
            words = words.replace(old, new.replace("{address}", address))
        if language == "bash":
            return ["bash", "-c", f"{words.split('  #')[0]} {step.after}".strip()]
        return ["python", "-c", f"{step.before}\n{words}\n{step.after}"]
    raise SystemExit(f"{step.page} no longer holds {step.starts!r}")


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Run one step; note the seconds until its first line and until its end, its code and what it said."""
    began, first, text = time.perf_counter(), None, ""
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    for line in process.stdout:
        first = first or time.perf_counter() - began
        text += line.decode(errors="replace")
        if time.perf_counter() - began > MOST:
            process.kill()
    code = process.wait()
    seconds = round(time.perf_counter() - began, 1)
    return {"first": first and round(first, 2), "seconds": seconds, "code": code, "text": text}


@contextlib.contextmanager
def beside(command: str, folder: Path, env: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """Keep a command running that prints an address, such as the page's; yield the address and its seconds."""
    if not command:
        yield "", 0.0
        return
    began = time.perf_counter()
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process: Any = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=env, **said)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def environment(folder: Path, whole: bool) -> dict[str, str]:
    """Make an empty virtual environment; let it borrow this one's packages if it shall not fetch its own."""
    new = not (folder / "venv").is_dir()
    if new:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    if (
        new and not whole
    ):  # files named .pth that lie there are not followed, so the attnctl of this environment is not found
        packages = next((folder / "venv").rglob("site-packages"))
        (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    left_out = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    return env | {"PATH": f"{folder / 'venv' / 'bin'}:{env['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def attempt(name: str, task: Task, clone: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Do one task and check it."""
    rows, seen = [], ""
    with beside(task.beside, clone, env) as (address, start):
        for step in task.steps:
            rows.append(run(read(clone, step, address), clone, env))
            if rows[-1]["code"]:
                seen = f"failed: {' '.join(rows[-1]['text'].splitlines()[-3:])[-400:]}"
                break
    try:
        seen = seen or getattr(checks, task.check)(clone, [row["text"] for row in rows])
    except (AssertionError, OSError, LookupError, ValueError) as error:
        seen = f"failed: {type(error).__name__} {error}"
    firsts = [row["first"] for row in rows]
    return {
        "task": task.about,
        "pages": sorted({step.page for step in task.steps if step.page}),
        "commands": len(rows),
        "first_line": firsts,
        "seconds": round(start + sum(row["seconds"] for row in rows), 1),
        "right": not seen.startswith("failed"),
        "seen": seen.replace(str(clone), "CLONE"),
    }


def commands_first(name: str, row: Mapping[str, Any]) -> list[float]:
    """Return the seconds to the first line of a task's commands of attnctl; scripts say what their user lets them."""
    ours = [step.starts.startswith("attnctl ") for step in TASKS[name].steps]
    return [s for s, own in zip(row["first_line"], ours, strict=False) if own and s is not None]


def main() -> int:
    """Clone, install, do the tasks, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), choices=tuple(TASKS), help="some tasks, after the install")
    parser.add_argument("--whole-install", action="store_true", help="fetch every package anew")
    parser.add_argument("--here", action="store_true", help="clone with the changes that are not committed")
    parser.add_argument("--work", type=Path, help="keep the clone and what it made there; one that is there is taken")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clone = work / "attnctl"
        if not clone.is_dir():
            subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
        if args.here:
            listing = ["git", "ls-files", "-mo", "--exclude-standard"]
            changed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
            for file in changed.stdout.splitlines():
                if (ROOT / file).is_file():
                    (clone / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, clone / file)
        installed = (work / "venv").is_dir()
        env = environment(work, args.whole_install)
        for name, task in TASKS.items():
            if args.only and name not in (*args.only, *(() if installed else ("install",))):
                continue
            rows[name] = attempt(name, task, clone, env)
            row = rows[name]
            firsts = "/".join("-" if s is None else f"{s:.1f}" for s in row["first_line"])
            print(f"{name:9}{row['seconds']:7.1f} s, first line {firsts:18} {row['seen']}", file=sys.stderr, flush=True)
    right = sum(row["right"] for row in rows.values())
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "packages": "own" if args.whole_install else "borrowed",
        "tasks": len(rows),
        "right": right,
        "first_line_of_commands": max((s for n in rows for s in commands_first(n, rows[n])), default=None),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
