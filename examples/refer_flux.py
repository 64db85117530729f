"""Find what an expression names in a picture, by the attention of FLUX.1: mask, box, and points for a model like SAM.

python examples/refer_flux.py --image photo.png --expression "the dog on the left" --expression "the red ball"
python examples/refer_flux.py --shapes     # offline, with the model that attnctl ships and a drawn scene

VRAM: about 34 GB at 1024 px in bfloat16 (an estimate, not measured).
"""

from __future__ import annotations

import json

import numpy as np
from _run import arguments, model
from PIL import Image

from attnctl.data.picture_files import read_picture
from attnctl.data.segments import coco, segments_sheet
from attnctl.pipelines import refer
from attnctl.shapes.scenes import render, sample

image = {"help": "a picture"}
expression = {"action": "append", "help": "what to look for; several times for several"}
args = arguments(__doc__, steps=None, image=image, expression=expression)
pipe = model(args, "mmdit", "FluxImg2ImgPipeline", "black-forest-labs/FLUX.1-schnell", dtype="bfloat16")
if args.shapes:
    scene = sample(np.random.default_rng(args.seed + 1), 2)
    picture = Image.fromarray(render(scene))
    expressions = args.expression or [f"the {thing.color} {thing.shape}" for thing in scene.things]
    # Where this small model looks is best seen near the end of its blocks, at a low noise level.
    how = {"strength": 0.15, "sites": (6, 7), "max_sequence_length": 0}
elif args.image:
    picture, expressions, how = read_picture(args.image), args.expression or ["the dog"], {"strength": 0.3}
else:
    raise SystemExit("Give a picture with --image, or --shapes.")
found = refer(pipe, picture, expressions, seed=args.seed, **how)

segments_sheet([picture], found).save(args.out / "segments.png")
(args.out / "segments.json").write_text(json.dumps(coco(found, [args.image or "scene.png"]), indent=1))
for one in found:
    share = one.masks[0].float().mean()
    print(f"{one.expression}: box {one.boxes[0]}, inside {one.positive[0]}, covers {share:.0%}")
print(f"wrote {args.out / 'segments.png'} and {args.out / 'segments.json'}")
