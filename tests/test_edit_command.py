"""`attnctl edit` end to end with the shipped model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnctl.app.cli import main
from attnctl.data.clips import FileClip, mp4_bytes
from attnctl.shapes.motion import Motion, render_clip, sample_clip

WORDS = ["--source", "a red circle on gray", "--target", "a blue circle on gray"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    path = tmp_path / "in.mp4"
    clip = sample_clip(np.random.default_rng(0), Motion("right", "slow"))
    path.write_bytes(mp4_bytes(render_clip(clip, 2), 8.0))
    return path


def test_edit(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.mp4"
    args = ["edit", str(video), *WORDS, "--steps", "2", "--out", str(out), "--blend", "circle", "--weight", "blue=2"]
    assert main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert FileClip(out).count == data["record"]["frames"][1] == 2
    assert data["record"]["control"]["equalizer"] == {"blue": 2.0}
    assert data["record"]["model"] == "shapes:text2image"
    assert str(tmp_path) not in json.dumps(data["record"])
    assert main(args) == 1
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--guidance", "nan"], 2, "--guidance"),
        (["--weight", "blue"], 2, "watercolor=10"),
        (["--keys", "centre"], 2, "mid"),
        (["--cross-replace", "2"], 2, "from 0 to 1"),
        (["--strength", "0.5"], 2, "--strength is for --method flowedit, and the method is fatezero"),
        (["--method", "flowedit", "--solver", "euler"], 2, "--solver is for --method fatezero or inject"),
        (["--method", "inject", "--blend", "circle"], 2, "--blend is for --method fatezero"),
        (["--solver", "euler", "--check"], 1, "solver and check: for transformers"),
        (["--blend", "square"], 1, "'square' is not in the prompt"),
        (["--start", "7"], 1, "no frame"),
    ],
)
def test_bad_usage(
    video: Path, tmp_path: Path, extra: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", str(video), *WORDS, "--out", str(tmp_path / "o.mp4"), *extra]) == code
    assert message in capsys.readouterr().err
    assert main(["edit", str(tmp_path / "none.mp4"), *WORDS]) == 1
