"""The shapes mmdit and video: exact pieces, training that resumes exactly, export, loading, refusals."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import write_base

from attnctl.errors import ConfigError
from attnctl.shapes import clip_prompts, load_shapes, sample, sample_clip
from attnctl.shapes import load as loading
from attnctl.shapes.data import Latents
from attnctl.shapes.motion import clip_caption, render_clip
from attnctl.shapes.scenes import caption
from attnctl.shapes.training import clips as world
from attnctl.shapes.training import evaluate as evaluating
from attnctl.shapes.training import mmdit, models
from attnctl.shapes.training.cards import write_mmdit_card, write_video_card
from attnctl.shapes.training.evaluate_mmdit import evaluate_mmdit
from attnctl.shapes.training.evaluate_video import evaluate_video, mark, strip, totals
from attnctl.shapes.training.loop import Plan, step_generator
from attnctl.shapes.training.options import load_base
from attnctl.shapes.training.train import main
from attnctl.shapes.training.train_mmdit import export_mmdit, train_mmdit
from attnctl.shapes.training.train_video import export_video, train_video

PLAN = Plan(steps=3, optimizer="muon", save_every=2, warmup=1)


class Killed(Exception):
    """Stand in for a kill."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def latents() -> Latents:
    rng = np.random.default_rng(0)
    captions = [caption(sample(rng, 1 + (i >= 6))) for i in range(8)]
    return Latents(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), captions, 6)


def clips(frames: int = 3) -> world.Clips:
    rng = np.random.default_rng(0)
    told = [sample_clip(rng) for _ in range(4)]
    forms = [[clip_caption(c), clip_caption(c, speed=False), clip_caption(c, motion=False)] for c in told]
    return world.Clips(torch.randn(4, frames, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), forms)


def interrupted(data, after: int):
    """Return the same data, which kills the run in the step after `after` steps."""
    drawn: list[int] = []

    class Stop(type(data)):
        def draw(self, *args):
            drawn.append(1)
            if len(drawn) > after:
                raise Killed
            return super().draw(*args)

    return Stop(*(getattr(data, name) for name in data.__dataclass_fields__))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    b_state = b.state_dict()
    return all(torch.equal(t, b_state[n]) for n, t in a.state_dict().items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder: Path) -> dict:
    """Train both models for three steps, whole and after a kill, and export; mmdit has two blocks in place of eight."""
    out = tmp_path_factory.mktemp("runs")
    cases = {
        "mmdit": (train_mmdit, export_mmdit, latents(), {"batch": 2, "bf16": False, "pairs": 0.5}),
        "video": (train_video, export_video, clips(), {"batch": 1, "bf16": False}),
    }
    result: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmdit, "LAYERS", 2)
        for name, (train, export, data, options) in cases.items():
            through = train(out / name / "a", PLAN, load_base(base_folder), data, quiet=True, **options)
            with pytest.raises(Killed):
                train(out / name / "b", PLAN, load_base(base_folder), interrupted(data, 2), quiet=True, **options)
            stopped = json.loads((out / name / "b/checkpoint/state.json").read_text())["step"]
            resumed = train(out / name / "b", PLAN, load_base(base_folder), data, resume=True, quiet=True, **options)
            step = export(out / name / "b", load_base(base_folder), out / name / "pipeline")
            result[name] = {"through": through, "resumed": resumed, "stopped": stopped, "step": step, "out": out / name}
    return result


@pytest.mark.parametrize("name", ["mmdit", "video"])
def test_a_killed_run_resumes_to_the_same_weights(runs: dict, base_folder: Path, name: str) -> None:
    run = runs[name]
    assert run["stopped"] == 2
    assert run["step"] == 3
    parts = ("transformer", "text_encoder") if name == "mmdit" else ("unet", "text_encoder", "motion_adapter")
    for part in parts:
        assert same(getattr(run["through"], part), getattr(run["resumed"], part)), part
    with pytest.raises(ConfigError, match="--resume"):
        train_mmdit(run["out"] / "b", PLAN, load_base(base_folder), latents(), quiet=True)


# mmdit


