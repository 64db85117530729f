"""FLUX with a part of its attention: blocks chosen while it runs, or windows of neighbours; no calibration.

python examples/sparse_flux.py --prompt "a lighthouse at dusk" --density 0.4
python examples/sparse_flux.py --shapes        # offline, with the joint-attention model that attnctl ships

VRAM: about 34 GB for 1024 x 1024 in bfloat16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments, model, prompt_of

import attnctl
from attnctl.plans import Neighborhood, Online
from attnctl.processors import SparseAttention

args = arguments(
    __doc__,
    seed=False,
    prompt={"help": "what to show"},
    density={"type": float, "default": 0.4, "help": "share of the blocks to compute between two choices"},
)
pipe = model(args, "mmdit", "FluxPipeline", "black-forest-labs/FLUX.1-dev", dtype="bfloat16", cpu=True)
if args.shapes:
    prompt = prompt_of(args, "a green ring and a white cross on black")
    # A grid of 16 x 16 tokens: one row of it is a block.
    block, window = 16, Neighborhood(window=8, stride=4)
    call = {"num_inference_steps": args.steps or 10, "guidance_scale": 4.0, "max_sequence_length": 0}
else:
    prompt = prompt_of(args, "a lighthouse at dusk, photograph")
    block, window = 64, Neighborhood(window=24, stride=8)
    call = {"num_inference_steps": args.steps or 28, "guidance_scale": 3.5, "width": 1024, "height": 1024}


def show(name: str) -> None:
    """Generate from the same noise every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    pipe(prompt, generator=generator, **call).images[0].save(args.out / f"{name}.png")


show("plain")
for name, select in (("online", Online(density=args.density, every=5, block=block)), ("windows", window)):
    control = SparseAttention(select, dense_steps=1)
    with attnctl.control(pipe, control) as handle:
        show(name)
        print(f"{name}: {100 * handle.result(control):.1f} % of the maps between image tokens computed")
print(f"wrote plain.png, online.png and windows.png into {args.out}")
