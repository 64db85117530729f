"""Block-sparse attention against dense, timed: `python benchmarks/paro.py > benchmarks/results/paro.json`.

`--speed`: one thread, processor time, both sides in one run, medians of interleaved repeats; the sparse side includes
laying every head out in its own order and back. Half of the blocks that are kept lie near the diagonal, half anywhere.
Once with memory as the C library handles it, once with all memory kept.
`--orders`: heads that look along frames, rows, columns or nearby, made up (benchmarks/videolike.py); how many blocks
hold 90 % of the attention in the chosen order and in the best of six, and what error the blocks at density 0.3 leave.
`--shapes`: plans for the shipped mmdit model, calibrated on two prompts; pictures of others compared with dense ones.
`--tiny`: latents of tiny random CogVideoX and Wan models, sparse against dense (takes the models from tests/).
`--gpu`: every kernel for GPUs against flash and cuDNN, on the card that is there; checked against float64 first.
`--storage`: bytes of a plan for CogVideoX-5B.
The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import keep_freed_memory
from paro_gpu import measure_gpu
from paro_models import measure_shapes, measure_tiny
from torch import Tensor
from videolike import HEADS, exact, smooth

import attnctl
from attnctl.kernels.sparse.block_mass import block_mass, choose_masks, choose_orders
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.sparse.lists import bundles, ratio
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.plans.orders import ORDERS

SIZES = (4096, 8192)
DENSITIES = (0.5, 0.3, 0.2, 0.1)
GRIDS = {4096: (4, 32, 32), 8192: (8, 32, 32)}
WANTED = {64: (1.45, 2.4, 3.5, 6.8), 256: (1.7, 2.8, 4.1, 8.5)}


def half_near_half_anywhere(n_blocks: int, density: float, heads: int, seed: int = 0) -> Tensor:
    """Keep the diagonal band that makes half of the density, and blocks anywhere for the rest."""
    g = torch.Generator().manual_seed(seed)
    row, column = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)
    near = (row - column).abs() <= max(0, round(density * n_blocks / 4 - 0.5))
    keep = near.expand(heads, -1, -1).clone()
    for h in range(heads):
        free = (~keep[h]).flatten().nonzero()[:, 0]
        missing = round(density * n_blocks**2) - int(keep[h].sum())
        keep[h].view(-1)[free[torch.randperm(len(free), generator=g)[: max(0, missing)]]] = True
    return keep


def measure_speed(repeats: int) -> list[dict[str, Any]]:
    """Time dense and sparse attention by turns."""
    torch.set_num_threads(1)
    found = []
    for n in SIZES:
        g = torch.Generator().manual_seed(1)
        q, k, v = torch.randn(3, 1, 4, n, 64, generator=g)
        for density in DENSITIES:
            keep = half_near_half_anywhere(n // 64, density, 4)
            fine = BlockPlan.from_mask(keep, 64, ["FHW", "HWF", "WHF", "WFH"], grid=GRIDS[n])
            tall = keep.unflatten(1, (-1, 4))[:, :, 0]  # a mask made for query blocks of 256
            coarse = BlockPlan.from_mask(tall.contiguous(), 64, fine.order, block_q=256, grid=GRIDS[n])
            cases = {"64x64": fine, "256x64": coarse}
            with torch.inference_mode():
                sides = {"dense": partial(attnctl.attention, q, k, v)}
                sides |= {name: partial(attnctl.attention, q, k, v, plan=plan) for name, plan in cases.items()}
                times = timed(sides, repeats)
                for name, plan in cases.items():
                    out = attnctl.attention(q, k, v, plan=plan)
                    want = block_sparse(q.double(), k.double(), v.double(), plan, backend="reference")
                    found.append({
                        "tokens": n, "blocks": name, "asked": density, "density": round(plan.density, 4),
                        "joined": ratio(plan, 0), "dense_ms": round(1e3 * times["dense"], 1),
                        "sparse_ms": round(1e3 * times[name], 1),
                        "speedup": round(times["dense"] / times[name], 2),
                        "error": float((out - want).abs().max()),
                    })  # fmt: skip
    return found


def timed(runs: dict[str, Any], repeats: int) -> dict[str, float]:
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


def measure_lists() -> dict[str, float]:
    """Time what turns masks into lists, which happens once a plan: 4 heads of 8,192 tokens."""
    keep = half_near_half_anywhere(128, 0.3, 4)
    taken = []
    for _ in range(9):
        plan = BlockPlan.from_mask(keep, 64)
        plan = plan.sized(8192)
        began = time.perf_counter()
        times = ratio(plan, 0)
        for h in range(4):
            bundles(plan, 0, h, times, torch.device("cpu"))
        taken.append(time.perf_counter() - began)
    return {"lists_ms": round(1e3 * statistics.median(taken), 2)}


def measure_storage(groups: int = 10) -> dict[str, Any]:
    """Add up the bytes of a plan for CogVideoX-5B: 42 layers, 48 heads, grid 13 x 30 x 45, blocks of 64."""
    grid, layers, heads = (13, 30, 45), 42, 48
    blocks = -(-grid[0] * grid[1] * grid[2] // 64)
    keep = half_near_half_anywhere(blocks, 0.3, 1)[:, None].expand(groups, heads, -1, -1).contiguous()
    one = BlockPlan.from_mask(keep, 64, ["HWF"] * heads, 226, grid=grid)
    with tempfile.TemporaryDirectory() as folder:
        files = sum(f.stat().st_size for f in Path(one.save_pretrained(folder)).iterdir())
    plan = ModelPlan(plans={"": one})
    return {
        "blocks": f"{blocks} x {blocks}", "step_groups": groups, "bytes_per_head_and_group": blocks**2 / 8,
        "mask_bytes_per_layer": plan.packed_bytes, "file_bytes_per_layer": files, "file_bytes": layers * files,
    }  # fmt: skip


def needed(mass: Tensor, share: float) -> Tensor:
    """Return the share of blocks that holds a share of the mass, [...]."""
    flat = mass.flatten(-2).sort(-1, descending=True).values.cumsum(-1)
    return ((flat < share * flat[..., -1:]).sum(-1) + 1) / flat.shape[-1]


LOOKING = [name for name, reach in HEADS.items() if any(reach)]
"""Made-up heads that an order can help."""


def draw_orders(mass: Tensor, chosen: Tensor, density: float, path: Path) -> None:
    """Draw each head's blocks in the model's order, in the chosen one, and those that are kept."""
    from PIL import Image

    from attnctl.data.pictures import grid

    tiles, labels = [], []
    for h, name in enumerate(LOOKING):
        kept = choose_masks(mass[h : h + 1, chosen[h]], density)[0]
        labels.append(f"{name}: {list(ORDERS)[chosen[h]]}")
        for m in (mass[h, 0], mass[h, chosen[h]], kept.float()):
            shade = np.sqrt(m.numpy() / float(m.max()))
            tiles.append(
                Image.fromarray(np.uint8(255 * shade)).resize((128, 128), Image.Resampling.NEAREST).convert("RGB")
            )
    columns = ("frames, rows, columns", "the chosen order", f"kept at density {density}")
    grid(tiles, len(labels), 3, labels, columns, footer="Brighter is more attention (square root).").save(path)


def measure_orders(
    make: Any = exact,
    grid: tuple[int, int, int] = (8, 16, 16),
    block: int = 32,
    density: float = 0.3,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Compare chosen orders with the best and with the model's own; `picture` is a file to draw the maps into."""
    q, k, v = make(grid, [HEADS[name] for name in LOOKING])
    found = block_mass(q, k, grid, block, block)
    chosen, _ = choose_orders(found, density)
    if picture is not None:
        draw_orders(found.mass, chosen, density, picture)
    blocks = needed(found.mass, 0.9)
    heads = torch.arange(len(LOOKING))
    dense = attnctl.attention(q, k, v)
    errors = {}
    for name, order in (("chosen", chosen), ("identity", torch.zeros_like(chosen))):
        plan = BlockPlan.from_mask(choose_masks(found.mass[heads, order], density), block, order.tolist(), grid=grid)
        out = attnctl.attention(q, k, v, plan=plan)
        errors[name] = ((out - dense).norm(dim=(-2, -1)) / dense.norm(dim=(-2, -1)))[0].tolist()
    rows = [
        {
            "head": name, "order": list(ORDERS)[chosen[h]], "blocks90_chosen": round(float(blocks[h, chosen[h]]), 4),
            "blocks90_best": round(float(blocks[h].min()), 4), "blocks90_identity": round(float(blocks[h, 0]), 4),
            "error_chosen": round(errors["chosen"][h], 5), "error_identity": round(errors["identity"][h], 5),
        }
        for h, name in enumerate(LOOKING)
    ]  # fmt: skip
    mean = {key: float(np.mean([r[key] for r in rows])) for key in rows[0] if key not in ("head", "order")}
    return {
        "heads": rows, "mean": {key: round(value, 5) for key, value in mean.items()},
        "chosen_over_best": round(mean["blocks90_chosen"] / mean["blocks90_best"], 4),
        "error_ratio": round(mean["error_identity"] / mean["error_chosen"], 2),
    }  # fmt: skip


