"""The shapes models: training that resumes exactly, loading, and a small guard of the shipped weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attnctl.errors import ConfigError
from attnctl.shapes import judge, load_shapes, pair_prompts, render, sample, single_prompts
from attnctl.shapes.data import Latents, draw_crops, draw_images, make_cache, to_tensor
from attnctl.shapes.load import WEIGHTS
from attnctl.shapes.scenes import caption
from attnctl.shapes.training.card import write_card
from attnctl.shapes.training.evaluate import contact_sheet, generate, localisation, score, wilson
from attnctl.shapes.training.loop import Plan, average_decay, learning_rate, train
from attnctl.shapes.training.models import build_tokenizer, build_unet, build_vae
from attnctl.shapes.training.muon import orthogonalise
from attnctl.shapes.training.options import shares
from attnctl.shapes.training.train import Denoising, export, finish_vae, main, train_text2image, train_vae


class Killed(Exception):
    """Stand in for a kill."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, optimizer: str) -> None:
    plan = Plan(steps=30, optimizer=optimizer, save_every=10, warmup=5)
    seen: list[int] = []

    def run(out: Path, resume: bool = False, stop: int | None = None):
        model = tiny()

        def loss(generator: torch.Generator, step: int):
            seen.append(1)
            if stop is not None and len(seen) > stop:
                raise Killed
            return (model(torch.randn(8, 3, 8, 8, generator=generator)) - 1).square().mean()

        return train({"m": model}, loss, out, plan, resume=resume, quiet=True)

    through = run(tmp_path / "a")
    seen.clear()
    with pytest.raises(Killed):
        run(tmp_path / "b", stop=17)
    assert json.loads((tmp_path / "b/checkpoint/state.json").read_text())["step"] == 10
    resumed = run(tmp_path / "b", resume=True)
    assert all(torch.equal(through[n], resumed[n]) for n in through)
    runs = [json.loads((tmp_path / d / "checkpoint/state.json").read_text())["history"] for d in "ab"]
    assert runs[0] == runs[1]
    assert [r["from"] for r in runs[0]] == [0]
    rows = [[json.loads(x) for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in "ab"]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]
    assert rows[0][-1]["mean"] < 1.5
    assert sorted(p.name for p in (tmp_path / "b/checkpoint").iterdir()) == [
        "average.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--resume"):
        run(tmp_path / "b")


