"""A batch of Stable Diffusion XL pictures that share attention: one style, one subject, or one picture's contents.

python examples/share_sdxl.py --method StyleAligned --prompts "a toy train, wood" "a toy plane, wood" "a toy car, wood"
python examples/share_sdxl.py --method Consistent
python examples/share_sdxl.py --shapes     # offline, with the model that attnctl ships

VRAM: about 16 GB for three pictures at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments, model

import attnctl
from attnctl import processors
from attnctl.data.pictures import grid

METHODS = ("StyleAligned", "Consistent", "MasaCtrl")
prompts = {"nargs": "+", "help": "one prompt per picture, two or more"}
method = {"choices": METHODS, "default": "StyleAligned", "help": "what the pictures share"}
args = arguments(__doc__, method=method, prompts=prompts)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
shapes = ["a red circle", "a blue square", "a green ring"]
texts = args.prompts or (shapes if args.shapes else [f"a toy {x}, macro photo" for x in ("train", "airplane", "car")])


def batch() -> list:
    """Generate all prompts in one call, from the same noise every time."""
    noise = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(texts))]
    return pipe(texts, num_inference_steps=30, guidance_scale=3.0 if args.shapes else 5.0, generator=noise).images


plain = batch()
with attnctl.control(pipe, getattr(processors, args.method)()) as handle:
    shared = batch()
    print(handle.report())
path = args.out / "shared.png"
grid([*plain, *shared], 2, len(texts), ["plain", args.method], texts).save(path)
print(f"wrote {path}")
