"""`edit_video` on tiny pipelines: windows, memory, files, resuming, and other hosts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_pipelines as pipes
from contract import distance
from fatezero_runs import BASE, SOURCE, STEPS, TARGET, clip, edited, job, latents
from PIL import Image

from attnctl.data.clips import FileClip, fit, mp4_bytes
from attnctl.data.specs import control_from_dict
from attnctl.pipelines import ddim_of, invert
from attnctl.pipelines.editing.inversion import inverse_of
from attnctl.plans.writing import FileExists
from attnctl.processors import FateZero


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


@pytest.mark.parametrize("keys", ["self", ["first", "mid"]])
def test_windows_equal_the_whole(pipe: Any, keys: Any) -> None:
    video = clip(3)
    whole, parts = (job(pipe, video, keys=keys, window=n, guidance_scale=2.0, steps=1).frames for n in (8, 2))
    assert whole.shape == video.shape
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1


def test_memory_does_not_grow_with_the_clip(pipe: Any) -> None:
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, k: rows.append(len(a[0])), with_kwargs=True)
    try:
        job(pipe, clip(5), window=2, steps=1)
        short = max(rows)
        job(pipe, clip(7), window=2, steps=1)
    finally:
        hook.remove()
    assert max(rows) == short == 2 * 3  # two frames and the middle one, twice for guidance


def test_files(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "in.mp4").write_bytes(mp4_bytes(clip(4, 32, 32), 12.0))
    assert FileClip(tmp_path / "in.mp4").count == 4
    out = tmp_path / "out" / "edit.mp4"
    done = job(pipe, tmp_path / "in.mp4", out=out, size=(24, 16), window=3)
    assert sorted(p.name for p in out.parent.iterdir()) == ["edit-strip.png", "edit.json", "edit.mp4"]
    again = FileClip(out)
    assert (again.count, again.fps) == (4, 12.0)
    assert np.abs(again.read(range(4)).astype(int) - done.frames.astype(int)).mean() < 25  # noise, through H.264
    record = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert record == done.record
    assert str(tmp_path) not in json.dumps(record)
    assert control_from_dict(record["control"]) == FateZero(source=SOURCE, target=TARGET, blend_words=("bear",))
    import av

    with av.open(str(out)) as file:
        assert json.loads(file.metadata["comment"]) == record
    with pytest.raises(FileExists):
        job(pipe, clip(1), out=out)
    job(pipe, tmp_path / "in.mp4", out=tmp_path / "frames", count=2, every=2)
    assert FileClip(tmp_path / "frames").count == 2
    (tmp_path / "frames" / "00007.png").write_bytes((tmp_path / "out" / "edit-strip.png").read_bytes()[:100])
    job(pipe, tmp_path / "frames", out=tmp_path / "frames", count=1, force=True)
    left = sorted(p.name for p in (tmp_path / "frames").iterdir())
    assert left == ["00000.png", "00007.png"], "the second frame of the longer edit is gone, what is not ours is left"
    job(pipe, Image.fromarray(clip(1)[0]), out=tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (16, 24)


def test_resume(pipe: Any, tmp_path: Path) -> None:
    out, video, ticks = tmp_path / "edit.mp4", clip(4), []

    def stop() -> None:
        ticks.append(0)
        if len(ticks) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(pipe, video, out=out, window=2, progress=stop)
    assert not out.exists()
    assert len(list(tmp_path.glob(".edit.mp4.*.parts/*.safetensors"))) == 1
    calls: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a: calls.append(0))
    try:
        done = job(pipe, video, out=out, window=2)
    finally:
        hook.remove()
    assert len(calls) == 4  # the second window alone: two steps to invert, two to edit
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert np.array_equal(done.frames, job(pipe, video, window=2).frames)


def test_fit() -> None:
    video = clip(1, 30, 50)
    assert fit(video, None, 8).shape == (1, 24, 48, 3)
    assert fit(video, 16, 8).shape[1:3] == (16, 24)
    assert fit(video, (64, 32), 8).shape[1:3] == (64, 32)


def test_sdxl() -> None:
    """Two text encoders, pooled embeddings and sizes among the inputs, and a scheduler that DDIM stands in for."""
    pipe, sd = pipes.build("sdxl")[0], pipes.build("sd")[0]
    config = sd.text_encoder.config
    config.projection_dim = 32
    second = transformers.CLIPTextModelWithProjection(config).eval()
    parts = {"tokenizer": sd.tokenizer, "tokenizer_2": sd.tokenizer, "text_encoder": sd.text_encoder}
    pipe.register_modules(**parts, text_encoder_2=second)
    held = pipe.scheduler
    done = job(pipe, clip(2), out=None)
    assert done.record["scheduler_replaced"] == type(held).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler is held
    with invert(pipe, latents(), control=dataclasses.replace(BASE, store="qk"), steps=2) as inversion:
        assert inversion.inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 32)


def test_sd2() -> None:
    """Heads that differ between levels, linear projections, and a model that predicts velocities."""
    pipe = pipes.build("sd")[0]
    pipe.unet = zoo.build("sd2", 1)[0]
    own = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    held = pipe.scheduler = ddim_of(own)
    assert held.config.prediction_type == "v_prediction"
    recompute = edited(pipe, BASE)
    assert distance(edited(pipe, dataclasses.replace(BASE, store="maps")), recompute) <= 1e-4
    inverse = inverse_of(held)
    inverse.set_timesteps(STEPS)
    embeds = pipe.encode_prompt([SOURCE] * 2, "cpu", 1, False)[0]
    x = latents()
    with torch.no_grad():
        for t in inverse.timesteps:
            v, a = pipe.unet(x, t, embeds).sample, held.alphas_cumprod
            before = a[int(t) - 1000 // STEPS] if t >= 1000 // STEPS else a[0]
            # The velocity names noise and picture; the step puts them together at the noise level of t.
            noise, picture = before**0.5 * v + (1 - before) ** 0.5 * x, before**0.5 * x - (1 - before) ** 0.5 * v
            x = a[int(t)] ** 0.5 * picture + (1 - a[int(t)]) ** 0.5 * noise
    torch.testing.assert_close(invert(pipe, latents(), SOURCE, steps=STEPS).noise, x, atol=1e-5, rtol=1e-5)
