"""FLUX.1-dev with and without SoftPAG on chosen heads.

    python examples/softpag_flux.py --prompt "a portrait of an astronaut, vintage film"
    python examples/softpag_flux.py --shapes        # offline, with the model that attnctl ships

Needs access to black-forest-labs/FLUX.1-dev on the Hub. The heads are those that arXiv 2506.10978 shows for a vintage
film look: depths count the 19 double blocks first, then the 38 single ones. VRAM: about 36 GB at 1024 px in bfloat16;
pipe.enable_model_cpu_offload() in the place of .to("cuda") needs about 26 GB. Estimates, not measured.
"""

from __future__ import annotations

from _run import PROMPT, SCALE, arguments, compare, model, prompt_of

import attnctl
from attnctl.processors import SoftPAG

# Single heads take a larger weight than whole layers: the authors use 8.
args = arguments(__doc__, prompt=PROMPT, scale=SCALE | {"default": 8.0})
pipe = model(args, "text2image", "FluxPipeline", "black-forest-labs/FLUX.1-dev", dtype="bfloat16")
prompt = prompt_of(args, "a portrait of an astronaut, vintage film")
heads = [(51, 23), (52, 22)]
if args.shapes:
    sites = [site.name for site in attnctl.find_sites(pipe) if site.kind == "self"]
    heads = [(sites[-1], 0), (sites[-2], 0)]
control = SoftPAG(scale=args.scale, u=1.0, heads=heads)
compare(args, pipe, prompt, control, "softpag", guidance_scale=4.0 if args.shapes else 3.5, num_inference_steps=15)
