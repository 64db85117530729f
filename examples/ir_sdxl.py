"""Two subjects in one picture that do not mix, each like its reference in another picture of the batch.

python examples/ir_sdxl.py --prompts "a gray cat" "a brown dog" "a gray cat and a brown dog, a garden"
python examples/ir_sdxl.py --shapes     # offline, with the model that attnctl ships

VRAM: about 16 GB for three pictures at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments, model

import attnctl
from attnctl.data.pictures import grid
from attnctl.processors import IRDiffusion

MIDDLE, LEFT, RIGHT = (0.2, 0.2, 0.8, 0.8), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
prompts = {"nargs": 3, "help": "a prompt for each reference, left and right, and one for both subjects"}
args = arguments(__doc__, prompts=prompts)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
shapes = ["a red circle on gray", "a blue square on gray", "a red circle and a blue square on gray"]
texts = args.prompts or (shapes if args.shapes else ["a gray cat", "a brown dog", "a gray cat and a brown dog"])


def batch() -> list:
    """Generate the references and the picture in one call, from the same noise every time."""
    noise = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(texts))]
    call = {"num_inference_steps": args.steps or 30, "guidance_scale": 3.0 if args.shapes else 5.0}
    return pipe(texts, **call, generator=noise).images


plain = batch()
boxes = ((MIDDLE, None), (None, MIDDLE), (LEFT, RIGHT))
with attnctl.control(pipe, IRDiffusion(boxes=boxes, references=(0, 1))) as handle:
    kept = batch()
    print(handle.report())
path = args.out / "ir.png"
grid([*plain, *kept], 2, len(texts), ["plain", "IR-Diffusion"], texts).save(path)
print(f"wrote {path}")
