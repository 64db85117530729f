"""Stable Diffusion 3.5 medium with and without SoftPAG in the joint attention of three blocks.

    python examples/softpag_sd35.py --prompt "a watercolor of a harbour at dawn"
    python examples/softpag_sd35.py --shapes        # offline, with the model that attnctl ships

Needs access to stabilityai/stable-diffusion-3.5-medium on the Hub. VRAM: about 18 GB at 1024 px in bfloat16, most of it
the T5 text encoder; about 8 GB without it (text_encoder_3=None, tokenizer_3=None). Estimates, not measured.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import SoftPAG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE)
pipeline, repository = "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"
pipe = model(args, "text2image", pipeline, repository, dtype="bfloat16")
prompt = prompt_of(args, "a watercolor of a harbour at dawn")
# Half-way to the identity in the middle blocks; text and image rows alike.
sites = ["mid", "up.0"] if args.shapes else [f"transformer_blocks.{i}" for i in (8, 9, 10)]
control = SoftPAG(scale=args.scale, u=0.5, sites=sites)
compare(args, pipe, prompt, control, "softpag", guidance_scale=4.0 if args.shapes else 4.5, num_inference_steps=28)
