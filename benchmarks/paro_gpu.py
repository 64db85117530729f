"""Block-sparse attention on a GPU against the fastest dense one, for benchmarks/paro.py --gpu.

Correctness first (small, ragged, with text, one block a row), then dense baselines (flash and cuDNN, each alone), then
every kernel at every density, block and layout. Bfloat16; medians of CUDA events after warming up.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnctl
from attnctl.errors import BackendError
from attnctl.kernels.sparse import triton
from attnctl.kernels.sparse.dispatch import SPARSE, block_sparse
from attnctl.plans import BlockPlan

SIZES = {16384: (16, 32, 32), 32768: (32, 32, 32)}
WIDTHS = (64, 128)
DENSITIES = (0.5, 0.3, 0.2, 0.1)
WANTED = dict(zip(DENSITIES, (1.25, 2.0, 3.0, 5.0), strict=True))
HEADS = 24
BLOCKS = ((64, 64), (128, 64), (128, 128))
KERNELS = ("flex", "triton", "triton_int8", "xformers")
LIMITS = {"flex": 8e-3, "triton": 8e-3, "triton_int8": 2.5e-2, "xformers": 8e-3, "gather": 8e-3}
"""Relative L2 error against float64, bfloat16 inputs."""
ORDERS = ("FHW", "HWF", "WHF", "WFH")


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def near_and_anywhere(rows: int, columns: int, heads: int, density: float) -> Tensor:
    """Keep the diagonal's blocks and others anywhere, up to a density; bool [heads, rows, columns]."""
    g = torch.Generator().manual_seed(0)
    chance = torch.rand(heads, rows, columns, generator=g)
    chance[:, torch.arange(rows), torch.arange(rows) * columns // rows] = 2.0
    kept = max(rows, round(density * rows * columns))
    return chance >= chance.flatten(1).topk(kept, -1).values[:, -1, None, None]


def check() -> Iterator[dict[str, Any]]:
    """Hold every kernel against the float64 reference on small plans."""
    cases = {
        "whole blocks": (256, 64, 64, 0, None), "ragged": (250, 64, 64, 0, None), "text": (250, 64, 64, 33, None),
        "tall": (500, 128, 64, 17, None), "reordered": (240, 64, 64, 16, (4, 6, 10)),
    }  # fmt: skip
    for name, (n, bq, bk, text, grid) in cases.items():
        torch.compiler.reset()  # flex compiles for every shape, and dynamo keeps only a few
        keep = near_and_anywhere(-(-n // bq), -(-n // bk), 4, 0.4)
        order = ORDERS if grid else None
        plan = BlockPlan.from_mask(keep, bk, order, text, block_q=bq, grid=grid, n_image=n)
        for width in WIDTHS:
            q, k, v = torch.randn(3, 2, 4, n + text, width, device="cuda").bfloat16()
            want = block_sparse(q.double(), k.double(), v.double(), plan, backend="reference")
            for kernel in (*KERNELS, "gather"):
                try:
                    error = float((block_sparse(q, k, v, plan, backend=kernel).double() - want).norm() / want.norm())
                except BackendError as refused:
                    yield {"case": name, "width": width, "kernel": kernel, "refused": str(refused)}
                    continue
                yield {
                    "case": name, "width": width, "kernel": kernel, "error": error, "right": error <= LIMITS[kernel]
                }  # fmt: skip


def dense_times(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, float | str]:
    """Time torch's flash and cuDNN attention, each alone."""
    found: dict[str, float | str] = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                found[name] = milliseconds(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), repeats
                )  # fmt: skip
        except RuntimeError as error:
            found[name] = f"did not run: {str(error).splitlines()[0]}"
    return found


def measure(repeats: int, sizes: list[int], tune: bool) -> Iterator[dict[str, Any]]:
    """Time every kernel, with and without a reordering, beside dense attention of the same tensors."""
    for n in sizes:
        for width in WIDTHS:
            torch.compiler.reset()  # flex compiles for every shape, and dynamo keeps only a few
            q, k, v = torch.randn(3, 1, HEADS, n, width, device="cuda").bfloat16()
            dense = dense_times(q, k, v, repeats)
            numbers = [t for t in dense.values() if isinstance(t, float)]
            best = min(numbers) if numbers else float("nan")
            yield {"tokens": n, "width": width, "dense_ms": dense}
            for bq, bk in BLOCKS:
                for density in DENSITIES:
                    keep = near_and_anywhere(n // bq, n // bk, HEADS, density)
                    for reordered in (False, True):
                        order = [ORDERS[h % 4] for h in range(HEADS)] if reordered else None
                        plan = BlockPlan.from_mask(keep, bk, order, block_q=bq, grid=SIZES[n])
                        for kernel in KERNELS:
                            row = {
                                "tokens": n, "width": width, "blocks": f"{bq}x{bk}", "density": round(plan.density, 4),
                                "asked": density, "reordered": reordered, "kernel": kernel,
                            }  # fmt: skip
                            yield row | _one(q, k, v, plan, kernel, best, repeats, tune)
                        plan.cache.clear()


def _one(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kernel: str, best: float, repeats: int, tune: bool
) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            taken = milliseconds(lambda: block_sparse(q, k, v, plan, backend=kernel), repeats)
            tuned: dict[str, float] = {}
            if tune and kernel.startswith("triton"):
                whole = slice(0, q.shape[2])
                for warps in (4, 8):
                    for stages in (2, 3, 4):
                        try:
                            tuned[f"{warps} warps, {stages} stages"] = milliseconds(
                                lambda w=warps, s=stages: triton.run(  # type: ignore[misc]
                                    q, k, v, plan, 0, whole, None, int8=kernel.endswith("int8"), warps=w, stages=s
                                ),
                                repeats,
                            )
                        except Exception as error:  # too much shared memory for this card
                            tuned[f"{warps} warps, {stages} stages: {type(error).__name__}"] = float("inf")
    except (BackendError, RuntimeError) as error:
        return {"refused": str(error).splitlines()[0]}
    fastest = min([taken, *tuned.values()])
    found: dict[str, Any] = {"ms": round(taken, 3), "speedup": round(best / taken, 2)}
    return found | ({"tuned_ms": tuned, "speedup_tuned": round(best / fastest, 2)} if tuned else {})


def measure_gpu(repeats: int, sizes: list[int], tune: bool) -> dict[str, Any]:
    """Check and time everything and name the card and the versions.

    Raises:
        SystemExit: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch sees none.")
    from attnctl.data.provenance import versions

    card = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "card": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "capability": [card.major, card.minor],
        "cuda": torch.version.cuda, "versions": versions(("torch",), ("triton", "xformers")), "heads": HEADS,
        "kernels": sorted(SPARSE), "attnctl": attnctl.__version__, "checks": [], "times": [],
    }  # fmt: skip
    for row in check():
        result["checks"].append(row)
        print(row, file=sys.stderr, flush=True)
    for row in measure(repeats, sizes, tune):
        wanted = f" (wanted {WANTED[row['asked']]})" if "asked" in row else ""
        result["times"].append(row)
        print(f"{row}{wanted}", file=sys.stderr, flush=True)
    return result
