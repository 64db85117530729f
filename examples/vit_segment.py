"""A BiFormer under a U-Net of segmentation-models-pytorch, trained on scenes with exact masks. Offline as it is.

python examples/vit_segment.py
python examples/vit_segment.py --encoder agent_pvt_micro --decoder fpn
python examples/vit_segment.py --encoder pvt_v2_b0 --swap agent
python examples/vit_segment.py --shapes        # a minute: fewer scenes and epochs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import attnctl
from attnctl.data.map_pictures import words_sheet
from attnctl.pipelines import segment
from attnctl.pipelines.vision.segmentation import scene_masks
from attnctl.processors import Capture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="the small form")
parser.add_argument("--encoder", default="biformer_micro", help="a timm name whose stages have strides 4 to 32")
parser.add_argument("--decoder", default="unet")
parser.add_argument("--swap", help="a kind of attnctl.swap for the encoder")
parser.add_argument("--epochs", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

small = {"n_train": 320, "n_test": 16, "epochs": 3} if args.shapes else {}
if args.epochs:
    small["epochs"] = args.epochs
options = {"num_agents": 4} if args.swap == "agent" else {}
done = segment(args.encoder, args.decoder, swap=args.swap, swap_options=options, seed=args.seed, out=args.out, **small)
if args.swap:
    print(attnctl.swap_report(done.model.encoder.model))
print(f"mean IoU {done.mean_iou:.3f} on scenes that it has not seen:")
for name, iou in done.iou.items():
    print(f"  {name:10s} {iou:.3f}")

images, masks = scene_masks(1, seed=args.seed + 7)
inside = masks[0].nonzero()
row, column = inside[len(inside) // 3].tolist()  # a pixel of an object
place = (round((column + 0.5) / 64, 2), round((row + 0.5) / 64, 2))
with attnctl.control(done.model, Capture(points=(place,), sites=slice(0, 2))) as handle, torch.no_grad():
    done.model(images)
    maps = handle.maps
picture = Image.fromarray(((images[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy())
words_sheet(picture, maps, title="What the ringed place attends to").save(args.out / "attention.png")
print(f"wrote {', '.join(p.name for p in done.files)}, attention.png to {args.out}")
