"""Losses on concept maps, whose gradient moves the latents: pure functions, one value a sample.

A concept map is the cross-attention that image tokens pay to the tokens of one word. Everywhere `maps` is
[B, C, h, w] (samples, concepts, rows, columns of the token grid), every loss is [B], and sums run in float32 (float64
stays). No function changes its inputs.

    segregation, retention   A-STAR, "Test-time Attention Segregation and Retention for Text-to-image Synthesis",
                             arXiv 2306.14544, eq. 2 and 3
    attend_excite            "Attend-and-Excite: Attention-Based Semantic Guidance", arXiv 2301.13826
    info_nce                 CONFORM, "Contrast is All You Need for High-Fidelity Text-to-Image Diffusion Models",
                             arXiv 2312.06059
    attendance, divergence   "Divide & Bind Your Attention for Improved Generative Semantic Nursing", arXiv 2307.10864
    self_cross               "Self-Cross Diffusion Guidance", arXiv 2411.18936
    focus                    FOCUS, arXiv 2510.02315
    jedi                     JEDI, "The Force of Jensen-Shannon Divergence in Disentangling Diffusion Models",
                             arXiv 2505.19166
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.maps import otsu_split, stretched

__all__ = [
    "Binarise",
    "MapNorm",
    "attend_excite",
    "attendance",
    "binarise",
    "divergence",
    "focus",
    "info_nce",
    "jedi",
    "normalise",
    "retention",
    "segregation",
    "self_cross",
    "smooth",
    "take",
    "token_softmax",
    "total_variation",
]

MapNorm = Literal["none", "max", "minmax", "ae"]
Binarise = Literal["mean", "otsu"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take(maps: Tensor, places: Sequence[int]) -> Tensor:
    """Take some concepts of maps [B, C, ...]; a list as an index would be copied to the device."""
    return torch.stack([maps[:, place] for place in places], 1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide, and give 0 with a finite gradient where the divisor is 0."""
    return a / torch.where(b > 0, b, torch.ones_like(b))


# Maps


def token_softmax(maps: Tensor) -> Tensor:
    """Share each image token among the text tokens: softmax(100 A) without the first and the last token.

    Attend-and-Excite's normalisation; it needs the map of every text token.

    Shapes: maps [B, T, h, w] -> [B, T, h, w], zero for the first and the last token.
    """
    shares = (100 * _wide(maps)[:, 1:-1]).softmax(dim=1)
    return F.pad(shares, (0, 0, 0, 0, 1, 1))


