"""Referring segmentation: sinks, stop words and magnets, masks and points, and the files that are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import attnctl
from attnctl.app.cli import main
from attnctl.core.sites import Site
from attnctl.data.map_points import peak_part, points_in
from attnctl.data.map_regions import from_rle
from attnctl.data.maps import WordMaps
from attnctl.data.segments import coco
from attnctl.errors import ConfigError
from attnctl.kernels.sinks import find_sinks, without_sinks
from attnctl.pipelines import image_maps, refer
from attnctl.pipelines.referring import expression_map
from attnctl.processors import Capture
from attnctl.shapes.scenes import Scene, Thing, render


@pytest.fixture(scope="module")
def host() -> Any:
    pipe = attnctl.load_shapes("mmdit")
    return diffusers.AutoPipelineForImage2Image.from_pipe(pipe)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    scene = Scene((Thing("circle", "red", 18, 20, 12), Thing("square", "blue", 46, 44, 12)), "gray")
    return Image.fromarray(render(scene))


def test_sinks_lose_their_columns_as_if_the_softmax_had_none() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50, dtype=torch.float64)
    logits[4] += 6  # one token receives from everywhere
    maps = logits.softmax(0)[:6]  # the seventh key is no text
    sinks = find_sinks(maps, 5.0)
    assert sinks.tolist() == [False] * 4 + [True, False]
    want = logits[[0, 1, 2, 3, 5, 6]].softmax(0)[:5]
    assert torch.allclose(without_sinks(maps, sinks)[~sinks], want, atol=1e-12)
    assert not without_sinks(maps, sinks)[4].any()
    assert not find_sinks(maps, 5.0, sinks).any()


def test_the_map_of_an_expression_is_the_mean_of_its_words_layer_by_layer() -> None:
    torch.manual_seed(1)
    words, counts = ("the", "red", "ring", "<start>"), (1, 1, 2, 1)
    raw = [torch.rand(4, n, n, dtype=torch.float64) * 0.04 for n in (4, 2)]
    for layer in raw:
        layer[3] = 0.6
    sites = tuple(Site(f"b.{i}", "joint", 1, 8, i, grid=(1, n, n)) for i, n in enumerate((4, 2)))
    maps = WordMaps(
        words=words,
        layers={s.name: r[None, :, None, None, None] for s, r in zip(sites, raw, strict=True)},
        sites=sites,
        steps=(0,),
        prompts=("the red ring",),
        tokens=(tuple(tuple(range(9, 9 + n)) for n in counts),),
        about={},
    )
    total = torch.zeros(4, 4)
    for layer in raw:
        own = sum(layer[w] / (1 - layer[3]) for w in (1, 2)) / 2
        total += torch.nn.functional.interpolate(own[None, None].float(), (4, 4), mode="bilinear")[0, 0] / 2
    assert torch.allclose(expression_map(maps, ("red", "ring")), total, atol=1e-6)
    plain = expression_map(maps, ("red", "ring"), None)
    assert torch.allclose(plain, total * 0.4, atol=1e-6)


def test_points_lie_on_peaks_inside_and_on_low_places_outside() -> None:
    values = np.zeros((40, 60), np.float32)
    values[8:13, 8:13] = 1.0
    values[30:34, 50:54] = 0.8
    mask = values > 0.5
    inside, outside = points_in(values, mask, positive=3, negative=2, blur=0.01)
    assert inside[0] == (10, 10)
    assert [mask[y, x] and x >= 50 for x, y in inside[1:]] == [True]
    assert len(outside) == 2
    assert not any(mask[y, x] for x, y in outside)
    assert peak_part(values, mask).sum() == 25
    assert points_in(values, np.zeros_like(mask)) == ((), ())
    with pytest.raises(ConfigError, match="of one size"):
        points_in(values, mask[:5])


def test_an_expression_is_found_where_it_is(host: Any, picture: Image.Image) -> None:
    options = {"strength": 0.15, "sites": (6, 7), "max_sequence_length": 0}
    found = refer(host, [picture, picture], ("the red circle", "a blue square"), **options)
    for one, (x, y), box in zip(found, ((18, 20), (46, 44)), ((6, 8, 24, 24), (34, 32, 24, 24)), strict=True):
        assert one.masks.shape == (2, 64, 64)
        assert torch.equal(one.masks[0], one.masks[1])
        assert one.masks[0, y, x]
        left, top, width, height = one.boxes[0] or (0, 0, 0, 0)
        assert abs(left - box[0]) <= 8
        assert abs(top - box[1]) <= 8
        assert abs(width - 24) <= 12
        assert abs(height - 24) <= 12
        assert all(one.masks[0, v, u] for u, v in one.positive[0])
        assert not any(one.masks[0, v, u] for u, v in one.negative[0])
    prompt = "the red circle the with on of and to in"
    words = Capture(words=("red", "circle"), sites=(6, 7))
    maps = image_maps(host, picture, prompt, words, strength=0.15, max_sequence_length=0)
    assert torch.allclose(found[0].heat[0], maps.stacked()[:, 0].mean(0), atol=1e-6)  # no token here is a sink
    data = coco(found, ("a.png", "b.png"))
    assert [a["image_id"] for a in data["annotations"]] == [1, 2, 1, 2]
    first = data["annotations"][0]
    assert torch.equal(from_rle(first["segmentation"]), found[0].masks[0])
    assert first["area"] == found[0].masks[0].sum()
    assert len(first["point_coords"]) == len(first["point_labels"])
    assert first["point_labels"][0] == 1


@pytest.mark.parametrize(
    ("expressions", "more", "message"),
    [
        ("of the", {}, "stop words alone"),
        ("  ", {}, "is empty"),
        ((), {}, "one expression or more"),
        ("the red circle", {"magnets": "the"}, "tuple of words"),
        ("the red circle", {"sinks": 0.5}, "sinks"),
        ("the red circle", {"threshold": 2}, "threshold"),
        ("the red circle " + "blue " * 12 + "ring", {}, "cut off"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(
    host: Any, picture: Image.Image, expressions: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refer(host, picture, expressions, max_sequence_length=0, **more)


def test_the_command_writes_masks_boxes_and_points(
    picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "clip.gif", tmp_path / "out"
    picture.save(path, save_all=True, append_images=[picture.rotate(90)], duration=80)
    args = ["maps", "--model", "shapes:mmdit", "--image", str(path), "--out", str(out), "--segment", "the red circle"]
    assert main([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    where = Path(told["folder"])
    masks = ["mask-1-the-red-circle-0001.png", "mask-1-the-red-circle-0002.png"]
    assert {p.name for p in where.iterdir()} == set(told["files"]) == {"segments.json", "segments.png", *masks}
    data = json.loads((where / "segments.json").read_text())
    assert [i["file_name"] for i in data["images"]] == ["clip.gif#1", "clip.gif#2"]
    white = np.asarray(Image.open(where / masks[0])) > 0
    assert np.array_equal(white, from_rle(data["annotations"][0]["segmentation"]).numpy())
    assert main(args) == 1
    assert "already there" in capsys.readouterr().err
    for more, message in (
        (("--word", "red"), "leave out --word"),
        (("--steps", "3"), "leave out --steps"),
        (("--segment", "the red circle"), "twice"),
    ):
        assert main([*args, "--force", *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["maps", "--segment", "a ring", "--out", str(out)]) == 2
    assert "give it with --image" in capsys.readouterr().err
