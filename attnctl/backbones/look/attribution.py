"""Which places of an image an answer comes from: rollout, relevance, and gradient times attention.

Rollout follows "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), relevance "Generic Attention-model
Explainability" (arXiv 2103.15679, equations 5 and 6), gradient times attention its last layer alone. All three read the
maps that `Capture` reads, so they work after a swap too. They need a backbone whose attention has the same tokens all
the way, as vision transformers do; where a pool or a late class token asks last, it is where they begin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.backbones.look.grids import GridWatch
from attnctl.backbones.look.probe import AttentionProbe, probe_attention
from attnctl.backbones.look.sites import BackboneSite, backbone_sites
from attnctl.backbones.modes import evaluating
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["gradient_attention", "relevance", "rollout"]

Grid = tuple[int, int]


@dataclass
class _Call:
    """One call of a site in a forward pass.

    Attributes:
        site: The site. args, kwargs: What it was called with. grid: Of its keys.
        mixed: What the layer behind attention was given.
        gradient: Of the target by `mixed`, in the same layout, once it is known.
    """

    site: BackboneSite
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: Grid
    mixed: Tensor | None = None
    gradient: Tensor | None = None

    @contextlib.contextmanager
    def probe(self) -> Iterator[AttentionProbe]:
        """Run the call once more, to be read."""
        with probe_attention(self.site, self.args, self.kwargs, self.grid) as probe:
            yield probe


def rollout(model: nn.Module, images: Tensor, *, residual: float = 0.5) -> Tensor:
    """Multiply the attention of all layers, heads averaged: what reaches the class token, or the pool, from each place.

    Every layer counts as residual I + (1 - residual) A. Shapes: images [B, C, H, W] -> [B, h, w], float32; the sum over
    places and prefix tokens is 1. One backward pass per layer.

    Raises: ConfigError for a residual outside 0 to 1; UnsupportedModelError for models whose tokens change on the way.
    """
    if not 0 <= residual <= 1:
        raise ConfigError(f"residual={residual} was given; expected 0 to 1.")
    calls, _ = _run(model, images)
    row, layers = _beginning(calls, len(images))
    for call in reversed(layers):
        with call.probe() as probe:
            row = residual * row + (1 - residual) * probe.rows(row).mean(1)
    return _on_the_map(row, calls[0].grid)


def relevance(model: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Compute how much each place contributes to a class: R <- R + mean over heads of (gradient x attention)^+ R.

    target: a class, one per image [B], or each image's best if None. Shapes: images [B, C, H, W] -> [B, h, w], float32,
    0 or more. One backward pass per token and layer.

    Raises: UnsupportedModelError as `rollout`; ConfigError for a target that is no class.
    """
    calls, answers = _run(model, images, grads=True)
    _differentiate(calls, answers, target)
    row, layers = _beginning(calls, len(images), weighed=True)
    for call in reversed(layers):
        row = row + torch.einsum("bq,bqk->bk", row, _weighed(call).mean(1))
    return _on_the_map(row, calls[0].grid)


def gradient_attention(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, *, layer: int = -1
) -> Tensor:
    """Weigh one layer's attention by its gradient, keep what is positive and average the heads: [B, h, w], float32.

    The row is the class token's, the pool's, or the mean of all places. target: as in `relevance`. layer: index into
    `attnctl.find_sites(model)`. Raises: as `relevance`; ConfigError for a layer that does not exist.
    """
    calls, answers = _run(model, images, grads=True, same=False)
    if not -len(calls) <= layer < len(calls):
        raise ConfigError(f"layer={layer} was given, but this model has {len(calls)} attention sites.")
    _differentiate(calls, answers, target)
    call = calls[layer]
    weights = _weighed(call).mean(1)
    return _on_the_map(torch.einsum("q,bqk->bk", _question(call), weights), call.grid)


def _run(model: nn.Module, images: Tensor, grads: bool = False, same: bool = True) -> tuple[list[_Call], Tensor]:
    """Run a model and note what its attention is called with, in the order in which it runs; return its answers."""
    if images.ndim != 4 or len(images) == 0:
        raise ConfigError(f"images of shape {tuple(images.shape)} were given; expected [B, C, H, W], at least one.")
    sites = backbone_sites(model)
    calls: dict[str, _Call] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.inference_mode(False))
        grid_of = GridWatch(model, sites, undo)

        def begin(site: BackboneSite) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                calls[site.name] = _Call(site, args, kwargs, grid_of(site, args))

            return hook

        def mixed(site: BackboneSite) -> Any:
            def hook(_: nn.Module, args: Any) -> None:
                calls[site.name].mixed = args[0]

            return hook

        for site in sites:
            undo.callback(site.module.register_forward_pre_hook(begin(site), with_kwargs=True).remove)
            undo.callback(site.reading.out.register_forward_pre_hook(mixed(site)).remove)
        undo.enter_context(torch.set_grad_enabled(grads))
        answers = model(images.detach().clone().requires_grad_(grads))
    ordered = list(calls.values())
    if same:
        _check_tokens(ordered, model)
    return ordered, answers[0] if isinstance(answers, tuple) else answers


