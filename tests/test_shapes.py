"""The shapes world: scenes, captions, judge, tokenizer."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from attnctl.errors import ConfigError, JudgeError
from attnctl.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    Thing,
    caption,
    judge,
    pair_prompts,
    parse,
    render,
    sample,
    single_prompts,
)
from attnctl.shapes.scenes import WORDS
from attnctl.shapes.tokenizer import MAX_LENGTH, learn_merges, write_tokenizer


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample(rng, 1 + i % 2, "any") for i in range(n)]


def accuracy(pairs: list[tuple[Scene, np.ndarray]]) -> float:
    marks = [judge(image).matches(caption(scene)) for scene, image in pairs]
    return float(np.mean([m.right and m.background for m in marks]))


# scenes


def test_render_is_plain_antialiased_and_repeatable() -> None:
    scene = Scene((Thing("circle", "red", 32, 32, 12),), "teal")
    image = render(scene)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["teal"]
    assert tuple(image[32, 32]) == COLORS["red"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 4, "no anti-aliased edge"
    assert np.array_equal(image, render(scene))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_centred_inside_their_extent(shape: str) -> None:
    image = render(Scene((Thing(shape, "white", 30.5, 34.0, 12.0),), "black")).astype(int).sum(-1)
    ys, xs = np.nonzero(image > 54)
    assert xs.min() >= 18
    assert xs.max() <= 43
    assert ys.min() >= 21
    assert ys.max() <= 46
    assert abs(xs.mean() + 0.5 - 30.5) < 0.3
    assert abs((ys.min() + ys.max() + 1) / 2 - 34) < 1


def test_ring_has_a_hole() -> None:
    assert tuple(render(Scene((Thing("ring", "green", 32, 32, 10),), "gray"))[32, 32]) == BACKGROUNDS["gray"]


def test_objects_do_not_overlap_and_differ() -> None:
    for scene in scenes(300):
        pairs = [t.pair for t in scene.things]
        assert len({c for c, _ in pairs}) == len({s for _, s in pairs}) == len(pairs)
        for i, a in enumerate(scene.things):
            assert a.size <= a.x <= 64 - a.size
            assert a.size <= a.y <= 64 - a.size
            for b in scene.things[i + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.size + b.size


def test_training_holds_pairs_out_of_two_object_scenes_only() -> None:
    rng = np.random.default_rng(0)
    two = {t.pair for _ in range(1500) for t in sample(rng, 2).things}
    one = {t.pair for _ in range(1500) for t in sample(rng, 1).things}
    assert not two & set(HELD_OUT)
    assert one >= set(HELD_OUT)
    assert len(two) == 30 - len(HELD_OUT)


def test_captions_round_trip() -> None:
    for scene in scenes(200):
        back = parse(caption(scene))
        assert [t.pair for t in back.things] == [t.pair for t in scene.things]
        assert back.background == scene.background
    assert caption(parse("A red circle and the blue square on gray.")) == "a red circle and a blue square on gray"
    assert parse("a red circle").background == "gray"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "Expected"),
        ("a red", "Expected"),
        ("a red cicle on gray", "'circle'"),
        ("a redd circle on gray", "'red'"),
        ("a red circle on grey", "'gray'"),
        ("a cat on gray", "Expected"),
    ],
)
def test_captions_outside_the_world_are_refused(text: str, hint: str) -> None:
    with pytest.raises(JudgeError, match=hint):
        parse(text)


def test_bad_scenes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'circle'"):
        Thing("cirle", "red")
    with pytest.raises(ConfigError, match="'red'"):
        Thing("circle", "redd")
    with pytest.raises(ConfigError, match="'gray'"):
        Scene((), "grey")
    with pytest.raises(ConfigError, match="n_objects"):
        sample(np.random.default_rng(0), 4)
    with pytest.raises(ConfigError, match="split"):
        sample(np.random.default_rng(0), 1, "test")


def test_prompt_sets_are_fixed_and_disjoint() -> None:
    assert len(set(single_prompts())) == 120
    sets = {split: set(pair_prompts(0, 5000, split)) for split in ("tuning", "report", "heldout")}
    assert sum(map(len, sets.values())) == 2400, "300 pairs, two orders, four backgrounds"
    assert not sets["tuning"] & sets["report"]
    for prompt in sets["tuning"] | sets["report"]:
        assert not {t.pair for t in parse(prompt).things} & set(HELD_OUT)
    assert pair_prompts(3, 7) == pair_prompts(3, 7)
    assert pair_prompts(3, 7) != pair_prompts(4, 7)
    with pytest.raises(ConfigError, match="report"):
        pair_prompts(0, 1, "reports")


# judge


def test_judge_reads_clean_scenes() -> None:
    assert accuracy([(s, render(s)) for s in scenes(2000)]) >= 0.995


def test_judge_finds_places_and_quality() -> None:
    for scene in scenes(300, seed=1):
        found = judge(render(scene)).things
        assert len(found) == len(scene.things)
        for thing in scene.things:
            f = next(f for f in found if (f.color, f.shape) == thing.pair)
            assert abs(f.x - thing.x) < 1.5
            assert abs(f.y - thing.y) < 2.0
            assert f.iou > 0.8


def _noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), 1.0)


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1], cv2.IMREAD_COLOR)


def _shade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image * rng.uniform(0.88, 1.1, 3) + rng.uniform(-8, 8), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("corrupt", "floor"), [(_noise, 0.97), (_blur, 0.97), (_jpeg, 0.97), (_shade, 0.97)])
def test_judge_reads_corrupted_scenes(corrupt, floor: float) -> None:
    rng = np.random.default_rng(2)
    assert accuracy([(s, corrupt(render(s), rng)) for s in scenes(400, seed=3)]) >= floor


def test_wrong_pictures_are_marked_wrong() -> None:
    rng = np.random.default_rng(4)
    for scene in [sample(rng, 2, "any") for _ in range(200)]:
        a, b = scene.things
        text = caption(scene)
        swapped = (Thing(a.shape, b.color, a.x, a.y, a.size), Thing(b.shape, a.color, b.x, b.y, b.size))
        m = judge(render(Scene(swapped, scene.background))).matches(text)
        assert m.all_present
        assert m.bound == (False, False)
        assert m.extra == 0
        m = judge(render(Scene((a,), scene.background))).matches(text)
        assert m.present == m.bound == (True, False)
        assert not m.right
        m = judge(render(scene)).matches(caption(Scene((a,), scene.background)))
        assert m.bound == (True,)
        assert m.extra == 1
        assert not m.right
        other = next(x for x in BACKGROUNDS if x != scene.background)
        m = judge(render(Scene(scene.things, other))).matches(text)
        assert m.right
        assert not m.background


@pytest.mark.parametrize("part", [0.35, 0.5, 0.65])
def test_a_leaking_colour_is_marked_wrong(part: float) -> None:
    rng = np.random.default_rng(5)
    wrong = []
    for scene in [sample(rng, 1) for _ in range(200)]:
        (a,) = scene.things
        leak = render(
            Scene((Thing(a.shape, "blue" if a.color != "blue" else "red", a.x, a.y, a.size),), scene.background)
        )
        image = render(scene)
        cut = int(a.x - a.size + 2 * part * a.size)
        image[:, cut:] = leak[:, cut:]
        wrong.append(not judge(image).matches(caption(scene)).right)
    assert np.mean(wrong) >= 0.99


def test_two_objects_that_merge_or_are_ragged_are_marked_wrong() -> None:
    scene = Scene((Thing("square", "red", 20, 20, 12),), "gray")
    image = render(scene)
    image[8:20, 8:20] = BACKGROUNDS["gray"]  # an L is no square
    assert not judge(image).matches(caption(scene)).right
    bar = np.full((64, 64, 3), BACKGROUNDS["gray"], np.uint8)
    bar[30:36, 10:50] = COLORS["red"]
    assert judge(bar).things[0].shape is None
    assert not judge(bar).matches("a red square on gray").right


def test_an_empty_picture_has_no_objects() -> None:
    verdict = judge(np.full((64, 64, 3), 112, np.uint8))
    assert verdict.things == ()
    assert verdict.background == "gray"
    m = verdict.matches("a red circle on gray")
    assert not m.all_present
    assert m.iou == 0.0


def test_noise_alone_crashes_nothing() -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        verdict = judge(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        assert not verdict.matches("a red circle on gray").right


@pytest.mark.parametrize(
    "bad", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8), "x"]
)
def test_the_judge_refuses_other_pictures(bad: object) -> None:
    with pytest.raises(JudgeError, match="64x64"):
        judge(bad)


# tokenizer


def test_every_word_is_one_token_and_nothing_crashes(tmp_path) -> None:
    from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast

    folder = write_tokenizer(tmp_path)
    for cls in (CLIPTokenizer, CLIPTokenizerFast, AutoTokenizer):
        if cls is AutoTokenizer:
            (folder / "config.json").write_text('{"model_type": "clip"}')
        tokenizer = cls.from_pretrained(str(folder))
        assert tokenizer.model_max_length == MAX_LENGTH
        for word in WORDS:
            assert len(tokenizer(word).input_ids) == 3, word
        ids = [tokenizer(word).input_ids[1] for word in WORDS]
        assert len(set(ids)) == len(set(WORDS))
        text = "a zebra, 猫 \U0001f600 é on grey!"
        assert len(tokenizer(text, truncation=True).input_ids) <= MAX_LENGTH
        padded = tokenizer("a red circle", padding="max_length", truncation=True).input_ids
        assert len(padded) == MAX_LENGTH
        assert padded[0] == tokenizer.bos_token_id
        assert padded[4:] == [tokenizer.eos_token_id] * 12
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
    if tokenizer.is_fast:
        spans = tokenizer("a red circle", return_offsets_mapping=True).offset_mapping
        assert spans == [(0, 0), (0, 1), (2, 5), (6, 12), (0, 0)]


def test_merges_are_deterministic() -> None:
    assert learn_merges() == learn_merges(tuple(reversed(WORDS)))
