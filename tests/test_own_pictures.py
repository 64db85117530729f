"""Training on a folder of pictures by commands: three classes, masks, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from attnctl.app.cli import main
from attnctl.errors import ConfigError
from attnctl.pipelines.vision.folders import find_classes, find_masks, open_picture
from attnctl.pipelines.vision.own_pictures import Recipe, train_pictures
from attnctl.pipelines.vision.runs import load_run

pytest.importorskip("torchmetrics")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = ["--model", "vit_tiny_patch16_224", "--model-options", json.dumps(SMALL)]


def picture(kind: str, seed: int) -> Image.Image:
    """Draw stripes that run across, along or not at all, with noise."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(40) * 1.2 + rng.random() * 6)
    pattern = {"across": wave[:, None], "along": wave[None], "flat": np.zeros((1, 1))}[kind]
    field = 128 + 80 * np.broadcast_to(pattern, (40, 40))[..., None] + 20 * rng.standard_normal((40, 40, 3))
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Draw a folder of three classes, 16 pictures each."""
    root = tmp_path / "data"
    for kind in ("across", "along", "flat"):
        (root / kind).mkdir(parents=True)
        for n in range(16):
            picture(kind, n).save(root / kind / f"{n}.png")
    return root


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Draw pictures of a bright square with masks of two classes."""
    root = tmp_path / "scenes"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for n in range(10):
        rng = np.random.default_rng(n)
        y, x = rng.integers(0, 30, 2)
        field, mask = rng.integers(0, 80, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
        field[y : y + 30, x : x + 30] += 150
        mask[y : y + 30, x : x + 30] = 1
        Image.fromarray(field).save(root / "images" / f"{n}.png")
        Image.fromarray(mask).save(root / "masks" / f"{n}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


def test_three_commands(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "answers"
    flags = [
        "--epochs",
        "16",
        "--lr",
        "0.003",
        "--batch",
        "12",
        "--out",
        str(run),
        "--ema",
        "0.8",
        "--json",
        "--swap",
        "moh",
    ]
    assert main(["classify", str(classes), *VIT, *flags]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["scores"]["accuracy"] > 0.5
    assert {p.name for p in run.iterdir()} >= {
        "model.safetensors",
        "run.json",
        "confusion.png",
        "curve.png",
        "predictions.png",
    }
    assert main(["predict", str(run), str(classes / "along"), "--out", str(out), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 16
    assert {a["map"] for a in answers} == {"relevance"}
    assert len(list(out.glob("*.png"))) == 16
    assert main(["classify", str(classes), *VIT, *flags]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_answers_alike(classes: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = tmp_path / "run"
    train_pictures(classes, run, Recipe(model="vit_tiny_patch16_224", model_options=SMALL, epochs=1))
    assert main(["export", str(run)]) == 0
    x = torch.rand(3, 3, 32, 32)
    got = runtime.InferenceSession(run / "model.onnx").run(None, {"images": x.numpy()})[0]
    np.testing.assert_allclose(got, load_run(run)[1](x).detach().numpy(), atol=1e-4)


def test_a_resumed_training_says_which_settings_change() -> None:
    from attnctl.pipelines.vision.runs import resumption

    state = {"epoch": 3, "recipe": {"lr": 0.001, "crop": 0.4}}
    assert resumption(state, {"lr": 0.01, "crop": 0.4}) == "Training goes on after epoch 3; lr 0.001 becomes 0.01."
    assert "does not say" in resumption({"epoch": 3}, {"lr": 0.01})
    assert resumption({}, {"lr": 0.01}) == "No checkpoint is there: training begins anew."


def test_resumed_training_is_the_same(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(model="vit_tiny_patch16_224", model_options=SMALL, epochs=3, batch=12, ema=0.9, mixup=0.2)
    whole = train_pictures(classes, tmp_path / "whole", recipe)
    from attnctl.pipelines.vision import own_pictures

    saved: list[int] = []
    save = own_pictures.save_checkpoint

    def stop(*args: Any) -> None:
        save(*args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(own_pictures, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train_pictures(classes, tmp_path / "part", recipe)
    monkeypatch.setattr(own_pictures, "save_checkpoint", save)
    with pytest.raises(ConfigError, match="go on with resume"):
        train_pictures(classes, tmp_path / "part", recipe)
    lines: list[str] = []
    rest = train_pictures(classes, tmp_path / "part", recipe, resume=True, announce=lines.append)
    assert lines[-1] == "Training goes on after epoch 2, with the same settings."
    assert rest.losses == whole.losses
    for change, said in (({"ema": 0.0}, "with a running average"), ({"head": True}, "trained other weights")):
        with pytest.raises(ConfigError, match=said):
            train_pictures(classes, tmp_path / "part", replace(recipe, **change), resume=True)
    one, two = (load_run(tmp_path / n)[1].state_dict() for n in ("whole", "part"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    (classes / "across").rename(classes / "sideways")
    with pytest.raises(ConfigError, match="was trained on the classes across"):
        train_pictures(classes, tmp_path / "part", recipe, resume=True)


def test_masks_by_commands(masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    run, out = tmp_path / "run", tmp_path / "answers"
    flags = ["--epochs", "3", "--size", "64", "--batch", "4", "--lr", "0.003", "--out", str(run), "--json"]
    assert main(["segment", str(masks), *flags]) == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]["iou"]) <= {"ground", "square"}
    assert (run / "iou.png").stat().st_size > 0
    assert main(["predict", str(run), str(masks / "images" / "3.png"), "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert answer["map"] == "attention, all places"
    again = ["predict", str(run), str(masks / "images" / "3.png"), "--out", str(out)]
    assert main(again) == 1
    assert "already there" in capsys.readouterr().err
    assert main([*again, "--force", "--no-maps"]) == 0
    assert Image.open(out / "000-3-mask.png").size == (64, 64)


def test_an_unknown_decoder_is_refused(masks: Path, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ConfigError, match=r"decoder='unett' was given; expected one of unet.* Did you mean 'unet'"):
        train_pictures(masks, tmp_path / "run", Recipe(task="segment", decoder="unett", size=64))


def test_only_the_head(classes: Path, tmp_path: Path) -> None:
    recipe = Recipe(model="vit_tiny_patch16_224", model_options=SMALL, epochs=1, head=True)
    from attnctl.pipelines.vision.runs import Run, build_model

    run = Run(task="classify", model=recipe.model, classes=("a", "b", "c"), model_options=SMALL, size=(32, 32))
    torch.manual_seed(0)
    start = build_model(run).state_dict()
    train_pictures(classes, tmp_path / "run", recipe)
    changed = {k for k, v in load_run(tmp_path / "run")[1].state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {"head.weight", "head.bias"}


def test_pictures_that_are_refused(classes: Path, tmp_path: Path) -> None:
    first = picture("flat", 0)
    bad = tmp_path / "bad"
    bad.mkdir()
    first.convert("CMYK").save(bad / "print.jpg")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(bad / "deep.png")
    first.save(bad / "moves.gif", save_all=True, append_images=[picture("along", 1)])
    (bad / "torn.png").write_bytes((classes / "flat" / "1.png").read_bytes()[:400])
    (bad / "text.jpg").write_text("no picture")
    for name, said in (
        ("print.jpg", "CMYK colours"), ("deep.png", "more than 8 bits"), ("moves.gif", "animated"),
        ("torn.png", "cannot be read"), ("text.jpg", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}.*{said}"):
            open_picture(bad / name)
    sideways = Image.new("RGB", (40, 20))
    exif = sideways.getexif()
    exif[ExifTags.Base.Orientation] = 6
    sideways.save(bad / "phone.jpg", exif=exif)
    assert open_picture(bad / "phone.jpg").size == (20, 40)
    first.save(bad / "preview.jpg", format="MPO", save_all=True, append_images=[picture("along", 1)])
    assert open_picture(bad / "preview.jpg").size == (40, 40)
    (classes / "flat" / "torn.png").write_bytes((bad / "torn.png").read_bytes())
    with pytest.raises(ConfigError, match=r"flat/torn\.png cannot be read"):
        train_pictures(classes, tmp_path / "run", Recipe())
    assert not (tmp_path / "run").exists()


def test_folders_that_are_refused(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has 1 class folders"):
        find_classes(tmp_path / "one")
    (tmp_path / "one" / "b").mkdir()
    with pytest.raises(ConfigError, match="one/a has no pictures"):
        find_classes(tmp_path / "one")
    with pytest.raises(ConfigError, match="is no folder"):
        find_classes(tmp_path / "none")
    for name in ("images", "masks"):
        (tmp_path / "scenes" / name).mkdir(parents=True)
        picture("flat", 0).save(tmp_path / "scenes" / name / "0.png")
    with pytest.raises(ConfigError, match="attnctl segment"):
        find_classes(tmp_path / "scenes")
    (tmp_path / "parts").mkdir()
    classes.rename(tmp_path / "parts" / "train")
    with pytest.raises(ConfigError, match="has train, but none of val"):
        find_classes(tmp_path / "parts")
    for kind in ("across", "along", "fat"):
        (tmp_path / "parts" / "val" / kind).mkdir(parents=True)
        picture("flat", 0).save(tmp_path / "parts" / "val" / kind / "0.png")
    with pytest.raises(ConfigError, match=r"is a class that .* lacks"):
        find_classes(tmp_path / "parts")


def test_masks_that_are_refused(masks: Path) -> None:
    mask = masks / "masks" / "4.png"
    good = mask.read_bytes()
    for image, said in (
        (Image.new("L", (32, 64)), "masks/4.png is 32 x 64, its picture 4.png 64 x 64"),
        (Image.new("L", (64, 64), 7), "has the value 7, but there are 2 classes"),
        (Image.new("RGB", (64, 64)), "has mode RGB; expected one channel"),
    ):
        image.save(mask)
        with pytest.raises(ConfigError, match=said):
            find_masks(masks)
    mask.unlink()
    with pytest.raises(ConfigError, match=r"images/4\.png has no mask"):
        find_masks(masks)
    mask.write_bytes(good)
    values = np.array(Image.open(mask))
    values[:3] = 255  # counts for nothing
    Image.fromarray(values).save(mask)
    assert find_masks(masks).classes == ("ground", "square")
    names = masks / "classes.txt"
    for text, said in ((b"ground\n", "names 1 class"), (b"gr\xfcn\nsquare\n", "not text in UTF-8")):
        names.write_bytes(text)
        with pytest.raises(ConfigError, match=said):
            find_masks(masks)
    names.unlink()
    for n in range(10):
        Image.new("L", (64, 64), 255 * (n % 2)).save(masks / "masks" / f"{n}.png")
    with pytest.raises(ConfigError, match="write 1 for 255"):
        find_masks(masks)
    (masks / "images" / "0.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"images/0\.png cannot be read"):
        find_masks(masks)


def test_what_lies_beside_the_pictures(classes: Path, masks: Path) -> None:
    (classes / "flat" / "._0.png").write_bytes(b"what macOS leaves")
    (classes / ".cache").mkdir()
    assert not find_classes(classes).left_out
    (classes / "flat" / "notes.txt").write_text("")
    picture("flat", 1).save(classes / "loose.PNG")
    picture("flat", 1).save(classes / "flat" / "a b\u00e9 \u5149.PNG")
    split = find_classes(classes)
    assert [p.name for p in split.left_out] == ["loose.PNG", "notes.txt"]
    assert "2 other files are left out" in split.describe()
    assert len(split.train) + len(split.test) == 49
    (classes / "flat" / "gone.png").symlink_to(classes / "nowhere.png")
    with pytest.raises(ConfigError, match=r"gone\.png is a link to a file that does not exist"):
        find_classes(classes)
    (classes / "flat" / "gone.png").unlink()
    (classes / "flat" / "link.jpeg").symlink_to(classes / "flat" / "1.png")
    more = find_classes(classes)
    assert len(more.train) + len(more.test) == 50
    (classes / "flat" / "old").mkdir()
    picture("flat", 1).save(classes / "flat" / "old" / "9.png")
    with pytest.raises(ConfigError, match=r"old/9\.png lies in a folder below"):
        find_classes(classes)
    (masks / "images" / ".hidden").mkdir()
    (masks / "masks" / "._3.png").write_bytes(b"what macOS leaves")
    (masks / "images" / "notes.txt").write_text("")
    assert [p.name for p in find_masks(masks).left_out] == ["notes.txt"]
    Image.open(masks / "masks" / "3.png").save(masks / "masks" / "3.tif")
    with pytest.raises(ConfigError, match=r"3\.tif and 3\.png have one name"):
        find_masks(masks)
    (masks / "masks" / "3.tif").unlink()
    first = Image.open(masks / "masks" / "3.png")
    (masks / "masks" / "3.png").unlink()
    first.save(masks / "masks" / "3.gif", save_all=True, append_images=[Image.new("L", first.size, 1)])
    with pytest.raises(ConfigError, match=r"3\.gif is animated"):
        find_masks(masks)


def test_accents_in_two_spellings_are_one_name(classes: Path, masks: Path) -> None:
    (classes.parent / "parts").mkdir()
    for part, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        for kind in (name, "flat"):
            folder = classes.parent / "parts" / part / kind
            folder.mkdir(parents=True)
            picture("flat", 0).save(folder / "0.png")
    assert find_classes(classes.parent / "parts").classes == ("caf\u00e9", "flat")
    (classes / "caf\u00e9").mkdir()
    (classes / "cafe\u0301").mkdir()
    for name in ("caf\u00e9", "cafe\u0301"):
        picture("flat", 0).save(classes / name / "0.png")
    with pytest.raises(ConfigError, match="accents in two spellings"):
        find_classes(classes)
    (masks / "images" / "3.png").rename(masks / "images" / "\u00e9.png")
    (masks / "masks" / "3.png").rename(masks / "masks" / "e\u0301.png")
    assert len(find_masks(masks).train) + len(find_masks(masks).test) == 10


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    import signal

    from attnctl.pipelines.vision.runs import save_checkpoint
    from attnctl.plans.writing import WriteError

    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(tmp_path, model, None, optimizer, {"epoch": 1})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
        with pytest.raises(WriteError, match=r"The checkpoint cannot be written.*The last one is kept"):
            save_checkpoint(tmp_path, model, None, optimizer, {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text()) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_values_that_are_refused(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="epochs=0"):
        Recipe(epochs=0)
    for name, value in (("workers", -1), ("warmup", -1), ("mixup", -0.1), ("crop", 1.5), ("size", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value} was given"):
            Recipe(**{name: value})
    assert main(["classify", str(classes), "--epochs", "0"]) == 2
    assert main(["classify", str(classes), "--model-options", "{img"]) == 2
    assert "expected a JSON object" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="mixup, cutmix and smoothing are for classes"):
        Recipe(task="segment", mixup=0.1)
    assert main(["classify", str(classes), "--out", str(tmp_path / "run"), "--model", "vit_tny"]) == 1
    assert "is no name of timm" in capsys.readouterr().err
    assert main(["classify", str(classes), "--out", str(tmp_path / "run"), "--swap-options", "[1]"]) == 2
    assert main(["predict", str(classes)]) == 2
    assert "at least one picture" in capsys.readouterr().err
    assert main(["predict", str(classes), str(classes)]) == 1
    assert "run.json" in capsys.readouterr().err
