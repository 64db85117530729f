"""Stable Diffusion XL with a negative prompt inside cross-attention (NAG) beside weak guidance, the same noise.

python examples/nag_sdxl.py --prompt "a portrait of an old fisherman" --negative "glasses, hat"
python examples/nag_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 12 GB at 1024 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import NAG

negative = {"help": "what not to draw"}
args = arguments(__doc__, prompt=PROMPT, negative=negative, scale=SCALE | {"default": 4.0, "help": "how strongly"})
pipeline, repository = "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", pipeline, repository, variant="fp16")
prompt = prompt_of(args, "a portrait of an old fisherman")
# Every cross-attention. Guidance is weak here; at guidance_scale=1 the control encodes the negative prompt itself.
call = {"negative_prompt": args.negative or ("on gray" if args.shapes else "glasses, hat"), "guidance_scale": 1.5}
compare(args, pipe, prompt, NAG(scale=args.scale), "nag", **call, num_inference_steps=30)
