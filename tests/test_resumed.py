"""What is taken up again after a kill: a file that was just being placed counts as not there, and is made anew."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnctl.pipelines import batches
from attnctl.pipelines.calibration.calibrate import _claim
from attnctl.pipelines.calibration.measure import over_prompts, read_store
from attnctl.pipelines.editing.files import parts_of
from attnctl.pipelines.hunting.log import HuntLog
from attnctl.plans import writing
from attnctl.plans.writing import publish

SETTINGS: Any = SimpleNamespace(density=0.5)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")


def killed_placing(path: Path, content: bytes) -> None:
    """Write a file in a process that is killed when the file is in its place, and not yet counted."""
    child = os.fork()
    if not child:
        place = writing._Entry.place

        def die(entry: Any, force: bool) -> None:
            place(entry, force)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            writing._Entry.place = die  # type: ignore[method-assign]
            publish({path: content}, force=True)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == content


def test_a_window_of_an_edit(tmp_path: Path) -> None:
    files = [tmp_path / "out", tmp_path / "out.json"]
    job: Any = SimpleNamespace(windows=range(0, 4, 2))
    with parts_of(files, {"steps": 2}, job) as parts:
        folder = parts.folder
    assert folder is not None
    killed_placing(folder / "000000.safetensors", b"half placed")
    with parts_of(files, {"steps": 2}, job) as again:
        assert again.folder == folder
        assert not again.has(0)


def test_a_prompt_of_a_calibration(tmp_path: Path) -> None:
    seen: list[str] = []

    def run(prompt: Any, seed: int) -> dict[str, Any]:
        seen.append(prompt)
        return {}

    def measure() -> None:
        _claim(tmp_path, SETTINGS, ("a", "b"), 0, None)
        shown: Any = SimpleNamespace(describe=lambda text: None)
        over_prompts(run, ("a", "b"), 0, tmp_path, "orders", lambda n: contextlib.nullcontext(shown))

    measure()
    content = (tmp_path / "orders-0.safetensors").read_bytes()
    (tmp_path / "orders-0.safetensors").unlink()
    (tmp_path / "orders-1.safetensors").unlink()
    killed_placing(tmp_path / "orders-0.safetensors", content)
    measure()
    assert seen == ["a", "b", "a", "b"]
    assert all(read_store(tmp_path / f"orders-{i}.safetensors") == {} for i in (0, 1))


@pytest.mark.parametrize("mark", ["settings.sha256", "hunt.json"])
def test_the_mark_that_says_whose_a_folder_is(mark: str, tmp_path: Path) -> None:
    def claim() -> None:
        if mark == "hunt.json":
            HuntLog(tmp_path, {"plan": {}})
        else:
            _claim(tmp_path, SETTINGS, ("a",), 0, None)

    claim()
    content = (tmp_path / mark).read_bytes()
    (tmp_path / mark).unlink()
    killed_placing(tmp_path / mark, content)
    claim()
    publish({tmp_path / "other": b""})  # which puts back what a killed run left half done
    assert (tmp_path / mark).read_bytes() == content


def test_a_picture_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "settings_of", lambda *_: {})
    path = tmp_path / "a.png"
    killed_placing(path, json.dumps({}).encode())
    run: Any = SimpleNamespace(call=None, jobs=[SimpleNamespace(path=path)])
    loaded: Any = None
    assert batches.unlike(run, loaded) == {path: ""}
