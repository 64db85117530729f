"""From a folder of pictures to a trained model, a confusion matrix, answers with maps and an ONNX file: three commands.

    python benchmarks/own_pictures.py             # draws the folder, runs the commands, prints scores and seconds
    python benchmarks/own_pictures.py --folder data   # draws the folder alone

The folder has three classes, circle, square and triangle: scenes of one object, 600 to train on and 20 to test per
class.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.shapes.scenes import render, sample

CLASSES = ("circle", "square", "triangle")


def draw(folder: Path, train: int, test: int) -> None:
    """Draw scenes of one object into folders by shape."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        left = dict.fromkeys(CLASSES, count)
        while any(left.values()):
            scene = sample(rng, 1, "any")
            shape = scene.things[0].shape
            if left.get(shape, 0):
                left[shape] -= 1
                path = folder / part / shape / f"{count - left[shape]:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render(scene)).save(path)


def command(*args: object) -> tuple[dict[str, Any], float]:
    """Run one command of attnctl, and return its result and its seconds."""
    start = time.perf_counter()
    text = subprocess.run(
        [sys.executable, "-m", "attnctl", *map(str, args), "--json"], check=True, stdout=subprocess.PIPE, env=os.environ
    ).stdout
    return json.loads(text), time.perf_counter() - start


def main() -> None:
    """Draw the folder, and run the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="draw the pictures there, and stop")
    parser.add_argument("--train", type=int, default=600, help="pictures to train on per class")
    parser.add_argument("--test", type=int, default=20, help="pictures to test on per class")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--model", default="biformer_micro")
    parser.add_argument("--model-options", default="{}")
    parser.add_argument("--out", type=Path, help="keep the run and the answers there")
    args = parser.parse_args()
    if args.folder:
        draw(args.folder, args.train, args.test)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = args.out or Path(folder)
        draw(root / "data", args.train, args.test)
        trained, first = command(
            "classify", root / "data", "--model", args.model, "--model-options", args.model_options,
            "--epochs", args.epochs, "--size", 64, "--lr", 0.003, "--crop", 0.9, "--out", root / "run",
        )  # fmt: skip
        answers, second = command(
            "predict", root / "run", root / "data" / "val" / "triangle", "--out", root / "answers"
        )
        _, third = command("export", root / "run")
        size = (root / "run" / "model.onnx").stat().st_size
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    right = [a["answer"] == "triangle" for a in answers["answers"]]
    result = {
        "accuracy": trained["scores"]["accuracy"], "test_pictures": 3 * args.test,
        "right": sum(right), "asked": len(right), "maps": answers["answers"][0]["map"], "onnx_bytes": size,
        "seconds": {"classify": round(first, 1), "predict": round(second, 1), "export": round(third, 1)},
        "total_seconds": round(first + second + third, 1), "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1),
        "epochs": args.epochs,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
