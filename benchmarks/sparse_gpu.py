"""Every selector's kernel on a GPU, at the shapes of real models, for benchmarks/sparse.py --gpu: at most ten minutes.

For each model's attention: dense torch attention (flash and cuDNN, each alone), then each selector at each density, in
bfloat16: milliseconds with choosing and lists in one of four calls, peak memory beside the inputs, and the relative L2
error of some query rows against float32. First, what control adds to a step of a whole pipeline that is too small to
gain anything. `--pretend` runs the same lines on a CPU, at tiny shapes and without dense kernels.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from paro_gpu import DENSITIES, WANTED, dense_times, milliseconds
from torch import Tensor

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import axes_of, neighborhood_density
from attnctl.kernels.sparse import select as choices
from attnctl.kernels.sparse.dispatch import block_sparse, choose_sparse
from attnctl.kernels.sparse.radial import radial_blocks
from attnctl.plans import Neighborhood, Online
from attnctl.plans.blocks import Blocks
from attnctl.processors import SparseAttention

EVERY, LIMIT_S, ROWS = 4, 570, 256


@dataclass(frozen=True)
class Shape:
    """One model's attention: heads, their width, the grid of image tokens, text tokens that stand first."""

    heads: int
    width: int
    grid: tuple[int, int, int]
    text: int

    @property
    def n(self) -> int:
        """Return the number of image tokens."""
        return math.prod(self.grid)


MODELS = {
    "FLUX 1024 px": Shape(24, 128, (1, 64, 64), 512),
    "CogVideoX-5B": Shape(48, 64, (13, 30, 45), 226),
    "Wan 14B 480p": Shape(40, 128, (21, 30, 52), 0),
}
TINY = {"tiny": Shape(2, 16, (4, 8, 8), 5)}


def selected(name: str, density: float, q: Tensor, k: Tensor, shape: Shape, block: int) -> Blocks:
    """Choose blocks of a call as the selector of that name does."""
    image = slice(shape.text, None)
    by, _, rest = name.partition(", ")
    scale = shape.width**-0.5
    qi, ki = q[:, :, image], k[:, :, image]
    if by == "map":
        scores = choices.map_scores(qi, ki, k[:, :, : shape.text], block, block, scale, 4)
    elif by == "pooled":
        scores = choices.pooled_scores(qi, ki, block, block, scale)
    else:
        scores = choices.antidiagonal_scores(qi, ki, block, block, scale)
    keep = choices.keep_density(scores, density, by_row=True)
    return _blocks(keep.flatten(0, 1)[None], shape, block, rest=bool(rest))


def _blocks(keep: Tensor, shape: Shape, block: int, *, rest: bool = False) -> Blocks:
    return Blocks(
        keep=keep, block_q=block, block_k=block, order=(0,) * shape.heads, grid=None, n_image=shape.n,
        n_text=shape.text, rest=rest,
    )  # fmt: skip


def calls(shape: Shape, q: Tensor, k: Tensor, v: Tensor, density: float, block: int) -> dict[str, Callable[[], Tensor]]:
    """Return four calls of every selector, the first of which chooses, as functions that return the last result."""

    def online(name: str) -> Tensor:
        blocks = selected(name, density, q, k, shape, block)
        return [block_sparse(q, k, v, blocks) for _ in range(EVERY)][-1]

    found: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: online(name)  # type: ignore[misc]
        for name in ("pooled", "antidiagonal", "map", "pooled, rest as means")
    }
    long = [n for n in shape.grid if n > 1]
    side = density ** (1 / len(long))
    axes = axes_of(long, [max(1, round(side * n)) for n in long], [min(8, max(1, round(side * n))) for n in long])
    image = slice(shape.text, shape.text + shape.n)
    found[f"windows of {neighborhood_density(axes):.3f}"] = lambda: [
        neighborhood(q, k, v, axes, image=image) for _ in range(EVERY)
    ][-1]
    if shape.grid[0] > 1:
        keep = radial_blocks(shape.grid[0], shape.grid[1] * shape.grid[2], block, 1.0, True).to(q.device)
        radial = _blocks(keep.expand(1, shape.heads, -1, -1), shape, block)
        found[f"radial of {float(keep.float().mean()):.3f}"] = lambda: [
            block_sparse(q, k, v, radial) for _ in range(EVERY)
        ][-1]
    return found


