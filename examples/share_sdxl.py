"""Stable Diffusion XL pictures that share attention: one style, one subject, one picture's contents, or a reference.

python examples/share_sdxl.py --method StyleAligned --prompts "a toy train, wood" "a toy plane, wood" "a toy car, wood"
python examples/share_sdxl.py --method Consistent --later "a toy ship, macro photo"     # a run of its own, same subject
python examples/share_sdxl.py --method ReferenceOnly --reference toy.png
python examples/share_sdxl.py --shapes     # offline, with the model that attnctl ships

VRAM: about 16 GB for three pictures at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from pathlib import Path

import torch
from _run import arguments, model

import attnctl
from attnctl import processors
from attnctl.data.pictures import grid

METHODS = ("StyleAligned", "Consistent", "MasaCtrl", "ReferenceOnly")
prompts = {"nargs": "+", "help": "one prompt per picture, two or more"}
method = {"choices": METHODS, "default": "StyleAligned", "help": "what the pictures share"}
later = {
    "nargs": "+",
    "default": [],
    "help": "prompts of a second run, which sees the first one's subject (Consistent)",
}
reference = {"type": Path, "help": "a picture file (ReferenceOnly); the first plain picture by default"}
args = arguments(__doc__, method=method, prompts=prompts, later=later, reference=reference)
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
shapes = ["a red circle", "a blue square", "a green ring"]
texts = args.prompts or (shapes if args.shapes else [f"a toy {x}, macro photo" for x in ("train", "airplane", "car")])


def batch(prompts: list[str]) -> list:
    """Generate all prompts in one call, from the same noise every time."""
    noise = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(prompts))]
    call = {"num_inference_steps": args.steps or 30, "guidance_scale": 3.0 if args.shapes else 5.0}
    return pipe(prompts, **call, generator=noise).images


plain = batch(texts)
settings: dict = {}
if args.method == "ReferenceOnly":
    settings = {"reference": args.reference or plain[0]}
elif args.later:
    if args.method != "Consistent":
        raise SystemExit("--later needs --method Consistent, whose subject a second run can see.")
    settings = {"bank": processors.IdentityBank()}
    plain += batch(args.later)
with attnctl.control(pipe, getattr(processors, args.method)(**settings)) as handle:
    shared = batch(texts)
    shared += batch(args.later) if args.later else []
    print(handle.report())
texts += args.later
path = args.out / "shared.png"
grid([*plain, *shared], 2, len(texts), ["plain", args.method], texts).save(path)
print(f"wrote {path}")
