"""A vision transformer with other attention in it, trained on digits, and what its heads do. Offline as it is.

python examples/vit_classify.py --swap agent
python examples/vit_classify.py --shapes        # a minute: a smaller model and fewer epochs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import attnctl
from attnctl.backbones.look.analysis import distance_profile, head_importance
from attnctl.data.map_pictures import heads_sheet
from attnctl.pipelines import classify
from attnctl.pipelines.vision.classification import digits
from attnctl.processors import Capture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="the small form")
parser.add_argument("--swap", default="agent", help="a kind of attnctl.swap, or none")
parser.add_argument("--epochs", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

# Digits are 32 px here: patches of 4 make a grid of 8 x 8 tokens, and a class token beside it.
layout: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
epochs = 40
if args.shapes:
    layout |= {"depth": 2}
    epochs = 8
swap = None if args.swap == "none" else args.swap
done = classify(
    "vit_tiny_patch16_224",
    model_options=layout,
    swap=swap,
    swap_options={"num_agents": 4} if swap == "agent" else {},
    epochs=args.epochs or epochs,
    seed=args.seed,
    out=args.out,
)
if swap:
    print(attnctl.swap_report(done.model))
print(f"{done.accuracy:.1%} of 360 digits that it has not seen are right")

images, labels = digits()[1]
with attnctl.control(done.model, Capture(words=("class",), keep=("heads",), sites=-1)) as handle, torch.no_grad():
    done.model(images[:1])
    maps = handle.maps
picture = Image.fromarray(((images[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy())
heads_sheet(picture, maps, title=f"The last block's class token on a {int(labels[0])}").save(args.out / "heads.png")

needed = head_importance(done.model, images, labels)
needed.save_picture(args.out / "importance.png")
distance_profile(done.model, images[:32]).save_picture(args.out / "distance.png")
site, lost = max(needed.probability_drop.items(), key=lambda item: float(item[1].max()))
print(f"most needed: head {int(lost.argmax())} of {site}, {float(lost.max()):.1%} of the right answer's probability")
print(f"wrote {', '.join(p.name for p in done.files)}, heads.png, importance.png, distance.png to {args.out}")
