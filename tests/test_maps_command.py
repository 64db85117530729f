"""`attnctl maps` of pictures that exist, and of concepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo_pipelines as pipes
from PIL import Image

from attnctl.app.cli import main
from attnctl.data.maps import WordMaps
from attnctl.pipelines import image_maps
from attnctl.processors import Capture


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)).save(path)
    return path


def look(folder: str, photo: Path, out: Path, *more: object) -> int:
    return main([str(a) for a in ("maps", "--model", folder, "--image", photo, "--out", out, *more)])


def test_the_command_looks_at_a_picture_that_exists(
    folder: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = (
        "--prompt",
        "a cat",
        "--word",
        "cat",
        "--heads",
        "--regions",
        "--masks",
        "--seed",
        3,
        "--strength",
        0.5,
        "--json",
    )
    assert look(folder, photo, out, *more) == 0
    (one,) = json.loads(capsys.readouterr().out)["images"]
    assert [w["word"] for w in one["words"]] == ["cat"]
    where = Path(one["folder"])
    assert {p.name for p in where.iterdir()} == {*one["files"], "maps.json"}
    assert set(one["files"]) == {"words.png", "heads.png", "regions.json", "mask-cat.png", "maps.safetensors"}
    maps = WordMaps.load(where / "maps.safetensors")
    assert (maps.about["model"], maps.about["image"], maps.about["strength"]) == ("tiny-sd", "a photo.png", 0.5)
    want = image_maps(pipes.build("sd")[0], Image.open(photo), "a cat", Capture(words=["cat"]), strength=0.5, seed=3)
    assert torch.allclose(maps["cat"], want["cat"], atol=1e-6)
    assert look(folder, photo, out, *more) == 1
    assert "already there" in capsys.readouterr().err
    assert look(folder, photo, out, "--point", "0.5,0.5", "--force", "--width", 32, "--height", 32) == 0


def test_the_command_shows_concepts(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concepts = ("--concept", "circle", "--concept", "gray", "--json")
    args = ("maps", "--model", "shapes:mmdit", "--prompt", "a red circle", "--steps", 1, "--out", tmp_path / "o")
    assert main([str(a) for a in (*args, *concepts)]) == 0
    (one,) = json.loads(capsys.readouterr().out)["images"]
    assert one["normalisation"] == "share of the concepts"
    assert [w["word"] for w in one["words"]] == ["circle", "gray"]
    assert look("shapes:mmdit", photo, tmp_path / "p", *concepts, "--width", 64, "--height", 64) == 0
    (one,) = json.loads(capsys.readouterr().out)["images"]
    assert one["layers"] == ["transformer_blocks.6.attn", "transformer_blocks.7.attn"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--word", "cat"), "Give a --prompt"),
        (("--prompt", "a", "--steps", 2, "--num", 2), "leave out --num, --steps"),
        (("--prompt", "a", "--gif", "--control", "PAG()"), "leave out --gif, --control"),
        (("--prompt", "a", "--negative", "b"), "leave out --negative"),
        (("--prompt", "a", "--strength", 0), "--strength is a noise level"),
        (("--prompt", "a", "--strength", "nan"), "--strength is a noise level"),
        (("--prompt", "a", "--image", "nowhere.png"), "nowhere.png cannot be read"),
        (("--concept", "a", "--heads"), "leave out --word"),
        (("--concept", "a"), "of one alone is 1 everywhere"),
    ],
)
def test_wrong_use_with_a_picture(
    folder: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], message: str
) -> None:
    assert look(folder, photo, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
