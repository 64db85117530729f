"""Motion figures by optical flow."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from attnctl.data.motion import NO_MOTION, Flow, dynamic, flow, measure, temporal_flicker, warp_error
from attnctl.errors import ConfigError
from attnctl.shapes import Motion, render_clip, sample_clip


def texture() -> np.ndarray:
    rng = np.random.default_rng(0)
    rough = cv2.GaussianBlur(rng.integers(0, 256, (420, 420, 3)).astype(np.float32), (0, 0), 3)
    return ((rough - rough.min()) / (rough.max() - rough.min()) * 255).astype(np.uint8)


BIG = texture()


def pan(dx: float, dy: float = 0.0, n: int = 4, side: int = 256) -> np.ndarray:
    """Let the texture move by (dx, dy) pixels per frame."""
    place = [np.float32([[1, 0, dx * i - 80], [0, 1, dy * i - 80]]) for i in range(n)]
    return np.stack([cv2.warpAffine(BIG, m, (side, side), flags=cv2.INTER_LINEAR) for m in place])


def grain(video: np.ndarray) -> np.ndarray:
    return np.clip(video + np.random.default_rng(1).normal(0, 8, video.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("dx", "dy"), [(1.0, 0.0), (3.0, 1.5), (-10.0, 5.0)])
def test_flow_finds_the_speed_of_a_pan(dx: float, dy: float) -> None:
    speed, video = math.hypot(dx, dy), pan(dx, dy)
    found = flow(video)
    assert found.motion_mean == pytest.approx(speed, rel=0.01)
    assert np.median(found.forward, (0, 1, 2)) == pytest.approx((dx, dy), abs=0.05)
    assert np.median(found.backward, (0, 1, 2)) == pytest.approx((-dx, -dy), abs=0.05)
    assert flow(video, "farneback").motion_mean == pytest.approx(speed, rel=0.03)
    error, occluded = warp_error(video, found)
    assert error < 1e-4
    assert occluded < 0.15
    assert found.accel < 0.05


def test_figures_of_noise_are_those_of_the_specification() -> None:
    still = measure(grain(pan(0.0)))
    assert 0.05 < still.motion_mean < NO_MOTION
    assert not still.dynamic
    assert 1.2e-3 < still.warp_error < 2.2e-3
    assert 1.0e-3 < measure(grain(pan(3.0, 1.5))).warp_error < 2.2e-3


def test_a_standing_video_does_not_move() -> None:
    figures = measure(pan(0.0))
    assert figures.motion_mean == figures.motion_top5 == figures.warp_error == figures.flow_accel == 0
    assert figures.temporal_flicker == 1
    assert not figures.dynamic


def test_top5_is_the_mean_of_the_fastest_twentieth() -> None:
    rng = np.random.default_rng(2)
    field = rng.normal(size=(3, 30, 21, 2)).astype(np.float32)
    pace = np.linalg.norm(field, axis=-1).reshape(3, -1)
    want = np.mean([np.sort(p)[-31:].mean() for p in pace])
    found = Flow(field, field)
    assert found.motion_top5 == pytest.approx(want, rel=1e-6)
    assert found.motion_mean == pytest.approx(pace.mean(), rel=1e-6)
    change = np.linalg.norm(field[1:] - field[:-1], axis=-1).mean()
    assert found.accel == pytest.approx(change / (pace.mean() + 1e-3), rel=1e-5)
    assert Flow(field[:1], field[:1]).accel == 0


def test_dynamic_follows_speed_frame_rate_and_size() -> None:
    # 6 pixels per frame at 256 pixels and 8 frames per second; 4 of 16 frames must pass it.
    assert dynamic(pan(7.0, n=6))
    assert not dynamic(pan(5.0, n=6))
    assert dynamic(pan(3.5, n=6, side=128))
    assert not dynamic(pan(7.0, n=6), fps=6), "slower video, higher threshold"
    assert dynamic(pan(3.5, n=8), fps=16), "every second frame"
    jump = np.concatenate([pan(0.0, n=15), pan(7.0, n=2)[1:]])
    assert not dynamic(jump), "one pair of sixteen"


def test_flicker_is_the_mean_change() -> None:
    video = np.zeros((3, 16, 16, 3), np.uint8)
    video[1] = 51
    assert temporal_flicker(video) == pytest.approx(0.8)


def test_warp_error_is_the_masked_square_difference() -> None:
    video = np.zeros((2, 16, 16, 3), np.uint8)
    video[1] = 51
    nothing = np.zeros((1, 16, 16, 2), np.float32)
    assert warp_error(video, Flow(nothing, nothing)) == (pytest.approx(0.04), 0.0)
    one = nothing + np.float32([1.0, 0.0])
    error, occluded = warp_error(video, Flow(one, -one))
    assert error == pytest.approx(0.04)
    assert occluded == pytest.approx(1 / 16), "the last column leaves the picture"
    error, occluded = warp_error(video, Flow(one, one))
    assert math.isnan(error)
    assert occluded == 1.0


def test_small_videos_of_the_shapes_world_are_measured() -> None:
    rng = np.random.default_rng(0)
    fast, slow, still = (
        measure(render_clip(sample_clip(rng, Motion(*m)))) for m in (("left", "fast"), ("up", "slow"), ("still",))
    )
    assert fast.motion_mean > slow.motion_mean > NO_MOTION > still.motion_mean
    assert fast.dynamic
    assert not still.dynamic


def test_figures_repeat_and_opencv_keeps_its_threads() -> None:
    before = cv2.getNumThreads()
    assert measure(pan(3.0)) == measure(pan(3.0))
    assert cv2.getNumThreads() == before


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 64, 64), np.uint8),
        np.zeros((4, 64, 64, 3)),
        np.zeros((1, 64, 64, 3), np.uint8),
        np.zeros((4, 8, 8, 3), np.uint8),
        [],
        [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)],
    ],
)
def test_other_videos_are_refused(bad: object) -> None:
    for function in (flow, dynamic, temporal_flicker, warp_error, measure):
        with pytest.raises(ConfigError, match=r"uint8 RGB|one size"):
            function(bad)


def test_bad_settings_are_refused() -> None:
    video = pan(0.0, side=32)
    with pytest.raises(ConfigError, match="Did you mean 'farneback'"):
        flow(video, "farnebak")
    with pytest.raises(ConfigError, match="fps"):
        dynamic(video, fps=0)
    with pytest.raises(ConfigError, match="fewer than two"):
        dynamic(video, fps=64)
    with pytest.raises(ConfigError, match="does not belong"):
        warp_error(video, flow(pan(0.0, side=48)))
