"""Attacks through models, records and controls as text: no code runs, nothing is fetched unasked, sizes are bounded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_pipelines as pipes
from test_record import image, record
from test_security_files import peak

import attnctl
from attnctl.app.cli import main
from attnctl.data.record import Record, RecordError, save_image
from attnctl.data.specs import methods, parse_control
from attnctl.errors import AttnctlError, ConfigError, PlanError, SiteError, UnsupportedModelError
from attnctl.kernels import blur_queries
from attnctl.pipelines import models
from attnctl.pipelines.generate import Call, _check_sizes
from attnctl.pipelines.repeat import _scheduler, sample_again
from attnctl.plans import BlockPlan, HeadSet
from attnctl.plans.hub import fetching
from attnctl.processors import PAG, SEG, Capture
from attnctl.shapes.load import WEIGHTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipes.build("sd")[0].save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a model's folder that a test may spoil."""
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "model"))


def spoiled(folder: Path, **changes: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Code of a model's own (47)


@pytest.mark.parametrize("place", ["pipe_x.py", "unet/my_unet.py", "scheduler/__init__.py"])
def test_a_python_file_beside_a_model_is_refused(place: str, folder: Path) -> None:
    (folder / place).write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UnsupportedModelError, match="brings code of its own"):
        models.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ["pipe_x", "Mine"]}, "which diffusers does not have"),
        ({"_class_name": "Mine"}, "which diffusers does not have"),
        ({"_class_name": None}, "which diffusers does not have"),
        ({"unet": ["os", "system"]}, "The unet of the model model comes from 'os'"),
        ({"unet": ["my_unet", "UNet"]}, "comes from 'my_unet'"),
        ({"vae": [["diffusers"], "AutoencoderKL"]}, "comes from"),
        ({"scheduler": ["pathlib", "Path"]}, "comes from 'pathlib'"),
        ({"safety_checker": ["subprocess", "Popen"]}, "comes from 'subprocess'"),
    ],
)
def test_a_part_from_elsewhere_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        models.load(str(spoiled(folder, **changes)))


def test_a_folder_in_the_place_of_a_shipped_model_brings_no_code_either(tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(WEIGHTS / "text2image", tmp_path / "trained"))
    attnctl.load_shapes("text2image", folder=folder)
    (folder / "unet" / "unet.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UnsupportedModelError, match="brings code of its own"):
        attnctl.load_shapes("text2image", folder=folder)
    (folder / "unet" / "unet.py").unlink()
    with pytest.raises(UnsupportedModelError, match="comes from 'os'"):
        attnctl.load_shapes("text2image", folder=spoiled(folder, vae=["os", "system"]))


def test_an_honest_folder_is_loaded(saved: Path) -> None:
    assert type(models.load(str(saved)).pipe).__name__ == "StableDiffusionPipeline"
    assert models.load_denoiser(str(saved)).config.sample_size == models.load(str(saved)).pipe.unet.config.sample_size


def test_a_name_from_a_record_is_no_local_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unplugged: None
) -> None:
    import shutil

    shutil.copytree(saved, tmp_path / "somebody" / "model")
    monkeypatch.chdir(tmp_path)
    assert type(models.load("somebody/model").pipe).__name__ == "StableDiffusionPipeline"  # whoever types it means it
    with fetching(False), pytest.raises(ConfigError, match="nothing is fetched unasked: give --fetch"):
        models.load("somebody/model", recorded=True)
    one = record(model="somebody/model", prompts=("a",), seeds=(1,), sha256=("0" * 64,), shows=(0,))
    save_image(image(), tmp_path / "x.png", one)
    assert main(["generate", "--from", "x.png", "--out", "out"]) == 1
    assert "nothing is fetched unasked" in capsys.readouterr().err


# Names that would be looked up (51)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", COMMIT[:7]])
def test_a_revision_that_is_no_commit_is_refused(
    revision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], unplugged: None
) -> None:
    save_image(image(), tmp_path / "x.png", record(model="somebody/model", revision=revision))
    assert main(["generate", "--from", str(tmp_path / "x.png"), "--out", str(tmp_path / "o")]) == 2
    assert "expected a commit of 40 hexadecimal digits" in capsys.readouterr().err


def test_the_commit_of_a_record_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        raise OSError("no network in tests")

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    save_image(image(), tmp_path / "x.png", record(model="somebody/model", revision=COMMIT))
    main(["generate", "--from", str(tmp_path / "x.png"), "--out", str(tmp_path / "o"), "--fetch"])
    assert (seen["name"], seen["revision"]) == ("somebody/model", COMMIT)


def test_a_control_as_text_fetches_nothing_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unplugged: None
) -> None:
    with fetching(False), pytest.raises(PlanError, match="nothing is fetched unasked: give --fetch"):
        parse_control('PARO(plan="somebody/plan")')
    for command in ("generate", "maps"):
        args = [command, "--prompt", "a", "--control", 'PARO(plan="somebody/plan")', "--out", str(tmp_path)]
        assert main(args) != 0
        assert "nothing is fetched unasked" in capsys.readouterr().err
    for name in ("a/b/c", "../plan", "/plan", "a//b", "a/b?x", "-a/b", "a b/c"):
        with pytest.raises(PlanError, match="does not exist"):
            BlockPlan.from_pretrained(name)
        with pytest.raises(PlanError, match="does not exist"):
            HeadSet.from_pretrained(name)


# Sizes (52)


