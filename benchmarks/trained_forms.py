"""Train every form of attention and every small model with one recipe, and compare them with softmax.

    python benchmarks/trained_forms.py                        # all rows, three seeds; goes on where it stopped
    python benchmarks/trained_forms.py --rows softmax moh --tasks digits
    python benchmarks/trained_forms.py --table                # the table of what has been trained so far

Three tasks on images of 32 px: which digit it is (scikit-learn's), which of five shapes a scene shows, and at which
places (mean IoU of six classes, with a decoder of segmentation-models-pytorch). Forms are swapped into one ViT, or one
PVTv2 for the third task; the small models are those that this package registers. All rows of a task share the images,
the optimiser, the schedule, the batch and the number of epochs; nothing is tuned per row. Every finished run is kept
in the file of `--out`, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnctl
from attnctl.backbones.mixers import MIXERS
from attnctl.backbones.mixers.moh import balance
from attnctl.backbones.swap import multiply_adds
from attnctl.errors import AttnctlError
from attnctl.pipelines.vision.classification import digits
from attnctl.pipelines.vision.fitting import fit
from attnctl.pipelines.vision.segmentation import scene_masks
from attnctl.plans.writing import publish
from attnctl.shapes.data import to_tensor
from attnctl.shapes.scenes import SHAPES, render, sample

OUT = Path(__file__).parent / "results" / "trained_forms.json"
VIT = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "class_token": False,
    "global_pool": "avg",
}  # fmt: skip
PVT = {
    "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "sr_ratios": (4, 2, 1, 1),
    "mlp_ratios": (4, 4, 2, 2),
}  # fmt: skip
# Options for a grid of 8 x 8 tokens; what is not listed starts at its defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "agent": {"num_agents": 16}, "bra": {"window_size": 2, "topk": 4}, "multiaxis": {"window": 4, "grid_size": 4},
    "neighborhood": {"kernel": 5}, "moh": {"shared": 1, "topk": 1, "noise": 0.5},
}  # fmt: skip
# PVTv2 has a single head in its first stage.
IN_PVT: dict[str, dict[str, Any]] = {
    "multiaxis": {"window": 4, "grid_size": 4, "mode": "mean"}, "moh": {"shared": 0, "topk": 1, "noise": 0.5},
}  # fmt: skip
EPOCHS = {"digits": 8, "scenes": 10, "masks": 6}
BATCH, RATE = 16, 1e-2  # the best of three settings for softmax on digits
Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
# What attnctl, timm and the decoders raise where a form has no place in a backbone.
REFUSALS = (AttnctlError, RuntimeError, AttributeError, NotImplementedError, ValueError, IndexError)


@dataclass(frozen=True)
class Row:
    """What is trained: a model of this package by name, or a form of attention in a host."""

    name: str

    @property
    def form(self) -> bool:
        """Return whether this is a form rather than a model."""
        return self.name == "softmax" or self.name in MIXERS

    def build(self, classes: int, task: str) -> nn.Module:
        """Build the network of a task, with random weights."""
        if task == "masks":
            import segmentation_models_pytorch as smp

            encoder, options = ("pvt_v2_b0", PVT) if self.form else (self.name, {})
            model = smp.create_model(
                "segformer", f"tu-{encoder}", encoder_weights=None, classes=classes, decoder_segmentation_channels=32,
                **options,
            )  # fmt: skip
            host, more = model.encoder.model, OPTIONS | IN_PVT
        else:
            model = host = timm.create_model(
                "vit_tiny_patch16_224" if self.form else self.name, num_classes=classes, **(VIT if self.form else {})
            )
            more = OPTIONS
        if self.name in MIXERS:
            attnctl.swap(host, self.name, **more.get(self.name, {}))
        return model


def rows() -> list[str]:
    """Name all rows: softmax, the forms, the models."""
    own = [n for n in timm.list_models("*_micro") if timm.models.model_entrypoint(n).__module__.startswith("attnctl.")]
    return ["softmax", *(k for k, m in MIXERS.items() if m.__module__.startswith("attnctl.")), *own]


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw scenes of one object: images [n, 3, 32, 32] in -1..1, and which shape it is."""
    rng = np.random.default_rng(seed)
    drawn = [sample(rng, 1, "any") for _ in range(count)]
    images = to_tensor(np.stack([render(s) for s in drawn]))
    return F.avg_pool2d(images, 2), torch.tensor([SHAPES.index(s.things[0].shape) for s in drawn])


