"""What the vision jobs reach: accuracy on digits, mean IoU on shapes scenes, and the seconds that it takes.

    python benchmarks/vision.py --digits --seeds 0 1 2      # small models, swapped and not, on scikit-learn's digits
    python benchmarks/vision.py --scenes --out out          # a BiFormer encoder and a U-Net decoder, exact masks

Every row trains from scratch with a recipe that is fixed beforehand; the test images are never trained on. Seconds are
wall-clock, cpu_seconds what the process computed. Tables go to stderr, one JSON line to stdout; `--out` keeps weights,
curves and pictures of predictions, one folder a row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from attnctl.pipelines import classify, segment

PYRAMID = {
    "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "mlp_ratios": (4, 4, 2, 2),
    "sr_ratios": (4, 2, 1, 1),
}  # fmt: skip
MAXVIT = {
    "img_size": 32, "embed_dim": (16, 32, 64), "depths": (1, 1, 1), "block_type": ("M", "M", "M"), "stem_width": 16,
    "transformer_window_size": (2, 2), "transformer_grid_size": (2, 2), "transformer_dim_head": 16,
}  # fmt: skip
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (1, 1, 2), "num_heads": (2, 3, 6), "window_size": 4}
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
# label -> what classify is given
DIGITS: dict[str, dict[str, Any]] = {
    "biformer_micro": {"name": "biformer_micro", "epochs": 12},
    "agent_pvt_micro": {"name": "agent_pvt_micro", "epochs": 20},
    "agent_cswin_micro": {"name": "agent_cswin_micro", "epochs": 20},
    "pvt_v2, agent": {"name": "pvt_v2_b0", "swap": "agent", "swap_options": {"num_agents": 4}, "model_options": PYRAMID,
                      "epochs": 15},
    "maxvit, agent": {"name": "maxvit_pico_rw_256", "swap": "agent", "swap_options": {"num_agents": 4},
                      "model_options": MAXVIT, "epochs": 12},
    "swin, bra": {"name": "swin_tiny_patch4_window7_224", "swap": "bra", "swap_options": {"window_size": 2, "topk": 1},
                  "model_options": SWIN, "epochs": 20},
    "vit, agent": {"name": "vit_tiny_patch16_224", "swap": "agent", "swap_options": {"num_agents": 16},
                   "model_options": VIT, "epochs": 40},
}  # fmt: skip


def timed(job: Any, **kwargs: Any) -> tuple[Any, dict[str, float]]:
    """Run a job; returns what it returns, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = job(**kwargs)
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return done, {k: round(v, 1) for k, v in spent.items()}


def folder(out: Path | None, label: str, seed: int) -> Path | None:
    """Name the folder of a row."""
    return None if out is None else out / f"{label.replace(', ', '_')}_{seed}"


def digits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every recipe with every seed."""
    rows = []
    for label in args.only or DIGITS:
        for seed in args.seeds:
            recipe = DIGITS[label] | ({"epochs": args.epochs} if args.epochs else {})
            done, spent = timed(classify, **recipe, seed=seed, out=folder(args.out, label, seed), quiet=args.quiet)
            size = sum(p.numel() for p in done.model.parameters())
            rows.append({"model": label, "seed": seed, "accuracy": done.accuracy, "parameters": size} | spent)
            print(
                f"{label:20s} seed {seed}  {done.accuracy:7.2%}  {size:9,d} parameters  {spent['seconds']:6.1f} s, "
                f"{spent['cpu_seconds']:6.1f} s computed",
                file=sys.stderr,
            )
    return rows


def scenes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the encoder and its decoder with every seed."""
    rows = []
    for seed in args.seeds:
        more = {k: v for k, v in {"epochs": args.epochs, "n_train": args.n_train}.items() if v}
        done, spent = timed(
            segment,
            encoder=args.encoder,
            decoder=args.decoder,
            seed=seed,
            out=folder(args.out, f"{args.decoder}_{args.encoder}", seed),
            quiet=args.quiet,
            **more,
        )
        size = sum(p.numel() for p in done.model.parameters())
        row = {"encoder": args.encoder, "decoder": args.decoder, "seed": seed, "parameters": size} | spent
        rows.append(row | {"mean_iou": done.mean_iou, "iou": done.iou})
        each = "  ".join(f"{name} {iou:.3f}" for name, iou in done.iou.items())
        print(f"{args.encoder}, {args.decoder}  seed {seed}  mIoU {done.mean_iou:.3f} ({each})", file=sys.stderr)
        print(f"  {size:,} parameters, {spent['seconds']} s, {spent['cpu_seconds']} s computed", file=sys.stderr)
    return rows


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(DIGITS), help="rows of --digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--n-train", type=int, help="scenes to train on")
    parser.add_argument("--encoder", default="biformer_micro")
    parser.add_argument("--decoder", default="unet")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    if not (args.digits or args.scenes):
        parser.error("nothing to do: give --digits or --scenes")
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads}
    if args.digits:
        result["digits"] = {"train": 1437, "test": 360, "rows": digits(args)}
    if args.scenes:
        result["scenes"] = {"rows": scenes(args)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
