"""`attnctl generate` end to end: images, videos, records, and the same image again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.data.clips import open_clip
from attnctl.data.record import Record, pixels_sha256, read

Run = Callable[..., tuple[int, str, str]]


def generate(folder: str, out: Path, *more: object) -> tuple[object, ...]:
    size = ("--height", 16, "--width", 16, "--steps", 2)
    return "generate", "--model", folder, "--prompt", "a cat", *size, "--out", out, *more


def test_generate_writes_an_image_and_its_record(run: Run, folder: str, tmp_path: Path) -> None:
    code, out, err = run(*generate(folder, tmp_path, "--negative", "a dog", "--guidance", 3, "--json"))
    assert code == 0
    data = json.loads(out)
    (row,) = data["images"]
    path = Path(row["path"])
    assert path == tmp_path / "a-cat-0.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cat-0.json", "a-cat-0.png"]
    (record,) = read(path)
    with Image.open(path) as image:
        assert pixels_sha256(image) == record.sha256[0] == row["sha256"]
        assert image.size == (record.width, record.height) == (16, 16)
    assert record.prompts == ("a cat",)
    assert (record.negative, record.guidance, record.steps, record.seeds) == ("a dog", 3.0, 2, (0,))
    assert (record.model, record.pipeline) == ("tiny-sd", "StableDiffusionPipeline")
    assert (record.device, record.dtype, record.generator_device) == ("cpu", "float32", "cpu")
    assert record.scheduler["_class_name"] == "DDIMScheduler"
    assert record.revision is not None
    assert record.revision.startswith("sha256:")
    assert record.versions["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in path.with_suffix(".json").read_text()
    assert folder not in path.with_suffix(".json").read_text()
    assert "Loading" in err


def test_controls_act_and_are_recorded(run: Run, folder: str, tmp_path: Path) -> None:
    code, _, _ = run(*generate(folder, tmp_path))
    assert code == 0
    more = ("--control", 'PAG(scale=2.0, sites="mid")', "--control", 'SoftPAG(u=0.3, sites="up.1")')
    code, out, err = run(*generate(folder, tmp_path, *more, "--json"))
    assert code == 0
    data = json.loads(out)
    (record,) = read(data["images"][0]["path"])
    (plain,) = read(tmp_path / "a-cat-0.png")
    assert Path(data["images"][0]["path"]).name == "a-cat-pag-softpag-0.png"
    assert [c["method"] for c in record.controls] == ["PAG", "SoftPAG"]
    assert record.controls[0]["scale"] == 2.0
    assert all("mid_block" in name for name in record.sites[0])
    assert all("up_blocks.1" in name for name in record.sites[1])
    assert record.sha256 != plain.sha256
    assert "PAG(" in err
    assert record.sites[0][0] in err
    assert plain.controls == plain.sites == ()


def test_other_arguments_of_the_pipeline(run: Run, folder: str, tmp_path: Path) -> None:
    args = generate(folder, tmp_path, "--option", "guidance_rescale=0.7", "--option", "clip_skip=None")
    assert run(*args)[0] == 0
    (record,) = read(tmp_path / "a-cat-0.png")
    assert record.options == {"guidance_rescale": 0.7, "clip_skip": None}
    code, _, err = run("generate", "--from", tmp_path / "a-cat-0.png", "--model", folder, "--out", tmp_path / "again")
    assert code == 0, err
    for bad, code, message in (
        ("guidance_rescal=1", 1, "Did you mean 'guidance_rescale'"),
        ("generator=1", 1, "set by attnctl"),
        ("guidance_rescale=x", 1, "cannot be called with the given guidance_rescale"),
        ("prompt=b", 1, "set by attnctl"),
        ("nothing", 2, "expected name=value"),
        ("a b=1", 2, "expected name=value"),
    ):
        found, _, err = run(*generate(folder, tmp_path / "bad", "--option", bad))
        assert (found, message in err) == (code, True), err


def test_sizes_are_brought_to_what_the_pipeline_takes(run: Run, folder: str, tmp_path: Path) -> None:
    args = ("generate", "--model", folder, "--prompt", "a cat", "--steps", 1, "--out", tmp_path)
    code, _, err = run(*args, "--width", 27)
    assert code == 0, err
    (record,) = read(tmp_path / "a-cat-0.png")
    assert (record.width, record.height) == (24, 32)  # the height is the model's own
    assert "27x32 becomes 24x32: the sides are multiples of 8 pixels" in err
    code, _, err = run(*args, "--model", "shapes:mmdit", "--width", 128, "--force")
    assert code == 1
    assert "places for 64x64 pixels; 128x64 were asked for" in err


def test_seeds_count_up_and_each_image_stands_alone(run: Run, folder: str, tmp_path: Path) -> None:
    args = ("--prompt", "a dog", "--num", 2, "--seed", 5, "--json")
    code, out, _ = run(*generate(folder, tmp_path / "all", *args))
    assert code == 0
    rows = json.loads(out)["images"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a cat", 5), ("a cat", 6), ("a dog", 7), ("a dog", 8)]
    assert len({row["sha256"] for row in rows}) == 4
    code, out, _ = run(*generate(folder, tmp_path / "one", "--seed", 6, "--json"))
    assert json.loads(out)["images"][0]["sha256"] == rows[1]["sha256"]


def test_the_global_generator_is_left_alone(run: Run, folder: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    assert run(*generate(folder, tmp_path, "--control", "PAG"))[0] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_generate_does_not_overwrite(run: Run, folder: str, tmp_path: Path) -> None:
    assert run(*generate(folder, tmp_path))[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, err = run(*generate(folder, tmp_path))
    assert (code, out) == (1, "")
    assert "already there" in err
    assert "--force" in err
    assert "Loading" not in err, "refuse before the work, not after it"
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert run(*generate(folder, tmp_path, "--force"))[0] == 0


REGIONS = 'Regions(prompts=("a dog",), areas=((0, 0, 0.5, 1),))'


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--control", "PAG(scale=2.0)"),
        ("--control", REGIONS),
        ("--batch", 3, "--num", 3),
        ("--control", "StyleAligned()", "--batch", 2, "--num", 2),
    ],
)
def test_the_same_image_again(run: Run, folder: str, tmp_path: Path, more: tuple[object, ...]) -> None:
    code, out, _ = run(*generate(folder, tmp_path, *more, "--json"))
    assert code == 0
    last = Path(json.loads(out)["images"][-1]["path"])
    for source in (last, last.with_suffix(".json")):
        code, out, err = run(
            "generate", "--from", source, "--model", folder, "--out", tmp_path / source.suffix, "--json"
        )
        assert code == 0, err
        data = json.loads(out)
        assert data["identical"] is True
        (row,) = data["images"]
        with Image.open(last) as first, Image.open(row["path"]) as second:
            assert (np.asarray(first) == np.asarray(second)).all()
        (again,) = read(row["path"])
        assert again.sha256 == read(last)[0].sha256
        assert "pixel for pixel" in err


def changed(path: Path, **fields: Any) -> Path:
    """Write a record with other fields beside an image."""
    data = read(path)[0].to_dict() | fields
    other = path.with_name("changed.json")
    other.write_text(json.dumps(Record.from_dict(data).to_dict()))
    return other


def test_a_different_version_is_named(run: Run, folder: str, tmp_path: Path) -> None:
    assert run(*generate(folder, tmp_path))[0] == 0
    versions = read(tmp_path / "a-cat-0.png")[0].versions | {"torch": "1.0", "diffusers": "0.0"}
    other = changed(tmp_path / "a-cat-0.png", versions=versions, sha256=["0" * 64])
    code, out, err = run("generate", "--from", other, "--model", folder, "--out", tmp_path / "again", "--json")
    assert code == 1
    data = json.loads(out)
    assert data["identical"] is False
    assert set(data["differences"]) == {"torch", "diffusers"}
    assert data["differences"]["torch"]["recorded"] == "1.0"
    assert "torch: recorded 1.0, here" in err
    assert Path(data["images"][0]["path"]).exists()


def test_another_scheduler_is_restored(run: Run, folder: str, tmp_path: Path) -> None:
    assert run(*generate(folder, tmp_path))[0] == 0
    scheduler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}
    other = changed(tmp_path / "a-cat-0.png", scheduler=scheduler)
    code, out, _ = run("generate", "--from", other, "--model", folder, "--out", tmp_path / "again", "--json")
    assert code == 1
    (again,) = read(json.loads(out)["images"][0]["path"])
    assert again.scheduler["_class_name"] == "EulerDiscreteScheduler"
    for bad in ("UNet2DConditionModel", "__import__", "nothing", None):
        other = changed(tmp_path / "a-cat-0.png", scheduler={"_class_name": bad})
        code, _, err = run("generate", "--from", other, "--model", folder, "--out", tmp_path / "bad")
        assert code == 1
        assert "scheduler" in err


def test_records_of_other_models_are_refused(run: Run, folder: str, tmp_path: Path) -> None:
    assert run(*generate(folder, tmp_path))[0] == 0
    code, _, err = run("generate", "--from", tmp_path / "a-cat-0.png", "--out", tmp_path / "again")
    assert code == 2
    assert "local model 'tiny-sd'" in err
    other = changed(tmp_path / "a-cat-0.png", pipeline="FluxPipeline")
    code, _, err = run("generate", "--from", other, "--model", folder, "--out", tmp_path / "again")
    assert code == 1
    assert "FluxPipeline" in err
    other = changed(tmp_path / "a-cat-0.png", model="../../etc", revision=None)
    assert run("generate", "--from", other, "--out", tmp_path / "again")[0] == 2
    assert not (tmp_path / "again").exists()


def test_a_record_with_an_unknown_method_is_refused(run: Run, folder: str, tmp_path: Path) -> None:
    assert run(*generate(folder, tmp_path))[0] == 0
    other = changed(tmp_path / "a-cat-0.png", controls=[{"method": "PAGG"}])
    code, _, err = run("generate", "--from", other, "--model", folder, "--out", tmp_path / "again")
    assert code == 1
    assert "Did you mean 'PAG'" in err


def test_pickled_weights_are_not_loaded(run: Run, folder: str, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "model"
    shutil.copytree(folder, bad)
    for path in bad.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    code, _, err = run(*generate(str(bad), tmp_path / "out"))
    assert code == 1
    assert "Cannot load" in err


def test_remote_code_is_not_run(run: Run, folder: str, tmp_path: Path) -> None:
    import shutil

    bad, mark = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(folder, bad)
    code = f"open({str(mark)!r}, 'w')\nfrom diffusers import StableDiffusionPipeline\n"
    (bad / "pipeline.py").write_text(code + "class Evil(StableDiffusionPipeline):\n    pass\n")
    index = json.loads((bad / "model_index.json").read_text())
    (bad / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Evil"]}))
    (bad / "unet" / "evil.py").write_text(code)
    assert run(*generate(str(bad), tmp_path / "out"))[0] == 1
    assert run("sites", bad)[0] in (0, 1)
    assert not mark.exists()


def test_the_output_folder_may_not_be_a_file(run: Run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    code, _, err = run(*generate(folder, tmp_path / "out"))
    assert code == 1
    assert "expected a folder" in err


def test_prompts_never_leave_the_folder(run: Run, folder: str, tmp_path: Path) -> None:
    args = ["generate", "--model", folder, "--prompt", "../../a cat", "--height", 16, "--width", 16, "--steps", 1]
    assert run(*args, "--out", tmp_path / "deep" / "out")[0] == 0
    assert {p.suffix for p in (tmp_path / "deep" / "out").iterdir()} == {".png", ".json"}
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_videos_are_written_with_their_film_strip_and_can_be_made_again(run: Run, tmp_path: Path) -> None:
    asked = ("generate", "--model", "shapes:video", "--prompt", "a red circle moving left on gray", "--steps", 1)
    code, out, err = run(*asked, "--option", "num_frames=10", "--out", tmp_path, "--json")
    assert code == 0, err
    (found,) = json.loads(out)["images"]
    with Image.open(found["path"]) as strip:
        assert strip.size == (8 * 64, 2 * 64)  # ten frames
    assert open_clip(found["video"]).count == 10
    (record,) = read(found["path"])
    assert (record.width, record.height, record.options) == (64, 64, {"num_frames": 10})
    code, out, err = run("generate", "--from", found["path"], "--out", tmp_path / "again", "--json")
    assert code == 0, err
    assert json.loads(out)["identical"] is True
    code, _, err = run(*asked, "--fps", 0, "--out", tmp_path / "new")
    assert code == 2
    assert "--fps is above 0" in err
    Path(found["path"]).unlink()
    Path(found["path"]).with_suffix(".json").unlink()
    code, _, err = run(*asked, "--out", tmp_path)
    assert code == 1
    assert ".mp4 is already there" in err