def normalise(maps: Tensor, how: MapNorm = "max") -> Tensor:
    """Divide each map by its own maximum ("max"), stretch it to [0, 1] ("minmax"), or leave it ("none", "ae").

    The maximum and the minimum are part of the graph. A map that is constant at 0 stays 0.
    """
    maps = _wide(maps)
    if how in ("none", "ae"):
        return maps
    return stretched(maps, (-2, -1), from_zero=how == "max")


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Blur maps with Attend-and-Excite's 3 x 3 kernel, edges reflected.

    Its weights are exp(-(x / (2 sigma))^2), so that sigma = 0.5 is a Gaussian of 0.71 tokens.

    Shapes: maps [..., h, w] -> the same. A grid with a side of one token is left alone along that side.
    """
    maps = _wide(maps)
    x = torch.arange(-1, 2, dtype=maps.dtype, device=maps.device)
    line = torch.exp(-((x / (2 * sigma)) ** 2))
    line = line / line.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    for axis, size in ((-2, maps.shape[-2]), (-1, maps.shape[-1])):
        if size > 1:
            pad = (0, 0, 1, 1) if axis == -2 else (1, 1, 0, 0)
            flat = F.conv2d(
                F.pad(flat, pad, mode="reflect"), line.reshape((1, 1, 3, 1) if axis == -2 else (1, 1, 1, 3))
            )
    return flat.reshape(maps.shape)


def binarise(maps: Tensor, rule: Binarise | float = 0.5) -> Tensor:
    """Mark the active pixels of each map with 1, the others with 0; no gradient.

    Args:
        maps: [..., h, w].
        rule: A fraction in (0, 1) of the way from the map's minimum to its maximum; "mean": at least the map's mean;
            "otsu": above Otsu's threshold.

    Returns:
        [..., h, w], in the floating-point type of the maps. A constant map has no active pixel under a fraction.
    """
    maps = _wide(maps.detach())
    if rule == "mean":
        return (maps >= maps.mean((-2, -1), keepdim=True)).to(maps)
    spread = stretched(maps, (-2, -1), from_zero=False)
    return _otsu(spread) if isinstance(rule, str) else (spread >= rule).to(maps)


def _otsu(maps: Tensor) -> Tensor:
    """Split each map where the variance between the two classes is greatest."""
    values = maps.flatten(-2)
    if values.shape[-1] == 1:
        return torch.ones_like(maps)
    return (maps > otsu_split(values)[0][..., None]).to(maps)


# A-STAR


def segregation(maps: Tensor) -> Tensor:
    """Measure how far the maps of different concepts overlap: A-STAR eq. 2.

        L = sum_{m > n} [ sum_ij min(A^m, A^n) / sum_ij (A^m + A^n) ]

    Between 0 (disjoint) and half the number of pairs (identical); 0 for a single concept, with a zero gradient.

    Shapes: maps [B, C, h, w] -> [B].
    """
    maps = _wide(maps)
    total = maps.sum((1, 2, 3)) * 0  # a single concept has no pair, but its loss can still be differentiated
    for m, n in itertools.combinations(range(maps.shape[1]), 2):
        a, b = maps[:, m], maps[:, n]
        total = total + _ratio(torch.minimum(a, b).sum((1, 2)), (a + b).sum((1, 2)))
    return total


def retention(maps: Tensor, masks: Tensor) -> Tensor:
    """Measure how much of each concept's region its map has left: A-STAR eq. 3.

        L = sum_m [ 1 - sum_ij min(A^m, B^m) / sum_ij (A^m + B^m) ]

    Between half the number of concepts (map equals mask) and their number (disjoint).

    Shapes: maps [B, C, h, w]; masks broadcastable to it, 0 or 1, no gradient -> [B].
    """
    maps = _wide(maps)
    masks = masks.detach().to(maps).expand_as(maps)
    overlap = _ratio(torch.minimum(maps, masks).sum((2, 3)), (maps + masks).sum((2, 3)))
    return (1 - overlap).sum(1)


# Attend-and-Excite


def attend_excite(maps: Tensor) -> Tensor:
    """Ask the least attended concept for a strong pixel: max_s max(0, 1 - max_ij A^s) (arXiv 2301.13826, eq. 1).

    Shapes: maps [B, C, h, w] -> [B]. Only the worst concept of each sample has a gradient.
    """
    return (1 - _wide(maps).amax((2, 3))).clamp_min(0).amax(1)


# CONFORM


def info_nce(maps: Tensor, groups: Sequence[int], previous: Tensor | None = None, temperature: float = 0.5) -> Tensor:
    """Draw maps of one group together and others apart: the InfoNCE loss of CONFORM (arXiv 2312.06059).

        L = mean over positive pairs (a, p) of -log( e^{s(a,p)/t} / (e^{s(a,p)/t} + sum_n e^{s(a,n)/t}) )

    with the cosine similarity s, n over the maps of other groups.

    Args:
        maps: [B, C, h, w].
        groups: The group of each concept: an object and its attributes share one.
        previous: Maps of the step before, further members of the same groups, or None.
        temperature: t.

    Returns:
        [B]; 0 where no group has two members.
    """
    if len(groups) != maps.shape[1]:
        raise ConfigError(f"info_nce: {len(groups)} groups were given for {maps.shape[1]} concepts; give one for each.")
    rows = _wide(maps).flatten(2)
    labels = torch.stack([maps.new_full((), g, dtype=torch.long) for g in groups])
    if previous is not None:
        rows, labels = torch.cat([rows, previous.detach().to(rows).flatten(2)], 1), labels.repeat(2)
    rows = F.normalize(rows, dim=-1)
    logits = rows @ rows.transpose(1, 2) / temperature
    alike = labels[:, None] == labels
    positive = alike & ~torch.eye(len(labels), dtype=torch.bool, device=maps.device)
    others = logits.masked_fill(alike, -torch.inf).logsumexp(-1, keepdim=True)
    loss = torch.logaddexp(logits, others) - logits
    return torch.where(positive, loss, 0.0).sum((1, 2)) / positive.sum().clamp_min(1)


# Divide & Bind


def total_variation(maps: Tensor) -> Tensor:
    """Sum up each map's mean absolute differences down and across: [..., h, w] -> [...]."""
    maps = _wide(maps)
    down, across = maps.diff(dim=-2).abs(), maps.diff(dim=-1).abs()
    return sum((d.mean((-2, -1)) for d in (down, across) if d.numel()), start=maps.sum((-2, -1)) * 0)


