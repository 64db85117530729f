"""Reading word maps: by word, by place, resized, normalised and thresholded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_pipelines as pipes

import attnctl
from attnctl.data.maps import WordMaps, normalised, otsu, resized
from attnctl.errors import ConfigError, SiteError
from attnctl.processors import Capture


def some_maps(**options: Any) -> WordMaps:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, Capture(words=("a", "cat"), **options)) as handle:
        pipes.run(pipe, kwargs)
        return handle.maps


def test_reading_as_a_mapping_and_normalised() -> None:
    maps = some_maps()
    assert list(maps) == ["a", "cat"]
    assert len(maps) == 2
    assert "cat" in maps
    assert "dog" not in maps
    share = maps.stacked(normalise="share")
    assert torch.allclose(share.sum(0), torch.ones(1, *maps.grid))
    sharp = maps.stacked(normalise="ae")
    assert torch.allclose(sharp, (100 * maps.stacked()).softmax(0))
    minmax = maps.get_map("cat", normalise="minmax")
    assert (minmax.min(), minmax.max()) == (0, 1)
    assert maps.get_map("cat", normalise="max").max() == 1
    assert "'a', 'cat': 1 images, 16x12, 7 layers, 3 steps" in repr(maps)
    assert maps.mask("cat", 0.5).equal(minmax >= 0.5)
    assert maps.mask("cat").dtype == torch.bool
    assert 0 < maps.mask("cat").float().mean() < 1


def test_resizing_keeps_constant_maps_places_and_means() -> None:
    flat_map = torch.full((1, 4, 6), 0.3)
    for size in ((8, 12), (7, 5), (2, 3), (4, 6)):
        assert torch.allclose(resized(flat_map, size), torch.full((1, *size), 0.3))
    bar = torch.zeros(1, 4, 6)
    bar[:, 1] = 1
    big = resized(bar, (16, 24))[0]
    assert big.sum(1).argmax() // 4 == 1
    assert torch.allclose(big.std(1), torch.zeros(16), atol=1e-6)
    assert abs(float(resized(bar, (2, 3)).mean() - bar.mean())) < 0.05  # no row is passed over


def test_normalised_frames_share_one_range() -> None:
    maps = torch.rand(2, 1, 3, 4, 4)
    out = normalised(maps, "minmax")
    assert out.amax((2, 3, 4)).eq(1).all()
    assert not out.amax((3, 4)).eq(1).all()


def test_otsu_parts_two_levels() -> None:
    values = torch.cat([torch.full((50,), 0.1), torch.full((20,), 0.9)]) + 0.01 * torch.randn(
        70, generator=torch.Generator().manual_seed(0)
    )
    assert 0.4 < otsu(values) < 0.6
    assert otsu(torch.full((4,), 0.5)) == 0.5


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: m["catt"], ConfigError, "'catt' was not recorded; these were: a, cat. Did you mean 'cat'"),
        (lambda m: m.get_map("cat", step=0), ConfigError, r'steps were reduced.*keep=\("steps",\)'),
        (lambda m: m.get_map("cat", head=0), ConfigError, r'heads were reduced.*keep=\("heads",\)'),
        (lambda m: m.get_map("cat", normalise="log"), ConfigError, "Choose one of probability, share"),
        (lambda m: m.get_map("cat", size=(0, 3)), ConfigError, "size="),
        (lambda m: m.get_map("cat", layers="up.9"), SiteError, "These maps"),
        (lambda m: m.mask("cat", 2), ConfigError, "threshold=2"),
        (lambda m: m.image(1), ConfigError, "Image 1 is past the end: there are 1"),
    ],
)
def test_bad_reading(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(some_maps(sites="mid"))


def test_a_step_or_head_that_was_not_recorded() -> None:
    maps = some_maps(sites="mid", reduce="none", stop=0.5, heads=(2,))
    with pytest.raises(ConfigError, match="step=2 was not recorded; these were: 0, 1"):
        maps.get_map("cat", step=2)
    with pytest.raises(ConfigError, match="head=0 was not recorded; these were: 2"):
        maps.get_map("cat", head=0)
