"""What the heads of a backbone do: how much each is needed, and how far each attends.

Leave-one-out importance of heads and their share of attention by neighbourhood follow "How Does Attention Work in
Vision Transformers? A Visual Analytics Attempt" (arXiv 2303.13731); the mean distance is that of "An Image is Worth
16x16 Words" (arXiv 2010.11929), figure 7. Both read all attention that `attnctl.find_sites` lists in a backbone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.backbones.look.grids import GridWatch
from attnctl.backbones.look.probe import AttentionProbe, probe_attention
from attnctl.backbones.look.sites import BackboneSite, backbone_sites, sites_of
from attnctl.backbones.modes import evaluating
from attnctl.core.sites import Selector, select
from attnctl.data.pictures import blank_figure
from attnctl.data.progress import tracked
from attnctl.errors import ConfigError

__all__ = ["AttentionDistance", "HeadImportance", "distance_profile", "head_importance"]


@dataclass(frozen=True, kw_only=True)
class HeadImportance:
    """What is lost without each head, by site name: tensors [H].

    Attributes:
        accuracy: Share of right answers with every head, 0 to 1.
        accuracy_drop: How much of it is lost without the head.
        probability_drop: How much probability the right answer loses on average.
        divergence: Mean Jensen-Shannon divergence of the answers with and without the head, in nats, 0 to log 2.
    """

    accuracy: float
    accuracy_drop: Mapping[str, Tensor]
    probability_drop: Mapping[str, Tensor]
    divergence: Mapping[str, Tensor]

    def save_picture(self, path: Path) -> None:
        """Draw the three measures, one row a site and one column a head. Raises: ConfigError without matplotlib."""
        parts = (
            ("accuracy lost", self.accuracy_drop),
            ("probability lost", self.probability_drop),
            ("divergence (nats)", self.divergence),
        )
        names = list(self.divergence)
        figure = blank_figure(12, 1.6 + 0.4 * len(names))
        for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True), parts, strict=True):
            table = _padded_rows([values[n] for n in names])
            top = float(table.nan_to_num().abs().max()) or 1.0
            shown = axes.imshow(table, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
            axes.set(title=title, xlabel="head", xticks=range(table.shape[1]), yticks=range(len(names)))
            axes.set_yticklabels(names)
            figure.colorbar(shown, ax=axes)
        figure.suptitle(f"Without one head at a time (accuracy with all of them: {self.accuracy:.1%})")
        figure.savefig(path)


@dataclass(frozen=True, kw_only=True)
class AttentionDistance:
    """How far each head attends, by site name.

    Attributes:
        pixels: Mean distance from a place to what it attends to, in pixels of the image, [H].
        hops: Share of attention that stays within 0, 1, 2, ... tokens up, down and sideways, [H, hops]; ends at 1.
    """

    pixels: Mapping[str, Tensor]
    hops: Mapping[str, Tensor]

    def save_picture(self, path: Path) -> None:
        """Draw the mean distance of every head over depth, and the share of attention by neighbourhood.

        Raises: ConfigError without matplotlib.
        """
        names = list(self.pixels)
        figure = blank_figure(12, 5)
        left, right = figure.subplots(1, 2)
        for depth, name in enumerate(names):
            left.scatter([depth] * len(self.pixels[name]), self.pixels[name], s=24, color="C0", alpha=0.7)
        left.set(xlabel="attention, in execution order", ylabel="mean distance (pixels)")
        left.set(ylim=(0, 1.1 * max(1e-3, *(float(v.max()) for v in self.pixels.values()))))
        left.set(xticks=range(len(names)), title="one dot a head")
        table = _padded_rows([row for n in names for row in self.hops[n]])
        shown = right.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        starts, count = [], 0
        for name in names:
            starts.append(count)
            count += len(self.pixels[name])
        right.set(xlabel="within so many tokens", title="share of attention, one row a head", yticks=starts)
        right.set_yticklabels(names, fontsize=7)
        figure.colorbar(shown, ax=right)
        figure.savefig(path)


def head_importance(
    model: nn.Module, images: Tensor, labels: Tensor | None = None, *, sites: Selector | None = None, batch: int = 128
) -> HeadImportance:
    """Leave out one head at a time and measure what the answers lose.

    Args:
        model: A backbone that answers with logits [B, classes] or [B, classes, h, w].
        images: [n, C, H, W]. labels: right answers, [n] or [n, h, w]; the model's own with all heads if None.
        sites: Selector of attention sites, all if None. batch: images at a time.

    Raises:
        ConfigError: No images, or labels of another number.
        SiteError, UnsupportedModelError: As `attnctl.find_sites` and its selectors.
    """
    if len(images) == 0 or batch < 1 or (labels is not None and len(labels) != len(images)):
        raise ConfigError(
            f"{len(images)} images, {'no' if labels is None else len(labels)} labels and batch={batch} were given; "
            "expected at least one image, one label an image or None, and a positive batch."
        )
    chosen = _chosen(model, sites)
    with evaluating(model):
        base = _answers(model, images, batch)
        right = base.argmax(-1) if labels is None else labels.flatten().to(base.device)
        accuracy = float((base.argmax(-1) == right).double().mean())
        losses: dict[str, list[tuple[float, float, float]]] = {s.name: [] for s in chosen}
        heads = [(s, h) for s in chosen for h in range(s.heads)]
        for site, head in tracked(heads, "head", "leave one out"):
            with site.reading.out.register_forward_pre_hook(_without(site, head)):
                answers = _answers(model, images, batch)
            remaining = (answers.argmax(-1) == right).double().mean()
            lost = (base - answers).gather(-1, right[:, None]).double().mean()
            losses[site.name].append((accuracy - float(remaining), float(lost), float(_divergence(base, answers))))
    drop, probability, divergence = (
        {name: torch.tensor([row[i] for row in rows]) for name, rows in losses.items()} for i in range(3)
    )
    return HeadImportance(accuracy=accuracy, accuracy_drop=drop, probability_drop=probability, divergence=divergence)


def distance_profile(
    model: nn.Module, images: Tensor, *, sites: Selector | None = None, queries: int = 64
) -> AttentionDistance:
    """Measure how far each head attends, averaged over images and over places spread evenly.

    Args:
        model: A backbone. images: [n, C, H, W], one batch. sites: Selector of attention sites, all if None.
        queries: Places to measure from at each site, at most; all where it has fewer. Class and register tokens do not
            count, neither as queries nor as keys.

    Raises:
        ConfigError: No images or places. SiteError, UnsupportedModelError: As `attnctl.find_sites` and its selectors.
    """
    if len(images) == 0 or queries < 1:
        raise ConfigError(f"{len(images)} images and queries={queries} were given; expected at least one of each.")
    chosen = [s for s in _chosen(model, sites) if s.kind == "self"]
    pixels: dict[str, Tensor] = {}
    hops: dict[str, Tensor] = {}
    size = (images.shape[-2], images.shape[-1])
    with contextlib.ExitStack() as undo:
        undo.enter_context(evaluating(model))
        grid_of = GridWatch(model, chosen, undo)

        def measure(site: BackboneSite) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
                with probe_attention(site, args, kwargs, grid_of(site, args)) as probe:
                    pixels[site.name], hops[site.name] = _spread(probe, size, queries)

            return hook

        for site in chosen:
            undo.callback(site.module.register_forward_hook(measure(site), with_kwargs=True).remove)
        with torch.no_grad():
            model(images)
    return AttentionDistance(pixels=pixels, hops=hops)


def _spread(probe: AttentionProbe, size: tuple[int, int], queries: int) -> tuple[Tensor, Tensor]:
    """Average distances in pixels [H], and the cumulative share by neighbourhood [H, hops]."""
    (h, w), (kh, kw) = probe.grid, probe.key_grid
    side = max(1, int(queries**0.5)) if h * w > queries else max(h, w)
    near = torch.zeros(probe.heads, max(h, w), dtype=torch.float64)
    total = torch.zeros(probe.heads, dtype=torch.float64)
    # Keys of a reduced map stand for the middle of what they were reduced from; distances count in query tokens.
    ys, xs = (torch.arange(kh) + 0.5) * h / kh - 0.5, (torch.arange(kw) + 0.5) * w / kw - 0.5
    rows, columns = (torch.linspace(0, n - 1, min(n, side)).round().long().tolist() for n in (h, w))
    for row in rows:
        for column in columns:
            share = probe.one(row * w + column)[..., : kh * kw].double().mean(0).cpu()
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
            dy, dx = (ys - row).abs()[:, None], (xs - column).abs()[None]
            total += share @ torch.hypot(dy * size[0] / h, dx * size[1] / w).flatten().double()
            ring = torch.maximum(*torch.broadcast_tensors(dy, dx)).ceil().long().flatten()
            near.index_add_(1, ring, share)
    count = len(rows) * len(columns)
    return (total / count).float(), (near / count).cumsum(-1).float()


def _chosen(model: nn.Module, sites: Selector | None) -> list[BackboneSite]:
    every = backbone_sites(model)
    if sites is None:
        return list(every)
    names = {s.name for s in select(sites_of(model), sites, kinds=("self", "pool"), what="The selector")}
    return [s for s in every if s.name in names]


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    """Compute probabilities [n, classes], pixels of maps in a row."""
    parts = [model(part).float().softmax(1).movedim(1, -1).flatten(0, -2) for part in images.split(batch)]
    return torch.cat(parts)


def _without(site: BackboneSite, head: int) -> Any:
    width = site.reading.width

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        channels = 1 if site.reading.channels_first and args[0].ndim == 4 else -1
        given = args[0].movedim(channels, -1)
        remaining = torch.ones(given.shape[-1], dtype=given.dtype, device=given.device)
        remaining[head * width // site.heads : (head + 1) * width // site.heads] = 0  # others pass beside attention
        return ((given * remaining).movedim(-1, channels), *args[1:])

    return hook


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Average the Jensen-Shannon divergence of rows of probabilities, in nats."""
    p, q = p.double(), q.double()
    middle = (p + q) / 2
    return (torch.xlogy(p, p / middle).nansum(-1) + torch.xlogy(q, q / middle).nansum(-1)).mean() / 2


def _padded_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, filled up with NaN."""
    width = max(len(r) for r in rows)
    return torch.stack([nn.functional.pad(r.float(), [0, width - len(r)], value=torch.nan) for r in rows])
