"""Segment what an expression names, in a picture or a clip, by the attention of a diffusion model; nothing is trained.

"RefAM: Attention Magnets for Zero-Shot Referral Segmentation", arXiv 2509.22650. A picture is noised to a level and
looked at once, with the expression as prompt. p_t(x) is how much place x attends to token t, the mean over heads,
layers and noises:

    magnets   stop words are appended to the prompt; they take attention that has nowhere to go, and their maps are
              left out
    sinks     tokens that receive far more than the others from everywhere lose their columns:
              p_t / (1 - the sum of p over the sinks), layer by layer
    filter    the map of an expression is the mean of p_t over its words without stop words

The paper's page gives no numbers for sinks, layers and the list of words: those here are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnctl.core.hosts.words import prompt_words
from attnctl.core.sites import Selector
from attnctl.data.map_points import peak_part, points_in
from attnctl.data.map_regions import boxes
from attnctl.data.maps import WordMaps, otsu, resized
from attnctl.data.segments import Referred
from attnctl.errors import ConfigError, number, shown
from attnctl.kernels.sinks import find_sinks, without_sinks
from attnctl.pipelines.map_images import image_maps
from attnctl.processors.capture.tokens import TokenCapture

__all__ = ["MAGNETS", "STOP_WORDS", "expression_map", "refer"]

MAGNETS = ("the", "with", "on", "of", "and", "to", "in")
STOP_WORDS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "and", "or", "but", "of", "in", "on", "at", "by", "to",
    "for", "from", "with", "without", "into", "onto", "over", "as", "is", "are", "was", "were", "be", "been",
    "being", "it", "its", "his", "her", "their", "our", "your", "my", "he", "she", "they", "we", "you", "i", "who",
    "which", "what", "there", "here", "some", "any", "each", "not", "no", "do", "does", "did", "has", "have", "had",
    "will", "would", "can", "could", "should", "may", "might", "than", "then", "so", "such", "very",
))  # fmt: skip


def expression_map(maps: WordMaps, words: Sequence[str], sinks: float | None = 10.0) -> Tensor:
    """Join the maps of an expression's words, without the attention that sinks take.

    Args:
        maps: Maps of all tokens of a prompt, of one image.
        words: The words that the expression is about; these are no sinks.
        sinks: A token is a sink where its mean is more than so many times the median token's; None for no sinks.

    Returns:
        The mean over words and layers, [h, w] on the largest grid.
    """
    chosen = torch.tensor([word in words for word in maps.words])
    counts = torch.tensor([len(places) for places in maps.tokens[0]])
    total: Tensor | None = None
    for site in maps.sites:
        layer = maps.stacked(layers=site.name)[:, 0]
        flat = layer.flatten(1)
        if sinks is not None:
            sink_mask = find_sinks(flat, sinks, chosen)
            # A word's map is the mean over its tokens, and the sum of all is what its columns take away.
            flat = without_sinks(flat * counts[:, None], sink_mask) / counts[:, None]
        part = resized(flat[chosen].mean(0).unflatten(0, layer.shape[1:]), maps.grid)
        total = part if total is None else total + part
    assert total is not None
    return total / len(maps.sites)


def refer(
    pipe: Any,
    pictures: Any,
    expressions: str | Sequence[str],
    *,
    magnets: Sequence[str] = MAGNETS,
    sinks: float | None = 10.0,
    sites: Selector | None = None,
    whole: bool = False,
    threshold: float | Literal["otsu"] = "otsu",
    points: tuple[int, int] = (1, 3),
    strength: float = 0.3,
    draws: int = 1,
    seed: int = 0,
    **options: Any,
) -> list[Referred]:
    """Find what expressions name in a picture, or in each frame of a clip.

    Args:
        pipe: A pipeline that `image_maps` takes.
        pictures: A PIL image, or a list of images of one size.
        expressions: One or several, such as "the red circle".
        magnets: Words that are appended to each; those that an expression contains are not.
        sinks: As for `expression_map`.
        sites: Attention sites to read; None for all that read text.
        whole: Keep all of the mask; False for the connected part with the peak alone.
        threshold: A share of each map's range, 0 to 1, or "otsu" to part each map by itself.
        points: Most points inside and outside.
        strength: Noise level, as for `image_maps`.
        draws: Noises to average over.
        seed: Seed of the first noise, the same for every picture.
        options: Further arguments of the pipeline.

    Raises:
        ConfigError: An expression is stop words alone, or is cut off with its magnets; a value is out of range.
    """
    if not isinstance(expressions, Sequence):
        raise ConfigError(f"expressions={shown(expressions)} was given; expected a text, or a list of texts.")
    texts = (expressions,) if isinstance(expressions, str) else tuple(expressions)
    images = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not texts or not images:
        raise ConfigError("Give one expression or more, and one picture or more.")
    if threshold != "otsu":
        number(threshold, "threshold", 0.0, 1.0)
    if sinks is not None:
        number(sinks, "sinks", 1.0)
    capture = TokenCapture(sites=sites)
    how = {"strength": strength, "draws": draws, "seed": seed, **options}
    segments = []
    for expression in texts:
        words, prompt = _prompt(expression, magnets)
        heats = []
        for image in images:
            maps = image_maps(pipe, image, prompt, capture, **how)
            if missing := [w for w in prompt_words(prompt) if w not in maps.words]:
                raise ConfigError(
                    f"{expression!r} with its magnets is longer than the text encoder reads: {', '.join(missing)} are "
                    "cut off. Give a shorter expression, or fewer magnets."
                )
            heats.append(expression_map(maps, words, sinks))
        segments.append(_referred(expression, torch.stack(heats), _size(images[0]), whole, threshold, points))
    return segments


def _prompt(expression: str, magnets: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return the words that an expression is about, and the prompt that asks for it."""
    if not isinstance(expression, str) or not expression.strip():
        raise ConfigError(f"The expression {expression!r} is empty: say what to look for, such as 'the red circle'.")
    if isinstance(magnets, str):
        raise ConfigError(f"magnets={magnets!r}: give a tuple of words, such as ('the', 'with').")
    every = prompt_words(expression)
    words = tuple(w for w in every if w not in STOP_WORDS)
    if not words:
        raise ConfigError(f"{expression!r} holds stop words alone: name what to look for, such as 'the red circle'.")
    appended = [m for m in magnets if m.lower() not in words]
    return words, " ".join([expression.strip(), *appended])