@pytest.mark.parametrize("damage", ["missing", "truncated", "other model", "bad json"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage: str) -> None:
    def run(model: nn.Module, resume: bool):
        plan = Plan(steps=3, save_every=2)
        return train(
            {"m": model}, lambda g, i: model(torch.ones(1, 3, 8, 8)).mean(), tmp_path, plan, resume=resume, quiet=True
        )

    run(tiny(), False)
    weights = tmp_path / "checkpoint/weights.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "bad json":
        (tmp_path / "checkpoint/state.json").write_text("{")
    with pytest.raises(ConfigError, match="checkpoint"):
        run(nn.Conv2d(3, 4, 3) if damage == "other model" else tiny(), True)


def test_plan_rates() -> None:
    plan = Plan(steps=100, lr=1.0, warmup=10, cooldown=0.2)
    rates = [learning_rate(i, plan) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[79] == 1.0
    assert rates[99] == pytest.approx(0.05)
    assert average_decay(0, plan) == 0.1
    assert average_decay(10**6, plan) == plan.average
    for bad in ({"steps": 0}, {"steps": 1, "save_every": 0}, {"steps": 1, "optimizer": "sgd"}):
        with pytest.raises(ConfigError):
            Plan(**bad)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_finishing_the_autoencoder_changes_the_latents_scale_only(tmp_path) -> None:
    vae = train_vae(tmp_path, Plan(steps=2, save_every=2), batch=2, quiet=True)
    raw = build_vae().eval()
    average = {f"vae/{n}": p.detach().clone() for n, p in raw.named_parameters()}
    x = draw_images(torch.Generator().manual_seed(2), 64)
    with torch.no_grad():
        before = raw.decode(raw.encode(x[:2]).latent_dist.mean).sample
        noise_before = raw.encode(x[:2]).latent_dist.std / raw.encode(x).latent_dist.mean.std((0, 2, 3))[:, None, None]
        finish_vae(vae, average)
        z = vae.encode(x).latent_dist
        after = vae.decode(z.mean[:2]).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(z.mean.std((0, 2, 3)), torch.ones(4), atol=0.2)
    assert torch.allclose(z.std[:2], noise_before, rtol=0.3)


def fake_latents() -> Latents:
    rng = np.random.default_rng(0)
    captions = [caption(sample(rng, 1 + (i >= 12))) for i in range(16)]
    return Latents(torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), captions, 12)


def test_text2image_trains_resumes_and_exports(tmp_path) -> None:
    latents, options = fake_latents(), {"batch": 2, "bf16": False, "quiet": True}
    vae = build_vae()
    plan = Plan(steps=3, optimizer="muon", save_every=2, warmup=1)
    through = train_text2image(tmp_path / "a", plan, vae, latents, **options)

    drawn: list[int] = []

    class Stop(Latents):
        def draw(self, *args):
            drawn.append(1)
            if len(drawn) > 2:
                raise Killed
            return Latents.draw(self, *args)

    stop = Stop(latents.values, latents.captions, latents.n_single)
    with pytest.raises(Killed):
        train_text2image(tmp_path / "b", plan, vae, stop, **options)
    resumed = train_text2image(tmp_path / "b", plan, vae, latents, resume=True, **options)
    for part in ("unet", "text_encoder"):
        a, b = (getattr(p, part).state_dict() for p in (through, resumed))
        assert all(torch.equal(a[n], b[n]) for n in a), part
    before = build_unet().state_dict()
    assert any(not torch.equal(before[n], v) for n, v in resumed.unet.state_dict().items())

    assert export(tmp_path / "b", vae, tmp_path / "pipeline") == 3
    pipe = load_shapes(folder=tmp_path / "pipeline")
    image = pipe("a red circle on gray", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert not list((tmp_path / "pipeline").rglob("*.bin"))
    record = json.loads((tmp_path / "pipeline/training.json").read_text())
    assert [(h["from"], h["pairs"], h["batch"]) for h in record["history"]] == [(0, [[0, 0.125]], 2)]


def test_cache_is_made_once_and_draws_the_right_share(tmp_path) -> None:
    vae = build_vae()
    first = make_cache(tmp_path, vae, n_single=5, n_pairs=3)
    again = make_cache(tmp_path, vae, n_single=50, n_pairs=30)
    assert torch.equal(first.values, again.values)
    assert first.captions == again.captions
    assert sum(" and " in c for c in first.captions) == 3
    index = first.draw(torch.Generator().manual_seed(0), 4000, 0.125)
    assert 0.1 < (index >= 5).float().mean() < 0.15
    assert set(index.tolist()) == set(range(8))


def test_the_share_of_pairs_changes_with_the_steps(tmp_path) -> None:
    assert shares("0.125") == [(0, 0.125)]
    assert shares("0.125,2000:0.5,3000:0.15") == [(0, 0.125), (2000, 0.5), (3000, 0.15)]
    for bad in ("", "x", "5:0.5", "1.5", "0.1,100:-1"):
        with pytest.raises(ConfigError, match="Shares"):
            shares(bad)

    class Seen(Latents):
        def draw(self, generator, n, pairs):
            drawn.append(pairs)
            raise Killed

    drawn: list[float] = []
    latents = fake_latents()
    tokenizer = build_tokenizer(tmp_path)
    seen = Seen(latents.values, latents.captions, latents.n_single)
    loss = Denoising(nn.Linear(1, 1), nn.Linear(1, 1), tokenizer, seen, pairs=[(0, 0.1), (5, 0.5), (9, 0.2)])
    for step in (0, 4, 5, 8, 9, 100):
        with pytest.raises(Killed):
            loss(torch.Generator(), step)
    assert drawn == [0.1, 0.1, 0.5, 0.5, 0.2, 0.2]


def test_crops_show_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    x = draw_images(generator, 4)
    assert x.shape == (4, 3, 64, 64)
    assert x.min() >= -1
    assert x.max() <= 1
    crops = draw_crops(generator, x, 4)
    assert crops.shape == (16, 3, 32, 32)
    assert (crops.std((2, 3)).sum(1) > 0.05).float().mean() > 0.9


def test_command_line_of_training(tmp_path, capsys) -> None:
    arguments = [
        "--out",
        str(tmp_path),
        "--vae-steps",
        "1",
        "--decoder-steps",
        "1",
        "--scenes",
        "4",
        "--pair-scenes",
        "2",
    ]
    assert main(["text2image", *arguments, "--steps", "1", "--batch", "2", "--threads", "1"]) == 0
    assert "step 1" in capsys.readouterr().out
    assert main(["text2image", *arguments, "--export-only", "--export", str(tmp_path / "x")]) == 0
    assert (tmp_path / "x/model_index.json").exists()
    with pytest.raises(SystemExit):
        main(["text3image", *arguments])


# loading


@pytest.mark.parametrize(
    ("name", "message"),
    [("vidoe", "Did you mean 'video'"), ("text2imag", "Did you mean 'text2image'"), ("x", "known")],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_shapes(name)


@pytest.fixture(scope="module")
def shipped() -> Path:
    return WEIGHTS / "text2image"


@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "empty", "json"])
def test_damaged_weight_files_are_named(tmp_path, shipped: Path, damage: str) -> None:
    shutil.copytree(shipped, tmp_path / "w")
    file = tmp_path / "w" / ("unet/config.json" if damage == "json" else "unet/diffusion_pytorch_model.safetensors")
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"truncated": data[:-100], "header": data[:50], "empty": b"", "json": b"{"}[damage])
    with pytest.raises(ConfigError, match=r"unet.*attnctl\.shapes\.training\.train") as error:
        load_shapes(folder=tmp_path / "w")
    assert str(file) in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_absent_gpu_is_named(shipped: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        load_shapes(device="cuda")


# the shipped weights


@pytest.fixture(scope="module")
def pipe(shipped: Path):
    return load_shapes("text2image")


def test_shipped_pipeline_is_what_it_says(pipe, shipped: Path) -> None:
    from diffusers import StableDiffusionPipeline

    assert type(pipe) is StableDiffusionPipeline
    assert pipe.vae_scale_factor == 4
    assert pipe.unet.config.sample_size == 16
    assert pipe.unet.dtype == torch.float32
    assert pipe.tokenizer.model_max_length == 16
    assert sum(f.stat().st_size for f in shipped.rglob("*")) < 15e6
    assert not [f for f in shipped.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert load_shapes(dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_shipped_autoencoder_keeps_what_the_judge_sees(pipe) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample(rng, 1 + i % 2, "any") for i in range(96)]
    x = to_tensor(np.stack([render(s) for s in scenes]))
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
    images = (y.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.mean(score(images, [caption(s) for s in scenes])["right"]) >= 0.97


@pytest.mark.slow
def test_shipped_weights_draw_what_is_asked(pipe) -> None:
    prompts = [single_prompts()[i] for i in range(3, 120, 5)]
    marks = score(generate(pipe, prompts, scale=4.0, seed=0, steps=12), prompts)
    assert np.mean(marks["right"]) >= 0.8
    assert np.mean(marks["background"]) >= 0.9


@pytest.mark.slow
def test_noun_maps_peak_inside_their_objects(pipe) -> None:
    before = dict(pipe.unet.attn_processors)
    inside = localisation(pipe, scale=4.0, n=16, seed=0, steps=10)
    assert len(inside["mid"]) >= 10
    assert max(np.mean(inside[k]) for k in ("mid", "up", "mid+up")) >= 0.7
    assert np.mean(inside["chance"]) < 0.25
    assert pipe.unet.attn_processors == before


# evaluation


def test_wilson_interval() -> None:
    assert wilson(50, 100) == (50.0, 40.4, 59.6)
    assert wilson(0, 0) == (0.0, 0.0, 100.0)
    share, low, high = wilson(512, 512)
    assert (share, high) == (100.0, 100.0)
    assert 99 < low < 100


def test_score_and_sheet() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample(rng, 1), sample(rng, 2)]
    images, prompts = [render(s) for s in scenes], [caption(s) for s in scenes]
    marks = score(images, prompts)
    assert marks["right"] == marks["present"] == marks["bound"] == marks["background"] == [1.0, 1.0]
    assert score(images[:1], pair_prompts(0, 1))["right"] == [0.0]
    sheet = contact_sheet(images, prompts, columns=2)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * 134
    assert judge(images[0]).things


def test_card_holds_every_figure(tmp_path) -> None:
    row = dict.fromkeys(("right", "present", "bound", "background"), (90.1, 87.0, 92.0)) | {"iou": 0.95}
    result = {
        "params": 5.2, "steps": 20, "scale": 4.0, "n": 512, "single": row, "pairs": row, "heldout": row,
        "sweep": {"4": {"single": (90.1, 87.0, 92.0), "pairs": (50.0, 45.0, 55.0)}},
        "noun_maps": dict.fromkeys(("mid", "up", "mid+up"), (85.0, 80.0, 90.0)) | {"chance": 14.0},
    }  # fmt: skip
    runs = [
        {"from": k, "batch": 32, "optimizer": "muon", "lr": 2e-3, "pairs": [[0, p]], "scenes": 9}
        for k, p in ((0, 0.125), (20, 0.5))
    ]
    (tmp_path / "training.json").write_text(json.dumps({"step": 50, "history": runs}))
    text = write_card(tmp_path, result).read_text()
    for part in (
        "90.1 (87 to 92)",
        "50 (45 to 55)",
        "5.2 million",
        "red ring",
        "14 %",
        "load_shapes",
        "| 20 to 50 | 32 | muon, 0.002 | 50 % |",
    ):
        assert part in text