def error_of(name: str, density: float, q: Tensor, k: Tensor, v: Tensor, shape: Shape, block: int) -> float | None:
    """Return the relative L2 error of one head's first rows against the written-out softmax in float32."""
    if not name.startswith(("pooled", "map", "antidiagonal")):
        return None
    blocks = selected(name, density, q, k, shape, block)
    out = block_sparse(q, k, v, blocks)[:, :1, shape.text : shape.text + ROWS].float()
    n, text = shape.n, shape.text
    one = Blocks(
        keep=blocks.keep[:, :1], block_q=block, block_k=block, order=(0,), grid=None, n_image=n, n_text=text,
        rest=blocks.rest,
    )  # fmt: skip
    want = block_sparse(*(x[:, :1].float() for x in (q, k, v)), one, backend="reference")  # type: ignore[misc]
    want = want[:, :, text : text + ROWS]
    return float((out - want).norm() / want.norm())


def overhead(repeats: int, device: str) -> dict[str, Any]:
    """Time a step of the shipped mmdit, plain and under control: there is little to save, so it shows what it costs."""
    pipe = attnctl.load_shapes("mmdit").to(device)
    pipe.set_progress_bar_config(disable=True)
    steps = 4
    controls = {
        "plain": None,
        "windows as wide as the picture": SparseAttention(Neighborhood(window=(16, 16))),
        "Online of 0.5": SparseAttention(Online(density=0.5, by="pooled", every=EVERY, block=16)),
    }
    taken: dict[str, list[float]] = {name: [] for name in controls}
    for _ in range(repeats + 1):
        for name, control in controls.items():
            with nullcontext() if control is None else attnctl.control(pipe, control), torch.inference_mode():
                if device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                pipe("a red circle on gray", num_inference_steps=steps, output_type="latent")
                if device == "cuda":
                    torch.cuda.synchronize()
                taken[name].append(1e3 * (time.perf_counter() - began) / steps)
    # The first run of each compiles and times kernels.
    return {"model": "shapes:mmdit", "ms_a_step": {n: round(statistics.median(t[1:]), 2) for n, t in taken.items()}}


def rows(repeats: int, pretend: bool) -> Iterator[dict[str, Any]]:
    """Yield the dense times of every model, then a row for every selector and density, until the time is over."""
    began, device = time.monotonic(), "cpu" if pretend else "cuda"
    yield overhead(1 if pretend else repeats, device)
    for model, shape in (TINY if pretend else MODELS).items():
        size = 3, 1, shape.heads, shape.text + shape.n, shape.width
        block, kind = (16, torch.float32) if pretend else (64, torch.bfloat16)
        q, k, v = torch.randn(size, device=device).to(kind).unbind(0)
        dense = {} if pretend else dense_times(q, k, v, repeats)
        numbers = [t for t in dense.values() if isinstance(t, float)]
        best = min(numbers) if numbers else float("nan")
        yield {"model": model, "tokens": size[3], "dense_ms": dense}
        for density in DENSITIES:
            for name, call in calls(shape, q, k, v, density, block).items():
                if time.monotonic() - began > LIMIT_S:
                    yield {"stopped": f"after {LIMIT_S} s, before {model}, {name}, {density}"}
                    return
                row: dict[str, Any] = {"model": model, "asked": density, "select": name, "wanted": WANTED[density]}
                try:
                    yield row | _measured(call, best, repeats, pretend, name, density, (q, k, v), shape, block)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    yield row | {"failed": str(error).splitlines()[0]}


def _measured(
    call: Callable[[], Tensor], best: float, repeats: int, pretend: bool, name: str, density: float,
    qkv: tuple[Tensor, Tensor, Tensor], shape: Shape, block: int,
) -> dict[str, Any]:  # fmt: skip
    error = error_of(name, density, *qkv, shape, block)
    if pretend:
        began = time.perf_counter()
        call()
        return {"ms": round(1e3 * (time.perf_counter() - began) / EVERY, 3), "error": error}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = milliseconds(call, repeats) / EVERY
    peak = torch.cuda.max_memory_allocated() - before
    kernel = choose_sparse(*qkv, selected("pooled", density, *qkv[:2], shape, block))
    return {
        "ms": round(taken, 3), "speedup": round(best / taken, 2), "peak_mib": round(peak / 2**20, 1), "error": error,
        "kernel": kernel,
    }  # fmt: skip


def measure_gpu(repeats: int, pretend: bool) -> dict[str, Any]:
    """Measure everything, name the card, and print rows as they come.

    Raises:
        SystemExit: There is no CUDA device, and nothing is pretended.
    """
    if not pretend and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch sees none. --pretend runs its lines on a CPU.")
    found: dict[str, Any] = {"every": EVERY, "rows": []}
    if not pretend:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "capability": [card.major, card.minor], "cuda": torch.version.cuda}
    for row in rows(repeats, pretend):
        found["rows"].append(row)
        print(row, file=sys.stderr, flush=True)
    return found
