"""Training data of the shapes models: scenes drawn on the fly, and a cache of scenes encoded once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnctl.shapes.scenes import caption, render, sample

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

__all__ = ["Latents", "draw_crops", "draw_images", "encode_captions", "make_cache", "to_tensor"]


@dataclass(frozen=True, slots=True)
class Latents:
    """Hold scaled latents [n, 4, 16, 16] (fp16) and their captions: first `n_single` single objects, then pairs."""

    values: Tensor
    captions: list[str]
    n_single: int

    def draw(self, generator: torch.Generator, n: int, pairs: float) -> Tensor:
        """Draw `n` indices, each a two-object scene with probability `pairs`."""
        u = torch.rand(n, generator=generator)
        double = torch.rand(n, generator=generator) < pairs
        n_pairs = len(self.captions) - self.n_single
        single = (u * self.n_single).long().clamp(max=self.n_single - 1)
        other = self.n_single + (u * n_pairs).long().clamp(max=n_pairs - 1)
        return torch.where(double, other, single)


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 [n, 64, 64, 3] into float [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_images(generator: torch.Generator, n: int) -> Tensor:
    """Draw `n` pictures of one to three objects as float [n, 3, 64, 64] in -1..1."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    rng = np.random.default_rng(seed)
    return to_tensor(np.stack([render(sample(rng, 1 + int(rng.integers(3)), "any")) for _ in range(n)]))


def draw_crops(generator: torch.Generator, x: Tensor, each: int) -> Tensor:
    """Cut `each` quarter-size crops out of every picture, the ones with the most contrast among twice as many."""
    half = x.shape[-1] // 2
    corner = torch.randint(half + 1, (len(x), 2 * each, 2), generator=generator).tolist()
    crops = [
        torch.stack([picture[:, i : i + half, j : j + half] for i, j in places])
        for picture, places in zip(x, corner, strict=True)
    ]
    return torch.cat([c[c.std((2, 3)).sum(1).topk(each).indices] for c in crops])


def encode_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Turn `n` captions into padded token numbers, int64 [n, 16]."""
    unique = sorted(set(captions))
    encoded = tokenizer(
        unique, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    place = {text: i for i, text in enumerate(unique)}
    return encoded[torch.from_numpy(np.array([place[c] for c in captions]))]


@torch.no_grad()
def make_cache(folder: str | Path, vae: AutoencoderKL, *, n_single: int, n_pairs: int, seed: int = 0) -> Latents:
    """Encode training scenes once, or read them back where `folder` already holds them."""
    from tqdm import tqdm

    folder = Path(folder)
    if not (folder / "captions.json").exists():
        rng = np.random.default_rng(seed)
        captions, parts = [], []
        for first in tqdm(range(0, n_single + n_pairs, 64), desc="encode"):
            last = min(first + 64, n_single + n_pairs)
            scenes = [sample(rng, 1 if i < n_single else 2) for i in range(first, last)]
            captions += [caption(s) for s in scenes]
            x = to_tensor(np.stack([render(s) for s in scenes])).to(vae.device)
            parts.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(parts).contiguous()}, folder / "latents.safetensors")
        # Written last: its presence says that the cache is whole.
        (folder / "captions.json").write_text(
            json.dumps({"n_single": n_single, "captions": captions}), encoding="utf-8"
        )
    info = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return Latents(load_file(folder / "latents.safetensors")["latents"], info["captions"], info["n_single"])
