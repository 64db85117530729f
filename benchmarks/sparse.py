"""Sparse attention timed and judged: `python benchmarks/sparse.py --speed > benchmarks/results/sparse_speed.json`.

`--speed`: one thread, processor time, dense attention and every selector by turns, medians of interleaved repeats.
Blocks are chosen in one of four calls, as `Online` does by default, and used in all four; the sparse side is the mean
of these, choosing and lists included. Beside it stands what choosing takes alone, in one call, and its products in four
calls as a share of those of dense attention.
`--quality`: what shapes mmdit or videodit makes against what it makes dense, and by the judge, at equal executed shares
of the maps. `--targets 0.5 --out FILE` runs one share and adds it to those that FILE (a recording, too) holds.
`--gpu`: the selectors' kernels on the card that is there, at the shapes of FLUX, CogVideoX-5B and Wan 14B, against
flash and cuDNN; `--gpu --pretend` runs the same lines on a CPU.
The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sparse_gpu import measure_gpu
from sparse_quality import TARGETS, measure_quality
from torch import Tensor

import attnctl
from attnctl.kernels import sdpa
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import axes_of, neighborhood_density, neighborhood_mask
from attnctl.kernels.neighborhood.tiles import tiles
from attnctl.kernels.sparse import select as choices
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.plans.blocks import Blocks

SIZES = {4096: (1, 64, 64), 8192: (8, 32, 32)}
DENSITIES = (0.5, 0.3, 0.2, 0.1)
WANTED = dict(zip(DENSITIES, (1.45, 2.4, 3.5, 6.3), strict=True))
WINDOWS = {
    4096: (((20, 20), 1), ((20, 20), 8), ((24, 17), (8, 17))),
    8192: (((4, 14, 15), 1), ((4, 16, 13), (4, 8, 8)), ((4, 16, 12), (2, 8, 4))),
}
"""Windows of a tenth of the map, and strides."""
HEADS, WIDTH, BLOCK, EVERY = 4, 64, 64, 4


def scored(by: str, q: Tensor, k: Tensor, block_q: int = BLOCK) -> Tensor:
    """Score the blocks of a call."""
    scale = q.shape[-1] ** -0.5
    if by == "map":
        return choices.map_scores(q, k, None, block_q, BLOCK, scale, 4)
    return getattr(choices, f"{by}_scores")(q, k, block_q, BLOCK, scale)  # type: ignore[no-any-return]


def chosen(by: str, density: float, q: Tensor, k: Tensor, *, rest: bool = False, block_q: int = BLOCK) -> Blocks:
    """Choose blocks as `Online` does."""
    keep = choices.keep_density(scored(by, q, k, block_q), density, by_row=True)
    return Blocks(
        keep=keep.flatten(0, 1)[None], block_q=block_q, block_k=BLOCK, order=(0,) * HEADS, grid=None,
        n_image=q.shape[2], rest=rest,
    )  # fmt: skip


def share_of_products(by: str, n: int) -> float:
    """Return the products of choosing once over those of dense attention, 4 n^2 D."""
    dense = 4 * n * n * WIDTH
    if by == "map":
        return 2 * (n // BLOCK * 4) * n * WIDTH / dense
    if by == "pooled":
        return 2 * (n // BLOCK) ** 2 * WIDTH / dense
    return 2 * (n // 8) ** 2 * 8 * WIDTH / dense


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median processor time of each function, taken by turns."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure_blocks(n: int, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time blocks that are chosen in each call, and what choosing takes."""
    found = []
    for density in DENSITIES:

        def run(by: str, rest: bool = False, block_q: int = BLOCK, density: float = density) -> None:
            blocks = chosen(by, density, q, k, rest=rest, block_q=block_q)
            for _ in range(EVERY):
                block_sparse(q, k, v, blocks)

        sides: dict[str, Callable[[], Any]] = {"dense": partial(sdpa.run, q, k, v)}
        sides |= {by: partial(run, by) for by in ("pooled", "antidiagonal", "map")}
        sides |= {"pooled, rest as means": partial(run, "pooled", rest=True)}
        sides |= {"pooled, 256 x 64": partial(run, "pooled", block_q=256)}
        sides |= {f"choosing by {by}": partial(chosen, by, density, q, k) for by in ("pooled", "antidiagonal", "map")}
        times = timed(sides, repeats)
        blocks = chosen("pooled", density, q, k)
        want = block_sparse(q.double(), k.double(), v.double(), blocks, backend="reference")
        error = (block_sparse(q, k, v, blocks) - want).abs().max()
        for name in ("pooled", "antidiagonal", "map", "pooled, rest as means", "pooled, 256 x 64"):
            by = name.partition(",")[0]
            times[name] /= EVERY
            found.append({
                "tokens": n, "select": name, "asked": density, "density": round(float(blocks.keep.float().mean()), 4),
                "dense_ms": round(1e3 * times["dense"], 1), "sparse_ms": round(1e3 * times[name], 1),
                "speedup": round(times["dense"] / times[name], 2), "wanted": WANTED[density],
                "choosing_ms": round(1e3 * times[f"choosing by {by}"], 2),
                "choosing_products": round(share_of_products(by, n) / EVERY, 5), "error": float(error),
            })  # fmt: skip
            print(found[-1], file=sys.stderr, flush=True)
    return found


