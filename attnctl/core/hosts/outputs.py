"""What denoisers and schedulers return: a tensor, or a tuple, a list or a dataclass that holds one."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["fitted", "latents_of", "main_output", "with_latents", "with_main_output"]


def main_output(output: Any) -> Any:
    """Return the prediction inside whatever container a denoiser returned."""
    if isinstance(output, torch.Tensor):
        return output
    return output[0]  # of a dataclass of diffusers, too: its first field


def with_main_output(output: Any, new: Any) -> Any:
    """Return the same container with another prediction in it."""
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return (new, *output[1:])
    if isinstance(output, list):
        return [new, *output[1:]]
    return type(output)(**{**output, next(iter(output)): new})


def fitted(delta: Any, prediction: Any) -> Any:
    """Cut a difference [B, N, C] to the tokens of another prediction, which sees no text in front of its image."""
    if isinstance(delta, torch.Tensor) and delta.ndim == 3 and delta.shape[1] > prediction.shape[1]:
        return delta[:, -prediction.shape[1] :]
    return delta


def latents_of(result: Any) -> torch.Tensor:
    """Return the latents that a scheduler's step returned."""
    latents: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents


def with_latents(result: Any, latents: torch.Tensor) -> Any:
    """Return what a scheduler's step returned with other latents in it."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    return type(result)(**{**result, "prev_sample": latents})