def _size(image: Any) -> tuple[int, int]:
    """Return rows and columns of a picture in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return int(image.shape[-2]), int(image.shape[-1])


def _referred(
    expression: str, heats: Tensor, size: tuple[int, int], whole: bool, threshold: Any, points: tuple[int, int]
) -> Referred:
    """Read masks, boxes and points off the maps [F, h, w] of some pictures."""
    masks, around, inside, outside = [], [], [], []
    for heat in resized(heats, size):
        low, high = heat.min(), heat.max()
        level = otsu(heat) if threshold == "otsu" else float(low + threshold * (high - low))
        mask = np.asarray(heat >= level) if high > low else np.zeros(size, bool)
        mask = mask if whole else peak_part(heat, mask)
        first, last = points_in(heat, mask, positive=points[0], negative=points[1])
        masks.append(torch.from_numpy(mask))
        around.append(_around(mask))
        inside.append(first)
        outside.append(last)
    return Referred(
        expression=expression,
        heat=heats,
        masks=torch.stack(masks),
        boxes=tuple(around),
        positive=tuple(inside),
        negative=tuple(outside),
    )


def _around(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the box around all parts of a mask, or None around nothing."""
    parts = boxes(mask)
    if not parts:
        return None
    left, top = (min(p[i] for p in parts) for i in (0, 1))
    right, bottom = (max(p[i] + p[i + 2] for p in parts) for i in (0, 1))
    return left, top, right - left, bottom - top
