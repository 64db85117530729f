"""A prompt per region of the picture, with FLUX.1 or Stable Diffusion XL.

python examples/regions_flux.py
python examples/regions_flux.py --sdxl --left "a red fox" --right "a gray owl" --prompt "two animals in a forest"
python examples/regions_flux.py --shapes     # offline, with the model that attnctl ships

VRAM: about 34 GB for FLUX.1 in bfloat16, 12 GB for SDXL in float16 (estimates, not measured).
"""

from __future__ import annotations

from _run import PROMPT, arguments, compare, model, prompt_of
from PIL import Image

from attnctl.data.pictures import grid
from attnctl.processors import Regions

left = {"help": "the prompt of the left half"}
right = {"help": "the prompt of the right half"}
sdxl = {"action": "store_true", "help": "use Stable Diffusion XL"}
args = arguments(__doc__, prompt=PROMPT, left=left, right=right, sdxl=sdxl)
if args.sdxl:
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    pipe = model(args, "text2image", "StableDiffusionXLPipeline", name, variant="fp16")
else:
    pipe = model(args, "mmdit", "FluxPipeline", "black-forest-labs/FLUX.1-dev", dtype="bfloat16")
prompt = prompt_of(args, "an astronaut and a horse on the moon", "a green ring and a yellow triangle on black")
texts = ("a green ring on black", "a yellow triangle on black") if args.shapes else ("an astronaut", "a white horse")
regions = Regions(
    prompts=(args.left or texts[0], args.right or texts[1]),
    areas=((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),  # left, top, right, bottom in fractions of the picture
)
call = {"guidance_scale": 3.0, "max_sequence_length": 0} if args.shapes and not args.sdxl else {"guidance_scale": 3.5}
compare(args, pipe, prompt, regions, "regions", **call, num_inference_steps=28)

pictures = [Image.open(args.out / f"{name}.png") for name in ("plain", "regions")]
grid(pictures, 1, 2, column_labels=(prompt, " | ".join(regions.prompts))).save(args.out / "both.png")
