"""The shapes videodit: exact pieces, training that resumes exactly, export, loading, refusals."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnctl.errors import ConfigError
from attnctl.shapes import load as loading
from attnctl.shapes import load_shapes, render_clip, sample_clip
from attnctl.shapes.data import to_tensor
from attnctl.shapes.motion import clip_caption
from attnctl.shapes.scenes import SIZE, WORDS
from attnctl.shapes.training import evaluate as evaluating
from attnctl.shapes.training import videodit
from attnctl.shapes.training.cards import write_videodit_card
from attnctl.shapes.training.clips import Clips
from attnctl.shapes.training.evaluate_video import evaluate_video, generate_clips
from attnctl.shapes.training.loop import Plan, step_generator
from attnctl.shapes.training.train import main
from attnctl.shapes.training.train_videodit import (
    export_videodit,
    make_dit_clips,
    refine_video_decoder,
    train_video_vae,
    train_videodit,
)
from attnctl.shapes.training.video_flow import COURSE, Phase, VideoFlow, WrittenAttention, course, frames_at

PLAN = Plan(steps=3, optimizer="muon", save_every=2, warmup=1)
PHASES = (Phase(0, 1, 3), Phase(1, 3, 2), Phase(2, 9, 1))
CALL = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}


class Killed(Exception):
    """Stand in for a kill."""


class Stop(Clips):
    """Clips that kill the run in its third step."""

    drawn = 0

    def draw(self, *args):
        Stop.drawn += 1
        if Stop.drawn > 2:
            raise Killed
        return super().draw(*args)


def clips(kind: type[Clips] = Clips) -> Clips:
    rng = np.random.default_rng(0)
    drawn = [sample_clip(rng, frames=17) for _ in range(4)]
    forms = [[clip_caption(c), clip_caption(c, speed=False), clip_caption(c, motion=False)] for c in drawn]
    return kind(torch.randn(4, 8, 9, 16, 16, generator=torch.Generator().manual_seed(0)).half(), forms)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(t, other[n]) for n, t in a.state_dict().items())


def alive(transformer: torch.nn.Module) -> torch.nn.Module:
    """Fill what starts at zero, so that every part shows in the output."""
    generator = torch.Generator().manual_seed(3)
    for parameter in transformer.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.3, generator=generator)
    return transformer.eval()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    plan = Plan(steps=1, optimizer="muon", warmup=1)
    return train_video_vae(tmp_path_factory.mktemp("vae"), plan, batch=1, bf16=False, quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, vae) -> dict:
    """Train for three steps, in one go and after a kill, and export; with two blocks in place of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videodit, "LAYERS", 2)
        return trained(tmp_path_factory.mktemp("videodit"), vae)


def trained(out: Path, vae: Any) -> dict:
    options = {"phases": PHASES, "bf16": False, "quiet": True}
    through = train_videodit(out / "a", PLAN, vae, clips(), **options)
    Stop.drawn = 0
    with pytest.raises(Killed):
        train_videodit(out / "b", PLAN, vae, clips(Stop), **options)
    stopped = json.loads((out / "b/checkpoint/state.json").read_text())["step"]
    resumed = train_videodit(out / "b", PLAN, vae, clips(), resume=True, **options)
    step = export_videodit(out / "b", vae, out / "pipeline")
    return {"through": through, "resumed": resumed, "stopped": stopped, "step": step, "out": out}


def test_a_killed_run_resumes_to_the_same_weights(runs: dict, vae) -> None:
    assert (runs["stopped"], runs["step"]) == (2, 3)
    for part in ("transformer", "text_encoder"):
        assert same(getattr(runs["through"], part), getattr(runs["resumed"], part)), part
    with pytest.raises(ConfigError, match="--resume"):
        train_videodit(runs["out"] / "b", PLAN, vae, clips(), quiet=True)


# pieces


