"""Stable Diffusion 1.5 with and without A-STAR, the same noise.

python examples/astar_sd15.py --prompt "a cat and a dog" --concepts cat dog
python examples/astar_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 6 GB at 512 px in float16, as it differentiates the UNet (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, arguments, compare, model, prompt_of

from attnctl.processors import AStar

concepts = {"nargs": "+", "help": "the words whose attention is kept apart"}
args = arguments(__doc__, prompt=PROMPT, concepts=concepts, step_size={"type": float, "help": "alpha_0"})
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
prompt = prompt_of(args, "a cat and a dog")
if args.shapes:
    words, call = args.concepts or ["circle", "square"], {"guidance_scale": 1.5, "num_inference_steps": 20}
    # Steps of a fixed length, because the small model's gradients have another scale.
    control = AStar(concepts=tuple(words), grad_transform="l2", step_size=args.step_size or 1.0)
else:
    words, call = args.concepts or ["cat", "dog"], {"guidance_scale": 7.5, "num_inference_steps": 50}
    control = AStar(concepts=tuple(words), step_size=args.step_size or 20.0)
compare(args, pipe, prompt, control, "astar", **call)
