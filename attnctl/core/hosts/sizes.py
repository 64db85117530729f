"""Which sizes of pictures a pipeline takes: what both sides are multiples of, its usual size, and the largest."""

from __future__ import annotations

import inspect
import math
from typing import Any

from diffusers.models.embeddings import PatchEmbed

__all__ = ["cell", "largest", "pixels_per_latent", "usual_size"]

_SPACE = (
    "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor",
)  # fmt: skip
_OF_UNETS = 8  # what every pipeline with a UNet checks its sides by, whatever its autoencoder does


def pixels_per_latent(pipe: Any) -> int | None:
    """Return how many pixels a latent cell is wide; None where the pipeline does not say."""
    return next((int(value) for name in _SPACE if (value := getattr(pipe, name, None)) is not None), None)


def cell(pipe: Any) -> int | None:
    """Return what height and width must be multiples of; None where the pipeline does not say."""
    space = pixels_per_latent(pipe)
    if getattr(pipe, "unet", None) is not None:
        return math.lcm(space or 1, _OF_UNETS)
    if space is None or getattr(pipe, "transformer", None) is None:
        return None
    config: Any = pipe.transformer.config
    patch = getattr(config, "patch_size", 1) or 1
    patch = int(patch[-1]) if isinstance(patch, (tuple, list)) else int(patch)
    packs = callable(getattr(pipe, "_pack_latents", None)) and not hasattr(pipe, "transformer_spatial_patch_size")
    return space * max(patch, 2 if packs else 1)


def usual_size(pipe: Any) -> tuple[int, int] | None:
    """Return the height and width of a call that names none; None where the pipeline does not say."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    height, width = (getattr(parameters.get(name), "default", None) for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    space = pixels_per_latent(pipe)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    if space is None or size is None:
        return None
    h, w = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return int(h) * space, int(w) * space


def largest(pipe: Any) -> int | None:
    """Return the longest side for whose tokens a transformer has places; None for one without such a limit."""
    transformer, multiple = getattr(pipe, "transformer", None), cell(pipe)
    if transformer is None or multiple is None:
        return None
    places = next((int(p.pos_embed_max_size or 0) for p in transformer.modules() if isinstance(p, PatchEmbed)), 0)
    return multiple * places or None