def main() -> int:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--orders", action="store_true")
    parser.add_argument("--picture", type=Path, help="--orders: draw the maps into this file")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--storage", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768], choices=[16384, 32768], help="--gpu")
    parser.add_argument("--tune", action="store_true", help="--gpu: try the Triton kernel's warps and stages")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument(
        "--null-tokens", type=int, default=0, help="--shapes: padding of the text; the pipeline's is 256"
    )
    options = parser.parse_args()
    single = (options.shapes, options.tiny, options.gpu, options.storage)
    everything = not (options.speed or options.orders or any(single))
    versions = {"torch": torch.__version__, "attnctl": attnctl.__version__}
    result: dict[str, Any] = {"versions": versions, "machine": platform.machine(), "heads": 4, "head_dim": 64}
    if options.speed or everything:
        result |= measure_lists()
        result["speed"] = measure_speed(options.repeats)
        if keep_freed_memory():
            result["speed_memory_kept"] = measure_speed(options.repeats)
        print(f"lists of a plan: {result['lists_ms']} ms; then twice the same, memory kept last", file=sys.stderr)
        for r in result["speed"] + result.get("speed_memory_kept", []):
            wanted = WANTED[int(r["blocks"].split("x")[0])][DENSITIES.index(r["asked"])]
            print(
                f"{r['tokens']:5} tokens  {r['blocks']:7} density {r['density']:.3f}  dense {r['dense_ms']:7.1f} ms  "
                f"sparse {r['sparse_ms']:7.1f} ms  {r['speedup']:5.2f} x (wanted {wanted})  error {r['error']:.1e}",
                file=sys.stderr,
            )
    if options.orders or everything:
        for key, make, path in (("orders", exact, options.picture), ("orders_smooth", smooth, None)):
            found = result[key] = measure_orders(make, picture=path)
            for r in found["heads"]:
                print(json.dumps(r), file=sys.stderr)
            print(
                f"{key}: blocks for 90 %: chosen {found['chosen_over_best']} x the best of six; error of the model's "
                f"order {found['error_ratio']} x that of the chosen one",
                file=sys.stderr,
            )
    if options.shapes:
        result["shapes"] = measure_shapes(options.pictures, options.steps, options.scale, options.null_tokens)
        print(json.dumps(result["shapes"], indent=1), file=sys.stderr)
    if options.tiny:
        result["tiny"] = measure_tiny(options.steps)
    if options.storage or everything:
        result["storage"] = measure_storage()
        print(f"a plan for CogVideoX-5B: {result['storage']}", file=sys.stderr)
    if options.gpu:
        result["gpu"] = measure_gpu(max(5, options.repeats), options.tokens, options.tune)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
