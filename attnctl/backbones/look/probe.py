"""Reading a backbone's attention without touching it: which values reach which place, head by head.

Attention is linear in its values: out = A v. One backward pass from a query's output to the values, with queries and
keys held constant, is that query's row of A, exactly. So one reader serves softmax attention over the map, in windows,
on grids or over reduced keys, routed attention, agents, and every swapped form. Depthwise branches on the values are no
attention and are left out. The module runs a second time for it: what the model computes stays bit for bit as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.backbones.look.kernel import AtKernel, AtSum
from attnctl.backbones.look.sites import BackboneSite
from attnctl.backbones.modes import evaluating
from attnctl.errors import UnsupportedModelError

__all__ = ["AttentionProbe", "probe_attention"]

Grid = tuple[int, int]
# Depthwise branches beside attention: their output does not count.
_BRANCHES = ("lepe", "dwc", "get_v", "crpe")


class _Reached(Exception):
    """Ends a run of a module where its purpose is reached."""


@dataclass
class AttentionProbe:
    """One call of one attention, ready to be read.

    heads: H. mixed: the result before the output projection, [B, queries, C]. leaf: the values, [B, keys, C].
    query_at, key_at: where each query and key lies: row by row in its grid, from h * w on prefix tokens, -1 padding.
    grid, key_grid: (height, width) in tokens of queries and keys. prefix: class and register tokens among the keys.
    tokens: queries that are no places, numbered behind the grid. spread: tokens in a row that each key is the mean of.
    """

    heads: int
    mixed: Tensor
    leaf: Tensor
    query_at: Tensor
    key_at: Tensor
    grid: Grid
    key_grid: Grid
    prefix: int
    tokens: int
    spread: int = 1

    def rows(self, weights: Tensor) -> Tensor:
        """Compute what the queries attend to, summed with weights.

        Shapes: weights [h * w + tokens] or [B, h * w + tokens], one per query -> [B, H, keys + prefix], the key grid
        row by row.
        """
        d = self.mixed.shape[-1] // self.heads
        weights = weights.to(self.mixed)
        each = torch.where(self.query_at >= 0, weights[..., self.query_at.clamp(min=0)], 0.0) / d
        cotangent = each.expand(self.mixed.shape[:2])[..., None].expand_as(self.mixed)
        (grad,) = torch.autograd.grad(self.mixed, self.leaf, cotangent, retain_graph=True)
        by_key = grad.float().unflatten(-1, (self.heads, -1)).sum(-1).transpose(1, 2)
        by_key = by_key.repeat_interleave(self.spread, -1) / self.spread
        n = self.key_grid[0] * self.key_grid[1] + self.prefix
        rows = by_key.new_zeros(*by_key.shape[:2], n + 1)
        return rows.index_add_(2, torch.where(self.key_at >= 0, self.key_at, n), by_key)[..., :n]

    def matrix(self) -> Tensor:
        """Compute what every query attends to, [B, H, queries, keys], places first; one backward pass per query."""
        return torch.stack([self.one(n) for n in range(self.grid[0] * self.grid[1] + self.tokens)], dim=2)

    def one(self, query: int) -> Tensor:
        """Compute what one query token attends to, [B, H, keys + prefix]."""
        weights = torch.zeros(self.grid[0] * self.grid[1] + self.tokens)
        weights[query] = 1
        return self.rows(weights)


@contextmanager
def probe_attention(
    site: BackboneSite, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Grid
) -> Iterator[AttentionProbe]:
    """Run an attention once more on the inputs of a call, and yield what can be asked of it.

    grid: (height, width) in tokens of one image's map, as a `GridWatch` finds it.
    """
    reading = site.reading
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(site.module))  # no dropout of attention weights
        for module in site.module.modules():
            if _leaf_name(site.module, module) in _BRANCHES:
                stack.callback(module.register_forward_hook(lambda _, __, y: y.detach()).remove)
        stack.enter_context(_set(reading.core, reading.settings))
        x = args[0].detach().clone()
        if reading.norm is not None:
            x = reading.norm(x).detach()
        parts, at = _places(site, x, grid)
        batch = x.shape[0] // parts
        kernel = AtKernel(reading.heads, batch, reading.rounds, reading.heads_first)
        if reading.mixer is not None:
            mixed, leaf, padded = *_run_mixer(site, x, args[1:], kwargs, batch), None
        elif reading.summed:
            mixed, leaf, padded = *_run_to_sum(site, x, batch), None
        elif reading.values is None:
            with kernel:
                reading.enter(x, *args[1:], **kwargs)
            mixed, leaf, padded = kernel.mixed, kernel.leaf, None
        else:
            mixed, leaf, padded = _run_to_out(site, x, args[1:], kwargs, batch)
        query_at, query_grid = _queries(site, mixed.shape[1], at, grid, padded)
        prefix = len(at) - grid[0] * grid[1] if reading.pool is not None else site.prefix
        key_at, key_grid = at, grid
        if reading.spread > 1:
            key_at = at[: leaf.shape[1] * reading.spread]
        elif leaf.shape[1] != len(at):
            key_at, key_grid = _reduced(leaf.shape[1], grid, prefix, x.device)
        yield AttentionProbe(
            reading.heads, mixed, leaf, query_at, key_at, query_grid, key_grid, prefix, len(site.tokens), reading.spread
        )


def _queries(site: BackboneSite, count: int, at: Tensor, grid: Grid, padded: Grid | None) -> tuple[Tensor, Grid]:
    """Number the queries of a call, and return their grid.

    at, grid: those of the keys. padded: (height, width) of the queries' map where it is one.
    """
    device = at.device
    if site.reading.pool is not None and count == len(site.reading.pool):
        return torch.arange(grid[0] * grid[1], grid[0] * grid[1] + count, device=device), grid
    if site.frame is not None and site.frame.queries is not None:
        size, places = site.frame.queries(*grid)
        return places.flatten().to(device), size
    if count == len(at):
        return at, grid
    if padded is not None and padded[0] * padded[1] == count and count > len(at):
        return _padded(grid, padded).to(device), grid
    return _reduced(count, grid, site.prefix, device)


def _run_to_out(
    site: BackboneSite, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> tuple[Tensor, Tensor, Grid | None]:
    """Run from the values to the layer behind attention.

    Returns what that layer is given, [B, queries, C], the values as a leaf, [B, keys, C], and the (height, width) of
    what the layer is given where that is a map.
    """
    reading = site.reading
    tensors: dict[str, Tensor] = {}

    def values(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        tensors["leaf"], whole = _with_leaf(y.detach(), site, batch)
        return whole

    def mixed(_: nn.Module, inputs: Any) -> None:
        tensors["mixed"] = inputs[0]
        raise _Reached

    hooks = reading.values.register_forward_hook(values), reading.out.register_forward_pre_hook(mixed)  # type: ignore[union-attr]
    with hooks[0], hooks[1], contextlib.suppress(_Reached):
        reading.enter(x, *rest, **kwargs)
    out = _channels_behind(tensors["mixed"], site)
    return (
        out.flatten(0, -2).unflatten(0, (batch, -1)),
        tensors["leaf"],
        (out.shape[1], out.shape[2] if out.ndim == 4 else 1),
    )


def _run_to_sum(site: BackboneSite, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Run from the product of keys and values to the layer behind attention.

    Returns what that layer is given, [B, queries, C], and the values as a leaf, [B, keys, C].
    """
    reading = site.reading
    tensors: dict[str, Tensor] = {}

    def mixed(_: nn.Module, inputs: Any) -> None:
        tensors["mixed"] = inputs[0]
        raise _Reached

    hook, summed = reading.out.register_forward_pre_hook(mixed), AtSum(reading.width // reading.heads)
    with hook, contextlib.suppress(_Reached), summed:
        reading.enter(x)
    return _channels_behind(tensors["mixed"], site).reshape(batch, -1, reading.width), summed.leaf


def _channels_behind(y: Tensor, site: BackboneSite) -> Tensor:
    """Turn a map [B, C, H, W] of a site that has its channels first into [B, H, W, C]."""
    return y.permute(0, 2, 3, 1) if site.reading.channels_first and y.ndim == 4 else y


def _run_mixer(
    site: BackboneSite, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> tuple[Tensor, Tensor]:
    """Run a swapped form to the end of its mixer, with the values as a leaf.

    Returns what the mixer gives, [B, queries, C], and the values, [B, keys, C].
    """
    tensors: dict[str, Tensor] = {}

    def values(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, *more = args
        tensors["leaf"] = v.detach().transpose(1, 2).flatten(2).reshape(batch, -1, v.shape[1] * v.shape[3]).clone()
        back = tensors["leaf"].requires_grad_().reshape(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
        return q.detach(), k.detach(), back, *more

    def mixed(_: nn.Module, __: Any, out: Tensor) -> None:
        tensors["mixed"] = out.transpose(1, 2).flatten(2).reshape(batch, -1, out.shape[1] * out.shape[3])
        raise _Reached

    mixer: Any = site.reading.mixer
    with mixer.register_forward_pre_hook(values), mixer.register_forward_hook(mixed), contextlib.suppress(_Reached):
        site.reading.enter(x, *rest, **kwargs)
    return tensors["mixed"], tensors["leaf"]


@contextmanager
def _set(module: nn.Module | None, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of a module, and set them back."""
    before = {name: getattr(module, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _leaf_name(parent: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in parent.named_modules() if m is module).rpartition(".")[2]


def _places(site: BackboneSite, x: Tensor, grid: Grid) -> tuple[int, Tensor]:
    """Count the parts of the batch that one image takes, and number its tokens as attention gets them.

    Blocks that cut windows are sent the numbers instead of features.
    """
    h, w = grid
    n = h * w
    if site.frame is not None and site.frame.places is not None:
        places = site.frame.places(h, w).to(x.device)
        return places.shape[0], places.flatten()
    if site.reading.order is not None:
        return 1, site.reading.order(h, w).to(x.device)
    if not site.reading.windowed:
        # A pool is given as many class and register tokens as lie beside the grid.
        ahead = x.shape[1] - n if site.reading.pool is not None and x.ndim == 3 else site.prefix
        first = torch.arange(n, n + ahead, device=x.device)
        return 1, torch.cat([first, torch.arange(n, device=x.device)])
    arrived: list[Tensor] = []

    def stop(_: nn.Module, inputs: Any) -> None:
        arrived.append(inputs[0])
        raise _Reached

    numbers = torch.arange(1, n + 1, device=x.device, dtype=torch.float32).reshape(1, h, w, 1)
    with site.reading.values.register_forward_pre_hook(stop), contextlib.suppress(_Reached):  # type: ignore[union-attr]
        site.reading.enter(numbers)
    return 1, arrived[0].flatten().round().long() - 1  # padding is zero


def _padded(grid: Grid, size: Sequence[int]) -> Tensor:
    """Number the tokens of a grid that was padded at the bottom and right to a size."""
    (h, w), (ph, pw) = grid, size
    numbers = torch.arange(1, h * w + 1).reshape(h, w)
    return nn.functional.pad(numbers, [0, pw - w, 0, ph - h]).flatten() - 1


def _with_leaf(y: Tensor, site: BackboneSite, batch: int) -> tuple[Tensor, Tensor]:
    """Cut the values out of a projection's output and put them back as a leaf [batch, keys, C].

    The output is [..., channels], or [B, channels, H, W] where the site has its channels first; the values are the last
    of the channels, or the last of those of each head.
    """
    heads, turned = site.heads if site.reading.by_head else 1, site.reading.channels_first and y.ndim == 4
    each = _channels_behind(y, site).unflatten(-1, (heads, -1))
    wide = site.reading.width // heads
    rest, v = each.split([each.shape[-1] - wide, wide], dim=-1)
    leaf = v.flatten(-2).flatten(0, -2).unflatten(0, (batch, -1)).clone().requires_grad_()
    whole = torch.cat([rest, leaf.reshape(v.shape)], dim=-1).flatten(-2)
    return leaf, whole.permute(0, 3, 1, 2) if turned else whole


def _reduced(count: int, grid: Grid, prefix: int, device: torch.device) -> tuple[Tensor, Grid]:
    """Number tokens of a map that was reduced to fewer than `grid` has, prefix tokens first, and return its grid.

    Raises: UnsupportedModelError where no reduction of both sides gives that many.
    """
    for first in dict.fromkeys((prefix, 0)):
        for r in range(1, max(grid) + 1):
            for h, w in ((grid[0] // r, grid[1] // r), (-(-grid[0] // r), -(-grid[1] // r))):
                if h * w == count - first:
                    return torch.cat([torch.arange(h * w, h * w + first), torch.arange(h * w)]).to(device), (h, w)
    raise UnsupportedModelError(f"{count} tokens were met, which are no evenly reduced map of {grid[0]}x{grid[1]}.")