HUGE: dict[str, Callable[[], object]] = {
    "a range": lambda: attnctl.control(pipes.build("sd")[0], PAG(sites=range(10**12))),
    "a range that goes down": lambda: attnctl.control(pipes.build("sd")[0], PAG(sites=range(10**12, 0, -1))),
    "a range in a list": lambda: attnctl.control(pipes.build("sd")[0], PAG(sites=(range(10**15),))),
    "sigma": lambda: SEG(sigma=1e9),
    "sigma of a kernel": lambda: blur_queries(torch.zeros(1, 1, 16, 4), (4, 4), 1e9),
    "images": lambda: _check_sizes(Call(prompts=("a",) * 20_000, seeds=(0,) * 20_000)),
    "steps": lambda: _check_sizes(Call(prompts=("a",), seeds=(0,), steps=10**9)),
    "width": lambda: _check_sizes(Call(prompts=("a",), seeds=(0,), width=10**6)),
    "width and height": lambda: _check_sizes(Call(prompts=("a",), seeds=(0,), width=16_000, height=16_000)),
    "a block": lambda: parse_control("SparseAttention(select=Online(density=0.5, block=1000000000))"),
    "a block of queries": lambda: parse_control("SparseAttention(select=Online(density=0.5, block_q=1000000000))"),
    "a radial block": lambda: parse_control("SparseAttention(select=Radial(block=1000000000))"),
    "a tile": lambda: parse_control("SparseAttention(select=SlidingTile(tile=(1, 40000, 40000)))"),
    "training steps": lambda: _scheduler({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}),
    "training steps of text": lambda: _scheduler({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}),
    "a scheduler's list": lambda: _scheduler({"_class_name": "DDIMScheduler", "trained_betas": {"a": 1}}),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_is_too_large_is_refused_before_anything_is_built(what: str) -> None:
    before, began = peak(), time.perf_counter()
    with pytest.raises((ConfigError, SiteError, RecordError)):
        HUGE[what]()
    assert time.perf_counter() - began < 20
    assert peak() < before + 400


FIELDS: dict[str, dict[str, Any]] = {
    "AStar": {"concepts": ("cat", "dog")},
    "AttendExcite": {"concepts": ("cat",)},
    "FateZero": {"source": "a cat", "target": "a dog"},
    "PromptToPrompt": {"source": "a cat", "target": "a dog"},
    "Inject": {"source": "a cat", "target": "a dog"},
    "FlowEdit": {"source": "a cat", "target": "a dog"},
    "IRDiffusion": {"boxes": (((0, 0, 0.5, 1), (0.5, 0, 1, 1)),)},
    "ReferenceOnly": {"reference": "cat.png"},
    "TextCenGen": {"concepts": ("cat",)},
    "Regions": {"prompts": ("a cat",), "areas": ((0, 0, 0.5, 1),)},
    "PARO": {"plan": BlockPlan.from_mask(torch.ones(2, 3, 3, dtype=torch.bool), 8)},
}


@pytest.mark.parametrize("method", sorted(methods()))
def test_no_field_of_a_control_is_unrolled(method: str) -> None:
    """Every field of every control, given what has no end: an error of attnctl, or a value that is stored as it is."""
    cls, before, began = methods()[method], peak(), time.perf_counter()
    for field in dataclasses.fields(cls):
        for value in (range(10**12), 10**12, 10**400, 1e300):
            if field.init:
                with warnings.catch_warnings(), contextlib.suppress(AttnctlError):
                    warnings.simplefilter("ignore")
                    cls(**{**FIELDS.get(method, {}), field.name: value})
    assert time.perf_counter() - began < 20
    assert peak() < before + 200


@pytest.mark.parametrize("change", [{"threads": 20_000}, {"steps": 10**9}, {"width": 10**9}, {"height": 10**9}])
def test_a_record_asks_for_no_more_than_a_command_may(change: dict[str, Any]) -> None:
    loaded = models.Loaded(pipes.build("sd")[0], "tiny", None)
    scheduler = {"_class_name": type(loaded.pipe.scheduler).__name__}
    one: Record = record(scheduler=scheduler, controls=(), sites=(), guidance=3.0, **change)
    with pytest.raises(AttnctlError, match=r"is a whole number from 1 on, at most"):
        sample_again(loaded, one)


@pytest.mark.parametrize(
    "args",
    [
        ("--num", 10**9), ("--batch", 10**9), ("--steps", 10**9), ("--width", 10**6), ("--height", 10**6),
        ("--width", 16_000, "--height", 16_000), ("--guidance", "nan"), ("--guidance", "inf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "maps"])
def test_commands_refuse_sizes_at_once(
    command: str, args: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "maps" and args[0] == "--batch":
        pytest.skip("maps has no batches")
    began = time.perf_counter()
    assert main([command, "--prompt", "a", "--out", str(tmp_path), *map(str, args)]) == 2
    assert time.perf_counter() - began < 10
    assert "expected" in (err := capsys.readouterr().err) or "number" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["layers_per_block", "transformer_layers_per_block", "norm_num_groups"])
def test_a_configuration_that_builds_for_hours_is_refused(key: str, folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**9}))
    with pytest.raises(UnsupportedModelError, match=f"{key}=1000000000; expected at most"):
        models.load_denoiser(str(folder))


# Numbers that are none (56)


@pytest.mark.parametrize(
    "controls", [(PAG(sites="mid"),), (SEG(sites="mid"), PAG(sites="mid")), (Capture(words=("cat",)),)]
)
@pytest.mark.parametrize("where", [slice(None), 0])
def test_latents_that_are_no_numbers_are_named(controls: tuple[Any, ...], where: Any) -> None:
    pipe, kwargs = pipes.build("sd")
    latents = torch.randn(1, 4, 16, 12)
    latents[0, where, 3] = torch.nan
    with (
        attnctl.control(pipe, *controls),
        pytest.raises(UnsupportedModelError, match="latents that hold NaN: nothing can be guided"),
    ):
        pipes.run(pipe, {**kwargs, "latents": latents})