def test_every_word_is_one_token_and_other_text_is_legal(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = videodit.build_tokenizer(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 2 for word in WORDS if word.isalpha())
    assert tokenizer.tokenize("a ring, red.")[2::2] == [",", "."]
    ids = tokenizer("a red circle moving left fast on gray").input_ids
    assert len(ids) == 9
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle moving left fast on gray"
    assert tokenizer.unk_token_id not in tokenizer("Two Dogs, 3 cats!").input_ids
    assert AutoTokenizer.from_pretrained(str(tmp_path))("a red dog").input_ids == tokenizer("a red dog").input_ids


def test_clips_of_17_frames_stay_inside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        clip = sample_clip(rng, frames=17)
        for index in (0, 16):
            (thing,) = clip.frame(index).things
            assert thing.size + 1.9 < min(thing.x, thing.y, SIZE - thing.x, SIZE - thing.y)
    for frames in (0, 18):
        with pytest.raises(ConfigError, match=f"1 to 17 frames, got {frames}"):
            sample_clip(rng, frames=frames)


def test_the_autoencoder_gives_latents_of_mean_0_and_spread_1(vae, tmp_path) -> None:
    first = make_dit_clips(tmp_path, vae, n=3)
    again = make_dit_clips(tmp_path, vae, n=50)
    assert first.values.shape == (3, 8, 9, 16, 16)
    assert torch.equal(first.values, again.values)
    assert first.values.float().mean().item() == pytest.approx(0, abs=0.3)
    assert first.values.float().std().item() == pytest.approx(1, abs=0.3)
    x = to_tensor(render_clip(sample_clip(np.random.default_rng(0), frames=17), 17)).transpose(0, 1)[None]
    z = vae.encode(x).latent_dist.mean
    back = videodit.encode_video(vae, x) * torch.tensor(vae.config.latents_std).view(8, 1, 1, 1)
    assert torch.allclose(back + torch.tensor(vae.config.latents_mean).view(8, 1, 1, 1), z, atol=1e-5)
    assert vae.decode(z).sample.shape == x.shape


def test_more_training_changes_the_decoder_alone(vae, tmp_path) -> None:
    copied = copy.deepcopy(vae)
    plan = Plan(steps=1, optimizer="muon", warmup=1, average=0.0)
    refine_video_decoder(tmp_path, plan, copied, bf16=False, quiet=True)
    assert same(vae.encoder, copied.encoder)
    assert same(vae.quant_conv, copied.quant_conv)
    assert not same(vae.decoder, copied.decoder)
    assert not any(p.requires_grad for p in copied.parameters())


def test_training_sees_text_and_null_tokens_as_the_pipeline_does(runs: dict) -> None:
    pipe = runs["through"]
    transformer = alive(videodit.build_transformer())
    plain = transformer.attn_processors
    flow = VideoFlow(transformer, pipe.text_encoder, pipe.tokenizer, clips(), bf16=False)
    prompts = ["a red circle moving left fast on gray", ""]
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    x, t = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        text = flow.text(ids)
        for length, bias in ((16, -1e4), (512, math.log(512 - 16))):
            want_text = pipe.encode_prompt(prompts, None, False, max_sequence_length=length)[0]
            assert torch.allclose(text[:, :16], want_text[:, :16], atol=1e-5)
            assert not want_text[:, 16:].any()
            assert not text[:, 16].any()
            transformer.set_attn_processor(plain.copy())
            want = transformer(x, t, want_text, return_dict=False)[0]
            flow.attention.null_bias = torch.full((2,), bias)
            transformer.set_attn_processor(flow.attention)
            got = transformer(x, t, text, return_dict=False)[0]
            assert torch.allclose(got, want, atol=1e-4), length
    assert want.std() > 0.1


def test_the_transformer_is_told_which_frames_it_sees() -> None:
    transformer = alive(videodit.build_transformer())
    tables = transformer.rope.freqs_cos, transformer.rope.freqs_sin
    x, text = torch.randn(1, 8, 3, 16, 16), torch.randn(1, 4, 96)

    def look(places: list[int]) -> torch.Tensor:
        with torch.no_grad(), frames_at(transformer, torch.tensor(places)):
            cos, _ = transformer.rope(x)
            for row, place in enumerate(places):
                assert torch.equal(cos[0, 64 * row, 0, : transformer.rope.t_dim], tables[0][place, :12])
            return transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]

    with torch.no_grad():
        plain = transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]
    assert torch.equal(look([0, 1, 2]), plain)
    # Rotary embeddings know distances only.
    assert torch.allclose(look([5, 6, 7]), plain, atol=1e-4)
    assert not torch.allclose(look([0, 4, 8]), plain, atol=1e-2)
    assert all(a is b for a, b in zip(tables, (transformer.rope.freqs_cos, transformer.rope.freqs_sin), strict=True))


