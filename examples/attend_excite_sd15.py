"""Stable Diffusion 1.5 with and without Attend-and-Excite, the same noise.

python examples/attend_excite_sd15.py --prompt "a cat and a frog" --concepts cat frog
python examples/attend_excite_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 6 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, arguments, compare, model, prompt_of

from attnctl.processors import AttendExcite

concepts = {"nargs": "+", "help": "the words of which none shall be neglected"}
args = arguments(__doc__, prompt=PROMPT, concepts=concepts)
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
prompt = prompt_of(args, "a cat and a frog")
if args.shapes:
    words, call = args.concepts or ["circle", "square"], {"guidance_scale": 1.5, "num_inference_steps": 20}
    # Steps of a fixed length, because the small model's gradients have another scale.
    control = AttendExcite(concepts=tuple(words), grad_transform="l2", step_size=0.5, thresholds=())
else:
    words, call = args.concepts or ["cat", "frog"], {"guidance_scale": 7.5, "num_inference_steps": 50}
    control = AttendExcite(concepts=tuple(words))
compare(args, pipe, prompt, control, "attend_excite", **call)
