"""Clips as the latents that a pipeline's call takes: autoencoders of images and of videos.

What differs from host to host is read from what it has: whether its autoencoder's weights are of three dimensions, the
means and deviations that it keeps, the functions that pack its latents.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.sizes import cell, largest, pixels_per_latent
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["Coded", "Coder"]


@dataclass(frozen=True)
class Coded:
    """A clip in latents.

    Attributes:
        latents: What the pipeline's call takes as `latents`.
        height: Rows of pixels.
        width: Columns of pixels.
        frames: Frames, as the call's `num_frames`; None for pipelines of images.
    """

    latents: Tensor
    height: int
    width: int
    frames: int | None


class Coder:
    """Knows how a pipeline's autoencoder takes clips.

    Args:
        pipe: The pipeline.

    Attributes:
        space: Pixels per latent cell.
        time: Frames per latent frame; 1 for autoencoders of images.
        multiple: What height and width must be multiples of.
        video: Whether the pipeline makes videos.
    """

    def __init__(self, pipe: Any) -> None:
        name = type(pipe).__name__
        vae = getattr(pipe, "vae", None)
        if vae is None or not hasattr(vae, "encode"):
            raise UnsupportedModelError(f"{name} has no autoencoder, so frames cannot become latents.")
        self.pipe, self.vae = pipe, vae
        self.space = pixels_per_latent(pipe) or 8
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
        self.time = int(_first(pipe, names, 1))
        weights = [p for p in vae.encoder.parameters() if p.ndim >= 4]
        self.solid = bool(weights) and weights[0].ndim == 5
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.video = "num_frames" in parameters
        if "latents" not in parameters:
            raise UnsupportedModelError(
                f"{name} cannot begin with given latents. Pass the text-to-image (or -video) one."
            )
        self.multiple = cell(pipe) or self.space

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the autoencoder's weights."""
        return next(self.vae.parameters()).dtype

    def frames(self, count: int) -> int:
        """Return the least number of frames, `count` or more, that the autoencoder takes."""
        # CogVideoX's keeps the first frame apart only where it sees an odd number of latent frames.
        each = self.time * (2 if type(self.vae).__name__ == "AutoencoderKLCogVideoX" else 1)
        return count if not self.video else -(-(count - 1) // each) * each + 1

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError unless pictures of this size divide into tokens, for which the model has places."""
        m = self.multiple
        if height % m or width % m or min(height, width) < m:
            low = [max(m, n // m * m) for n in (height, width)]
            raise ConfigError(
                f"Frames of {width}x{height} do not divide into the cells of {m} pixels that "
                f"{type(self.pipe).__name__} sees. Resize them, for example to {low[1]}x{low[0]}."
            )
        most = largest(self.pipe)
        if most is not None and most < max(height, width):
            raise ConfigError(
                f"Frames of {width}x{height} are larger than the {most}x{most} pixels for which "
                f"{type(self.pipe).__name__}'s model has places. Bring their shorter side to "
                f"{most * min(height, width) // max(height, width)} pixels (size), or cut them."
            )

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Coded:
        """Encode uint8 frames [n, height, width, 3]; for pipelines of images, one."""
        n, height, width = frames.shape[:3]
        self.check_size(height, width)
        if n != self.frames(n) or (not self.video and n != 1):
            expected = f"such as {self.frames(n)}" if self.video else "one"
            raise ConfigError(f"{type(self.pipe).__name__} was given {n} frames; expected {expected}.")
        device = getattr(self.pipe, "_execution_device", self.pipe.device)
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(device, torch.float32) / 127.5 - 1
        x = x.permute(3, 0, 1, 2)[None] if self.solid else x.permute(0, 3, 1, 2)
        upcast = self.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
        dtype = self.dtype
        try:
            if upcast:
                self.vae.to(torch.float32)
            made = self.vae.encode(x.to(torch.float32 if upcast else dtype))
        finally:
            if upcast:
                self.vae.to(dtype)
        z = (made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent).float()
        latents = self._argument(self._normalised(z), height, width)
        return Coded(latents, height, width, n if self.video else None)

    def _normalised(self, z: Tensor) -> Tensor:
        """Bring the autoencoder's latents to what the denoiser sees."""
        config = self.vae.config
        factor = getattr(config, "scaling_factor", None) or 1.0
        if callable(getattr(self.pipe, "_patchify_latents", None)) and hasattr(self.vae, "bn"):  # FLUX.2
            z = self.pipe._patchify_latents(z)
            mean = self.vae.bn.running_mean.view(1, -1, 1, 1)
            std = (self.vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps).sqrt()
            return (z - mean.to(z)) / std.to(z)
        mean, std = (_moment(self.vae, name, z) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            return (z - mean) * factor / std
        return (z - (getattr(config, "shift_factor", None) or 0.0)) * factor

    def _argument(self, z: Tensor, height: int, width: int) -> Tensor:
        """Lay latents out as the pipeline's call takes them."""
        pipe = self.pipe
        denoiser = getattr(pipe, "transformer", None)
        denoiser = pipe.unet if denoiser is None else denoiser
        dtype = denoiser.dtype
        if z.ndim == 5 and not self.video:
            z = z[:, :, 0]
        if family_of(denoiser).unet:
            return z.to(dtype)
        if family_of(denoiser).frames_first:
            return z.transpose(1, 2).contiguous().to(dtype)
        pack = getattr(pipe, "_pack_latents", None)
        if hasattr(pipe, "_patchify_latents"):  # it packs what it is given
            return z.to(dtype)
        if pack is not None and hasattr(pipe, "transformer_spatial_patch_size"):
            z = pack(z, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        elif pack is not None:
            z = pack(z, z.shape[0], z.shape[1], z.shape[2], z.shape[3])
        # Video pipelines keep their latents in float32 between steps.
        return z.float() if self.video else z.to(dtype)

    def again(self, packed: Tensor, coded: Coded) -> Tensor:
        """Lay latents of a run's end out as the call takes them."""
        if packed.shape == coded.latents.shape:
            return packed
        b, c, h, w = coded.latents.shape
        return packed.transpose(1, 2).reshape(b, c, h, w)


def _first(pipe: Any, names: tuple[str, ...], default: int) -> Any:
    return next((getattr(pipe, n) for n in names if getattr(pipe, n, None) is not None), default)


def _moment(vae: Any, name: str, z: Tensor) -> Tensor | None:
    value = getattr(vae.config, name, None)
    buffer = vae._buffers.get(name)
    value = buffer if buffer is not None else value
    if value is None:
        return None
    return torch.as_tensor(value).to(z).view(1, -1, *[1] * (z.ndim - 2))
