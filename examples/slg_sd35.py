"""Stable Diffusion 3.5 medium with and without skip-layer guidance, the same noise.

python examples/slg_sd35.py --prompt "a dancer in mid leap, full body"
python examples/slg_sd35.py --shapes        # offline, with the model that attnctl ships

Needs access to stabilityai/stable-diffusion-3.5-medium on the Hub. VRAM: about 18 GB at 1024 px in bfloat16, most of it
the T5 text encoder; about 8 GB without it (text_encoder_3=None, tokenizer_3=None). Estimates, not measured.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import SLG

args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"default": 2.8})
pipeline, repository = "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"
pipe = model(args, "mmdit", pipeline, repository, dtype="bfloat16")
prompt = prompt_of(args, "a dancer in mid leap, full body")
if args.shapes:
    call = {"guidance_scale": 3.0, "num_inference_steps": 20, "max_sequence_length": 0}
else:
    call = {"guidance_scale": 4.5, "num_inference_steps": 28}
# Blocks 7, 8 and 9 from 1 % to 20 % of the run, as published; the small model has eight blocks, and another window.
control = SLG(scale=args.scale, sites=6, start=0.0, stop=0.6) if args.shapes else SLG(scale=args.scale)
compare(args, pipe, prompt, control, "slg", **call)
