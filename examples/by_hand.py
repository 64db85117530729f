"""The classic plug point: processors for `set_attn_processor`, and a denoising loop of one's own.

    python examples/by_hand.py        # offline, with the model that attnctl ships

`attnctl.control` does all of this by itself, and reuses what both passes share; this script shows what it computes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.processors import PAG

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="accepted for symmetry; this example always uses it")
parser.add_argument("--prompt", default="a red circle and a blue square on gray")
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

pipe = attnctl.load_shapes("text2image")
unet, scheduler = pipe.unet, pipe.scheduler
s, w = 4.0, 3.0  # weights of classifier-free and of perturbed-attention guidance

plain = dict(unet.attn_processors)
perturbed = attnctl.attn_processors(unet, PAG(sites="mid"))

with torch.no_grad():
    c_text, u_text = pipe.encode_prompt(args.prompt, "cpu", 1, True)
    scheduler.set_timesteps(25)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    start = x
    for t in scheduler.timesteps:
        u = unet(x, t, encoder_hidden_states=u_text).sample
        c = unet(x, t, encoder_hidden_states=c_text).sample
        unet.set_attn_processor(dict(perturbed))  # the host empties the dict that it is given
        p = unet(x, t, encoder_hidden_states=c_text).sample
        unet.set_attn_processor(dict(plain))
        x = scheduler.step(u + s * (c - u) + w * (c - p), t, x).prev_sample

# The same with one line on and one line off.
with attnctl.control(pipe, PAG(scale=w, sites="mid")):
    y = pipe(args.prompt, guidance_scale=s, num_inference_steps=25, latents=start, output_type="latent").images

print(f"largest difference between the two: {float((x - y).abs().max()):.2e}")
args.out.mkdir(parents=True, exist_ok=True)
with torch.no_grad():
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
pipe.image_processor.postprocess(image)[0].save(args.out / "by_hand.png")
print(f"wrote {args.out / 'by_hand.png'}")
