"""Which patterns the heads of a backbone have: alike for all queries, or each its own; near, or far.

Normalised mutual information and distance follow "What Do Self-Supervised Vision Transformers Learn?" (arXiv
2305.00729); distilling the pattern of one layer follows UNIP (arXiv 2502.06200, equation 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.look.grids import GridWatch
from attnctl.backbones.look.probe import probe_attention
from attnctl.backbones.look.sites import BackboneSite, backbone_sites
from attnctl.backbones.modes import evaluating
from attnctl.errors import ConfigError

__all__ = ["Patterns", "attention_distance", "attention_entropy", "mutual_information", "pattern_loss", "patterns"]


def mutual_information(weights: Tensor) -> Tensor:
    """Compute the mutual information of queries and keys divided by the root of the product of their entropies.

    0 where all queries attend alike (global), 1 where each attends to a key of its own (local). Shapes: weights
    [..., N, N] over places, prefix tokens left out -> [...].
    """
    a = _rows(weights, 1e-8)
    keys = a.mean(-2, keepdim=True)
    information = (a * (a / keys).log()).sum(-1).mean(-1)
    entropy = -(keys * keys.log()).sum((-1, -2))
    return information / (torch.log(torch.tensor(float(a.shape[-2]))) * entropy).sqrt()


def attention_distance(weights: Tensor, grid: tuple[int, int], patch: float = 1.0) -> Tensor:
    """Compute the mean distance from a query to its keys, in units of `patch` per token: [..., N, N] -> [...]."""
    a = _rows(weights, 1e-32)
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    at = torch.stack([y.flatten(), x.flatten()], -1).to(a)
    return (a * torch.cdist(at, at) * patch).sum(-1).mean(-1)


def attention_entropy(weights: Tensor) -> Tensor:
    """Compute the mean entropy of the rows, in nats: [..., N, N] -> [...]."""
    a = _rows(weights, 1e-8)
    return -(a * a.log()).sum(-1).mean(-1)


def pattern_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the divergence KL(teacher || student) of attention logits s q k^T, mean over images, heads and queries.

    Shapes: student, teacher [B, H, N, N]; both have the same number of heads.
    """
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """What the heads of each site do, by its name: tensors [H].

    Attributes:
        information: `mutual_information`, 0 to 1. distance: In tokens. entropy: In nats.
        label: "local", "hybrid" or "global" of a site, by its mean information beside the range over all sites.
    """

    information: Mapping[str, Tensor]
    distance: Mapping[str, Tensor]
    entropy: Mapping[str, Tensor]
    label: Mapping[str, str]


def patterns(model: nn.Module, images: Tensor) -> Patterns:
    """Measure the patterns of every attention whose places attend to all places, averaged over images.

    Labels divide the range of the sites' information into thirds: the highest is local, the lowest global. One backward
    pass per place and site.

    Raises: ConfigError without images; UnsupportedModelError for a model with no attention that can be read.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ConfigError(f"images of shape {tuple(images.shape)} were given; expected [B, C, H, W], at least one.")
    sites = [s for s in backbone_sites(model) if s.kind == "self"]
    values: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(evaluating(model))
        grid_of = GridWatch(model, sites, undo)

        def measure(site: BackboneSite) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
                with probe_attention(site, args, kwargs, grid_of(site, args)) as probe:
                    if probe.grid != probe.key_grid:
                        return  # queries or keys were pooled: no query has a key of its own
                    n = probe.grid[0] * probe.grid[1]
                    a = probe.matrix()[:, :, :n, :n].double()
                measured = mutual_information(a), attention_distance(a, probe.grid), attention_entropy(a)
                values[site.name] = measured[0].mean(0), measured[1].mean(0), measured[2].mean(0)

            return hook

        for site in sites:
            undo.callback(site.module.register_forward_hook(measure(site), with_kwargs=True).remove)
        with torch.no_grad():
            model(images)
    means = {name: float(v[0].mean()) for name, v in values.items()}
    low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
    names = ("global", "hybrid", "local")
    label = {n: names[min(2, int(3 * (m - low) / max(high - low, 1e-12)))] for n, m in means.items()}
    information, distance, entropy = ({n: v[i] for n, v in values.items()} for i in range(3))
    return Patterns(information=information, distance=distance, entropy=entropy, label=label)


def _rows(weights: Tensor, least: float) -> Tensor:
    weights = weights + least
    return weights / weights.sum(-1, keepdim=True)
