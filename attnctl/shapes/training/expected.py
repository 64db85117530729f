"""What a caption lets expect before anything is seen: the mean of all clips that it fits.

At the first step of a run the input is pure noise, and the best prediction is the mean of all clips that fit the
caption. A real clip is that mean plus where its object happens to be, which is many times larger, so that words of
motion are learnt slowly: what "left" says of frame f at place x is an interaction of three, and none of the three tells
anything alone. This world is small enough to know the mean itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attnctl.shapes.data import to_tensor
from attnctl.shapes.motion import DIRECTIONS, SPEEDS, Motion, sample_clip, say
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, render

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["Expected", "make_expected"]

_SIZE = 12.0  # the middle of the sizes; a mean over all of them looks the same
_FIRST, _STEP, _PLACES = 12.0, 10 / 3, 13  # where objects are seen, along each side, in pixels
_SAMPLES = 256


@dataclass(frozen=True)
class Expected:
    """Hold latents of every kind of object at every place [kinds, 13, 13, 4, 16, 16] (fp16), and where motions lead.

    Attributes:
        values: The latents; the axes of places are y, x.
        kinds: Colour, shape and background of each kind.
        places: For each motion, how often its object is at each place in each frame [motions, frames, 13, 13].
        motions: The motions: with their speed, and without.
    """

    values: Tensor
    kinds: tuple[tuple[str, str, str], ...]
    places: Tensor
    motions: tuple[Motion, ...]

    def draw(self, generator: torch.Generator, n: int, frames: Tensor, skew: float = 0.0) -> tuple[Tensor, list[str]]:
        """Draw `n` captions and return the mean clip of each [n, frames, 4, 16, 16], at these frames, and the captions.

        A share of `skew` of them moves right or down only.
        """
        some = torch.tensor([i for i, m in enumerate(self.motions) if m.direction in ("right", "down")])
        kind = torch.randint(len(self.kinds), (n,), generator=generator)
        motion = torch.randint(len(self.motions), (n,), generator=generator)
        skewed = some[torch.randint(len(some), (n,), generator=generator)]
        motion = torch.where(torch.rand(n, generator=generator) < skew, skewed, motion)
        weights = self.places[motion][:, frames]
        means = torch.einsum("nfyx,nyxchw->nfchw", weights, self.values[kind].float())
        captions = []
        for k, m in zip(kind.tolist(), motion.tolist(), strict=True):
            color, shape, background = self.kinds[k]
            captions.append(say(color, shape, background, self.motions[m]))
        return means, captions


@torch.no_grad()
def make_expected(
    vae: AutoencoderKL, *, frames: int = 16, kinds: Sequence[tuple[str, str, str]] | None = None
) -> Expected:
    """Encode kinds of objects (all, where none are given) at every place, and count where each motion leads."""
    from tqdm import tqdm

    kinds = tuple(product(COLORS, SHAPES, BACKGROUNDS) if kinds is None else kinds)
    axis = [_FIRST + _STEP * i for i in range(_PLACES)]
    values = []
    for color, shape, background in tqdm(kinds, desc="expect"):
        images = [render(Scene((Thing(shape, color, x, y, _SIZE),), background)) for y, x in product(axis, axis)]
        z = vae.encode(to_tensor(np.stack(images)).to(vae.device)).latent_dist.mean * vae.config.scaling_factor
        values.append(z.half().cpu().unflatten(0, (_PLACES, _PLACES)))
    motions = [Motion(d, s) for d in DIRECTIONS for s in (None, *SPEEDS) if d != "still" or s is None]
    rng = np.random.default_rng(0)
    places = torch.stack([_places(rng, motion, frames) for motion in motions])
    return Expected(torch.stack(values), kinds, places, tuple(motions))


def _places(rng: np.random.Generator, motion: Motion, frames: int) -> Tensor:
    """Count where the objects of one motion are in each frame, shared between the nearest places [frames, 13, 13]."""
    counts = np.zeros((frames, _PLACES, _PLACES))
    for _ in range(_SAMPLES):
        clip = sample_clip(rng, motion)
        for f in range(frames):
            thing = clip.frame(f).things[0]
            at = [np.clip((p - _FIRST) / _STEP, 0, _PLACES - 1 - 1e-6) for p in (thing.y, thing.x)]
            (i, a), (j, b) = ((int(p), p - int(p)) for p in at)
            corner = np.outer([1 - a, a], [1 - b, b])
            counts[f, i : i + 2, j : j + 2] += corner / _SAMPLES
    return torch.from_numpy(counts).float()
