"""Stable Diffusion 1.5: an image and its edit by a changed prompt, generated together (prompt-to-prompt).

python examples/prompt_to_prompt_sd15.py --source "a photo of a red car" --target "a photo of a blue car"
python examples/prompt_to_prompt_sd15.py --shapes        # offline, with the model that attnctl ships

VRAM: about 5 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments, model

import attnctl
from attnctl.data.pictures import pair
from attnctl.processors import PromptToPrompt

words = {"source": {"help": "what the first image shows"}, "target": {"help": "what the second one shall show"}}
args = arguments(__doc__, **words)
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
if args.shapes:
    source = args.source or "a red circle and a blue square on gray"
    target, scale, steps = args.target or "a green circle and a blue square on gray", 3.0, 20
else:
    source = args.source or "a photo of a red car in the street"
    target, scale, steps = args.target or "a photo of a blue car in the street", 7.5, 50

# Both images begin with the same noise.
channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(args.seed))
latents = noise.repeat(2, 1, 1, 1).to(pipe.device, pipe.unet.dtype)
with attnctl.control(pipe, PromptToPrompt(source=source, target=target)) as handle:
    call = {"latents": latents, "guidance_scale": scale, "num_inference_steps": args.steps or steps}
    image, edited = pipe([source, target], **call).images
    print(handle.report())

image.save(args.out / "source.png")
edited.save(args.out / "edited.png")
pair(image, edited, (source, target)).save(args.out / "pair.png")
print(f"wrote {args.out / 'source.png'}, {args.out / 'edited.png'} and {args.out / 'pair.png'}")
