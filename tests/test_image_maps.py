"""Maps of an image that exists: one forward at a noise level, in the words of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_pipelines as pipes
from contract import snapshot
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.pipelines.map_images import image_maps
from attnctl.processors import Capture


def photo(h: int = 32, w: int = 24) -> Tensor:
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(3))


def counted(module: Any) -> list[int]:
    """Note the rows of each call."""
    rows: list[int] = []
    module.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k.get("hidden_states", a[0] if a else ()))), with_kwargs=True
    )
    return rows


def test_maps_are_those_of_the_first_step_of_image_to_image() -> None:
    pipe, kwargs = pipes.build("sd_img2img")
    words = Capture(words=("cat",), keep=("steps",))
    options = kwargs | {"image": photo(), "strength": 0.4, "num_inference_steps": 50, "guidance_scale": 1.0}
    with attnctl.control(pipe, words) as handle:
        pipe(**options, generator=torch.Generator().manual_seed(7), output_type="latent")
        want = handle.maps
    assert len(want.steps) == 20
    maps = image_maps(pipe, photo(), "a cat", Capture(words=("cat",)), strength=0.4, seed=7)
    assert (maps.steps, maps.images, maps.prompts) == ((0,), 1, ("a cat",))
    assert torch.equal(maps["cat"], want.get_map("cat", step=0))
    assert maps.about == {"strength": 0.4, "draws": 1, "seed": 7}


def test_a_text_to_image_pipeline_runs_once_and_stays_as_it_is() -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs)
    before, rows = snapshot(pipe.unet), counted(pipe.unet)
    maps = image_maps(pipe, photo(), "a cat")
    assert len(rows) == 1
    assert "cat" in maps
    assert {k: v for k, v in snapshot(pipe.unet).items() if "hook" not in k}.keys() == {
        k for k in before if "hook" not in k
    }
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_several_noises_are_averaged() -> None:
    pipe, _ = pipes.build("sd_img2img")
    one, two = (image_maps(pipe, photo(), "a cat", seed=s)["cat"] for s in (5, 6))
    both = image_maps(pipe, photo(), "a cat", draws=2, seed=5)
    assert both.images == 1
    assert torch.allclose(both["cat"], (one + two) / 2, atol=1e-6)


def test_points_and_joint_attention() -> None:
    pipe, kwargs = pipes.build("sd3")
    pipe.vae.register_to_config(shift_factor=0.0)
    embeds = {k: v for k, v in kwargs.items() if "prompt_embeds" in k}
    maps = image_maps(pipe, photo(), capture=Capture(words=(1, 3)), **embeds)
    assert maps["1"].shape == (1, *maps.grid)
    looks = image_maps(pipe, photo(), capture=Capture(points=((0.5, 0.5),)), **embeds)
    assert 0 < float(looks["0.5,0.5"].sum()) < 1  # the rest goes to the text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength=0.0 is the noise level"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"draws": 0}, "draws is a whole number"),
        ({"capture": Capture(keep=("steps",))}, "runs one step"),
        ({"capture": Capture(start=0.5)}, "runs one step"),
        ({"capture": Capture(words=("dog",))}, "'dog' is not in the prompt"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    pipe, _ = pipes.build("sd_img2img")
    with pytest.raises(ConfigError, match=message):
        image_maps(pipe, photo(), "a cat", **options)
    assert attnctl.core.handle.handle_of(pipe) is None


def test_a_family_without_image_to_image_is_refused() -> None:
    pipe, _ = pipes.build("pixart")
    with pytest.raises(UnsupportedModelError, match="no image-to-image pipeline for PixArtSigmaPipeline"):
        image_maps(pipe, photo(), "a cat")
