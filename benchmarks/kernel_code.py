"""What ptxas makes of the block-sparse Triton kernel for several cards, none of which is needed.

    python benchmarks/kernel_code.py [--quick]
    python benchmarks/kernel_code.py --of benchmarks/results/kernel_code.json    # the model of speed alone, at once

Registers, spills, shared memory, programs on a multiprocessor, and instructions of the loops over image and text tiles,
for bfloat16 heads in the orders of a plan. From the main loop's instructions follows how fast it can be: nothing of
that is measured, and what it assumes stands beside it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

CARDS = {
    80: ("A100 SXM", 108, 1.41, 2048),
    89: ("RTX 4090", 128, 2.52, 512),
    90: ("H100 SXM", 132, 1.83, 4096),
    100: ("B200", 148, 1.85, 8192),
}
"""For each architecture a card, its multiprocessors, clock in GHz, and bfloat16 operations of one of them in a cycle
with float32 sums, as the makers publish them."""
SCHEDULERS, EXPONENTIALS, TILE_K = 4, 16, 64
ASSUMES = (
    "All queries and keys lie in whole blocks; loads come in time (memory bounds nothing); every multiprocessor is "
    "busy to the end; the clock is the published one. A step multiplies a tile of queries with 64 keys, and its "
    "weights with 64 values. It needs three things: its instructions, of which each of 4 schedulers issues one warp's "
    "in a cycle; its products, at the published rate; one exponential for each weight, 16 in a cycle. 'best' overlaps "
    "all three, as when programs on one multiprocessor take turns (the longest counts); 'worst' overlaps nothing "
    "(their sum counts)."
)
WIDTHS = (40, 64, 72, 80, 88, 96, 128)
BLOCKS = ((64, 64), (128, 128))


def speed(row: dict[str, Any]) -> dict[str, Any]:
    """Model the speed of one compiled kernel by the instructions of its main loop: see ASSUMES."""
    card, processors, clock, rate = CARDS[row["arch"]]
    tile = min(row["blocks"][0], 128 if row["arch"] >= 90 else 64)
    flops = 4 * tile * TILE_K * row["width"]
    cycles = {
        "instructions": max(row["loops"][:2]) * row["warps"] / SCHEDULERS,
        "products": flops / rate,
        "exponentials": tile * TILE_K / EXPONENTIALS,
    }
    best, worst = (flops / c * processors * clock / 1e3 for c in (max(cycles.values()), sum(cycles.values())))
    return {
        "card": card, "arch": row["arch"], "blocks": row["blocks"], "width": row["width"],
        "cycles": {name: round(c) for name, c in cycles.items()}, "bound": max(cycles, key=cycles.__getitem__),
        "tflops": {"worst": round(worst), "best": round(best), "peak": round(rate * processors * clock / 1e3)},
    }  # fmt: skip


def modelled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model of speed for whole widths, with what it assumes."""
    return {"assumes": ASSUMES, "rows": [speed(row) for row in rows if row["width"] in (64, 128)]}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one card and one width")
    parser.add_argument("--of", type=Path, metavar="FILE", help="compile nothing: model the speed of a recording")
    options = parser.parse_args()
    if options.of is not None:
        print(json.dumps(modelled(json.loads(options.of.read_text())["rows"]), indent=1))
        return 0
    quick = options.quick
    import pretend_card
    import torch
    import triton

    if why := pretend_card.missing():
        print(f"kernels cannot be compiled here: {why}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    rows = []
    for arch in (90,) if quick else pretend_card.ARCHITECTURES:
        for block_q, block_k in BLOCKS[:1] if quick else BLOCKS:
            for width in (64,) if quick else WIDTHS:
                code = pretend_card.block_sparse_code(arch, width, block_q=block_q, block_k=block_k)
                told = asdict(code) | {"loops": code.loops}
                del told["binary"]
                rows.append({"arch": arch, "blocks": [block_q, block_k], "width": width, **told})
                print(rows[-1], file=sys.stderr)
    table = {(r["arch"], *r["blocks"], r["width"]): r for r in rows}
    main_loop = {str(w): max(table[90, 64, 64, w]["loops"][:2]) for w in (64, 128) if (90, 64, 64, w) in table}
    narrow = sum(r["narrow_loads"] for r in rows)
    found = {"triton": triton.__version__, "main_loop_sm_90": main_loop, "spilled": max(r["spilled"] for r in rows)}
    print(json.dumps({**found, "narrow_loads": narrow, "rows": rows, "model": modelled(rows)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
