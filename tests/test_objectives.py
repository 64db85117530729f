"""Objectives of a search for heads: judges and scorers, and what they say when their weights are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import zoo_pipelines as pipes
from PIL import Image

from attnctl.errors import ConfigError
from attnctl.pipelines.hunting.scorers import BlipScore, ClipScore, ShapesJudge, harmonic, objective_of


def test_the_judge_marks_what_was_asked() -> None:
    from attnctl.shapes.scenes import Scene, Thing, render

    scene = Scene((Thing("circle", "red", 18, 18, 10), Thing("square", "blue", 45, 45, 10)), "gray")
    image = Image.fromarray(render(scene))
    asked = ["a red circle and a blue square on gray", "a red circle and a blue ring on gray", "a white ring on gray"]
    right, half, wrong = ShapesJudge()([image] * 3, asked)
    assert right > 0.95 > half > wrong == 0


def _clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(pipes.TOKENIZER)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_and_pickscore_are_cosines(tmp_path: Path) -> None:
    folder = str(_clip(tmp_path))
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    marks = ClipScore(folder)(images, ["a cat", "a black bear"])
    assert len(marks) == 2
    assert all(abs(m) <= 100 for m in marks)
    assert ClipScore(folder)(images[:1], ["a cat"]) == pytest.approx(marks[:1], abs=1e-3)
    own = ClipScore(folder, factor=None)
    assert own(images, ["a cat", "a black bear"]) == pytest.approx(
        [m / 100 * float(own.model.logit_scale.exp().detach()) for m in marks], abs=1e-4
    )
    both = harmonic(lambda i, p: [1.0] * len(i), lambda i, p: [3.0] * len(i))
    assert both(images, ["", ""]) == [1.5, 1.5]
    with pytest.raises(ConfigError, match="positive"):
        harmonic(lambda i, p: [-1.0], lambda i, p: [3.0])(images[:1], [""])


def test_blip_marks_by_log_odds(tmp_path: Path) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]", "a", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "projection_dim": 8,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, image_text_hidden_size=8
    )
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path)
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(str(tmp_path / "vocab.txt"))
    )
    processor.save_pretrained(tmp_path)
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    scorer = BlipScore(str(tmp_path))
    marks = scorer(images, ["a cat", "a dog"])
    assert len(marks) == 2
    assert scorer(images[1:], ["a dog"]) == pytest.approx(marks[1:], abs=1e-4)


def test_missing_weights_say_how_to_fetch_them() -> None:
    for make in (lambda: ClipScore("nobody/nothing"), lambda: BlipScore("nobody/nothing")):
        with pytest.raises(ConfigError, match=r"not on this machine.*hf download nobody/nothing"):
            make()


def test_objectives_by_name() -> None:
    assert isinstance(objective_of("shapes"), ShapesJudge)
    assert objective_of("os.path:basename") is os.path.basename
    with pytest.raises(ConfigError, match="Did you mean 'pickscore'"):
        objective_of("pick_score")
    for name in ("nowhere:f", "os:nothing", "os:name"):
        with pytest.raises(ConfigError):
            objective_of(name)
