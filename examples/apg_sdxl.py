"""SDXL at a high guidance scale, plain and with adaptive projected guidance, the same noise.

python examples/apg_sdxl.py --prompt "a market at dusk"
python examples/apg_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 8 GB in float16 (estimate, not measured). The control costs no pass.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import APG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"default": None, "help": "guidance scale of both pictures"})
repository = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", "StableDiffusionXLPipeline", repository, variant="fp16")
prompt = prompt_of(args, "a market at dusk, crowded, lanterns")
call = {
    "guidance_scale": args.scale or (6.0 if args.shapes else 15.0),
    "num_inference_steps": 20 if args.shapes else 30,
}
# The paper's bound for SDXL is for clean images of 4 x 128 x 128 latents; those of the small model are smaller.
compare(args, pipe, prompt, APG(space="x0", norm=3.0 if args.shapes else 15.0), "apg", **call)
