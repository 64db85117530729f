"""The five commands of the README do what they say, on the shipped models where weights would be fetched."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnctl.app.cli import main
from attnctl.data.clips import mp4_bytes
from attnctl.data.record import read
from attnctl.shapes.motion import Motion, render_clip, sample_clip

pytestmark = pytest.mark.usefixtures("unplugged")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What stands for weights that are not here, and what makes the runs short.
INSTEAD = {
    "stabilityai/stable-diffusion-xl-base-1.0": "shapes:text2image",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "shapes:text2image",
    "an old sailor": "a red circle on gray",
    "a silver jeep": "a red circle on black",
    "a red jeep": "a blue circle on black",
    "512": "64",
}


def commands() -> list[list[str]]:
    """Read the commands out of the README."""
    section = README.split("## Five commands\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].strip().splitlines()]


def attnctl(words: list[str], *more: str) -> int:
    """Run one of them with what stands for weights."""
    assert words[0] == "attnctl"
    return main([*(INSTEAD.get(word, word) for word in words[1:]), *more])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_five_and_ci_runs_the_blocks_that_it_needs() -> None:
    assert len(commands()) == 5
    for heading in ("Try it", "Test it"):
        assert re.search(rf"^## {heading}\n[^#]*?^```bash\n", README, re.MULTILINE)
    used = {word for words in commands() for word in words}
    assert set(INSTEAD) <= used


def test_install(tmp_path: Path) -> None:
    words = commands()[0]
    assert words == ["pip", "install", "-e", ".[dev]"]
    left_out = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "attnctl", tmp_path / "attnctl", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    # Nothing is fetched and nothing installed: what the package needs is here, or the tests would not run.
    offline = ("--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    done = subprocess.run(
        [sys.executable, "-m", *words, *offline], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Would install attnctl-" in done.stdout


def test_a_picture_of_your_own_prompt(here: Path) -> None:
    words = commands()[1]
    assert attnctl(words, "--steps", "2") == 0
    (record,) = read(next((here / "out").glob("*softpag-0.png")))
    assert record.model == "shapes:mmdit"
    assert record.controls[0]["method"] == "SoftPAG"
    assert record.prompts == (words[words.index("--prompt") + 1],)


def test_your_own_sdxl(here: Path) -> None:
    words = commands()[2]
    assert "stable-diffusion-xl" in words[words.index("--model") + 1]
    assert attnctl(words, "--steps", "3") == 0
    picture = next((here / "out").glob("*-pag-0.png"))
    assert read(picture)[0].controls[0]["method"] == "PAG"
    assert Image.open(picture).size == (64, 64)


def test_a_video_edit(here: Path) -> None:
    clip = sample_clip(np.random.default_rng(3), Motion("right", "slow"))
    (here / "jeep.mp4").write_bytes(mp4_bytes(render_clip(clip, 2), 8.0))
    assert attnctl(commands()[3], "--steps", "3") == 0
    assert next((here / "out").glob("jeep-*.mp4")).stat().st_size > 500
    assert next((here / "out").glob("jeep-*-strip.png")).is_file()


def test_a_swapped_backbone(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    python, script, *options = commands()[4]
    assert python == "python"
    assert "--swap" in options
    monkeypatch.setattr(sys, "argv", [script, *options, "--shapes", "--epochs", "1"])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "that it has not seen" in capsys.readouterr().out
    assert (here / "out" / "heads.png").is_file()
