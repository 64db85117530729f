"""`attnctl edit` end to end with the shipped model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnctl.app.cli import main
from attnctl.data.audio import sound_of
from attnctl.data.clips import FileClip, gif_bytes, mp4_bytes
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
    ("model", "size", "made"),
    [
        ("shapes:text2image", (75, 61), (72, 56)),
        ("shapes:text2image", (84, 36), (80, 32)),
        ("shapes:mmdit", (50, 38), (48, 36)),
        ("shapes:mmdit", (168, 72), (64, 24)),  # more than the model has places for
    ],
)
def test_every_size_is_edited(
    model: str, size: tuple[int, int], made: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", size, "gray").save(source)
    method = [] if model == "shapes:text2image" else ["--method", "flowedit"]
    assert main(["edit", str(source), *WORDS, "--model", model, *method, "--steps", "1", "--out", str(out)]) == 0
    assert f"1 frame(s) of {size[0]}x{size[1]} become {made[0]}x{made[1]}" in capsys.readouterr().err
    with Image.open(out) as image:
        assert image.size == made
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["input_size"], [record["width"], record["height"]]) == ([*size], [*made])


def test_a_gif_repeats_and_has_the_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    (tmp_path / "a.gif").write_bytes(gif_bytes(frames, 8.0, "how it was made"))
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["comment"]) == (3, (12, 8), 0, b"how it was made")
        assert abs(gif.info["duration"] - 125) <= 5
    assert FileClip(tmp_path / "a.gif").count == 3


def heard(path: Path) -> list[tuple[str, float]]:
    """Return the codec and the seconds of each stream of sound."""
    import av

    with av.open(str(path)) as file:
        return [(s.codec_context.name, float(s.duration * s.time_base)) for s in file.streams.audio]


@pytest.mark.parametrize(("container", "codec", "made"), [("mp4", "aac", "aac"), ("mkv", "flac", "aac")])
def test_sound_is_taken_over(container: str, codec: str, made: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / f"in.{container}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        kind = "fltp" if codec == "aac" else "s16"
        for first in range(0, 96_000, 1_000):
            wave = np.sin(np.arange(first, first + 1_000) / 20)[None] * 0.3
            samples = wave.astype(np.float32) if codec == "aac" else (wave * 2**15).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format=kind, layout="mono")
            frame.sample_rate, frame.pts = 48_000, first
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    sound = sound_of(path, 0.5, 1.5)
    assert sound is not None
    frames = np.zeros((8, 16, 16, 3), np.uint8)
    out = tmp_path / "out.mp4"
    out.write_bytes(mp4_bytes(frames, 8.0, sound=sound))
    ((name, seconds),) = heard(out)
    assert name == made
    assert abs(seconds - 1.0) < 0.1
    assert FileClip(out).count == 8
    silent = tmp_path / "silent.mp4"
    silent.write_bytes(mp4_bytes(frames, 8.0))
    assert sound_of(silent, 0, 1) is None


def test_a_failure_before_the_first_window_leaves_nothing(video: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    bad = ["--blend", "square"]
    assert main(["edit", str(video), *WORDS, "--steps", "1", "--out", str(tmp_path / "o" / "o.mp4"), *bad]) == 1
    assert set(tmp_path.iterdir()) == before


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