def _check_tokens(calls: list[_Call], model: nn.Module) -> None:
    """Raise UnsupportedModelError unless every layer has the tokens of the first."""
    layers = [c for c in calls if c.site.reading.pool is None]
    tokens = {(c.grid, c.site.prefix) for c in layers}
    folded = [
        c for c in layers if c.site.reading.windowed or (c.site.frame is not None and c.site.frame.places is not None)
    ]
    if not layers or len(tokens) > 1 or folded:
        raise UnsupportedModelError(
            f"The attention of {type(model).__name__} has not the same tokens at every layer, so its maps cannot be "
            "multiplied. Use gradient_attention, which reads one layer, or a Capture."
        )


def _beginning(calls: list[_Call], images: int, weighed: bool = False) -> tuple[Tensor, list[_Call]]:
    """Return the weight of every token where the answer is read, [B, tokens], places first, and the layers before.

    weighed: whether attention counts times its gradient.
    """
    layers = [c for c in calls if c.site.reading.pool is None]
    last = calls[-1]
    if last.site.reading.pool is None:
        return _question(last).expand(images, -1).clone(), layers
    with last.probe() as probe:
        row = _weighed(last).mean(1)[:, -1] if weighed else probe.one(probe.grid[0] * probe.grid[1]).mean(1)
    size = last.grid[0] * last.grid[1] + layers[-1].site.prefix
    # A class token that joins late is no token of the layers before.
    row = nn.functional.pad(row, [0, size - row.shape[1]]) if row.shape[1] < size else row[:, :size]
    return row, layers


def _question(call: _Call) -> Tensor:
    """Weigh the queries of a site by who reads the answer: its first token, or all places alike."""
    places = call.grid[0] * call.grid[1]
    weights = torch.zeros(places + len(call.site.tokens), device=call.args[0].device)
    if call.site.tokens and call.site.tokens[0] in ("class", "pool"):
        weights[places] = 1
    else:
        weights[:places] = 1 / places
    return weights


def _differentiate(calls: list[_Call], answers: Tensor, target: int | Tensor | None) -> None:
    """Store the gradient of the target's logit at every site."""
    if answers.ndim != 2:
        raise UnsupportedModelError(f"The model answered {tuple(answers.shape)}; expected logits [B, classes].")
    chosen = (
        answers.argmax(1) if target is None else torch.as_tensor(target, device=answers.device).expand(len(answers))
    )
    if chosen.min() < 0 or chosen.max() >= answers.shape[1]:
        raise ConfigError(f"target={target} was given; expected classes from 0 to {answers.shape[1] - 1}.")
    logits = answers.gather(1, chosen[:, None]).sum()
    mixed = [c.mixed for c in calls]
    for call, gradient in zip(calls, torch.autograd.grad(logits, mixed, allow_unused=True), strict=True):  # type: ignore[arg-type]
        call.gradient = torch.zeros_like(call.mixed) if gradient is None else gradient


def _weighed(call: _Call) -> Tensor:
    """Multiply attention by its gradient and keep what is positive: [B, H, queries, keys], places first.

    The output is A v, so the gradient by A is that of the output times the values.
    """
    reading, frame = call.site.reading, call.site.frame
    cut = (frame is not None and frame.places is not None) or reading.order is not None
    gradient = call.gradient
    with call.probe() as probe:
        if gradient is not None and gradient.ndim == 4 and reading.channels_first:
            gradient = gradient.flatten(2).mT
        elif gradient is not None:  # in the order in which `mixed` was taken from what the same layer was given
            gradient = gradient.flatten(0, -2).unflatten(0, (probe.mixed.shape[0], -1))
        if gradient is None or (cut and reading.values is None) or gradient.shape != probe.mixed.shape:
            raise UnsupportedModelError(
                f"{call.site.name} has its tokens in an order of its own, so gradients cannot be laid beside its maps."
            )
        g = gradient.float().unflatten(-1, (probe.heads, -1)).transpose(1, 2)
        v = probe.leaf.detach().float().unflatten(-1, (probe.heads, -1)).transpose(1, 2)
        by_place = g @ v.mT
        queries, keys = (at.argsort()[(at < 0).sum() :] for at in (probe.query_at, probe.key_at))  # without padding
        by_place = by_place[:, :, queries][..., keys]
        return (by_place * probe.matrix()).clamp(min=0)


def _on_the_map(row: Tensor, grid: Grid) -> Tensor:
    return row[:, : grid[0] * grid[1]].unflatten(1, grid).detach()
