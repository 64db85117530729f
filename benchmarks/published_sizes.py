"""Count the parameters of every registered model whose published size is known.

    python benchmarks/published_sizes.py

The numbers are those of the authors' classes (tests/fixtures/vit2/model_counts.json). Models are built without data.
Ninety sizes were published; OverLoCK's four and ViTAEv2's four are not built here, because nothing was recorded that
would tell a right network from another of that size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch

import attnctl.backbones  # noqa: F401  (registers the names)
from attnctl.backbones.models import moh_dit

TABLE = Path(__file__).parents[1] / "tests" / "fixtures" / "vit2" / "model_counts.json"


def main() -> None:
    """Print how many sizes are exact, and which are not."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    published = json.loads(TABLE.read_text())
    wrong = {}
    for name, size in published.items():
        with torch.device("meta"):
            model = moh_dit.moh_dit(name) if name in moh_dit.LAYOUTS else timm.create_model(name)
        count = sum(p.numel() for p in model.parameters())
        if count != size:
            wrong[name] = {"published": size, "here": count}
            print(f"{name}: {count:,} instead of {size:,}", file=sys.stderr)
    print(json.dumps({"models": len(published), "exact": len(published) - len(wrong), "wrong": wrong}))


if __name__ == "__main__":
    main()
