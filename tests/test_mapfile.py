"""Word maps as files and pictures, and `attnctl maps`; none of it needs a trained model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.app.cli import main
from attnctl.core.sites import Site
from attnctl.data.map_pictures import heads_sheet, layers_sheet, overlay_word, steps_gif, steps_sheet, words_sheet
from attnctl.data.map_regions import boxes, from_rle, regions, rle
from attnctl.data.maps import WordMaps
from attnctl.data.record import RecordError, read
from attnctl.errors import ConfigError
from attnctl.plans.writing import FileExists


def made(keep: tuple[str, ...] = ("steps", "heads"), frames: int = 1) -> WordMaps:
    g = torch.Generator().manual_seed(0)
    steps, heads = 3 if "steps" in keep else 1, 2 if "heads" in keep else 1
    grids = {"down.attn2": (frames, 4, 6), "mid.attn2": (frames, 2, 3)}
    layers = {n: torch.rand(2, 2, steps, heads, *grid, generator=g) for n, grid in grids.items()}
    layers["down.attn2"][1, 1] = layers["mid.attn2"][1, 1] = torch.nan
    return WordMaps(
        words=("cat", "dog#2"),
        layers=layers,
        sites=tuple(Site(n, "cross", 2, 8, i, grid=grid) for i, (n, grid) in enumerate(grids.items())),
        steps=(0, 1, 2),
        prompts=("a cat, a dog and a dog", "a cat"),
        tokens=(((2,), (8, 9)), ((2,), ())),
        keep=keep,
        about={"model": "tiny", "seeds": [3, 4]},
    )


def test_maps_survive_being_written(tmp_path: Path) -> None:
    maps, path = made(), tmp_path / "maps.safetensors"
    maps.save(path)
    again = WordMaps.load(path)
    assert {
        n: getattr(again, n) for n in ("words", "sites", "steps", "prompts", "tokens", "keep", "rows", "about")
    } == {n: getattr(maps, n) for n in ("words", "sites", "steps", "prompts", "tokens", "keep", "rows", "about")}
    for name, layer in maps.layers.items():
        assert torch.equal(again.layers[name].nan_to_num(-1), layer.nan_to_num(-1))
    assert torch.equal(again["cat"], maps["cat"])
    data = json.loads(path.with_suffix(".json").read_text())
    assert data["normalisation"] == "probability"
    assert data["grid"] == [4, 6]
    with pytest.raises(FileExists):
        maps.save(path)
    maps.save(path, force=True)


def _edit(**changes: Any) -> Any:
    def edit(path: Path) -> None:
        side = path.with_suffix(".json")
        side.write_text(json.dumps({**json.loads(side.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "There are no maps"),
        (lambda p: p.write_bytes(b"12345678"), "missing or damaged"),
        (lambda p: p.with_suffix(".json").unlink(), r"maps\.json cannot be read: there is no file"),
        (lambda p: p.with_suffix(".json").write_text("{"), "maps.json is not JSON"),
        (lambda p: p.with_suffix(".json").write_text("[]"), "maps.json is not a description of word maps"),
        (_edit(schema=2), "schema 2; this attnctl reads schema 1"),
        (_edit(schema=True), "schema True"),
        (_edit(layers=[]), "its layers are not those of the tensors"),
        (_edit(reduce="median"), "reduce is 'median'"),
        (_edit(words=["cat"]), "its tokens are not one list"),
        (_edit(prompts=["a"], tokens=[[[1], [2]]]), "do not belong together"),
        (_edit(steps=[0]), "has 3 steps; the JSON lists 1"),
        (_edit(heads="all"), "is damaged"),
        (_edit(of="colours"), "its maps are of 'colours'"),
    ],
)
def test_damaged_files_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    made().save(path)
    spoil(path)
    with pytest.raises(RecordError, match=message):
        WordMaps.load(path)


def test_only_safetensors_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kept in \.safetensors files"):
        made().save(tmp_path / "maps.pt")


def picture() -> Image.Image:
    return Image.fromarray(np.full((32, 48, 3), (200, 40, 40), np.uint8))


def test_an_overlay_is_bright_where_the_word_is() -> None:
    maps = made(keep=())
    for layer in maps.layers.values():
        layer.zero_()
    maps.layers["down.attn2"][0, 0, 0, 0, 0, 0, 5] = 1
    seen = np.asarray(overlay_word(picture(), maps, "cat")).astype(float).sum(-1)
    y, x = np.unravel_index(seen.argmax(), seen.shape)
    assert y < seen.shape[0] / 4
    assert x > seen.shape[1] * 5 / 6


def test_sheets_have_a_tile_for_each_word_step_and_head() -> None:
    maps = made()
    wide, one = words_sheet(picture(), maps), words_sheet(picture(), maps, ["cat"])
    assert wide.width > one.width
    assert words_sheet(picture(), maps, index=1).size == one.size  # the second prompt has no dog
    tall = words_sheet(picture(), maps, ["cat"] * 8)
    assert tall.height > 1.5 * wide.height
    assert steps_sheet(picture(), maps).width > heads_sheet(picture(), maps).width


def test_points_are_ringed_and_said_in_the_footer() -> None:
    maps = replace(made(keep=()), of="points", words=("0.25,0.5", "0.75,0.5"))
    plain = np.asarray(overlay_word(picture(), replace(maps, of="words"), "0.25,0.5")).astype(int)
    ringed = np.asarray(overlay_word(picture(), maps, "0.25,0.5")).astype(int)
    changed = np.argwhere(np.abs(ringed - plain).sum(-1) > 0)
    y, x = (changed.min(0) + changed.max(0)) / 2 / ringed.shape[:2]
    assert abs(x - 0.25) < 0.02
    assert abs(y - 0.5) < 0.02
    assert not np.array_equal(words_sheet(picture(), maps), words_sheet(picture(), replace(maps, of="words")))


def test_a_moving_picture_has_a_frame_a_step() -> None:
    data = steps_gif(picture(), made(), ["cat"])
    with Image.open(io.BytesIO(data)) as moving:
        assert moving.format == "GIF"
        assert moving.n_frames == 3
    with pytest.raises(ConfigError, match="steps were reduced"):
        steps_gif(picture(), made(keep=()))


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_come_back(seed: int) -> None:
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) > 0.5
    data = rle(mask)
    assert data["size"] == [5, 7]
    assert sum(data["counts"]) == 35
    assert torch.equal(from_rle(data), mask)
    for whole in (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)):
        assert torch.equal(from_rle(rle(whole)), whole)
    assert rle(torch.tensor([[True, False], [False, False]]))["counts"] == [0, 1, 3]
    with pytest.raises(ConfigError, match="cover 3 pixels, expected 2 x 2 = 4"):
        from_rle({"size": [2, 2], "counts": [1, 2]})


def test_boxes_are_of_connected_parts_the_largest_first() -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0, 0] = mask[2:5, 3:7] = True
    assert boxes(mask) == [(3, 2, 4, 3), (0, 0, 1, 1)]
    assert boxes(torch.zeros(2, 2)) == []
    with pytest.raises(ConfigError, match="Take one frame"):
        boxes(torch.zeros(2, 2, 2))


def test_regions_of_one_image() -> None:
    maps = made(keep=())
    for layer in maps.layers.values():
        layer[0, 0].zero_()
    maps.layers["down.attn2"][0, 0, 0, 0, 0, 1:3, 2:5] = 1
    found = regions(maps, 0, threshold=0.9)
    assert [one["word"] for one in found] == ["cat", "dog#2"]
    assert found[0]["bbox"] == [2, 1, 3, 2]
    assert found[0]["area"] == 6 == int(from_rle(found[0]["segmentation"]).sum())
    json.dumps(found, allow_nan=False)
    assert [one["word"] for one in regions(maps, 1, height_width=(8, 12))] == ["cat"]
    assert regions(maps, 1, height_width=(8, 12))[0]["segmentation"]["size"] == [8, 12]
    with pytest.raises(ConfigError, match="past the end"):
        regions(maps, 2)
    with pytest.raises(ConfigError, match="Take one frame"):
        regions(made(keep=(), frames=2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: overlay_word(picture(), m, "dog#2", 1), "The prompt of image 1 has no 'dog#2'"),
        (lambda m: overlay_word(picture(), m, "cat", 2), "Image 2 is past the end"),
        (lambda m: overlay_word(picture(), m, "bird"), "'bird' was not recorded"),
        (lambda m: steps_sheet(picture(), made(keep=())), "steps were reduced"),
        (lambda m: overlay_word(picture(), made(frames=2), "cat"), "maps of a video"),
    ],
)
def test_pictures_that_cannot_be(act: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act(made())


def test_layers_with_different_heads_share_no_columns() -> None:
    maps = made()
    layers = {**maps.layers, "mid.attn2": torch.rand(2, 2, 3, 4, 1, 2, 3)}
    with pytest.raises(ConfigError, match="have 2 or 4 heads"):
        heads_sheet(picture(), replace(maps, layers=layers))
    few, many = layers_sheet(picture(), maps, "cat"), layers_sheet(picture(), replace(maps, layers=layers), "cat")
    assert many.width > few.width  # layer by layer they can stand side by side, with gaps
    with pytest.raises(ConfigError, match="heads were reduced"):
        layers_sheet(picture(), made(keep=()), "cat")


# attnctl maps ---------------------------------------------------------------------------------------------------


def call(folder: str, out: Path, *more: object) -> int:
    size = ("--height", 16, "--width", 24, "--steps", 2)
    args = ("maps", "--model", folder, "--prompt", "a black bear and a cat", *size, "--out", out, *more)
    return main([str(a) for a in args])


def test_the_command_writes_pictures_maps_and_records(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--word", "cat", "--word", "black bear", "--word", "a#2")
    more = ("--heads", "--negative", "ugly", "--num", 2, "--seed", 5, "--json", "--control", "PAG(scale=2.0)")
    assert call(folder, tmp_path, *words, *more) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in data["images"]] == [5, 6]
    for one in data["images"]:
        assert [w["word"] for w in one["words"]] == ["cat", "black bear", "a#2"]
        assert one["normalisation"] == "probability"
        where = Path(one["folder"])
        for name in ("image.png", "words.png", "steps.png", "heads.png"):
            (record,) = read(where / name)
            assert record.seeds == (one["seed"],)
            assert [c["method"] for c in record.controls] == ["PAG"]  # what only looks makes no part of the image
        maps = WordMaps.load(where / "maps.safetensors")
        assert maps.steps == (0, 1)
        assert maps.about["model"] == "tiny-sd"
        assert maps.about["seeds"] == [one["seed"]]
        assert maps.about["negative"] == "ugly"
    assert call(folder, tmp_path, *words, "--seed", 5) == 1
    assert "already there" in capsys.readouterr().err
    assert call(folder, tmp_path, "--word", "cat", "--seed", 5, "--force") == 0


def test_the_command_shows_points_regions_and_a_moving_picture(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, tmp_path, "--point", "0.5,0.25", "--point", "1,0", "--gif", "--regions", "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["images"]
    assert [w["word"] for w in one["words"]] == ["0.5,0.25", "1,0"]
    where = Path(one["folder"])
    assert {"words.png", "steps.png", "steps.gif", "regions.json"} <= {p.name for p in where.iterdir()}
    assert set(one["files"]) <= {p.name for p in where.iterdir()}
    assert WordMaps.load(where / "maps.safetensors").of == "points"
    data = json.loads((where / "regions.json").read_text())
    assert (data["height"], data["width"]) == (16, 24)
    assert data["regions"][0]["segmentation"]["size"] == [16, 24]
    assert call(folder, tmp_path, "--point", "0.5,0.25", "--gif") == 1
    assert "already there" in capsys.readouterr().err


def test_the_image_is_the_one_without_maps(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, tmp_path, "--word", "cat") == 0
    size = ("--height", 16, "--width", 24, "--steps", 2)
    args = (
        "generate",
        "--model",
        folder,
        "--prompt",
        "a black bear and a cat",
        *size,
        "--out",
        tmp_path / "g",
        "--json",
    )
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0
    path = json.loads(capsys.readouterr().out)["images"][0]["path"]
    (image,) = tmp_path.glob("*/image.png")
    assert read(image)[0].sha256 == read(path)[0].sha256


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--prompt", " "), 2, "Give a --prompt"),
        (("--num", 0), 2, "--num is a whole number"),
        (("--negative-words",), 2, "--negative-words shows the words of --negative"),
        (("--control", "PAGG"), 2, "Unknown method 'PAGG'"),
        (("--point", "0.5"), 2, "--point '0.5': expected x,y"),
        (("--point", "0.5,2"), 2, "lies outside the image"),
        (("--point", "0.5,0.5", "--word", "cat"), 2, "leave out --word"),
        (("--word", "dog"), 1, "'dog' is not in the prompt"),
        (("--word", "0"), 1, "start token"),
        (("--word", "cat", "--sites", "self"), 1, "self"),
    ],
)
def test_wrong_use_is_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], code: int, message: str
) -> None:
    assert call(folder, tmp_path, *more) == code
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
