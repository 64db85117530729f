"""What regional prompts and shared attention cost, counted at the shapes of FLUX and SDXL at 1024 px.

python benchmarks/sharing_costs.py > benchmarks/results/sharing_costs.json

Nothing is run: for every attention call that the controls make at one site, its multiply-adds (4 n_q n_k d per head)
and the bytes of its queries, keys, values and output in 16 bits are added up, and set beside those of the plain call.
The largest tensor is named beside what a mask of all queries by all keys would take. The calls are those of
`LiveRegions._joint` and `._crossed`, `ShareAttention._appended` and `IRDiffusion._attend`. The JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.kernels.areas import box_on_grid, patterns

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
BYTES = 2  # of a number in 16 bits


@dataclass(frozen=True)
class Shape:
    """One attention: heads, their width, image tokens along a side, tokens of one text, and how many such sites."""

    heads: int
    width: int
    side: int
    text: int
    sites: int

    @property
    def image(self) -> int:
        """Count the image's tokens."""
        return self.side**2


FLUX = Shape(24, 128, 64, 512, 57)
SDXL = (Shape(10, 64, 64, 77, 10), Shape(20, 64, 32, 77, 60))


def cost(shape: Shape, queries: int, keys: int) -> tuple[int, int]:
    """Count the FLOPs and bytes of one attention call."""
    flops = 4 * queries * keys * shape.width * shape.heads
    return flops, BYTES * shape.heads * shape.width * (2 * queries + 2 * keys)


def summed(calls: list[tuple[int, int]]) -> tuple[int, int]:
    """Add up calls."""
    return sum(c[0] for c in calls), sum(c[1] for c in calls)


def groups(shape: Shape) -> list[tuple[tuple[int, ...], int]]:
    """Return each set of regions with the number of its tokens, as `Regions` finds them."""
    inside = torch.stack([box_on_grid(box, shape.side, shape.side).flatten() >= 0.5 for box in HALVES])
    return [(regions, len(places)) for regions, places in patterns(inside)]


def regions_joint(shape: Shape, isolated: bool) -> tuple[int, int]:
    """Count two halves in joint attention: the plain call, each set of regions, and each text with its region."""
    calls = [cost(shape, shape.text + shape.image, shape.text + shape.image)]
    for held, tokens in groups(shape):
        keys = shape.text + len(held) * shape.text + (tokens if isolated else shape.image)
        calls.append(cost(shape, tokens, keys))
        calls += [cost(shape, shape.text, shape.text + tokens) for _ in held]
    return summed(calls)


def regions_crossed(shape: Shape) -> tuple[int, int]:
    """Count two halves in cross-attention: the plain call, and one per region."""
    return summed([cost(shape, shape.image, shape.text)] * (1 + len(HALVES)))


def row(shape: Shape, plain: tuple[int, int], controlled: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Set a controlled site beside the plain one, with what a mask of all queries by all keys would take."""
    return {
        "plain_gflops": round(plain[0] / 1e9, 2),
        "gflops": round(controlled[0] / 1e9, 2),
        "flops_ratio": round(controlled[0] / plain[0], 3),
        "bytes_ratio": round(controlled[1] / plain[1], 3),
        "largest_mib": round(BYTES * tokens * shape.heads * shape.width / 2**20, 1),
        "dense_mask_mib": round(BYTES * tokens**2 / 2**20, 1),
    }


def main() -> int:
    """Count and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    both = FLUX.text + FLUX.image
    flux = cost(FLUX, both, both)
    isolated, open_ = (regions_joint(FLUX, i) for i in (True, False))
    alternate = tuple((a + b) // 2 for a, b in zip(isolated, open_, strict=True))
    rows = {
        "FLUX, Regions, two halves, alternate": row(FLUX, flux, (alternate[0], alternate[1]), both),
        "FLUX, Regions, two halves, all": row(FLUX, flux, isolated, both),
        "FLUX, ShareAttention, one source": row(FLUX, flux, cost(FLUX, both, both + FLUX.image), both + FLUX.image),
        "FLUX, MasaCtrl": row(FLUX, flux, flux, both),
    }
    for shape in SDXL:
        name, n = f"SDXL, {shape.side} x {shape.side}", shape.image
        own, crossed = cost(shape, n, n), cost(shape, n, shape.text)
        rows[f"{name}, Regions at cross-attention"] = row(shape, crossed, regions_crossed(shape), n)
        rows[f"{name}, ShareAttention, one source"] = row(shape, own, cost(shape, n, 2 * n), 2 * n)
        subjects = [cost(shape, tokens, 2 * tokens) for _, tokens in groups(shape)]
        rows[f"{name}, IRDiffusion, two halves"] = row(shape, own, summed([own, *subjects]), n)
    print(json.dumps({"rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
