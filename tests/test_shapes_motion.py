"""Scenes in motion and the judge for videos."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from attnctl.errors import ConfigError, JudgeError
from attnctl.shapes import (
    Clip,
    Motion,
    Scene,
    Thing,
    clip_caption,
    clip_prompts,
    judge_clip,
    parse_clip,
    render_clip,
    sample_clip,
)
from attnctl.shapes.motion import DIRECTIONS, FRAMES, SPEEDS, describe
from attnctl.shapes.training.judge_errors import clip_errors, main, scene_errors
from attnctl.shapes.training.models import build_tokenizer


def moving(
    velocity: tuple[float, float], shape: str = "circle", color: str = "red", x: float = 32, y: float = 32
) -> Clip:
    return Clip(Scene((Thing(shape, color, x, y, 11.0),), "gray"), (velocity,))


# scenes in motion


def test_objects_stay_inside_and_do_what_the_caption_says() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        clip = sample_clip(rng)
        (motion,) = parse_clip(clip_caption(clip))[1]
        seen.add(str(motion))
        u, v = clip.velocities[0]
        assert describe((u, v)) == motion
        for thing in clip.frame(0).things + clip.frame(FRAMES - 1).things:
            assert thing.size < thing.x < 64 - thing.size
            assert thing.size < thing.y < 64 - thing.size
    assert len(seen) == 9


def test_a_motion_asked_for_is_drawn() -> None:
    rng = np.random.default_rng(1)
    for direction in DIRECTIONS:
        for speed in SPEEDS if direction != "still" else (None,):
            asked = Motion(direction, speed)
            assert all(describe(sample_clip(rng, asked).velocities[0]) == asked for _ in range(20))


def test_clips_are_pictures_that_move() -> None:
    video = render_clip(moving((1.0, 0.0), x=20))
    assert video.shape == (FRAMES, 64, 64, 3)
    assert video.dtype == np.uint8
    assert np.array_equal(video[8, :, 20:50], video[0, :, 12:42]), "whole pixels move without change"
    still = render_clip(moving((0.0, 0.0)))
    assert (still == still[0]).all()


def test_captions_leave_out_what_they_are_told_to() -> None:
    clip = moving((-1.8, 0.0), x=50)
    assert clip_caption(clip) == "a red circle moving left fast on gray"
    assert clip_caption(clip, speed=False) == "a red circle moving left on gray"
    assert clip_caption(clip, motion=False) == "a red circle on gray"
    assert clip_caption(moving((0, 0))) == "a red circle still on gray"


def test_captions_of_videos_are_read_back() -> None:
    scene, motions = parse_clip("A red circle moving up slow and a blue ring still on black.")
    assert [t.pair for t in scene.things] == [("red", "circle"), ("blue", "ring")]
    assert scene.background == "black"
    assert motions == (Motion("up", "slow"), Motion("still"))
    assert parse_clip("a red circle")[1] == (Motion(),)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a red circle moving west on gray", "direction 'west'"),
        ("a red circle moving left quick on gray", "speed 'quick'"),
        ("a red cicle moving left on gray", "'circle'"),
        ("a red circle moving still fast on gray", "needs a direction"),
        ("", "Expected"),
        ("still on gray", "Expected"),
    ],
)
def test_other_captions_are_refused(text: str, hint: str) -> None:
    with pytest.raises(JudgeError, match=hint):
        parse_clip(text)


def test_bad_clips_are_refused() -> None:
    for bad in ({"direction": "lef"}, {"direction": "left", "speed": "fas"}, {"speed": "fast"}):
        with pytest.raises(ConfigError):
            Motion(**bad)
    with pytest.raises(ConfigError, match="as many velocities"):
        Clip(Scene((Thing("circle", "red"),)), ())


def test_prompts_ask_for_every_motion_and_are_short_enough(tmp_path) -> None:
    prompts = clip_prompts(0, 90)
    assert prompts == clip_prompts(0, 90)
    assert prompts != clip_prompts(1, 90)
    motions = [str(parse_clip(p)[1][0]) for p in prompts]
    assert {m: motions.count(m) for m in motions} == dict.fromkeys(motions, 10)
    tokenizer = build_tokenizer(tmp_path)
    assert max(len(tokenizer(p).input_ids) for p in prompts) == 10


# judge


def test_the_judge_reads_rendered_scenes_and_videos() -> None:
    wrong = clip_errors(40)
    assert wrong["any"] == 0, wrong
    assert scene_errors(200, seed=7)["clean"] == 0


def test_the_command_prints_the_judges_errors_and_nothing_else() -> None:
    command = [
        sys.executable,
        "-m",
        "attnctl.shapes.training.judge_errors",
        "--scenes",
        "3",
        "--videos",
        "2",
        "--seed",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["scenes, clean: wrong 0 of 2 (0.00 %)", "scenes, spoilt: wrong 0 of 1 (0.00 %)"]
    assert "videos, direction: wrong 0 of 2 (0.00 %)" in lines
    assert done.stderr == ""
    assert main(["--scenes", "0", "--videos", "0"]) == 0


def test_the_judge_measures_the_way() -> None:
    for velocity in ((-1.7, 0.0), (0.0, 0.8), (0.0, -1.9), (0.0, 0.0)):
        verdict = judge_clip(render_clip(moving(velocity, x=32 - 7 * velocity[0], y=32 - 7 * velocity[1])))
        track = verdict.track(Thing("circle", "red"))
        assert track.velocity == pytest.approx(velocity, abs=0.03)
        assert (track.present, track.bound) == (1.0, 1.0)
        assert track.wobble < 0.4
        assert track.pulse < 0.05
        assert verdict.flicker == 0


def test_other_motions_are_marked_wrong() -> None:
    clip = judge_clip(render_clip(moving((1.8, 0.0), x=16)))
    assert clip.matches("a red circle moving right fast on gray").right
    assert clip.matches("a red circle on gray").right
    for text, direction, speed in (
        ("a red circle moving left fast on gray", False, True),
        ("a red circle moving right slow on gray", True, False),
        ("a red circle still on gray", False, True),
        ("a red circle moving up on gray", False, True),
    ):
        match = clip.matches(text)
        assert (match.direction, match.speed) == ((direction,), (speed,)), text
        assert not match.right
    assert not clip.matches("a red circle moving right on black").right
    assert clip.matches("a red square moving right on gray").tracks[0].bound == 0
    missing = clip.matches("a blue circle moving right on gray")
    assert missing.tracks[0].present == 0
    assert missing.direction == (False,)
    assert missing.extra == 1


def test_vanishing_jumping_and_pulsing_objects_are_seen() -> None:
    video = render_clip(moving((1.0, 0.0), x=20))
    empty = np.broadcast_to(video[0, 0, 0], (64, 64, 3))
    gone = video.copy()
    gone[3:6] = empty
    track = judge_clip(gone).track(Thing("circle", "red"))
    assert track.present == 13 / 16
    assert track.velocity == pytest.approx((1.0, 0.0), abs=0.03), "the frames that are there tell the way"
    gone[3:14] = empty
    assert judge_clip(gone).track(Thing("circle", "red")).motion is None
    swapped = video[[*range(0, 16, 2), *range(1, 16, 2)]]
    assert judge_clip(swapped).track(Thing("circle", "red")).wobble > 2
    sizes = [render_clip(Clip(Scene((Thing("circle", "red", 32, 32, r),)), ((0.0, 0.0),)), 1)[0] for r in (10, 13) * 4]
    assert judge_clip(np.stack(sizes)).track(Thing("circle", "red")).pulse > 0.2


def test_background_flicker_is_measured_beside_the_object() -> None:
    video = render_clip(moving((1.0, 0.0), x=20)).astype(int)
    video[::2] += 5
    assert judge_clip(video.astype(np.uint8)).flicker == pytest.approx(5 / 255, rel=0.01)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 32, 32, 3), np.uint8),
        np.zeros((4, 64, 64, 3)),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
        [],
        "x",
    ],
)
def test_the_judge_refuses_other_videos(bad: object) -> None:
    with pytest.raises(JudgeError, match=r"64, 64|two frames"):
        judge_clip(bad)
