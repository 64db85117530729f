"""Maps of temporal attention, guided and enhanced: BroadWay ("ByTheWay", arXiv 2410.06241), see `kernels.bands`.

Maps are kept centred, A - 1 / F: what is left is all that guidance and enhancement act on, and energies of nearly
uniform maps stay exact in float32. Frames lie on the next to last axis: q, k, v [positions, heads, F, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.kernels.bands import Band
from attnctl.kernels.checks import Memory, full, room, wide_dtype

__all__ = [
    "MAX_POSITIONS",
    "Layer",
    "Reference",
    "centred_map",
    "guided_maps",
    "output_like",
    "weigh",
]

MAX_POSITIONS = 65_535  # CUDA's grid bound: fused kernels refuse a larger batch
_LONG_ROW = 64
_MAX_ELEMENTS = 2**17  # of maps at once on a CPU: with their queries, keys and values they stay in a cache

Interpolation = Literal["nearest", "bilinear"]


@dataclass(frozen=True, slots=True)
class Layer:
    """How the positions of one temporal attention lie: rows major, then y, then x.

    Attributes:
        rows: Rows of the call.
        grid: Rows and columns of positions of each.
        cond: Rows whose energies count.
    """

    rows: int
    grid: tuple[int, int]
    cond: slice

    @property
    def positions(self) -> int:
        """Count the positions."""
        return self.rows * self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class Reference:
    """Centred maps [rows * h * w, heads, F, F] of the block that guides, and their grid (h, w)."""

    maps: Tensor
    rows: int
    grid: tuple[int, int]

    def take(self, rows: slice) -> Reference:
        """Keep some rows."""
        maps = self.maps.unflatten(0, (self.rows, -1))[rows]
        return Reference(maps.flatten(0, 1), maps.shape[0], self.grid)

    def with_heads(self, heads: int) -> Reference:
        """Average groups of heads where the guided layer has fewer; the mean of all where the numbers do not fit."""
        have = self.maps.shape[1]
        if have == heads:
            return self
        groups = heads if have % heads == 0 else 1
        return Reference(self.maps.unflatten(1, (groups, -1)).mean(2), self.rows, self.grid)

    def on(self, grid: tuple[int, int], mode: Interpolation) -> tuple[Tensor, tuple[int, int]]:
        """Bring the maps to another grid.

        Returns:
            Maps, and how often each is repeated down and across: enlarging by whole numbers copies nothing.
        """
        (h, w), (big_h, big_w) = self.grid, grid
        if mode == "nearest" and big_h % h == 0 and big_w % w == 0:
            return self.maps, (big_h // h, big_w // w)
        heads, frames = self.maps.shape[1:3]
        planes = self.maps.reshape(self.rows, h, w, -1).permute(0, 3, 1, 2)
        options = {} if mode == "nearest" else {"align_corners": False}
        planes = F.interpolate(planes, size=grid, mode=mode, **options)
        return planes.permute(0, 2, 3, 1).reshape(-1, heads, frames, frames), (1, 1)


def centred_map(q: Tensor, k: Tensor, scale: float | None = None, out: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T scale) - 1 / F, [positions, heads, F, F], in float32; its rows sum to zero.

    `out` is memory for it, where no gradient is asked for; a CPU may lay the heads out one after the other in it.
    """
    *lead, frames, channels = q.shape
    scale = channels**-0.5 if scale is None else scale
    if out is not None and _in_place(q) and _in_place(k):
        laid = out.view(q.shape[1], -1, frames, frames)
        for h, head_map in enumerate(laid):
            torch.baddbmm(head_map, q[:, h], k[:, h].transpose(1, 2), beta=0, alpha=scale, out=head_map)
        return torch.softmax(laid, -1, out=laid).sub_(1 / frames).transpose(0, 1)
    rows, columns = _packed(q), _packed(k).transpose(1, 2)
    logits = torch.baddbmm(rows.new_empty(()), rows, columns, beta=0, alpha=scale).view(*lead, frames, frames)
    if out is None:
        return logits.softmax(-1) - 1 / frames
    return torch.softmax(logits, -1, out=out).sub_(1 / frames)


def _in_place(x: Tensor) -> bool:
    """Tell whether products read each head where the host laid it out.

    On a CPU a batch of matrices with rows far apart, taken head by head, costs less than packing them and multiplying
    once; short rows do not (measured with 40 and with 80 channels: benchmarks/broadway.py).
    """
    plain = x.device.type == "cpu" and x.dtype == wide_dtype(x.dtype)
    return plain and x.stride(-1) == 1 and x.shape[-1] >= _LONG_ROW


