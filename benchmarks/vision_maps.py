"""Where a vision transformer looks with its own and with swapped attention: `python benchmarks/vision_maps.py`.

The small transformer of `attnctl demo`, trained on scenes of one object to name its colour, with timm's attention and
with agent attention in its place, from several seeds. Percent: answers that are right, and the share of the class
token's attention (last block, mean over heads) that lies on the object, on scenes that it was not trained on; the
object's share of the picture is what attention at random would have. The interval is a 95 % bootstrap interval of the
mean difference over scenes (the mean over seeds of each). The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from judged import interval
from torch.nn.functional import interpolate

from attnctl.app.commands.demo_panels import colour_scenes, looks, train_on_colours

KINDS = {"own": None, "agent": "agent"}
TEST_SEED = 2


def study(n: int, seeds: int, epochs: int) -> dict[str, Any]:
    """Train each kind from each seed, and look."""
    pixels, images, labels, objects = colour_scenes(n, TEST_SEED)
    size, found = pixels.shape[1:3], {}
    for name, kind in KINDS.items():
        right, shares, began = [], [], time.process_time()
        for seed in range(seeds):
            answers, maps = looks(train_on_colours(kind, seed=seed, epochs=epochs), images)
            right.append(float((answers == labels).double().mean()))
            large = interpolate(maps[:, None].float(), size, mode="nearest")[:, 0].numpy()
            shares.append((large * objects).sum((1, 2)) / large.sum((1, 2)))
            print(f"{name} {seed}: {right[-1]:.1%} right, {shares[-1].mean():.1%} on the object", file=sys.stderr)
        found[name] = {"right": right, "shares": np.mean(shares, 0), "cpu": time.process_time() - began}
    return {
        "scenes": n,
        "seeds": seeds,
        "epochs": epochs,
        "right_percent": {k: [round(100 * v, 1) for v in f["right"]] for k, f in found.items()},
        "on_object_percent": {k: round(100 * float(f["shares"].mean()), 1) for k, f in found.items()},
        "object_percent": round(100 * float(objects.mean()), 1),
        "gain_points": interval(found["agent"]["shares"] - found["own"]["shares"]),
        "cpu_seconds": {k: round(f["cpu"], 1) for k, f in found.items()},
    }


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=256, help="scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = study(options.n, options.seeds, options.epochs)
    print(json.dumps(result | {"torch": torch.__version__}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
