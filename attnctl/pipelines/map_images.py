"""Maps of an image that exists: noise it to a level, run the denoiser once, and read what attends to what.

The way of zero-shot segmentation with diffusion models: at a moderate level the denoiser sees the image's layout and
still has to ask the prompt what it shows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctl.core.attach import attach
from attnctl.data.maps import WordMaps
from attnctl.data.picture_files import upright
from attnctl.data.quiet import without_bar
from attnctl.errors import ConfigError, UnsupportedModelError, shown
from attnctl.pipelines.bounds import check_whole
from attnctl.processors.capture.capture import Capture

__all__ = ["image_maps"]

_STEPS = 50  # how finely a noise level can be chosen


def image_maps(
    pipe: Any,
    image: Any,
    prompt: str = "",
    capture: Capture | None = None,
    *,
    strength: float = 0.3,
    draws: int = 1,
    seed: int = 0,
    **options: Any,
) -> WordMaps:
    """Record the maps of one forward on a noised image; nothing is generated, and the pipeline stays as it is.

    Args:
        pipe: A text-to-image or image-to-image pipeline of a family that diffusers has an image-to-image pipeline for.
        image: What that pipeline takes as `image`: a PIL image, or a tensor [1, 3, h, w] in 0 to 1.
        prompt: What the image shows; may be empty where the capture has points or embeddings are among the options.
        capture: What to record; all words of the prompt if None.
        strength: Noise level, from above 0 (the image) to 1 (noise alone), as in image-to-image pipelines.
        draws: Noises to average over.
        seed: Seed of the first noise.
        options: Further arguments of the pipeline, such as `prompt_embeds`. Guidance is off unless they ask for it.

    Returns:
        Maps of one image and one step.

    Raises:
        ConfigError: A number is out of range.
        UnsupportedModelError: The family has no image-to-image pipeline.

    Example:
        >>> maps = image_maps(pipe, photo, "a cat on a sled")  # doctest: +SKIP
        >>> maps.mask("cat")  # doctest: +SKIP
    """
    if isinstance(strength, bool) or not 1 / _STEPS <= strength <= 1:
        raise ConfigError(f"strength={strength!r} is the noise level: give a number from {1 / _STEPS} to 1.")
    check_whole("draws", draws, ConfigError)
    _check_image(image)
    if capture is None:
        capture = Capture()
    if "steps" in capture.keep or capture.start > 0 or capture.stop < 1:
        raise ConfigError("image_maps runs one step: leave start, stop and keep=('steps',) out of the capture.")
    host = _image_to_image(pipe)
    generators = [torch.Generator().manual_seed(seed + n) for n in range(draws)]
    if prompt or "prompt_embeds" not in options:
        options = {"prompt": prompt, **options}
    if not getattr(getattr(host, "transformer", None), "config", {}).get("guidance_embeds", False):
        options = {"guidance_scale": 1.0, **options}
    # The bar would count steps that are passed over.
    with without_bar(host), attach(host, capture) as handle:
        host(
            image=upright(image) if isinstance(image, Image.Image) else image,
            strength=strength,
            num_inference_steps=_STEPS,
            num_images_per_prompt=draws,
            generator=generators if draws > 1 else generators[0],
            output_type="latent",
            callback_on_step_end=_stop,
            **options,
        )
        maps = handle.maps
    layers = {name: layer.mean(0, keepdim=True) for name, layer in maps.layers.items()}
    about = {**maps.about, "strength": strength, "draws": draws, "seed": seed}
    return replace(maps, layers=layers, prompts=maps.prompts[:1], tokens=maps.tokens[:1], about=about)


def _check_image(image: Any) -> None:
    """Raise ConfigError for what image-to-image pipelines cannot read."""
    one = image[0] if isinstance(image, (list, tuple)) and image else image
    if not isinstance(one, (Image.Image, torch.Tensor, np.ndarray)):
        opened = " Open the file first: PIL.Image.open(path)." if isinstance(one, (str, os.PathLike)) else ""
        raise ConfigError(f"image={shown(image)} was given; expected a PIL image, or a tensor [1, 3, h, w].{opened}")


def _stop(host: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let the pipeline pass over the steps that are left."""
    host._interrupt = True
    return kwargs


def _image_to_image(pipe: Any) -> Any:
    from diffusers import AutoPipelineForImage2Image

    if "Img2Img" in type(pipe).__name__:
        return pipe
    try:
        return AutoPipelineForImage2Image.from_pipe(pipe)
    except (ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"diffusers has no image-to-image pipeline for {type(pipe).__name__}, which image_maps noises images with "
            f"({error!s:.120})."
        ) from None
