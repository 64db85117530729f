"""Editing on transformers: what cannot be right is said before the work, and odd input gives a right result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import editing_hosts as hosts
import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.core.hosts.autoencoders import Coder
from attnctl.errors import AttnctlError, ConfigError
from attnctl.pipelines import edit_video, invert
from attnctl.pipelines.editing.costs import ON_DEVICE, Shape, flow_costs, in_words
from attnctl.pipelines.editing.defaults import defaults_of
from attnctl.processors import FateZero

SOURCE, TARGET = hosts.SOURCE, hosts.TARGET
LONG = " ".join(["in the water"] * 400)
CLIP = hosts.clip(1, 32, 48)


@pytest.fixture(scope="module")
def sd3() -> Any:
    return hosts.build("sd3")


@pytest.fixture(scope="module")
def wan() -> Any:
    return hosts.build("wan")


def edited(pipe: Any, clip: Any = CLIP, **options: Any) -> np.ndarray:
    done = edit_video(pipe, clip, **{"source": SOURCE, "target": TARGET, "steps": 2, "progress": False} | options)
    assert done.frames is not None
    return done.frames


@pytest.fixture
def idle(sd3: Any, wan: Any) -> Iterator[None]:
    """Hold that no transformer is run."""
    calls: list[int] = []
    hooks = [p.transformer.register_forward_hook(lambda *a: calls.append(0)) for p in (sd3, wan)]
    yield
    for hook in hooks:
        hook.remove()
    assert not calls


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("host", "options", "match"),
    [
        ("wan", {"target": f"{LONG} a red bear"}, "The target prompt has 120[0-9] tokens, and WanPipeline reads 512"),
        ("sd3", {"source": f"{LONG} a black bear"}, "The source prompt has .* reads 256 of them: its end"),
        ("sd3", {"source": f"{LONG} a bear", "method": "flowedit"}, "Shorten it, or give a larger max_sequence_length"),
        ("sd3", {"options": {"max_sequence_length": 10**5}}, "does not take this call: .*max_sequence_length"),
        ("sd3", {"options": {"nonsense": 1}}, "does not take this call: .*nonsense"),
        ("sd3", {"solver": "rf_inversion", "blend_words": ["bear"]}, "goes up with the empty prompt"),
        ("sd3", {"solver": "rf_inversion", "store": "qk"}, "goes up with the empty prompt"),
        ("sd3", {"solver": "rf_inversion", "noise": "drawn"}, "adds nothing"),
        ("sd3", {"noise": "loud"}, "noise='loud' is unknown. Choose one of own, drawn"),
        ("sd3", {"mask": np.arange(32 * 48).reshape(32, 48) == 100}, "smaller than a cell"),
        ("sd3", {"mask": np.ones((32, 48, 3))}, "give a picture, an array of bool"),
        ("sd3", {"mask": "."}, "is a folder"),
        ("sd3", {"mask": Image.new("L", (48, 32))}, "black: nothing"),
    ],
)
def test_refused_before_the_work(host: str, options: dict[str, Any], match: str, request: Any) -> None:
    with pytest.raises(AttnctlError, match=match):
        edited(request.getfixturevalue(host), **options)


def test_masks_of_every_kind_mean_the_same(sd3: Any) -> None:
    """A picture with alpha, in gray, whole numbers or fractions."""
    white = np.zeros((32, 48), bool)
    white[:, :24] = True
    gray = Image.fromarray(white.astype(np.uint8) * 255)
    wanted = edited(sd3, mask=white)
    kinds = (gray, gray.convert("RGBA"), gray.convert("1"), white.astype(np.uint8) * 255, white.astype(np.float32))
    for mask in kinds:
        assert np.array_equal(edited(sd3, mask=mask), wanted)
    assert np.array_equal(edited(sd3, mask=white[None]), wanted)
    assert not np.array_equal(edited(sd3), wanted)


def test_pictures_of_every_kind_are_edited(sd3: Any, wan: Any) -> None:
    """In gray, with alpha, of odd sizes; one frame and two of a video."""
    gray = Image.fromarray(CLIP[0, ..., 0])
    assert np.array_equal(edited(sd3, [gray]), edited(sd3, [gray.convert("RGB")]))
    assert edited(sd3, Image.fromarray(CLIP[0]).convert("RGBA")).shape == CLIP.shape
    assert edited(sd3, hosts.clip(1, 37, 53)).shape == (1, 36, 52, 3)
    for count in (1, 2):
        assert edited(wan, hosts.clip(count, 32, 48)).shape == (count, 32, 48, 3)


def test_rf_inversion_has_the_source_s_prompt_beside_the_edit(sd3: Any) -> None:
    """It goes up with the empty prompt, whose words correspond to none."""
    coded = Coder(sd3).encode(CLIP)
    control = FateZero(source=SOURCE, target=TARGET, mode="replace")
    with invert(sd3, coded, control=control, steps=2, solver="rf_inversion") as inversion:
        assert inversion.readings[0].prompt_text == SOURCE
    assert edited(sd3, solver="rf_inversion", mode="replace").shape == CLIP.shape


@pytest.mark.parametrize("solver", ["fireflow", "rf_solver", "euler", "uniinv"])
def test_drawn_noise_goes_straight_in_the_first_step(sd3: Any, solver: str) -> None:
    """x_1 = (1 - t) x_0 + t eps; what a flat picture has too little of, the path ends with."""
    flat = np.full((1, 32, 48, 3), 128, np.uint8)
    coded = Coder(sd3).encode(flat)
    draw = torch.Generator().manual_seed(0)
    eps = torch.randn(coded.latents.shape, generator=draw)
    with invert(sd3, coded, SOURCE, steps=4, solver=solver, noise="drawn") as inversion:
        level = inversion.levels[1]
        wanted = (1 - level) * coded.latents + level * eps
        assert torch.allclose(inversion.latents[1], wanted, atol=1e-5)
        assert inversion.way_back().route.bend is None


def test_wan_begins_with_drawn_noise(wan: Any, sd3: Any) -> None:
    assert defaults_of(wan, "Wan", "FateZero").noise == defaults_of(wan, "Wan", "Inject").noise == "drawn"
    assert defaults_of(sd3, "Stable Diffusion 3, 3.5", "FateZero").noise == "own"
    clip = hosts.clip(5, 32, 48)
    own, drawn, usual = (edited(wan, clip, **more) for more in ({"noise": "own"}, {"noise": "drawn"}, {}))
    assert np.array_equal(usual, drawn)
    assert not np.array_equal(usual, own)
    edited(wan, clip, solver="rf_inversion")  # which bends the whole path to noise of its own


def test_latents_beyond_the_device_s_share_are_said_to_lie_on_the_cpu() -> None:
    control = FateZero(source="a", target="b")
    small = flow_costs(control, (), Shape(4096, 512, 4096 * 64, 2, 2), 25, "fireflow")
    large = flow_costs(control, (), Shape(32760, 512, 16 * 21 * 60 * 104, 4, 2), 50, "fireflow")
    assert small["device_bytes"] == small["latent_bytes"] == 26 * 4096 * 64 * 2
    assert large["device_bytes"] == 16 * 21 * 60 * 104 * 4 <= ON_DEVICE < large["latent_bytes"]
    assert "on the CPU" in in_words(large)
    assert "on the CPU" not in in_words(small)


def test_a_word_in_neither_prompt(sd3: Any) -> None:
    for fields in ({"blend_words": ["tree"]}, {"equalizer": {"tree": 2.0}}, {"cross_replace": {"tree": 0.5}}):
        with pytest.raises(ConfigError, match="'tree' is not in the prompt"):
            edited(sd3, **fields)
