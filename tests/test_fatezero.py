"""FateZero on tiny pipelines: one edit in three stores, exactness, windows, files, and bad input."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, distance, snapshot
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.data.clips import ClipError, FileClip, fit, mp4_bytes
from attnctl.data.files import FileExists
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import AttnctlError, ConfigError, SiteError, UnsupportedModelError
from attnctl.pipelines import ddim_of, edit_video, estimate_bytes, invert
from attnctl.pipelines.editing.codec import encode
from attnctl.pipelines.editing.inversion import inverse_of
from attnctl.processors import PAG, FateZero
from attnctl.processors.editing import engine as editing
from attnctl.processors.editing.source import Inversion, MemoryBudgetError, SourceStore, check_room

SOURCE, TARGET = "a black bear in the water", "a red bear in the water"
BASE = FateZero(source=SOURCE, target=TARGET, blend_words=["bear"], blend_threshold=0.6, self_replace=0.7)
STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


def latents(n: int = 2, h: int = 12, w: int = 8) -> Tensor:
    return torch.randn(n, 4, h, w, generator=torch.Generator().manual_seed(n))


def run(pipe: Any, inversion: Inversion, text: str = TARGET, guidance: float = 7.5, **options: Any) -> Tensor:
    n, (h, w) = inversion.frames, inversion.noise.shape[-2:]
    given = {
        "prompt": [text] * n,
        "negative_prompt": ["ugly"] * n,
        "latents": inversion.noise,
        "num_inference_steps": inversion.steps,
        "guidance_scale": guidance,
        "height": h * 2,
        "width": w * 2,
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**given | options)[0]


def edited(pipe: Any, control: FateZero, x: Tensor | None = None, guidance: float = 7.5, **options: Any) -> Tensor:
    with (
        invert(pipe, latents() if x is None else x, control=control, steps=STEPS, **options) as inversion,
        attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
    ):
        return run(pipe, inversion, control.target, guidance)


# The same edit, however the source is had


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blend_words": None},
        {"keys": ["mid", -1]},
        {"keys": [-1, "first"], "equalizer": {"red": 4.0}, "cross_replace": {"default_": 0.6, "water": (0.0, 0.3)}},
        {"blend_words": [["bear"], ["red"]], "blend_latents": True, "blend_threshold": 0.9},
        {"blend_attention": False, "stop": 0.5},
    ],
    ids=lambda c: ",".join(c) or "plain",
)
def test_stores_agree(pipe: Any, changes: dict[str, Any]) -> None:
    control = dataclasses.replace(BASE, **changes)
    recompute = edited(pipe, control)
    assert distance(edited(pipe, dataclasses.replace(control, store="qk")), recompute) <= 1e-5
    assert distance(edited(pipe, dataclasses.replace(control, store="maps")), recompute) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_replace": 0.0},
        {"self_replace": 0.0},
        {"mode": "replace"},
        {"keys": "last"},
        {"blend_words": None},
        {"blend_words": [["bear"], ["red"]], "blend_latents": True, "blend_threshold": 0.95, "blend_window": (0, 1)},
        {"equalizer": {"red": 4.0}},
        {"sites": "up.1", "mask_factor": 2},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_field_matters(pipe: Any, changes: dict[str, Any], plain_edit: Tensor) -> None:
    assert distance(edited(pipe, dataclasses.replace(BASE, **changes)), plain_edit) > 1e-3


@pytest.fixture(scope="module")
def plain_edit(pipe: Any) -> Tensor:
    return edited(pipe, BASE)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload(pipe: Any, offload: Any, tmp_path: Path) -> None:
    control = dataclasses.replace(BASE, store="qk")
    assert distance(edited(pipe, control, offload=offload, folder=tmp_path), edited(pipe, control)) <= 1e-6
    assert not list(tmp_path.iterdir())


def test_neighbouring_latent_fails(pipe: Any) -> None:
    with invert(pipe, latents(), control=BASE, steps=STEPS) as inversion:
        with attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion)):
            right = run(pipe, inversion)
        shifted = dataclasses.replace(inversion, latents=[*inversion.latents[1:], inversion.noise])
        with attnctl.control(pipe, dataclasses.replace(BASE, inversion=shifted)):
            wrong = run(pipe, inversion)
    assert distance(wrong, right) > 1e-3


def test_inversion_equals_a_loop(pipe: Any) -> None:
    x = latents()
    inversion = invert(pipe, x, SOURCE, steps=STEPS)
    inverse = diffusers.DDIMInverseScheduler(
        **{k: pipe.scheduler.config[k] for k in ("beta_start", "beta_end", "beta_schedule")},
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    inverse.set_timesteps(STEPS)
    embeds = pipe.encode_prompt([SOURCE] * 2, "cpu", 1, False)[0]
    with torch.no_grad():
        for i, t in enumerate(inverse.timesteps):
            assert torch.equal(inversion.latents[i], x)
            x = inverse.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample
    assert torch.equal(inversion.noise, x)
    assert inversion.timesteps == tuple(inverse.timesteps.tolist())
    assert len(inversion.latents) == STEPS + 1


def test_mask_of_one_is_a_plain_run(pipe: Any) -> None:
    control = dataclasses.replace(BASE, blend_threshold=0.0, cross_replace=0.0, keys="self", self_replace=1.0)
    with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
        plain = run(pipe, inversion)
        with attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)):
            assert torch.equal(run(pipe, inversion), plain)
        idle = dataclasses.replace(BASE, keys="self", stop=0.0, inversion=inversion)
        with attnctl.control(pipe, idle):
            assert torch.equal(run(pipe, inversion), plain)


@pytest.mark.parametrize("store", ["recompute", "maps"])
def test_mask_parts_the_queries(pipe: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone at its sites, an edit attends with each query once; that changes nothing but rounding."""
    control, parted = dataclasses.replace(BASE, store=store, self_replace=1.0), []
    fuse = editing.self_fuse
    monkeypatch.setattr(editing, "self_fuse", lambda *given: parted.append(given) or fuse(*given))
    once = edited(pipe, control)
    count = len(parted)
    monkeypatch.setattr(editing, "is_last", lambda proceed: False)
    twice = edited(pipe, control)
    assert count
    assert len(parted) == count
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("store", ["recompute", "maps"])
@pytest.mark.parametrize("words", [None, ["bear"]])
def test_negative_rows_are_unchanged(pipe: Any, store: Any, words: Any) -> None:
    control = dataclasses.replace(BASE, store=store, blend_words=words)
    plain = dataclasses.replace(control, cross_replace=0.0, self_replace=0.0, store="recompute")
    seen: list[Tensor] = []
    hook = None
    try:
        for c in (plain, control):
            with (
                invert(pipe, latents(), control=c, steps=STEPS) as inversion,
                attnctl.control(pipe, dataclasses.replace(c, inversion=inversion)),
            ):
                hook = pipe.unet.register_forward_hook(lambda m, a, out: seen.append(out[0]))
                run(pipe, inversion)
                hook.remove()
    finally:
        if hook is not None:
            hook.remove()
    first, second = seen[0], seen[STEPS]  # step 0: the latents are the same
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2:], second[2:])