def _packed(x: Tensor) -> Tensor:
    """Lay queries, keys or values out head after head in float32, [n, H, F, D] -> [n H, F, D].

    A CPU first reads them in one sweep, as the host laid them out: picking the heads out of its cache costs half of
    picking them out of memory.
    """
    wide = wide_dtype(x.dtype)
    if x.dtype == wide and x.device.type == "cpu" and not x.is_contiguous():
        x = x.clone()  # keeps the strides
    return x.to(wide).reshape(-1, *x.shape[-2:])


def guided_maps(
    q: Tensor,
    k: Tensor,
    layer: Layer,
    reference: Reference | None = None,
    *,
    scale: float | None = None,
    alpha: float | Tensor = 0.0,
    interpolation: Interpolation = "nearest",
    band: Band | None = None,
    maps: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Compute centred maps, pulled towards a reference: A + alpha (R - A), and their energies.

    Args:
        q: Queries [positions, heads, F, D].
        k: Keys of the same shape.
        layer: How the positions lie.
        reference: Maps of the block that guides, with as many heads or one; None for none.
        scale: Logit scale.
        alpha: Strength in [0, 1], or a tensor [positions].
        interpolation: How the reference is enlarged.
        band: Bands to measure energies of; None measures nothing.
        maps: Maps [positions, heads, F, F] that somebody else computed, in place of those of q and k.
        out: Memory that `weigh` will fill, from `output_like`: where a map fits into the output of its position, the
            maps wait there, so that they ask for no memory of their own.

    Returns:
        Maps [n, heads, F, F] in pieces of bounded size along the positions, in order, and energies
        [3, prompt rows] of E1, E2 and E2_low, each the sum over a row's positions, heads and queries.
    """
    grid, repeat, guide = layer.grid, (1, 1), None
    if reference is not None:
        guide, repeat = reference.on(grid, interpolation)
    unit = repeat[0] * grid[1]
    low = band.low(q) if band is not None and not band.mean_only else None
    counted = range(layer.rows)[layer.cond] if band is not None else range(0)
    wide = wide_dtype(q.dtype)
    sums: dict[int, list[Tensor]] = {row: [] for row in counted}
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    room = None if graph or maps is not None else _room(q, out)
    pieces: list[Tensor] = []
    for row, part in _parts(layer, unit, q.shape[1] * q.shape[2] ** 2, q.device):
        if maps is None:
            memory = None if room is None else room[part].flatten()[: q[part, ..., 0].numel() * q.shape[2]]
            a = centred_map(q[part], k[part], scale, None if memory is None else memory.view(*q[part].shape[:3], -1))
        else:
            a = (maps[part].to(wide) - 1 / maps.shape[-1]).contiguous()
        e1 = _energy(a) if row in sums else None  # before the map is overwritten
        if guide is not None:
            source = slice(part.start // (repeat[0] * repeat[1]), part.stop // (repeat[0] * repeat[1]))
            weight = alpha[part] if isinstance(alpha, Tensor) else alpha
            a = _towards(a, guide[source], weight, repeat, grid[1])
        if e1 is not None and low is None:
            sums[row] += [e1, e1 if guide is None else _energy(a)]
        elif e1 is not None and low is not None:
            # Both energies are sums over the products of key frames with one another, which one product gives.
            flat = _laid(a).view(-1, a.shape[-1])
            gram = flat.mT @ flat
            e2 = gram.trace()
            sums[row] += [e2 if guide is None else e1, e2, torch.dot(gram.view(-1), low.reshape(-1))]
        pieces.append(a)
    if band is None:
        return pieces, None
    kinds = 2 if low is None else 3
    energies = torch.stack([torch.stack(terms).view(-1, kinds).sum(0) for terms in sums.values()], 1)
    return pieces, F.pad(energies, (0, 0, 0, 3 - kinds))


def output_like(v: Tensor) -> Tensor | None:
    """Return memory for an output [positions, heads, F, D]; None where a gradient may be asked for.

    Frames lie before heads, as fused kernels lay their output out: the host joins the heads without a copy.
    """
    if torch.is_grad_enabled() and v.requires_grad:
        return None
    return v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)


def _room(q: Tensor, out: Tensor | None) -> Tensor:
    """Return memory for maps, one row a position: a part of the output's, or else one piece for all of them.

    Many pieces would be given back to the system and asked for again at every call.
    """
    wide = wide_dtype(q.dtype)
    if out is not None and out.dtype == wide and out.shape[3] >= q.shape[2]:
        return out.transpose(1, 2).flatten(1)
    return q.new_empty((q.shape[0], q.shape[1] * q.shape[2] ** 2), dtype=wide)


def weigh(pieces: list[Tensor], v: Tensor, band: Band, beta: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply values by centred maps with an enhanced high band: mu + A M v.

    Args:
        pieces: What `guided_maps` returned; overwritten where they wait in `out`.
        v: Values [positions, heads, F, D].
        band: Low and high bins.
        beta: Gain: a number, a tensor without dimensions, or one for each position, [positions].
        out: What `guided_maps` was given, to be filled.

    Returns:
        Output [positions, heads, F, D] in the dtype of v.
    """
    frames, spread = band.frames, isinstance(beta, Tensor) and beta.dim() == 1
    matrix = None if band.whole or band.mean_only or spread else band.matrix(v, beta)
    gain = full(beta, v.new_empty((), dtype=wide_dtype(v.dtype))).view(-1, 1, 1, 1)
    graph = torch.is_grad_enabled() and (v.requires_grad or any(a.requires_grad for a in pieces))
    out = None if graph else output_like(v) if out is None else out
    memory = None if graph else Memory()
    outputs: list[Tensor] = []
    start = 0
    for a in pieces:
        part = slice(start, start + a.shape[0])
        start = part.stop
        laid = _laid(a)
        turned = laid is not a
        if matrix is not None:
            laid = _times(laid, matrix, memory)
        elif not band.whole:
            factor = gain[part] if spread else gain
            factor = factor.transpose(0, 1) if turned else factor
            low = None if band.mean_only else _times(laid, band.low(v), memory)
            laid = laid * factor if low is None else torch.lerp(low, laid, factor)
        laid = laid + 1 / frames if graph or band.whole else laid.add_(1 / frames)
        a = laid.transpose(0, 1) if turned else laid
        if memory is not None and out is not None and _in_place(v):
            product = memory.take("product", (len(a), frames, v.shape[3]), v)
            for h in range(v.shape[1]):
                out[part, h] = torch.bmm(a[:, h], v[part, h], out=product)
            continue
        product = torch.bmm(a.reshape(-1, frames, frames), _packed(v[part]))
        product = product.view(*a.shape[:2], frames, -1)
        if out is None:
            outputs.append(product.to(v.dtype))
        else:
            out[part] = product
    return torch.cat(outputs) if out is None else out


def _parts(layer: Layer, unit: int, elements: int, device: torch.device) -> Iterator[tuple[int, slice]]:
    """Cut the positions into bounded pieces that end with a row and with what shares a row of the reference."""
    per_row = layer.grid[0] * layer.grid[1]
    most = _MAX_ELEMENTS if device.type == "cpu" else room(device) // 16
    step = max(1, min(MAX_POSITIONS, most // elements) // unit) * unit
    for row in range(layer.rows):
        for start in range(0, per_row, step):
            yield row, slice(row * per_row + start, row * per_row + min(start + step, per_row))


def _towards(a: Tensor, r: Tensor, alpha: float | Tensor, repeat: tuple[int, int], width: int) -> Tensor:
    """Compute lerp(a, r, alpha) where each map of r serves a block of positions."""
    down, across = repeat
    tail = a.shape[1:]
    if isinstance(alpha, Tensor):
        alpha = alpha.to(a.dtype).view(-1, down, width // across, across, *(1,) * len(tail))
    r = r.view(-1, 1, width // across, 1, *r.shape[1:]).to(a.dtype)
    view = a.view(-1, down, width // across, across, *tail)
    mixed = torch.lerp(view, r.expand_as(view), alpha) if a.requires_grad else view.lerp_(r.expand_as(view), alpha)
    return mixed.view(-1, *tail)


def _times(a: Tensor, matrix: Tensor, memory: Memory | None) -> Tensor:
    """Multiply contiguous maps by a matrix [F, F] on the key side, into memory that the next call takes over."""
    if memory is None:
        return a @ matrix
    out = memory.take("filtered", a.shape, a)
    torch.mm(a.view(-1, a.shape[-1]), matrix, out=out.view(-1, a.shape[-1]))
    return out


def _energy(a: Tensor) -> Tensor:
    flat = _laid(a).view(-1)
    return torch.dot(flat, flat)


def _laid(a: Tensor) -> Tensor:
    """Return maps [n, H, F, F] as they lie in memory: the same, or [H, n, F, F]."""
    return a if a.is_contiguous() else a.transpose(0, 1)
