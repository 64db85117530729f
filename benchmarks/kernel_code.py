"""What ptxas makes of the block-sparse Triton kernel for several cards, none of which is needed.

    python benchmarks/kernel_code.py [--quick]

Registers, spills, shared memory, programs on a multiprocessor, and instructions of the loops over image and text tiles,
for bfloat16 heads in the orders of a plan. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pretend_card  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

WIDTHS = (40, 64, 72, 80, 88, 96, 128)
BLOCKS = ((64, 64), (128, 128))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one card and one width")
    quick = parser.parse_args().quick
    if why := pretend_card.missing():
        print(f"kernels cannot be compiled here: {why}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    rows = []
    for arch in (90,) if quick else pretend_card.ARCHITECTURES:
        for block_q, block_k in BLOCKS[:1] if quick else BLOCKS:
            for width in (64,) if quick else WIDTHS:
                code = pretend_card.block_sparse_code(arch, width, block_q=block_q, block_k=block_k)
                rows.append({"arch": arch, "blocks": [block_q, block_k], "width": width, **asdict(code)})
                print(rows[-1], file=sys.stderr)
    table = {(r["arch"], *r["blocks"], r["width"]): r for r in rows}
    main_loop = {str(w): max(table[90, 64, 64, w]["loops"][:2]) for w in (64, 128) if (90, 64, 64, w) in table}
    narrow = sum(r["narrow_loads"] for r in rows)
    found = {"triton": triton.__version__, "main_loop_sm_90": main_loop, "spilled": max(r["spilled"] for r in rows)}
    print(json.dumps({**found, "narrow_loads": narrow, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