def attendance(maps: Tensor) -> Tensor:
    """Ask the flattest map for variation: -min_s TV(A^s), Divide & Bind's attendance loss (arXiv 2307.10864).

    Shapes: maps [B, C, h, w] -> [B].
    """
    return -total_variation(maps).amin(1)


def divergence(maps: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of the maps as distributions, divided by log C: 0 (equal) to 1 (disjoint).

    Divide & Bind's binding loss is this for an object and its attribute.

    Shapes: maps [B, C, h, w] -> [B]; 0 for a single concept.
    """
    p = _shares(maps)
    if p.shape[1] == 1:
        return p.sum((1, 2)) * 0
    mean = p.mean(1, keepdim=True)
    tiny = torch.finfo(p.dtype).tiny  # keeps the logarithm of an empty pixel, and its gradient, finite
    kl = (p * ((p + tiny).log() - (mean + tiny).log())).sum(-1)
    return kl.mean(1) / torch.log(p.new_full((), float(p.shape[1])))


def _shares(maps: Tensor, power: float = 1.0) -> Tensor:
    rows = _wide(maps).flatten(2) ** power
    return _ratio(rows, rows.sum(-1, keepdim=True))


# Self-Cross guidance


def self_cross(maps: Tensor, masks: Tensor, self_attention: Tensor) -> Tensor:
    """Measure how far the image tokens of one concept look where another concept is (arXiv 2411.18936).

        L = mean_{i != j} sum min(S_j, M_i),   S_j = sum_{p in mask j} M_j[p] self_attention[p, :]

    with S and M normalised to sum 1.

    Shapes: maps, masks [B, C, h, w]; self_attention [B, h w, h w] -> [B]; 0 for a single concept.
    """
    c = maps.shape[1]
    seen = _wide(maps * masks.detach().to(maps)).flatten(2) @ _wide(self_attention)
    seen = _ratio(seen, seen.sum(-1, keepdim=True))
    shared = torch.minimum(seen[:, :, None], _shares(maps)[:, None]).sum(-1)
    apart = ~torch.eye(c, dtype=torch.bool, device=maps.device)
    return (shared * apart).sum((1, 2)) / max(c * (c - 1), 1)


# FOCUS and JEDI


def focus(maps: Tensor, groups: Sequence[int]) -> Tensor:
    """Ask for one sharp place a group and different places for different groups (FOCUS, arXiv 2510.02315).

        L = (mean over groups of JSD within the group + 1 - JSD of the group means) / 2,   each map as A^3 / sum A^3

    Shapes: maps [B, C, h, w]; groups: the group of each concept -> [B].
    """
    within, between = _coherence(_shares(maps, 3.0), groups, "focus")
    return (within + 1 - between) / 2


def jedi(maps: Tensor, groups: Sequence[int], diversity: float = 0.01) -> Tensor:
    """Ask for the same place within a group, for different ones between groups, and for no map of one pixel.

        L = mean over groups of JSD within the group + 1 - JSD of the group means + diversity (1 - mean entropy)

    with the entropy of each map divided by its greatest, log(h w): JEDI, arXiv 2505.19166, whose steps are
    `grad_transform="sign", step_size=3e-3, schedule="constant"`.

    Shapes: maps [B, C, h, w]; groups: the group of each concept -> [B].
    """
    p = _shares(maps)
    within, between = _coherence(p, groups, "jedi")
    tiny = torch.finfo(p.dtype).tiny
    entropy = -(p * (p + tiny).log()).sum(-1).mean(1) / math.log(max(p.shape[-1], 2))
    return within + 1 - between + diversity * (1 - entropy)


def _coherence(p: Tensor, groups: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
    """Compute the mean JSD within groups and the JSD of their means, [B] each, of distributions [B, C, N]."""
    if len(groups) != p.shape[1]:
        raise ConfigError(f"{name}: {len(groups)} groups were given for {p.shape[1]} concepts; give one for each.")
    members = [[i for i, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)]
    rows = p[:, :, None]
    grouped = [take(rows, m) for m in members]
    within = torch.stack([divergence(part) for part in grouped]).mean(0)
    return within, divergence(torch.stack([part.mean(1) for part in grouped], 1))
