"""`attnctl edit` from file to file on eight hosts: `python benchmarks/edit_hosts.py`, its JSON on stdout.

Each pipeline has tiny random weights (tests/editing_hosts.py), is saved to a folder, and edits an MP4, a GIF, a folder
of pictures and a picture by the command. Then a run of the folder is killed (SIGKILL) once a window is done, and run
again: it has to take that window over, and to end with the pictures of the run that nobody killed. The table goes to
stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import editing_hosts as hosts  # noqa: E402

import attnctl  # noqa: E402
from attnctl.app.cli import main as attnctl_main  # noqa: E402
from attnctl.data.clips import FileClip, gif_bytes, mp4_bytes  # noqa: E402

INPUTS = {"MP4": "in.mp4", "GIF": "in.gif", "folder": "frames", "picture": "in.png"}
FRAMES, HEIGHT, WIDTH, WINDOW = 6, 32, 64, 5  # LTX takes sides divisible by 32


def write_inputs(folder: Path) -> None:
    """Write the same clip in each form, and its first frame as a picture."""
    clip = hosts.clip(FRAMES, HEIGHT, WIDTH)
    (folder / "in.mp4").write_bytes(mp4_bytes(clip, 8.0))
    (folder / "in.gif").write_bytes(gif_bytes(clip, 8.0))
    (folder / "frames").mkdir()
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / "frames" / f"{i}.png")
    Image.fromarray(clip[0]).save(folder / "in.png")


def command(name: str, model: Path, source: Path, out: Path) -> list[str]:
    """Write the command."""
    words = ["edit", str(source), "--model", str(model), "--source", hosts.SOURCE, "--target", hosts.TARGET]
    words += ["--steps", "2", "--guidance", "3", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    return words + (["--window", str(WINDOW)] if name in hosts.VIDEO else [])


def run(words: list[str]) -> tuple[int, str, str]:
    """Run the command in this process: its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = attnctl_main([*words, "--json"])
    return code, out.getvalue(), err.getvalue()


def one(name: str, model: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Edit one input; look at what was written."""
    source = folder / INPUTS[kind]
    out = folder / f"{name}-{kind}{source.suffix}"
    began = time.process_time()
    code, printed, err = run(command(name, model, source, out))
    row: dict[str, Any] = {"exit": code, "seconds": round(time.process_time() - began, 2)}
    if code:
        return row | {"error": _last_line(err)}
    clip = FileClip(out)
    height, width = clip.read([0]).shape[1:3]
    return row | {"frames": clip.count, "size": f"{width}x{height}", "sha256": json.loads(printed)["record"]["sha256"]}


def _last_line(err: str) -> str:
    return err.strip().splitlines()[-1][:300]


def killed(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """Kill a run of the folder once a window is done, and run it again."""
    out = folder / f"{name}-killed"
    words = command(name, model, folder / "frames", out)
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            attnctl_main(words)
        os._exit(0)
    while not (done := list(folder.glob(f".{out.name}.*.parts/*.safetensors"))):
        if os.waitpid(child, os.WNOHANG)[0]:
            return {"killed": False}
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.exists():
        return {"killed": False}
    code, printed, err = run(words)
    said = [line for line in err.splitlines() if "taken over" in line]
    row = {"killed": True, "windows_done": len(done), "exit": code, "said": said[0] if said else ""}
    return row | ({"error": _last_line(err)} if code else {"sha256": json.loads(printed)["record"]["sha256"]})


def host(name: str) -> dict[str, Any]:
    """Run all inputs of one host."""
    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place), Path(place) / "model"
        hosts.build(name).save_pretrained(model)
        write_inputs(folder)
        rows = {kind: one(name, model, folder, kind) for kind in INPUTS}
        rows["killed"] = killed(name, model, folder)
        rows["killed"]["same"] = rows["killed"].get("sha256") == rows["folder"].get("sha256")
        shutil.rmtree(model)
    return rows


def line(name: str, rows: dict[str, Any]) -> str:
    """Write a host's row of the table."""
    cells = [f"{r['frames']} of {r['size']}" if "frames" in r else f"exit {r['exit']}" for r in map(rows.get, INPUTS)]
    again = rows["killed"]
    cells.append(
        f"{again['said']}; {'same pictures' if again['same'] else 'DIFFERS'}" if again["killed"] else "not killed"
    )
    return f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Run all hosts and print them; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", choices=tuple(hosts.HOSTS), default=list(hosts.HOSTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    found, right = {}, True
    print(f"| host | {' | '.join(INPUTS)} | killed and run again |\n|---|{'---|' * 5}", file=sys.stderr)
    for name in options.hosts:
        rows = found[name] = host(name)
        print(line(name, rows), file=sys.stderr, flush=True)
        right &= all(r["exit"] == 0 for r in map(rows.get, INPUTS)) and rows["killed"]["same"]
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    print(json.dumps({"hosts": found, "versions": versions, "machine": platform.machine()}, indent=1))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
