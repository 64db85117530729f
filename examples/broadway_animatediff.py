"""AnimateDiff with and without BroadWay, the same noise, with figures of motion.

python examples/broadway_animatediff.py --prompt "a horse gallops along the beach" --motion 1.5
python examples/broadway_animatediff.py --shapes        # offline, with the video model that attnctl ships

VRAM: about 8 GB for 16 frames of 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from _run import arguments, prompt_of, save_gif

import attnctl
from attnctl.data.motion import measure
from attnctl.errors import AttnctlError
from attnctl.processors import BroadWay

motion = {"type": float, "default": 1.0, "help": "0 changes nothing, 1 is the published setting"}
shapes, steps = "use the shipped video model", {"type": int, "default": 20}
args = arguments(__doc__, shapes=shapes, prompt={"help": "what to show"}, motion=motion, steps=steps)
prompt = prompt_of(args, "a horse gallops along the beach", "a red circle moving right on gray")
if args.shapes:
    try:
        pipe = attnctl.load_shapes("video")
    except AttnctlError as error:
        sys.exit(f"The shipped video model cannot be used: {error}")
else:
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2", torch_dtype=dtype)
    pipe = AnimateDiffPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", motion_adapter=adapter, torch_dtype=dtype
    ).to(device)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace", steps_offset=1
    )


def film(name: str) -> None:
    """Generate from the same noise every time, save, and print how much moves."""
    call = {"num_frames": 16, "num_inference_steps": args.steps, "guidance_scale": 3.0}
    frames = pipe(prompt, **call, generator=torch.Generator("cpu").manual_seed(args.seed)).frames[0]
    save_gif(frames, args.out / f"{name}.gif", 125)
    figures = measure([np.asarray(f.convert("RGB")) for f in frames])
    print(f"{name}: motion {figures.motion_mean:.2f} pixels a frame, warp error {figures.warp_error:.5f}")


film("plain")
with attnctl.control(pipe, BroadWay(motion=args.motion)) as handle:
    film("broadway")
    print(handle.report())
print(f"wrote {args.out / 'plain.gif'} and {args.out / 'broadway.gif'}")