def measure_windows(n: int, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time windows of a tenth of the map."""
    found = []
    for window, stride in WINDOWS[n]:
        grid = [a for a in SIZES[n] if a > 1]
        axes = axes_of(grid, window, stride)
        times = timed({"dense": partial(sdpa.run, q, k, v), "near": partial(neighborhood, q, k, v, axes)}, repeats)
        seen = neighborhood_mask(axes)
        some = slice(0, 512)
        logits = (q[:, :, some].double() @ k.double().mT) / math.sqrt(WIDTH)
        want = logits.masked_fill(~seen[some], -math.inf).softmax(-1) @ v.double()
        work, _ = tiles(axes, torch.device("cpu"))
        found.append({
            "tokens": n, "select": "windows", "grid": grid, "window": list(window),
            "stride": stride if isinstance(stride, int) else list(stride),
            "density": round(neighborhood_density(axes), 4), "masked": any(w.seen is not None for w in work),
            "dense_ms": round(1e3 * times["dense"], 1), "sparse_ms": round(1e3 * times["near"], 1),
            "speedup": round(times["dense"] / times["near"], 2),
            "error": float((neighborhood(q, k, v, axes)[:, :, some] - want).abs().max()),
        })  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def measure_speed(repeats: int, sizes: list[int]) -> dict[str, Any]:
    """Time every selector against dense attention of torch."""
    torch.set_num_threads(1)
    rows, windows = [], []
    with torch.inference_mode():
        for n in sizes:
            q, k, v = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(1)).unbind(0)
            rows += measure_blocks(n, q, k, v, repeats)
            windows += measure_windows(n, q, k, v, repeats)
    return {"heads": HEADS, "head_dim": WIDTH, "block": BLOCK, "every": EVERY, "blocks": rows, "windows": windows}


def main() -> int:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--model", choices=("mmdit", "videodit"), default="mmdit", help="--quality: of this model")
    parser.add_argument(
        "--targets", type=float, nargs="+", choices=TARGETS, help="--quality: these shares of the maps alone"
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--pretend", action="store_true", help="--gpu: on a CPU, at tiny shapes")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES), choices=list(SIZES), help="--speed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="--quality: write rows into this file as they come")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "attnctl": attnctl.__version__}, "machine": platform.machine(),
    }  # fmt: skip
    if options.speed:
        result["speed"] = measure_speed(options.repeats, options.tokens)
    if options.quality:
        result["quality"] = measure_quality(
            options.model, options.pictures, options.steps, options.scale, options.targets or TARGETS, options.out
        )
    if options.gpu:
        result["gpu"] = measure_gpu(options.repeats, options.pretend)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
