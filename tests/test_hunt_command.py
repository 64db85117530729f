"""`attnctl hunt` end to end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from attnctl import HeadSet
from attnctl.app.cli import main
from attnctl.data.specs import parse_control
from attnctl.processors import SoftPAG


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["hunt", "--model", "shapes:mmdit", "--heads", "L7H0 L7H3", "--pairs", "1", "--k", "1", "--steps", "2"]
    args += ["--show", "1", "--batch", "2", "--out", str(tmp_path / "heads"), "--json"]
    assert main([*args, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pool"], told["images"], told["images_per_round"]) == (2, 2 + 1 + 3, [2])
    assert told["passes"] == 2 * ((2 + 2) * 3 + 2 * 2)
    assert told["hours"] > 0
    assert not (tmp_path / "heads").exists()
    assert main(args) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["images"] == told["images"] == done["generated"]
    assert {p.name for p in (tmp_path / "heads").iterdir()} == {
        "README.md", "attnctl_heads.json", "grid.png", "heat_map_1.png", "hunt_result.json", "log",
    }  # fmt: skip
    assert main(args) == 1  # there is a result already
    assert "already there" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["generated"] == 3  # the log had the rest
    assert main([*args[:-1], "--force"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])  # the command that uses what was found
    assert words[:4] == ["attnctl", "generate", "--model", "shapes:mmdit"]
    assert parse_control(words[-1]) == SoftPAG(
        heads=HeadSet.from_pretrained(tmp_path / "heads").pairs, u=0.5, scale=2.5
    )


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    args = ["hunt", "--model", "shapes:mmdit", "--heads", "L7H0 L7H3", "--pairs", "2", "--k", "1", "--steps", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "attnctl", *args, "--out", str(tmp_path / "heads"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # of both processes, one says what was found
    assert (told["processes"], told["images"]) == (2, 2 * 2 + 2)
    logs = {p.name.split("-")[1]: p.read_text().splitlines() for p in (tmp_path / "heads" / "log").glob("*.jsonl")}
    assert set(logs) == {"000", "001"}
    assert sum(len(json.loads(line)["marks"]) for lines in logs.values() for line in lines) == told["images"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--pairs", "65"), "--pairs 65 is out of range"),
        (("--pairs", "0"), "--pairs 0 is out of range"),
        (("--preset", "style"), "--style"),
        (("--preset", "quality"), "--prompt"),
        (("--heads", "L1"), "L1H10"),
        (("--k", "0"), "k=0"),
        (("--option", "height"), "height"),
    ],
)
def test_usage_errors(more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hunt", *more]) in (1, 2)
    assert words in capsys.readouterr().err
