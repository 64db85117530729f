"""How `attnctl demo` shares its panels between two processes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from attnctl.app.commands import demo_shares
from attnctl.app.commands.demo_shares import make_all, shares
from attnctl.app.panels import PANELS
from attnctl.errors import AttnctlError

VISION = dataclasses.replace(next(panel for panel in PANELS if panel.kind == "vision"), steps=1)
BROKEN = dataclasses.replace(PANELS[0], control="NoSuchControl()", steps=1, seconds=0.1)


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_every_panel_is_made_once_and_a_model_is_loaded_once(cores: int) -> None:
    parts = shares(PANELS, cores)
    assert sorted(i for part in parts for i in part) == list(range(len(PANELS)))
    models = [{PANELS[i].model for i in part} for part in parts]
    assert not models[0] & models[1]
    assert bool(parts[1]) == (cores > 1)


@pytest.mark.parametrize("cores", [1, 2])
def test_what_fails_in_either_process_is_said(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_shares, "_cores", lambda: cores)
    threads, passed = torch.get_num_threads(), []
    with pytest.raises(AttnctlError, match="NoSuchControl"):
        make_all([VISION, BROKEN], "", passed.append, lambda title: None)
    assert sum(passed) == pytest.approx(VISION.seconds)
    assert torch.get_num_threads() == threads


def test_the_second_process_leaves_nothing_behind() -> None:
    code = (
        "import dataclasses\n"
        "from attnctl.app.commands import demo_shares\n"
        "from attnctl.app.panels import PANELS\n"
        "def passed(seconds):\n"
        "    if seconds < 0.1: raise SystemExit(3)\n"  # while the second process is at work
        "demo_shares._cores = lambda: 2\n"
        "first, second = PANELS[-1], dataclasses.replace(PANELS[0], steps=100, seconds=0.1)\n"
        "demo_shares.make_all([first, second], '', passed, lambda title: None)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert "resource_tracker" not in run.stderr  # of a semaphore that nobody gave back


def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_shares, "_cores", lambda: 2)
    monkeypatch.setattr(demo_shares, "make", lambda panel, tick, command: _end())
    with pytest.raises(AttnctlError, match="ended early"):
        make_all([VISION, BROKEN], "", lambda seconds: None, lambda title: None)


def _end() -> Any:
    import multiprocessing

    for process in multiprocessing.active_children():
        process.terminate()
        process.join()
    return None