def test_it_starts_from_nothing_and_every_phase_reaches_every_part(tmp_path) -> None:
    tokenizer = videodit.build_tokenizer(tmp_path)
    transformer, text_encoder = videodit.build_transformer(), videodit.build_text_encoder(tokenizer)
    flow = VideoFlow(transformer, text_encoder, tokenizer, clips(), phases=PHASES, bf16=False)
    for step in range(3):
        loss = flow(step_generator(0, 0), step)
        assert loss.item() == pytest.approx(2, rel=0.1), "zero output: variance of noise plus data"
    alive(transformer)
    for step in range(3):
        flow(step_generator(0, 0), step).backward()
        for module in (transformer, text_encoder):
            assert all(p.grad is not None and p.grad.any() for p in module.parameters()), step
            module.zero_grad()
    chosen = torch.stack([flow.draw_frames(step_generator(0, i), 3) for i in range(20)])
    assert not chosen[:, 0].any(), "places are known by their distance from the first frame"
    assert chosen[:, 1].unique().tolist() == [1, 2, 3, 4]
    assert chosen[:, 2].unique().tolist() == [5, 6, 7, 8]
    assert flow.draw_frames(step_generator(0, 0), 1).tolist() == [0]
    assert flow.draw_frames(step_generator(0, 0), 9).tolist() == list(range(9))
    assert len(transformer.blocks) == 8
    assert isinstance(transformer.blocks[0].attn1.processor, WrittenAttention)


def test_one_frame_of_some_clips_is_nearly_clean(runs: dict) -> None:
    pipe = runs["through"]
    flow = VideoFlow(alive(videodit.build_transformer()), pipe.text_encoder, pipe.tokenizer, clips(), anchor=0.5)
    levels = torch.cat([flow.draw_levels(step_generator(0, i), 40, 3) for i in range(10)])
    lower = levels < levels.max(1, keepdim=True).values
    assert 0.4 < lower.any(1).float().mean() < 0.6
    assert lower.sum(1).max() == 1, "the others share one level"
    assert levels[lower].max() < 0.5
    assert lower.any(0).all()
    assert flow.draw_levels(step_generator(0, 0), 40, 1).shape == (40, 1)
    # A time for each token, all the same, is what the pipeline's one time is.
    x, text = torch.randn(1, 8, 3, 16, 16), torch.randn(1, 4, 96)
    flow.attention.null_bias = None
    with torch.no_grad():
        one, many = (
            flow.transformer(x, t, text, return_dict=False)[0]
            for t in (torch.tensor([500.0]), torch.full((1, 3 * flow.patches), 500.0))
        )
    assert torch.allclose(one, many, atol=1e-4)


def test_courses_are_read_and_refused() -> None:
    assert course(",".join(map(str, COURSE))) == COURSE
    assert course("0:9x4") == (Phase(0, 9, 4),)
    for text in ("", "9x4", "5:1x4", "0:1x4,0:3x2", "0:0x4", "0:1x0", "0:1y4"):
        with pytest.raises(ConfigError, match="course looks like"):
            course(text)


# the pipeline


