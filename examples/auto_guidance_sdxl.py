"""SDXL guided away from a version of itself that dropout has made worse (AutoGuidance), the same noise.

python examples/auto_guidance_sdxl.py --prompt "a market at dusk" --scale 2 --dropout 0.2
python examples/auto_guidance_sdxl.py --shapes        # offline, with the model that attnctl ships

VRAM: about 10 GB at 1024 px in float16 (an estimate, not measured). The control adds a pass per step.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

from attnctl.processors import AutoGuidance

dropout = {"type": float, "default": 0.5, "help": "share of the outputs of attention that is dropped"}
args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"default": 4.0}, dropout=dropout)
repository = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = model(args, "text2image", "StableDiffusionXLPipeline", repository, variant="fp16")
prompt = prompt_of(args, "a market at dusk, crowded, lanterns")
# The paper's weight is scale + 1. The worse model sees the same prompt, so a little classifier-free guidance stays on.
control = AutoGuidance(scale=args.scale, dropout=args.dropout)
compare(args, pipe, prompt, control, "auto_guidance", guidance_scale=1.5, num_inference_steps=20)