def test_nothing_is_left(pipe: Any) -> None:
    before = snapshot(pipe.unet, pipe.scheduler)
    scheduler = pipe.scheduler
    edited(pipe, BASE)
    assert_clean(before, pipe.unet, scheduler)

    def boom(*args: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        invert(pipe, latents(), SOURCE, steps=STEPS, step=boom)
    assert pipe.scheduler is scheduler
    assert_clean(before, pipe.unet, scheduler)
    with (
        invert(pipe, latents(), control=BASE, steps=STEPS) as inversion,
        pytest.raises(RuntimeError, match="boom"),
        attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion)),
    ):
        run(pipe, inversion, callback_on_step_end=boom)
    assert_clean(before, pipe.unet, scheduler)


def test_with_another_control_and_without_guidance(pipe: Any) -> None:
    with invert(pipe, latents(), control=BASE, steps=STEPS) as inversion:
        control = dataclasses.replace(BASE, inversion=inversion)
        with attnctl.control(pipe, control):
            alone, bare = run(pipe, inversion), run(pipe, inversion, guidance=1.0)
        with attnctl.control(pipe, control, PAG(scale=1.0, sites="mid")) as handle:
            assert distance(run(pipe, inversion), alone) > 1e-4
            assert handle.passes == STEPS
        with attnctl.control(pipe, control, PAG(scale=0.0, sites="mid")):
            assert torch.equal(run(pipe, inversion), alone)
    assert bare.isfinite().all()


