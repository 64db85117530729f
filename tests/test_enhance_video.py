"""Enhance-A-Video: the intensity by whole maps, the scale of the output, every video transformer, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from contract import assert_clean, distance, snapshot
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors import EnhanceAVideo
from attnctl.processors.enhance_video import cross_frame_intensity

FULL = ("cogvideox", "cogvideox_rope", "wan", "ltx", "hunyuanvideo", "allegro", "cosmos")
FRAMES = 5


@pytest.fixture(autouse=True)
def _videos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(zoo, "FRAMES", FRAMES)
    with torch.no_grad():
        yield


def by_maps(q: Tensor, k: Tensor, frames: int) -> Tensor:
    """Average the off-diagonal entries of every map of frames by frames."""
    a, b = (x.unflatten(2, (frames, -1)).transpose(2, 3) for x in (q, k))
    attn = (a @ b.mT * q.shape[-1] ** -0.5).softmax(-1)
    return attn[..., ~torch.eye(frames, dtype=torch.bool)].flatten(1).mean(1)


def test_intensity_is_the_mean_off_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, FRAMES * 7, 4, generator=g, dtype=torch.float64) for _ in range(2))
    want = by_maps(q, k, FRAMES)
    torch.testing.assert_close(cross_frame_intensity(q, k, FRAMES), want, atol=1e-14, rtol=0)
    monkeypatch.setattr("attnctl.processors.enhance_video._MAX_ELEMENTS", 1)
    torch.testing.assert_close(cross_frame_intensity(q, k, FRAMES), want, atol=1e-14, rtol=0)
    uniform = cross_frame_intensity(torch.zeros_like(q), k, FRAMES)
    assert (uniform * (FRAMES + 4)).tolist() == pytest.approx([1 + 4 / FRAMES] * 2)


@pytest.mark.parametrize("name", FULL)
def test_contract(name: str) -> None:
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    with attnctl.control(model, EnhanceAVideo(weight=40.0, stop=0.5), layout="cond") as handle:
        handle.set_step(1, 2)
        assert torch.equal(zoo.call(model, inputs), plain)
        handle.set_step(0, 2)
        out = zoo.call(model, inputs)
        assert out.isfinite().all()
        assert distance(out, plain) > 1e-3
        assert "arXiv 2502.07508" in handle.report()
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuanvideo", "ltx"])
def test_the_output_after_its_projection_is_scaled_and_text_is_not(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    control = EnhanceAVideo(weight=30.0)
    site = control.resolve(attnctl.find_sites(model), attnctl.core.hosts.families.family_of(model))[0]
    found: dict[str, Any] = {}

    def read(key: str) -> Tensor:
        hook = site.module.register_forward_hook(lambda m, a, out: found.update({key: out}))
        zoo.call(model, inputs)
        hook.remove()
        return found[key]

    plain = read("plain")
    with attnctl.control(model, EnhanceAVideo(weight=30.0, sites=site.name), layout="cond"):
        scaled = read("scaled")
    if isinstance(plain, tuple):
        assert torch.equal(plain[1], scaled[1]), "text"
        plain, scaled = plain[0], scaled[0]
    ratio = (scaled / plain).flatten(1)
    assert float(ratio.std(1).max()) < 1e-9  # one factor a video
    assert float(ratio.mean()) > 1


def test_the_published_weights_are_taken() -> None:
    for name in ("cogvideox", "wan", "hunyuanvideo"):
        model, inputs = zoo.build(name)
        with attnctl.control(model, EnhanceAVideo(), layout="cond"):
            zoo.call(model, inputs)
    with pytest.raises(ConfigError, match="no weight is published"):
        attnctl.control(zoo.build("ltx")[0], EnhanceAVideo(), layout="cond")


@pytest.mark.parametrize(
    ("name", "message"),
    [("animatediff", "all frames"), ("flux", "all frames"), ("latte", "all frames"), ("mochi", "undoes any factor")],
)
def test_other_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        attnctl.control(zoo.build(name)[0], EnhanceAVideo(), layout="cond")


def test_weights_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight=-1"):
        EnhanceAVideo(weight=-1.0)


def test_a_single_frame_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 1)
    model, inputs = zoo.build("wan")
    plain = zoo.call(model, inputs)
    with attnctl.control(model, EnhanceAVideo(), layout="cond"):
        assert torch.equal(zoo.call(model, inputs), plain)