def test_it_is_a_real_pipeline_and_loads(runs: dict) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    folder = runs["out"] / "pipeline"
    pipe = load_shapes("videodit", folder=folder)
    classes = [type(x) for x in (pipe, pipe.vae, pipe.transformer, pipe.text_encoder)]
    assert classes == [WanPipeline, AutoencoderKLWan, WanTransformer3DModel, UMT5EncoderModel]
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    trained = runs["resumed"].transformer.state_dict()
    assert all(torch.allclose(t, trained[n], atol=2e-3) for n, t in pipe.transformer.state_dict().items())
    tokens: list[int] = []
    pipe.transformer.blocks[0].attn1.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[1]))
    video = pipe("a red circle moving left on gray", **CALL, output_type="np").frames
    assert video.shape == (1, 17, 64, 64, 3)
    assert tokens == [576, 576]
    for larger in ({"num_frames": 21}, {"height": 80}):
        with pytest.raises(ConfigError, match="17 frames of 64x64"):
            pipe("a red circle", **{**CALL, **larger})
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"] == ["transformers", "T5TokenizerFast"]
    record = json.loads((folder / "training.json").read_text())
    assert [(h["from"], h["course"], h["clips"]) for h in record["history"]] == [
        (0, [[0, 1, 3], [1, 3, 2], [2, 9, 1]], 4)
    ]
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 20e6


def test_missing_and_damaged_weights_are_named(tmp_path, runs: dict, monkeypatch) -> None:
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"Reinstall attnctl, or train it anew.*train videodit --out runs/videodit"):
        load_shapes("videodit")
    shutil.copytree(runs["out"] / "pipeline", tmp_path / "w")
    file = tmp_path / "w/transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"transformer.*damaged"):
        load_shapes("videodit", folder=tmp_path / "w")


def test_command_line_of_training(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(videodit, "LAYERS", 2)
    monkeypatch.setattr("attnctl.shapes.training.train_videodit._MEASURED", 2)
    arguments = ["videodit", "--out", str(tmp_path), "--clips", "2"]
    arguments += ["--vae-steps", "1", "--steps", "1", "--decoder-steps", "1"]
    arguments += ["--course", "0:1x2", "--threads", "1", "--device", "cpu"]
    assert main(arguments) == 0
    assert "step 1" in capsys.readouterr().out
    assert load_shapes("videodit", folder=tmp_path / "pipeline")
    assert main([*arguments, "--export-only", "--export", str(tmp_path / "x")]) == 0
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "pipeline" / name).read_bytes()
    assert (tmp_path / "x/model_index.json").exists()
    with pytest.raises(ConfigError, match="--resume"):
        main(arguments)
    with pytest.raises(ConfigError, match="9 latent frames, but the course asks for 10"):
        main([*arguments, "--course", "0:10x1"])


def test_it_is_evaluated_and_its_card_holds_the_figures(runs: dict, tmp_path) -> None:
    folder = tmp_path / "w"
    shutil.copytree(runs["out"] / "pipeline", folder)
    pipe = load_shapes("videodit", folder=folder)
    pair = generate_clips(pipe, ["a red circle on gray"] * 2, scale=1.0, seed=0, steps=1)
    (alone,) = generate_clips(pipe, ["a red circle on gray"], scale=1.0, seed=1, steps=1)
    assert alone.shape == (17, 64, 64, 3)
    assert np.abs(pair[1].astype(int) - alone).max() <= 1, "the noise of a video is its own"
    result = {"params": 4.6, **evaluate_video(pipe, n=2, tune=1, steps=1, scales=(1.0,))}
    result["all"]["direction"] = (90.1, 87.0, 92.0)
    text = write_videodit_card(folder, result).read_text()
    row = "| 0 to 3 | 1 x 3 from 0, 3 x 2 from 1, 9 x 1 from 2 | muon, 0.001 | 4 |"
    for part in ("90.1 (87 to 92)", "4.6 million", row, "moving left", "Euler"):
        assert part in text
    assert evaluating.main(["videodit", "--folder", str(folder), "--steps", "1", "--n", "1", "--tune", "1"]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["n"] == 1
