"""Convert a trained vision transformer to other forms of attention, and measure what is left of its accuracy.

    python benchmarks/conversion.py                  # digits; softmax trained first, then each form
    python benchmarks/conversion.py --kinds hedgehog rala --seeds 0 1 2

For each form: accuracy on digits not seen, right after the swap, after teaching each layer softmax's outputs (or, for
Hedgehog, its weights) without labels, and after that and some epochs of training of the whole model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnctl
from attnctl.backbones.distil import distil
from attnctl.pipelines.vision.classification import digits
from attnctl.pipelines.vision.fitting import fit

OPTIONS = {
    "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10,
    "class_token": False, "global_pool": "avg",
}  # fmt: skip


@torch.inference_mode()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Return the share of right answers."""
    answers = torch.cat([model(part).argmax(1) for part in test[0].split(120)])
    return float((answers == test[1]).double().mean())


def convert(model: nn.Module, kind: str, data: Any, epochs: int, seed: int) -> dict[str, float]:
    """Swap a form in, teach it, and train on; return the accuracy after each."""
    train, test = data
    row: dict[str, float] = {}
    made = attnctl.swap(copy.deepcopy(model), kind)
    row["swapped"] = accuracy(made, test)
    if any(True for host in attnctl.swap_report(made).new):
        distil(
            made,
            train[0],
            loss="weights" if kind in ("hedgehog", "sparsifiner") else "outputs",
            epochs=4,
            seed=seed,
            quiet=True,
        )
        row["taught"] = accuracy(made, test)
    fit(made, *train, F.cross_entropy, epochs=epochs, batch=16, lr=1e-3, seed=seed, quiet=True)
    row["taught_and_tuned"] = accuracy(made, test)
    raw = attnctl.swap(copy.deepcopy(model), kind)
    fit(raw, *train, F.cross_entropy, epochs=epochs, batch=16, lr=1e-3, seed=seed, quiet=True)
    row["tuned"] = accuracy(raw, test)
    return row


def main() -> None:
    """Train and convert, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["hedgehog", "rala", "inline", "sigmoid"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=12, help="of softmax")
    parser.add_argument("--tune", type=int, default=3, help="epochs after the swap")
    args = parser.parse_args()
    data, rows = digits(32), []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
        fit(model, *data[0], F.cross_entropy, epochs=args.epochs, batch=16, lr=5e-3, seed=seed, quiet=True)
        first = accuracy(model, data[1])
        print(f"softmax seed {seed}: {first:.4f}", file=sys.stderr, flush=True)
        for kind in args.kinds:
            row = {"kind": kind, "seed": seed, "softmax": first} | convert(model, kind, data, args.tune, seed)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    print(json.dumps({"torch": torch.__version__, "test": len(data[1][1]), "tune": args.tune, "rows": rows}))


if __name__ == "__main__":
    main()