@pytest.mark.parametrize(("n", "h", "w"), [(1, 12, 8), (2, 8, 20), (3, 16, 16), (1, 96, 16)])
def test_any_number_of_frames_and_any_size(pipe: Any, n: int, h: int, w: int) -> None:
    out = edited(pipe, dataclasses.replace(BASE, keys=["previous", "last"]), latents(n, h, w))
    assert out.shape == (n, 4, h, w)
    assert out.isfinite().all()


def test_source_runs_no_further_than_needed(pipe: Any) -> None:
    control = dataclasses.replace(BASE, sites="mid", blend_words=None)
    calls: list[int] = []
    with (
        invert(pipe, latents(), control=control, steps=STEPS) as inversion,
        attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
    ):
        hooks = [m.register_forward_hook(lambda m, a, o: calls.append(0)) for m in pipe.unet.up_blocks]
        run(pipe, inversion)
        for hook in hooks:
            hook.remove()
    assert len(calls) == STEPS * len(pipe.unet.up_blocks)


def test_fused_projections(pipe: Any) -> None:
    """Queries and keys that are parts of one projection are kept without the rest of it."""
    control, plain = dataclasses.replace(BASE, store="qk"), edited(pipe, BASE)
    pipe.unet.fuse_qkv_projections()
    try:
        with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
            assert inversion.store is not None
            kept = [t for site in inversion.store._kept.values() for t in site.values()]  # type: ignore[union-attr]
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
        assert distance(edited(pipe, BASE), plain) <= 1e-4
    finally:
        pipe.unet.unfuse_qkv_projections()


def test_store_sizes(pipe: Any) -> None:
    for store in ("recompute", "qk", "maps"):
        control = dataclasses.replace(BASE, store=store)
        with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
            assert inversion.nbytes == estimate_bytes(pipe.unet, control, 2, 12, 8, STEPS)[store]
            assert (inversion.store is None) == (store == "recompute")


def test_estimate_for_stable_diffusion() -> None:
    """Eight frames of 512 x 512 in 50 steps: the method's own maps take 36 and 69 GiB, latents 13 MiB."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()
    edit = {"source": SOURCE, "target": TARGET, "cross_replace": 1.0, "self_replace": 1.0}
    one = estimate_bytes(unet, FateZero(**edit), 8, 64, 64, 50)
    two = estimate_bytes(unet, FateZero(**edit, keys=[-1, "first"]), 8, 64, 64, 50)
    assert one["recompute"] == 51 * 8 * 4 * 64 * 64 * 2 <= 32 * 2**20
    assert one["maps"] / 2**30 == pytest.approx(36.2, abs=0.1)
    assert two["maps"] / 2**30 == pytest.approx(69.4, abs=0.1)
    assert two["qk"] == one["qk"] < 14 * 2**30


# Whole jobs


def clip(n: int = 5, h: int = 24, w: int = 16) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def job(pipe: Any, video: Any, **options: Any) -> Any:
    fields = {"source": SOURCE, "target": TARGET, "blend_words": ["bear"], "progress": False, "steps": 2}
    return edit_video(pipe, video, **fields | options)


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


# Bad input


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
    for name in ("pixart", "sd3"):
        other = pipes.build(name)[0]
        with pytest.raises(UnsupportedModelError, match="UNets"):
            attnctl.control(other, BASE)
        with pytest.raises(UnsupportedModelError, match=r"has no unet.*SD 1, SD 2, SDXL"):
            job(other, clip(1))
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
        ({"out": tmp_path / "x.gif"}, r"\.mp4"),
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
    monkeypatch.setattr("attnctl.processors.editing.source.save_file", full)
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
