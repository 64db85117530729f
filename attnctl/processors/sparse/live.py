"""What `SparseAttention` keeps while it is attached: the blocks that were chosen last, and how many were computed.

Blocks are chosen inside the kernel, from the queries and keys that other controls leave it. What is chosen lies in the
memory that belongs to the run, so it goes when the next run begins and when the control is detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Grid, Site
from attnctl.errors import ConfigError
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import Axis, axes_of, neighborhood_density
from attnctl.kernels.sparse import select as choices
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.sparse.radial import radial_blocks
from attnctl.plans import Neighborhood, Online, Radial, SlidingTile
from attnctl.plans.blocks import Blocks
from attnctl.plans.orders import LAYOUTS, permutation
from attnctl.processors.sparse.calls import OnceWarned, TextMasks, words_of

__all__ = ["LiveSparse", "Tally", "axes_for"]

_SAMPLE = 1 << 16  # scores of one attention that stand for all of them in a budget of the model
_TRACING = "torch.compile is tracing, and blocks are chosen while the model runs"


@dataclass
class _Chosen:
    """The blocks that an attention computes until the next choice."""

    blocks: Blocks
    shape: tuple[Any, ...]
    share: Tensor


class Tally:
    """How much of the maps between image tokens was computed, over all attention calls of the sites.

    Shares of blocks stay on their device until somebody asks.
    """

    def __init__(self) -> None:
        self.calls, self._known, self._waiting = 0, 0.0, list[Tensor]()

    def add(self, share: float | Tensor, calls: int = 1) -> None:
        """Count a call that computed a share of its map; 0 calls add work to one that is counted already."""
        self.calls += calls
        if isinstance(share, float):
            self._known += share
        else:
            self._waiting.append(share)
            if len(self._waiting) > 512:
                self._waiting = [torch.stack(self._waiting).sum()]

    @property
    def executed(self) -> float:
        """Return the mean share of the map that was computed."""
        if self._waiting:
            self._known += float(torch.stack(self._waiting).sum())
            self._waiting = []
        return self._known / max(self.calls, 1)


class LiveSparse(LiveControl):
    """Choose blocks, or windows, and compute them.

    Args:
        select: What to compute.
        sites: The control's sites in the order in which they run.
        kernel: Name of the block-sparse kernel.
        first: Step at which the control begins.
        start: Fraction of the run at which it begins.
    """

    def __init__(
        self,
        select: Online | Neighborhood | SlidingTile | Radial,
        sites: tuple[Site, ...],
        kernel: str,
        first: int,
        start: float,
    ) -> None:
        self.select, self.kernel, self.first, self.start = select, kernel, first, start
        self.dense_choices = isinstance(select, Online) and select.by == "map"
        self.places = {site.name: i for i, site in enumerate(sites)}
        self.names = [site.name for site in sites]
        self.masks, self.warned, self.tally = TextMasks(), OnceWarned("SparseAttention"), Tally()
        self.kept: dict[Hashable, Any] = {}

    def begin_run(self) -> None:
        self.tally = Tally()

    def before_call(self, passes: LiveDenoiser) -> None:
        self.kept = passes.shared.setdefault(("sparse", id(self)), {})

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Put a kernel in the place of the call's own, where the call is one that it can compute."""
        if torch.compiler.is_compiling() and not isinstance(self.select, (Neighborhood, SlidingTile)):
            self._warn_traced()
            return proceed(call)
        if call.keys is not None:
            self.warned.dense("keys are other tokens than queries there: the text's too, or reference images")
            return proceed(call)
        if call.q.shape[2] != call.k.shape[2]:
            return proceed(call)  # a perturbation that computes the text rows alone, which are dense anyway
        image = call.image or slice(0, call.q.shape[2])
        why = self._refusal(call, image)
        if why:
            self.warned.dense(why)
            return proceed(call)
        return proceed(call.with_(kernel=partial(self._kernel, call, image)))

    @torch.compiler.assume_constant_result
    def _warn_traced(self) -> bool:
        self.warned.dense(_TRACING)
        return True

    def _refusal(self, call: AttnCall, image: slice) -> str:
        """Return why a call stays dense, or ""."""
        needs_grid = not isinstance(self.select, Online) or self.select.order != "FHW"
        if needs_grid and call.grid is None:
            return "nothing tells how the image tokens lie on the image"
        if isinstance(self.select, Radial) and call.grid is not None and call.grid[0] == 1:
            return "Radial is about frames, and there is one"
        return "" if self.masks.text_only(call, image) else "a mask covers image tokens"

    def _kernel(
        self,
        call: AttnCall,
        image: slice,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Compute a part of the map; calls that another control has cut or masked are computed as they are."""
        n = call.q.shape[2]
        if q.shape[2] != n or k.shape[2] != n or (mask is not None and mask is not call.mask):
            return call.kernel(q, k, v, mask=mask, scale=scale)
        dense = partial(call.kernel, q, k, v, mask=mask, scale=scale)
        words = None if mask is None else words_of(call, image)
        if isinstance(self.select, Online):
            return self._online(self.select, call, image, (q, k, v), scale, words, dense)
        if isinstance(self.select, Radial):
            blocks = self._radial(self.select, call, q.shape[1])
            self.tally.add(blocks.density)
            return block_sparse(q, k, v, blocks, image=image, scale=scale, words=words, backend=self.kernel)
        assert call.grid is not None
        axes = axes_for(self.select, call.grid, call.site.name)
        self.tally.add(_share(axes))
        if all(axis.full for axis in axes):
            return dense()
        return neighborhood(q, k, v, axes, image=image, scale=scale, words=words)

    def _radial(self, select: Radial, call: AttnCall, heads: int) -> Blocks:
        """Return the blocks of a grid, made once for all sites of as many heads."""
        grid = call.grid
        assert grid is not None
        key = "radial", grid, heads
        if key not in self.kept:
            keep = radial_blocks(grid[0], grid[1] * grid[2], select.block, select.decay, select.sink)
            self.kept[key] = Blocks(
                keep=keep.expand(1, heads, -1, -1), block_q=select.block, block_k=select.block, order=(0,) * heads,
                grid=None, n_image=math.prod(grid),
            )  # fmt: skip
        blocks: Blocks = self.kept[key]
        return blocks

    # Blocks that are chosen while the model runs --------------------------------------------------------------

    def _online(
        self, select: Online, call: AttnCall, image: slice, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None,
        words: Tensor | None, dense: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Choose blocks where a choice is due, and compute them."""
        state, q = call.state, qkv[0]
        share = select.share_at(state.step, state.steps or 1)
        if share >= 1:
            self.tally.add(1.0)
            return dense()
        shape = q.shape, qkv[1].shape[1], image.start, image.stop, call.grid
        key, of = self._keys(select, call)
        chosen: _Chosen | None = self.kept.get(of)
        if chosen is not None and chosen.shape != shape:
            chosen = None
        sparse = partial(block_sparse, *qkv, image=image, scale=scale, words=words, backend=self.kernel)
        if self._due(select, state.step, state.steps) or chosen is None:
            if key == of or chosen is None:
                blocks = self._choose(select, call, image, qkv, scale, share)
                chosen = self.kept[key] = _Chosen(blocks, shape, blocks.keep.float().mean())
            if self.dense_choices:
                out = dense()
                self.tally.add(1.0)
                if select.carry:
                    left = (out - sparse(chosen.blocks)).detach()
                    self.tally.add(chosen.share, 0)
                    self.kept["carried", key] = left
                return out
        self.tally.add(chosen.share)
        out = sparse(chosen.blocks)
        carried: Tensor | None = self.kept.get(("carried", key))
        return out if carried is None or carried.shape != out.shape else out + carried

    def _due(self, select: Online, step: int, steps: int | None) -> bool:
        """Tell whether blocks are chosen at a step; where nothing tells the step, at each."""
        if steps is None:
            return True
        first = max(self.first, math.ceil(self.start * steps))
        return (step - first) % select.every == 0

    def _choose(
        self, select: Online, call: AttnCall, image: slice, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None,
        share: float,
    ) -> Blocks:  # fmt: skip
        """Score the blocks of a call and choose some, for each sample its own."""
        high, wide = select.block_q or select.block, select.block
        order, n = LAYOUTS.index(select.order), image.stop - image.start
        with torch.no_grad():
            q, k = (x[:, :, image] for x in qkv[:2])
            if order:
                assert call.grid is not None
                there = _there(call.grid, order, wide, q.device)
                q, k = q.index_select(2, there), k.index_select(2, there)
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            if select.by == "map":
                text = torch.cat([qkv[1][:, :, : image.start], qkv[1][:, :, image.stop :]], 2)
                scores = choices.map_scores(q, k, text, high, wide, factor, select.rows)
            elif select.by == "pooled":
                scores = choices.pooled_scores(q, k, high, wide, factor)
            else:
                scores = choices.antidiagonal_scores(q, k, high, wide, factor)
            keep = self._keep(select, call.site.name, scores, share)
        samples, heads = keep.shape[:2]
        return Blocks(
            keep=keep.reshape(1, samples * heads, *keep.shape[2:]), block_q=high, block_k=wide,
            order=(order,) * (samples * heads), grid=call.grid if order else None, n_image=n,
            n_text=call.q.shape[2] - n, text_first=image.start > 0, rest=select.rest == "mean",
        )  # fmt: skip

    def _keep(self, select: Online, site: str, scores: Tensor, share: float) -> Tensor:
        """Choose blocks by the budget that was asked for."""
        if select.mass is not None:
            return choices.keep_mass(scores, share)
        if select.budget != "model":
            return choices.keep_density(scores, share, by_row=select.budget == "row")
        seen = self.kept.setdefault("scores", {})
        seen[site] = scores.flatten()[:: -(-scores.numel() // _SAMPLE)]
        return choices.keep_above(scores, choices.least_kept(list(seen.values()), share))

    def blocks_of(self, call: AttnCall) -> Blocks | None:
        """Return the blocks that a call's site computes now, or None where nothing was chosen."""
        if isinstance(self.select, Radial):
            blocks: Blocks | None = self.kept.get(("radial", call.grid, call.q.shape[1]))
            return blocks
        if not isinstance(self.select, Online):
            return None
        chosen: _Chosen | None = self.kept.get(self._keys(self.select, call)[1])
        return None if chosen is None else chosen.blocks

    def _keys(self, select: Online, call: AttnCall) -> tuple[Hashable, Hashable]:
        """Return under what a call's own choice lies, and under what that which it uses."""
        leader = self.names[self.places[call.site.name] // select.share * select.share]
        state = call.state
        key, used = ((name, call.index, state.phase, state.rows.role) for name in (call.site.name, leader))
        return key, used

    def result(self, parts: Sequence[LiveControl]) -> float:
        """Return the share of the maps between image tokens that was computed where the control acted last."""
        tallies = [p.tally for p in parts if isinstance(p, LiveSparse) and p.tally.calls]
        return sum(t.executed * t.calls for t in tallies) / max(sum(t.calls for t in tallies), 1)

    def describe(self) -> str | None:
        if not self.tally.calls:
            return None
        return f"  {100 * self.tally.executed:.1f} % of the maps between image tokens computed in the last run"


@lru_cache(maxsize=16)
def _there(grid: Grid, order: int, block: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return permutation(grid, order, block).to(device)


@lru_cache(maxsize=64)
def _share(axes: tuple[Axis, ...]) -> float:
    return neighborhood_density(axes)


@lru_cache(maxsize=64)
def axes_for(select: Neighborhood | SlidingTile, grid: Grid, site: str) -> tuple[Axis, ...]:
    """Return the neighbourhood that a selector means on a grid.

    Raises:
        ConfigError: The window does not fit into the grid, or has more numbers than the grid has axes.
    """
    shape = grid[1:] if grid[0] == 1 else grid
    try:
        if isinstance(select, SlidingTile):
            return _tiles_on(select, shape)
        return _windows_on(select, shape)
    except ConfigError as error:
        lie = " x ".join(map(str, shape))
        raise ConfigError(f"SparseAttention at {site}, whose image tokens lie on {lie}: {error}") from None


def _spread(value: int | tuple[int, ...], axes: int, what: str) -> list[int | None]:
    """Return a size for each axis of a grid, None for leading ones that a shorter tuple does not name."""
    if isinstance(value, int):
        return [value] * axes
    if len(value) > axes:
        raise ConfigError(f"{what}={value} has {len(value)} numbers, and the grid {axes} axes.")
    return [None] * (axes - len(value)) + list(value)


def _windows_on(select: Neighborhood, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    windows = _spread(select.window, len(shape), "window")
    lone = 1 if select.frames == "own" else shape[0]
    window = [lone if w is None else w for w in windows]
    stride, dilation = (
        [1 if s is None or w is None else s for s, w in zip(_spread(x, len(shape), what), windows, strict=True)]
        for x, what in ((select.stride, "stride"), (select.dilation, "dilation"))
    )
    return axes_of(shape, window, stride, dilation)


def _tiles_on(select: SlidingTile, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    tile = [n if t is None else min(t, n) for t, n in zip(_last(select.tile, len(shape)), shape, strict=True)]
    counts = _last(select.window, len(shape)) if isinstance(select.window, tuple) else [select.window] * len(shape)
    window = [n if c is None else min(c * t, n) for c, t, n in zip(counts, tile, shape, strict=True)]
    return axes_of(shape, window, tile)


def _last(value: tuple[int, ...], axes: int) -> list[int | None]:
    """Return the numbers of the last axes; a frame's tile has none for the axis of frames of an image."""
    return [None] * (axes - len(value)) + list(value[max(0, len(value) - axes) :])