@pytest.mark.parametrize("n", [mmdit.NULL_TOKENS, 5, 0])
def test_one_weighted_null_token_acts_like_many(n: int) -> None:
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    torch.manual_seed(0)
    model = mmdit.build_transformer()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, text, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 17, 192), torch.randn(2, 192)
    text[:, -1] = 0
    t = torch.tensor([300.0, 700.0])
    full = torch.cat([text[:, :-1], torch.zeros(2, n, 192)], 1)
    with torch.no_grad():
        model.set_attn_processor(JointAttnProcessor2_0())
        want = model(x, full, pooled, t, return_dict=False)[0]
        model.set_attn_processor(mmdit.NullAttention())
        bias = {"null_bias": torch.full((2,), math.log(n) if n else -1e4)}
        got = model(x, text, pooled, t, joint_attention_kwargs=bias, return_dict=False)[0]
    assert want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4)


def test_training_and_pipeline_say_the_text_alike(runs: dict) -> None:
    pipe = runs["mmdit"]["through"]
    flow = mmdit.Flow(copy.deepcopy(pipe.transformer), pipe.text_encoder, pipe.tokenizer, latents(), batch=2)
    prompts = latents().captions[:2]
    with torch.no_grad():
        text, pooled = flow.text(flow.ids[:2])
        want, _, want_pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert want.shape == (2, 16 + mmdit.NULL_TOKENS, 192)
    assert torch.allclose(text[:, :16], want[:, :16], atol=1e-6)
    assert torch.equal(want[:, 16:], torch.zeros_like(want[:, 16:]))
    assert torch.equal(text[:, 16], want[:, 16])
    assert torch.allclose(pooled, want_pooled, atol=1e-6)


def test_the_text_encoder_starts_as_text2images(base_folder: Path, tmp_path) -> None:
    tokenizer = models.build_tokenizer(tmp_path)
    source = load_base(base_folder).text_encoder
    target = mmdit.build_text_encoder(tokenizer)
    mmdit.inherit_text(target, source)
    ids = torch.tensor([tokenizer("a red circle on gray", padding="max_length").input_ids])
    with torch.no_grad():
        a, b = (m(ids, output_hidden_states=True).hidden_states for m in (source, target))
    # The source's last state may have gone through its final norm already.
    assert torch.allclose(a[1], b[1])
    assert len(b) == 4


