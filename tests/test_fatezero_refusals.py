"""Edits that cannot be made: one clear error each."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo_pipelines as pipes
from fatezero_runs import BASE, SOURCE, STEPS, TARGET, clip, edited, job, latents, run

import attnctl
from attnctl.data.clips import ClipError
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import AttnctlError, ConfigError, SiteError, UnsupportedModelError
from attnctl.pipelines import ddim_of, edit_video, invert
from attnctl.pipelines.editing.codec import encode
from attnctl.processors import FateZero
from attnctl.processors.editing.source import Inversion, MemoryBudgetError, SourceStore, check_room


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "swap"}, "refine"),
        ({"cross_replace": 1.5}, "from 0 to 1"),
        ({"self_replace": (0.8, 0.2)}, "from 0 to 1"),
        ({"self_replace": True}, "from 0 to 1"),
        ({"blend_words": "bear"}, r"\['bear'\]"),
        ({"blend_words": [[], ["bear"]]}, "pair"),
        ({"blend_threshold": -1}, "number"),
        ({"equalizer": {"red": "much"}}, "number"),
        ({"equalizer": {"red": float("inf")}}, "finite"),
        ({"keys": "center"}, "mid"),
        ({"keys": 1.5}, "whole number"),
        ({"store": "ram"}, "recompute"),
        ({"factor": 3}, "1, 2, 4"),
        ({"blend_latents": True, "blend_words": None}, "blend_words"),
        ({"blend_window": (1, 0)}, "from 0 to 1"),
        ({"target": 3}, "text"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FateZero(**{"source": SOURCE, "target": TARGET} | fields)


def test_numbers_of_any_type_are_windows() -> None:
    control = FateZero(source=SOURCE, target=TARGET, cross_replace=1, self_replace=1)
    assert control.self_window(10) == range(10)
    assert control_from_dict(control_to_dict(control)) == control


def test_words(pipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"'tree'.*water"):
        invert(pipe, latents(), control=dataclasses.replace(BASE, blend_words=["tree"]), steps=2)
    with pytest.raises(ConfigError, match="purple"):
        invert(pipe, latents(), control=dataclasses.replace(BASE, equalizer={"purple": 2.0}), steps=2)
    longer = dataclasses.replace(BASE, mode="replace", target="a very red bear in the water")
    with pytest.raises(ConfigError, match='mode="refine"'):
        invert(pipe, latents(), control=longer, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = dataclasses.replace(BASE, target=" ".join(["a red bear"] * 60))
        edited(pipe, long)  # cut at 77 tokens, as the pipeline itself says


def test_runs_that_do_not_fit(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="edit_video"):
        attnctl.control(pipe, BASE)
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        attnctl.control(pipe.unet, dataclasses.replace(BASE, inversion=Inversion(SOURCE, [], (), {}, "mid")))
    with invert(pipe, latents(), control=BASE, steps=STEPS) as inversion:
        control = dataclasses.replace(BASE, inversion=inversion)
        with attnctl.control(pipe, control):
            with pytest.raises(ConfigError, match="prompts are"):
                run(pipe, inversion, text="a bear")
            with pytest.raises(ConfigError, match="num_inference_steps=3"):
                run(pipe, inversion, num_inference_steps=2)
            with pytest.raises(ConfigError, match="one prompt a frame"):
                run(pipe, inversion, prompt=[TARGET], negative_prompt=["ugly"], latents=inversion.noise[:1])
        for changes, message in (
            ({"source": "a bear in the water"}, "was made with the prompt"),
            ({"keys": "first"}, "looked at frames"),
            ({"store": "qk"}, "latents only"),
        ):
            with pytest.raises(ConfigError, match=message):
                attnctl.control(pipe, dataclasses.replace(control, **changes))
        same = dataclasses.replace(control, target=SOURCE)
        with pytest.warns(UserWarning, match="reconstructs"):
            attnctl.control(pipe, same).detach()
        held = pipe.scheduler
        try:
            pipe.scheduler = diffusers.DDIMScheduler.from_config(held.config, timestep_spacing="trailing")
            with attnctl.control(pipe, control), pytest.raises(ConfigError, match="timesteps"):
                run(pipe, inversion)
        finally:
            pipe.scheduler = held
    assert attnctl.handle_of(pipe) is None


@pytest.mark.parametrize(
    ("name", "inverts"),
    [
        ("DDIMScheduler", True),
        ("PNDMScheduler", True),
        ("EulerDiscreteScheduler", True),
        ("DPMSolverMultistepScheduler", True),
        ("UniPCMultistepScheduler", True),
        ("EulerAncestralDiscreteScheduler", False),
        ("LCMScheduler", False),
        ("DDPMScheduler", False),
        ("FlowMatchEulerDiscreteScheduler", False),
    ],
)
def test_schedulers(pipe: Any, name: str, inverts: bool) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cls = getattr(diffusers, name)
    scheduler = cls() if "Flow" in name else cls(**config)
    if not inverts:
        with pytest.raises(UnsupportedModelError, match=r"invert|inversion"):
            ddim_of(scheduler)
        return
    made = ddim_of(scheduler)
    assert type(made).__name__ == "DDIMScheduler"
    assert made.config.beta_end == 0.012


def test_other_models() -> None:
    video = pipes.build("animatediff")[0]
    with pytest.raises(UnsupportedModelError, match="UNets"):
        attnctl.control(video, BASE)
    for method in ("inject", "flowedit"):
        with pytest.raises(UnsupportedModelError, match="along the flow of a transformer"):
            edit_video(pipes.build("sd")[0], clip(1), source=SOURCE, target=TARGET, method=method, progress=False)
    with pytest.raises(UnsupportedModelError, match="no autoencoder"):
        job(pipes.build("wan")[0], clip(1))
    with pytest.raises(UnsupportedModelError, match="AutoPipelineForText2Image"):
        invert(pipes.build("sd_img2img")[0], latents(), SOURCE, steps=2)


def test_videos_that_cannot_be_read(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    for name, message in (("none.mp4", "no video"), ("text.mp4", "damaged"), ("empty", "no images")):
        with pytest.raises(ClipError, match=message):
            job(pipe, tmp_path / name)
    with pytest.raises(ClipError, match="not an image"):
        job(pipe, tmp_path / "bad.png")
    for video in (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((2, 16, 16), np.uint8), [], 3):
        with pytest.raises(ConfigError, match=r"(?i)video|frame"):
            job(pipe, video)
    for options, message in (
        ({"start": 9}, "no frame"),
        ({"steps": 0}, "from 1 on"),
        ({"window": 0}, "from 1 on"),
        ({"count": -1}, "from 1 on"),
        ({"fps": 0.0}, "above 0"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"out": tmp_path / "x.avi"}, r"\.mp4"),
        ({"out": tmp_path / "x.png"}, "one frame"),
        ({"colour": "red"}, "unknown: colour"),
        ({"size": 1}, "cell"),
    ):
        with pytest.raises(AttnctlError, match=message):
            job(pipe, clip(2), **options)


def test_too_much_to_store(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a: calls.append(0))
    try:
        with pytest.raises(MemoryBudgetError, match="recompute"):
            job(pipe, clip(2), store="maps", budget=1000)
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1000})())
        with pytest.raises(MemoryBudgetError, match="on the disk"):
            job(pipe, clip(2), store="qk", offload="disk", folder=tmp_path)
    finally:
        hook.remove()
    assert not calls
    check_room(10, "cpu", torch.device("cpu"))
    with pytest.raises(ConfigError, match="none, cpu, disk"):
        SourceStore("qk", "tape")  # type: ignore[arg-type]


def test_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    store = SourceStore("qk", "disk", tmp_path)
    monkeypatch.setattr("attnctl.processors.editing.source.save_tensors", full)
    with pytest.raises(MemoryBudgetError, match="No space left"):
        store.put(0, "site", {"q": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_sites(pipe: Any) -> None:
    with pytest.raises(SiteError, match="smaller factor"):
        invert(pipe, latents(), control=dataclasses.replace(BASE, factor=16), steps=2)
    with pytest.raises(SiteError, match="mask_factor"):
        invert(pipe, latents(), control=dataclasses.replace(BASE, mask_factor=16), steps=2)


def test_encoding_is_the_mode(pipe: Any) -> None:
    assert torch.equal(encode(pipe, clip(3), batch=1), encode(pipe, clip(3), batch=1))
    with pytest.raises(ConfigError, match="16x22"):
        encode(pipe, clip(1, 23, 16))