def masks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw scenes of one or two objects: images [n, 3, 32, 32], and the shape at every pixel [n, 32, 32]."""
    images, places = scene_masks(count, seed)
    return F.avg_pool2d(images, 2), places[:, ::2, ::2]


DATA: dict[str, Callable[[], Data]] = {
    "digits": lambda: digits(32),
    "scenes": lambda: (scenes(4000, 0), scenes(400, 1_000_003)),
    "masks": lambda: (masks(800, 0), masks(200, 1_000_003)),
}
CLASSES = {"digits": 10, "scenes": len(SHAPES), "masks": 1 + len(SHAPES)}


@torch.inference_mode()
def score(model: nn.Module, task: str, test: tuple[Tensor, Tensor]) -> float:
    """Return the share of right answers, or the mean IoU."""
    guesses = torch.cat([model(part).argmax(1) for part in test[0].split(100)])
    if task != "masks":
        return float((guesses == test[1]).double().mean())
    from torchmetrics.classification import MulticlassJaccardIndex

    return float(MulticlassJaccardIndex(CLASSES[task])(guesses, test[1]))


def train(row: Row, task: str, seed: int, data: Data, epochs: int) -> dict[str, Any]:
    """Train one row once."""
    torch.manual_seed(seed)
    model = row.build(CLASSES[task], task)
    macs = multiply_adds(model, (3, 32, 32))

    def loss(answers: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(answers, targets) + 0.01 * balance(model)

    start = time.process_time()
    fit(model, *data[0], loss, epochs=epochs, batch=BATCH, lr=RATE, seed=seed, quiet=True)
    spent = time.process_time() - start
    return {
        "row": row.name, "task": task, "seed": seed, "score": round(score(model, task, data[1]), 4), "macs": macs,
        "parameters": sum(p.numel() for p in model.parameters()), "cpu_seconds": round(spent, 1),
    }  # fmt: skip


def table(runs: list[dict[str, Any]], names: list[str]) -> str:
    """Write the table: mean and range over seeds, multiply-adds and seconds beside softmax's."""
    lines = [
        "| row | digits | scenes | masks, mIoU | multiply-adds, M | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [name]
        own = [r for r in runs if r["row"] == name]
        for task in EPOCHS:
            scores = [100 * r["score"] for r in own if r["task"] == task and "score" in r]
            cells.append(f"{np.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})" if scores else "")
        first = [r for r in own if r["task"] == "digits" and "score" in r]
        cells.append(f"{first[0]['macs'] / 1e6:.1f}" if first else "")
        cells.append(f"{np.mean([r['cpu_seconds'] for r in first]):.1f}" if first else "")
        if any(cells[1:]):
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table or a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="names of forms and models; all if none are given")
    parser.add_argument("--tasks", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of the recipe's; such runs are not kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the table of the runs so far, and stop")
    args = parser.parse_args()
    known = rows()
    if unknown := set(args.rows or ()) - set(known):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    kept: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.epochs else {"runs": []}
    runs: list[dict[str, Any]] = kept["runs"]
    if args.table:
        print(table(runs, known))
        return
    torch.set_num_threads(1)
    finished = {(r["row"], r["task"], r["seed"]) for r in runs}
    data: dict[str, Data] = {}
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.rows or known:
                if (name, task, seed) in finished:
                    continue
                data[task] = data.get(task) or DATA[task]()
                try:
                    done = train(Row(name), task, seed, data[task], args.epochs or EPOCHS[task])
                except REFUSALS as error:
                    done = {"row": name, "task": task, "seed": seed, "refused": str(error).splitlines()[0][:160]}
                runs.append(done)
                print(json.dumps(done), file=sys.stderr, flush=True)
                result = {"torch": torch.__version__, "timm": timm.__version__, "epochs": EPOCHS, "runs": runs}
                if not args.epochs:
                    publish({args.out: (json.dumps(result, indent=0) + "\n").encode()}, force=True)
    print(json.dumps({"runs": len(runs), "refused": sum("refused" in r for r in runs)}))


if __name__ == "__main__":
    main()