def test_mmdit_starts_from_nothing_and_its_noise_levels_are_as_told(base_folder: Path) -> None:
    base = load_base(base_folder)
    transformer = mmdit.build_transformer()
    flow = mmdit.Flow(
        transformer, mmdit.build_text_encoder(base.tokenizer), base.tokenizer, latents(), batch=64, bf16=False
    )
    levels = torch.cat([flow.levels(torch.Generator().manual_seed(i)) for i in range(20)])
    assert 0 < levels.min() < levels.max() < 1
    assert levels.median() == pytest.approx(2 / 3, abs=0.03), "the middle of Euler steps with shift 2"
    sigmas = mmdit.build_scheduler().sigmas
    assert sigmas[len(sigmas) // 2] == pytest.approx(2 / 3, abs=0.01)
    assert flow(step_generator(0, 0), 0).item() == pytest.approx(2, rel=0.1), "zero output: variance of noise plus data"
    assert len(transformer.transformer_blocks) == 8
    assert transformer.transformer_blocks[0].attn.heads == 6


def test_mmdit_is_a_real_pipeline_and_loads(runs: dict) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = load_shapes("mmdit", folder=runs["mmdit"]["out"] / "pipeline")
    assert type(pipe) is StableDiffusion3Pipeline
    assert pipe.transformer.dtype == pipe.text_encoder_2.dtype == torch.float32
    tokens = []
    pipe.transformer.transformer_blocks[0].attn.register_forward_hook(
        lambda m, args, kwargs, out: tokens.append((out[0].shape[1], out[1].shape[1])), with_kwargs=True
    )
    call = {"num_inference_steps": 1, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    assert pipe("a red circle on gray", **call).images[0].size == (64, 64)
    pipe("a red circle on gray", **call, max_sequence_length=0)
    assert tokens == [(256, 272), (256, 16)]
    assert not list((runs["mmdit"]["out"] / "pipeline").rglob("*.bin"))


# video


def test_motion_modules_start_as_the_identity(base_folder: Path) -> None:
    base = load_base(base_folder)
    unet = world.with_motion(base.unet, world.build_adapter(base.unet)).eval()
    x, text = torch.randn(1, 4, 3, 16, 16), torch.randn(3, 16, 96)
    with torch.no_grad():
        together = unet(x, 500, text).sample
        apart = base.unet(x[0].transpose(0, 1), 500, text).sample.transpose(0, 1)[None]
    assert torch.allclose(together, apart, atol=1e-4)
    assert all(p.requires_grad for p in unet.parameters())
    names = {n for n in unet.state_dict() if n not in world.flat_parameters(unet)}
    assert set(world.flat_parameters(unet)) == set(base.unet.state_dict())
    assert {n.split(".motion_modules.")[0] for n in names} == {
        "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    }  # fmt: skip


def test_video_training_reaches_every_part_and_holds_still_captions(runs: dict, base_folder: Path) -> None:
    base, pipe = load_base(base_folder), runs["video"]["through"]
    state = pipe.unet.state_dict()
    assert any(not torch.equal(t, state[n]) for n, t in base.unet.state_dict().items())
    assert all(torch.equal(t, state[n]) for n, t in pipe.motion_adapter.state_dict().items())
    assert any(t.abs().max() > 0 for n, t in state.items() if n.endswith("proj_out.weight") and "motion" in n)
    assert not same(base.text_encoder, pipe.text_encoder)
    unet = world.with_motion(base.unet, world.build_adapter(base.unet))
    motions = world.Motions(unet, base.text_encoder, base.tokenizer, clips(), batch=1)
    assert motions.anchor(motions.ids[2]).item() == 0
    motions.text_encoder = pipe.text_encoder
    assert motions.anchor(motions.ids[2]).item() > 0


def test_a_batch_of_few_frames_tells_the_motion_modules_which(base_folder: Path) -> None:
    base = load_base(base_folder)
    unet = world.with_motion(base.unet, world.build_adapter(base.unet))
    motions = world.Motions(unet, base.text_encoder, base.tokenizer, clips(16), batch=1, frames=4)
    tables = [place.pe.clone() for place in motions.places]
    chosen = motions.draw_frames(torch.Generator().manual_seed(0))
    assert [int(i) // 4 for i in chosen] == [0, 1, 2, 3]
    assert all(torch.equal(p.pe, t[:, chosen]) for p, t in zip(motions.places, tables, strict=True))
    assert motions(torch.Generator().manual_seed(0), 0).isfinite()
    assert all(torch.equal(p.pe, t) for p, t in zip(motions.places, tables, strict=True))
    with pytest.raises(ConfigError, match="frames must be 1 to 16, the length of a clip, got 17"):
        world.Motions(unet, base.text_encoder, base.tokenizer, clips(16), batch=1, frames=17)


def test_video_is_a_real_pipeline_that_names_its_limit(runs: dict) -> None:
    from diffusers import AnimateDiffPipeline

    folder = runs["video"]["out"] / "pipeline"
    pipe = load_shapes("video", folder=folder)
    assert type(pipe) is AnimateDiffPipeline
    assert type(pipe.unet).__name__ == "UNetMotionModel"
    trained = runs["video"]["resumed"].unet.state_dict()
    assert all(torch.allclose(t, trained[n], atol=2e-3) for n, t in pipe.unet.state_dict().items())
    kwargs = {"num_inference_steps": 1, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
    frames = pipe("a red circle moving left on gray", num_frames=16, **kwargs).frames[0]
    assert len(frames) == 16
    assert frames[0].size == (64, 64)
    with pytest.raises(ConfigError, match=r"16 frames, but 20.*enable_free_noise"):
        pipe("a red circle moving left on gray", num_frames=20, **kwargs)
    pipe.enable_free_noise(context_length=16, context_stride=4)
    assert len(pipe("a red circle moving left on gray", num_frames=20, **kwargs).frames[0]) == 20
    record = json.loads((folder / "training.json").read_text())
    assert [(h["from"], h["batch"], h["clips"]) for h in record["history"]] == [(0, 1, 4)]


def test_clips_are_encoded_once(tmp_path, base_folder: Path) -> None:
    vae = load_base(base_folder).vae
    first = world.make_clips(tmp_path, vae, n=2)
    again = world.make_clips(tmp_path, vae, n=50)
    assert first.values.shape == (2, 16, 4, 16, 16)
    assert torch.equal(first.values, again.values)
    assert first.captions == again.captions
    assert all(len(forms) == 3 for forms in first.captions)
    assert first.draw(torch.Generator().manual_seed(0), 9).unique().tolist() == [0, 1]


# refusals


@pytest.mark.parametrize("name", ["mmdit", "video"])
def test_missing_and_damaged_weights_are_named(tmp_path, runs: dict, monkeypatch, name: str) -> None:
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path / "none")
    with pytest.raises(
        ConfigError, match=rf"lacks the file .*attnctl\.shapes\.training\.train {name} --out runs/{name}"
    ):
        load_shapes(name)
    shutil.copytree(runs[name]["out"] / "pipeline", tmp_path / "w")
    part = "transformer" if name == "mmdit" else "motion_adapter"
    file = tmp_path / "w" / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"{part}.*damaged.*attnctl\.shapes\.training\.train {name}"):
        load_shapes(name, folder=tmp_path / "w")


def test_an_absent_gpu_is_named(runs: dict, base_folder: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("mmdit", "video"):
        with pytest.raises(ConfigError, match="CUDA"):
            load_shapes(name, device="cuda", folder=runs[name]["out"] / "pipeline")
        with pytest.raises(ConfigError, match="--device cpu"):
            main([name, "--out", str(tmp_path), "--base", str(base_folder), "--device", "cuda"])


@pytest.mark.parametrize("name", ["mmdit", "video"])
def test_command_line_of_training(tmp_path, base_folder: Path, capsys, monkeypatch, name: str) -> None:
    monkeypatch.setattr(mmdit, "LAYERS", 2)
    few = ["--scenes", "3", "--pair-scenes", "2"] if name == "mmdit" else ["--clips", "2"]
    arguments = [name, "--out", str(tmp_path), "--base", str(base_folder), "--steps", "1", "--batch", "1", *few]
    assert main([*arguments, "--threads", "1", "--device", "cpu"]) == 0
    assert "step 1" in capsys.readouterr().out
    assert load_shapes(name, folder=tmp_path / "pipeline")
    again = [*arguments, "--export-only", "--export", str(tmp_path / "x"), "--threads", "1", "--device", "cpu"]
    assert main(again) == 0
    assert (tmp_path / "x/model_index.json").exists()
    with pytest.raises(ConfigError, match="--resume"):
        main([*arguments, "--threads", "1", "--device", "cpu"])
    with pytest.raises(ConfigError, match="--batch"):
        main([*arguments, "--batch", "0"])
    with pytest.raises(ConfigError, match="lacks the file"):
        main([*arguments, "--base", str(tmp_path / "nowhere")])


# evaluation


def test_mmdit_is_evaluated_and_its_card_holds_the_figures(runs: dict, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "w"
    shutil.copytree(runs["mmdit"]["out"] / "pipeline", folder)
    pipe = load_shapes("mmdit", folder=folder)
    result = {"params": 6.3, **evaluate_mmdit(pipe, n=2, tune=1, steps=1, scales=(1.0,))}
    assert set(result) >= {"single", "pairs", "heldout", "pairs without null tokens", "sweep", "scale"}
    result["single"]["right"] = (90.1, 87.0, 92.0)
    text = write_mmdit_card(folder, result).read_text()
    for part in ("90.1 (87 to 92)", "6.3 million", "| 0 to 3 | 2 | muon, 0.001 | 50 % |", "max_sequence_length=0"):
        assert part in text
    assert evaluating.main(["mmdit", "--folder", str(folder), "--steps", "1", "--n", "1", "--tune", "1"]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["n"] == 1


def test_video_is_evaluated_and_its_card_holds_the_figures(runs: dict, tmp_path) -> None:
    folder = tmp_path / "w"
    shutil.copytree(runs["video"]["out"] / "pipeline", folder)
    result = {"params": 6.9, **evaluate_video(load_shapes("video", folder=folder), n=2, tune=1, steps=1, scales=(1.0,))}
    assert result["n"] == 2
    result["all"]["direction"] = (90.1, 87.0, 92.0)
    text = write_video_card(folder, result).read_text()
    for part in ("90.1 (87 to 92)", "6.9 million", "| 1 | 0 to 3 | 1 x 3 | 0.001 | 0 | 0 | no | 0 |", "moving left"):
        assert part in text


def test_marks_of_rendered_videos_are_full(tmp_path) -> None:
    rng = np.random.default_rng(0)
    told = [sample_clip(rng) for _ in range(6)]
    videos, prompts = [render_clip(c) for c in told], [clip_caption(c) for c in told]
    result = totals(mark(videos, prompts))
    assert all(result[k][0] == 100 for k in ("right", "direction", "speed", "present", "bound", "background"))
    assert totals(mark(videos, clip_prompts(0, 6)))["right"][0] < 50
    sheet = strip(videos, prompts)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (6 * (18 + 68), 6 * 68, 3)
