"""The shapes video-still: clips that stand still whatever is said, training that resumes exactly, export, loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attnctl.errors import ConfigError
from attnctl.shapes import load_shapes, sample_clip
from attnctl.shapes.motion import clip_caption
from attnctl.shapes.training import clips as world
from attnctl.shapes.training import evaluate as evaluating
from attnctl.shapes.training.cards import write_still_card
from attnctl.shapes.training.evaluate_video import evaluate_video
from attnctl.shapes.training.loop import Plan, step_generator
from attnctl.shapes.training.train import main
from attnctl.shapes.training.train_still import export_still, train_still

PLAN = Plan(steps=3, optimizer="muon", save_every=1, warmup=1)
OPTIONS = {"batch": 2, "bf16": False, "lies": 0.5}


def clips(frames: int = 3) -> world.Clips:
    rng = np.random.default_rng(0)
    told = [sample_clip(rng) for _ in range(4)]
    forms = [[clip_caption(c), clip_caption(c, speed=False), clip_caption(c, motion=False)] for c in told]
    return world.Clips(torch.randn(4, frames, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), forms)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Train for three steps, in one go and in two, and export."""
    out = tmp_path_factory.mktemp("still")
    through = train_still(out / "a", PLAN, clips(), quiet=True, **OPTIONS)

    class Stop(world.Clips):
        def draw(self, *args):
            if (out / "b/checkpoint/state.json").exists():
                raise KeyboardInterrupt
            return super().draw(*args)

    with pytest.raises(KeyboardInterrupt):
        train_still(out / "b", PLAN, Stop(**vars(clips())), quiet=True, **OPTIONS)
    resumed = train_still(out / "b", PLAN, clips(), resume=True, quiet=True, **OPTIONS)
    return {"out": out, "through": through, "resumed": resumed, "step": export_still(out / "b", out / "pipeline")}


def test_a_run_in_two_parts_is_the_run_and_nothing_but_motion_modules_moves(runs: dict) -> None:
    before = load_shapes("video").unet.state_dict()
    a, b = (runs[name].unet.state_dict() for name in ("through", "resumed"))
    assert runs["step"] == 3
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    moved = {n for n, t in a.items() if not torch.equal(t, before[n])}
    assert moved
    assert all(".motion_modules." in n for n in moved)
    with pytest.raises(ConfigError, match="--resume"):
        train_still(runs["out"] / "b", PLAN, clips(), quiet=True, **OPTIONS)


@pytest.mark.parametrize(("lies", "still"), [(0.0, 0), (1.0, 64), (0.5, 32)])
def test_a_share_of_the_clips_stands_still_whatever_is_said(lies: float, still: int) -> None:
    pipe, seen = load_shapes("video"), []
    loss = world.Motions(pipe.unet, pipe.text_encoder, pipe.tokenizer, clips(), batch=64, lies=lies, anchor=0.0)
    loss.scheduler.get_velocity = lambda x, noise, t: seen.append(x) or x
    pipe.unet.forward = lambda x, t, text, return_dict: (x * 0,)
    loss(step_generator(0, 0), 0)
    (x,) = seen
    found = int((x == x[:, :1]).flatten(1).all(1).sum())
    assert abs(found - still) <= (12 if 0 < lies < 1 else 0)


@pytest.mark.parametrize("lies", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(lies: float) -> None:
    pipe = load_shapes("video")
    with pytest.raises(ConfigError, match="lies is a share"):
        world.Motions(pipe.unet, pipe.text_encoder, pipe.tokenizer, clips(), lies=lies)


def test_the_exported_adapter_is_loaded_beside_the_rest_of_video(runs: dict) -> None:
    folder = runs["out"] / "pipeline"
    assert sorted(p.name for p in folder.iterdir()) == ["motion_adapter", "training.json", "training.jsonl"]
    assert json.loads((folder / "training.json").read_text())["history"][-1]["lies"] == 0.5
    pipe, trained = load_shapes("video-still", folder=folder), runs["resumed"].unet.state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, trained[name].half().float()), name
    with pytest.raises(ConfigError, match="16 frames"):
        pipe("a red circle", num_frames=17, num_inference_steps=1)
    with pytest.raises(ConfigError, match=r"lacks the file .*train video-still --out runs/video-still"):
        load_shapes("video-still", folder=runs["out"])


def test_the_card_tells_how_many_captions_lied(runs: dict) -> None:
    folder = runs["out"] / "pipeline"
    result = evaluate_video(load_shapes("video-still", folder=folder), n=1, tune=1, steps=1, scales=(2.0,))
    text = write_still_card(folder, result | {"params": 1.0}).read_text()
    assert "in 50 % of the clips" in text
    assert "3 steps" in text


def test_the_shipped_adapter_loads() -> None:
    a, b = load_shapes("video").unet.state_dict(), load_shapes("video-still").unet.state_dict()
    assert a.keys() == b.keys()
    assert {n for n in a if not torch.equal(a[n], b[n])}


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(world, "make_clips", lambda *a, **k: clips())
    arguments = ["video-still", "--out", str(tmp_path), "--steps", "1", "--fp32", "--frames", "2", "--batch", "1"]
    assert main([*arguments, "--threads", "1"]) == 0
    assert f"wrote {tmp_path / 'pipeline'} (step 1)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds no motion_adapter"):
        main([*arguments, "--base", str(tmp_path)])
    quick = ["video-still", "--folder", str(tmp_path / "pipeline"), "--steps", "1", "--n", "1", "--tune", "1"]
    assert evaluating.main([*quick, "--threads", "1"]) == 0
    assert (tmp_path / "pipeline" / "README.md").exists()
