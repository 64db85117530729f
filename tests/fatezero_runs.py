"""What tests of FateZero share: one edit of a tiny pipeline from noise to latents, and whole jobs on random clips."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attnctl
from attnctl.pipelines import edit_video, invert
from attnctl.processors import FateZero
from attnctl.processors.editing.source import Inversion

SOURCE, TARGET = "a black bear in the water", "a red bear in the water"
BASE = FateZero(source=SOURCE, target=TARGET, blend_words=["bear"], blend_threshold=0.6, self_replace=0.7)
STEPS = 3


def latents(n: int = 2, h: int = 12, w: int = 8) -> Tensor:
    return torch.randn(n, 4, h, w, generator=torch.Generator().manual_seed(n))


def call_of(inversion: Inversion, text: str = TARGET, guidance: float = 7.5) -> dict[str, Any]:
    n, (h, w) = inversion.frames, inversion.noise.shape[-2:]
    return {
        "prompt": [text] * n,
        "negative_prompt": ["ugly"] * n,
        "latents": inversion.noise,
        "num_inference_steps": inversion.steps,
        "guidance_scale": guidance,
        "height": h * 2,
        "width": w * 2,
        "output_type": "latent",
        "return_dict": False,
    }


def run(pipe: Any, inversion: Inversion, text: str = TARGET, guidance: float = 7.5, **options: Any) -> Tensor:
    return pipe(**call_of(inversion, text, guidance) | options)[0]


def edited(pipe: Any, control: FateZero, x: Tensor | None = None, guidance: float = 7.5, **options: Any) -> Tensor:
    with (
        invert(pipe, latents() if x is None else x, control=control, steps=STEPS, **options) as inversion,
        attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
    ):
        return run(pipe, inversion, control.target, guidance)


def clip(n: int = 5, h: int = 24, w: int = 16) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def job(pipe: Any, video: Any, **options: Any) -> Any:
    fields = {"source": SOURCE, "target": TARGET, "blend_words": ["bear"], "progress": False, "steps": 2}
    return edit_video(pipe, video, **fields | options)
