"""Stable Diffusion 1.5: an image and its edit by a changed prompt, generated together (prompt-to-prompt).

python examples/prompt_to_prompt_sd15.py --source "a photo of a red car" --target "a photo of a blue car"
python examples/prompt_to_prompt_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 5 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.data.pictures import pair
from attnctl.processors import PromptToPrompt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model")
parser.add_argument("--source", help="what the first image shows")
parser.add_argument("--target", help="what the second one shall show")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("text2image")
    source = args.source or "a red circle and a blue square on gray"
    target, scale, steps = args.target or "a green circle and a blue square on gray", 3.0, 20
else:
    from diffusers import StableDiffusionPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=dtype).to(
        device
    )
    source = args.source or "a photo of a red car in the street"
    target, scale, steps = args.target or "a photo of a blue car in the street", 7.5, 50

# Both images begin with the same noise.
config = pipe.unet.config
noise = torch.randn(
    1, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(args.seed)
)
latents = noise.repeat(2, 1, 1, 1).to(pipe.device, pipe.unet.dtype)
with attnctl.control(pipe, PromptToPrompt(source=source, target=target)) as handle:
    call = {"latents": latents, "guidance_scale": scale, "num_inference_steps": steps}
    image, edited = pipe([source, target], **call).images
    print(handle.report())

args.out.mkdir(parents=True, exist_ok=True)
image.save(args.out / "source.png")
edited.save(args.out / "edited.png")
pair(image, edited, (source, target)).save(args.out / "pair.png")
print(f"wrote {args.out / 'source.png'}, {args.out / 'edited.png'} and {args.out / 'pair.png'}")
