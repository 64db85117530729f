"""The stages of the shapes video model: one command that a kill does not set back, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import write_base

from attnctl.errors import ConfigError
from attnctl.shapes import sample_clip
from attnctl.shapes.load import WEIGHTS
from attnctl.shapes.motion import Motion, clip_caption
from attnctl.shapes.training import clips as world
from attnctl.shapes.training import train_video
from attnctl.shapes.training.cards import write_video_card
from attnctl.shapes.training.expected import Expected
from attnctl.shapes.training.loop import Plan, mend_checkpoint
from attnctl.shapes.training.options import load_base
from attnctl.shapes.training.recipe import STAGES, Stage, first_unfinished
from attnctl.shapes.training.train import main

PLAN = Plan(steps=1, optimizer="muon", save_every=1, warmup=1)
TINY = (
    Stage(name="one", steps=2, batch=1, frames=2),
    Stage(name="two", steps=2, batch=2, frames=2, expect=0.5, keep=True, teach=2),
    Stage(name="three", steps=1, batch=2, frames=3, expect=0.5),
)


class Killed(Exception):
    """Stand in for a kill."""


def clips() -> world.Clips:
    rng = np.random.default_rng(0)
    told = [sample_clip(rng) for _ in range(4)]
    forms = [[clip_caption(c), clip_caption(c, speed=False), clip_caption(c, motion=False)] for c in told]
    return world.Clips(torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), forms)


def expected() -> Expected:
    values = torch.randn(1, 13, 13, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    return Expected(values, (("red", "circle", "black"),), torch.full((1, 3, 13, 13), 1 / 169), (Motion("right"),))


def untouched() -> world.Clips:
    pytest.fail("a finished recipe asked for its data")


def dies_after(drawn: int) -> world.Clips:
    """Return the clips, which kill the run when they are drawn once more."""
    count: list[int] = []

    class Stop(world.Clips):
        def draw(self, *args):
            count.append(1)
            if len(count) > drawn:
                raise Killed
            return super().draw(*args)

    data = clips()
    return Stop(data.values, data.captions)


def run(out: Path, base, data=clips, means=expected, **options) -> Path:
    told = {"stages": TINY, "bf16": False, "quiet": True, **options}
    return train_video.train_recipe(out, told.pop("plan", PLAN), base, data, means, **told)


def files(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path):
    return load_base(folder)


@pytest.fixture(scope="module")
def through(base, tmp_path_factory) -> Path:
    """Train the three stages in one go."""
    out = tmp_path_factory.mktemp("through")
    run(out, base)
    return out


def test_killed_in_the_second_stage_and_resumed_is_as_run_through(base, through: Path, tmp_path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, base, lambda: dies_after(3))  # two steps of the first stage, one of the second
    steps = {
        name: json.loads((tmp_path / name / "checkpoint/state.json").read_text())["step"] for name in ("one", "two")
    }
    assert steps == {"one": 2, "two": 1}
    assert not (tmp_path / "three").exists()
    assert run(tmp_path, base) == tmp_path / "three"
    for stage in TINY:
        for name in ("weights", "average", "optimizer"):
            file = Path(stage.name) / "checkpoint" / f"{name}.safetensors"
            assert (tmp_path / file).read_bytes() == (through / file).read_bytes(), file


def test_a_finished_recipe_trains_nothing_again(base, through: Path) -> None:
    before = files(through)
    assert run(through, base, untouched, untouched) == through / "three"
    assert files(through) == before


def test_each_stage_starts_from_the_one_before_and_the_record_says_so(base, through: Path, tmp_path) -> None:
    train_video.export_video(through / "three", base, tmp_path)
    record = json.loads((tmp_path / "training.json").read_text())
    assert [r["history"][0]["stage"] for r in record["before"]] == ["one", "two"]
    assert [r["step"] for r in record["before"]] == [2, 2]
    assert [record["history"][0][name] for name in ("stage", "batch", "frames", "steps")] == ["three", 2, 3, 1]


def test_a_longer_recipe_goes_on_behind_its_last_stage(base, through: Path, tmp_path) -> None:
    shutil.copytree(through, tmp_path / "more")
    more = (*TINY, Stage(name="four", steps=1, batch=1, frames=1))
    assert run(tmp_path / "more", base, means=untouched, stages=more).name == "four"


def test_a_kill_between_two_renames_costs_no_checkpoint(through: Path, tmp_path) -> None:
    shutil.copytree(through / "one", tmp_path / "one")
    now = tmp_path / "one" / "checkpoint"
    shutil.copytree(now, now.with_suffix(".new"))
    now.rename(now.with_suffix(".old"))
    assert mend_checkpoint(tmp_path / "one")
    assert now.exists()
    assert not now.with_suffix(".new").exists()
    shutil.rmtree(now)
    assert mend_checkpoint(tmp_path / "one"), "the old one, where no new one is"
    assert not mend_checkpoint(tmp_path / "nowhere")


def test_other_settings_and_lost_stages_are_refused(base, through: Path, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"three was trained with batch=2, and 5 is asked for"):
        run(through, base, stages=(*TINY[:2], replace(TINY[2], batch=5)))
    with pytest.raises(ConfigError, match=r"one was trained with steps=2, and 6 is asked for.*another --out"):
        run(through, base, scale=3.0)
    with pytest.raises(ConfigError, match=r"one was trained with seed=0, and 1 is asked for"):
        run(through, base, plan=replace(PLAN, seed=1))
    run(through, base, untouched, untouched, plan=replace(PLAN, save_every=7))
    shutil.copytree(through, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "two")
    with pytest.raises(ConfigError, match=r"lost/three was trained already, but .*two, which it goes back to"):
        run(tmp_path / "lost", base)


def test_the_shipped_recipe_scales_with_its_warm_up() -> None:
    assert [(s.name, s.steps, s.teach) for s in STAGES] == [
        ("move", 2200, 0), ("direct", 400, 600), ("join", 550, 0), ("settle", 1200, 0), ("finish", 500, 0),
    ]  # fmt: skip
    small = [s.scaled(0.01) for s in STAGES]
    assert [(s.steps, s.teach) for s in small] == [(22, 0), (4, 6), (6, 0), (12, 0), (5, 0)]
    plan = small[1].plan(Plan(steps=9, seed=3), 0.01)
    assert (plan.steps, plan.warmup, plan.cooldown, plan.seed) == (4, 1, 0.3, 3)
    assert [s.scaled(1e-9).steps for s in STAGES] == [1, 1, 1, 1, 1]
    assert first_unfinished(Path("nowhere"), STAGES, [s.plan(plan) for s in STAGES]) == 0


# command line


def test_one_command_makes_the_model(folder: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_video, "make_expected", lambda vae: expected_of_clips())
    monkeypatch.setattr(train_video, "STAGES", tuple(replace(s, batch=2, frames=1) for s in STAGES[:2]))
    command = [
        "video", "--out", str(tmp_path), "--base", str(folder), "--clips", "2", "--scale", "0.0001",
        "--threads", "1", "--device", "cpu",
    ]  # fmt: skip
    assert main(command) == 0
    assert "(step 1)" in capsys.readouterr().out
    before = files(tmp_path / "direct")
    assert main(command) == 0
    assert files(tmp_path / "direct") == before
    assert not (tmp_path / "motion").exists()
    shutil.rmtree(tmp_path / "direct")
    assert main([*command, "--export-only", "--export", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x/training.json").read_text())["history"][0]["stage"] == "move"

    result = json.loads((WEIGHTS / "video/evaluation.json").read_text())
    shutil.copy(tmp_path / "pipeline/training.json", tmp_path / "x/training.json")
    text = write_video_card(tmp_path / "x", result).read_text()
    assert "made this model in one command" in text
    assert "start from the one before: move, direct." in text.replace("\n", " ")


def expected_of_clips() -> Expected:
    whole = expected()
    return replace(whole, places=whole.places[:, :1].expand(1, 16, 13, 13))


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_is_none_is_refused(tmp_path, scale: str) -> None:
    with pytest.raises(ConfigError, match="--scale must be above 0"):
        main(["video", "--out", str(tmp_path), "--scale", scale])


def test_a_scale_is_not_for_a_single_stage(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--scale is for all stages.*--expect asks for one"):
        main(["video", "--out", str(tmp_path), "--scale", "0.5", "--expect", "0.25"])


def test_a_folder_of_a_single_stage_stays_one(tmp_path) -> None:
    (tmp_path / "motion" / "checkpoint").mkdir(parents=True)
    out = ["--out", str(tmp_path)]
    assert train_video._parse([*out, "--export-only"]).single
    assert train_video._parse([*out, "--resume"]).single
    assert train_video._parse([*out, "--export-only", "--start", "x"]).single
    assert not train_video._parse(out).single
    (tmp_path / "move").mkdir()
    assert not train_video._parse([*out, "--export-only"]).single
    told = train_video._parse([*out, "--keep"])
    assert (told.single, told.steps, told.lr, told.skew, told.anchor) == (True, 4000, 2e-3, [(0, 0.0)], 1.0)
