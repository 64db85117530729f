"""Frames to latents and back with a pipeline's own autoencoder, a few frames at a time; which pipelines can do it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["check_pipeline", "check_size", "decode", "encode", "latent_factor"]


def check_pipeline(pipe: Any) -> None:
    """Refuse what is no pipeline that makes a picture of a prompt and of latents that it is given, with a UNet.

    Raises:
        UnsupportedModelError: It lacks a part, or begins with something else than latents.
    """
    name = type(pipe).__name__
    lacking = [part for part in ("unet", "scheduler", "vae", "tokenizer") if getattr(pipe, part, None) is None]
    if lacking:
        raise UnsupportedModelError(
            f"{name} has no {', '.join(lacking)}: editing needs a Stable Diffusion pipeline (SD 1, SD 2, SDXL)."
        )
    if "latents" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedModelError(
            f"{name} cannot begin with given latents. Pass the text-to-image pipeline of the same parts: "
            "diffusers.AutoPipelineForText2Image.from_pipe(pipe)."
        )


def latent_factor(pipe: Any) -> int:
    """Return how many pixels a latent cell is wide."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no autoencoder, so frames cannot become latents.")
    return int(getattr(pipe, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1)))


def check_size(pipe: Any, height: int, width: int) -> None:
    """Raise ConfigError unless the autoencoder takes pictures of this size whole."""
    factor = latent_factor(pipe)
    if height % factor or width % factor or min(height, width) < factor:
        low = [max(factor, n // factor * factor) for n in (height, width)]
        raise ConfigError(
            f"Frames of {width}x{height} do not divide into the autoencoder's cells of {factor} pixels. Resize them, "
            f"for example to {low[1]}x{low[0]}."
        )


@contextlib.contextmanager
def _steady(vae: torch.nn.Module) -> Iterator[torch.dtype]:
    """Run an autoencoder that overflows in half precision (SDXL's) in single precision."""
    dtype = next(vae.parameters()).dtype
    config: Any = vae.config
    upcast = dtype == torch.float16 and getattr(config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield torch.float32 if upcast else dtype
    finally:
        if upcast:
            vae.to(dtype)


def _moments(pipe: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return what is taken off the autoencoder's latents, and what they are multiplied by."""
    config = pipe.vae.config
    factor = config.scaling_factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        m, s = (torch.tensor(x).view(1, -1, 1, 1).to(like) for x in (mean, std))
        return m, factor / s
    return getattr(config, "shift_factor", None) or 0.0, factor


@torch.no_grad()
def encode(pipe: Any, video: np.ndarray, batch: int = 4) -> Tensor:
    """Encode uint8 frames [n, height, width, 3] as latents [n, C, h, w], the mode of their distribution.

    Raises:
        ConfigError: The size does not divide into latent cells.
    """
    check_size(pipe, *video.shape[1:3])
    device = getattr(pipe, "_execution_device", pipe.device)
    parts = []
    with _steady(pipe.vae) as dtype:
        for start in range(0, len(video), batch):
            x = torch.from_numpy(np.ascontiguousarray(video[start : start + batch])).permute(0, 3, 1, 2)
            x = (x.to(device, torch.float32) / 127.5 - 1).to(dtype)
            parts.append(pipe.vae.encode(x).latent_dist.mode())
    z = torch.cat(parts)
    shift, scale = _moments(pipe, z)
    return ((z - shift) * scale).to(pipe.unet.dtype)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> np.ndarray:
    """Decode latents [n, C, h, w] into uint8 frames [n, height, width, 3]."""
    parts = []
    with _steady(pipe.vae) as dtype:
        shift, scale = _moments(pipe, latents.to(dtype))
        for z in latents.to(dtype).split(4):
            x = pipe.vae.decode(z / scale + shift, return_dict=False)[0].float()
            parts.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
