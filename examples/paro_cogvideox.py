"""CogVideoX with half of its attention: calibrate on one prompt, check on another, generate with the plan.

python examples/paro_cogvideox.py --prompt "a panda in a bamboo forest" --check "a boat on a lake at dawn"
python examples/paro_cogvideox.py --shapes        # offline, with the joint-attention model that attnctl ships

VRAM: about 30 GB for 49 frames of 720 x 480 in bfloat16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.pipelines import calibrate, check_plan, write_report
from attnctl.processors import PARO

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model")
parser.add_argument("--prompt", help="what to calibrate on and to show")
parser.add_argument("--check", help="another prompt, to compare dense and sparse on")
parser.add_argument("--density", type=float, default=0.5, help="share of the blocks to compute")
parser.add_argument("--steps", type=int, help="denoising steps")
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("mmdit")
    prompt = args.prompt or "a red circle and a blue square on gray"
    other = args.check or "a green ring and a white cross on black"
    # A grid of 16 x 16 tokens: one row of it is a block.
    block, call = 16, {"num_inference_steps": args.steps or 10, "guidance_scale": 4.0, "max_sequence_length": 0}
else:
    from diffusers import CogVideoXPipeline

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=dtype).to(device)
    prompt = args.prompt or "a panda plays the guitar in a bamboo forest"
    other = args.check or "a boat on a lake at dawn"
    block, call = 64, {"num_inference_steps": args.steps or 50, "guidance_scale": 6.0}

# What has been measured is kept: after an interruption the same command goes on from there.
found = calibrate(
    pipe, [prompt], density=args.density, block=block, groups=2, call=call, out=args.out / "measured", quiet=True
)
found.plan.save_pretrained(args.out / "plan")
checks = check_plan(pipe, found.plan, [other], call=call)
report = write_report(found, args.out, checks)
print(f"{100 * report['captured']:.1f} % of the attention in {100 * report['density_image']:.1f} % of the blocks")
print(f"on {other!r}: {checks[0]['psnr_db']} dB to dense")


def show(name: str) -> None:
    """Generate from the same noise every time."""
    result = pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), **call)
    if args.shapes:
        result.images[0].save(args.out / f"{name}.png")
    else:
        from diffusers.utils import export_to_video

        export_to_video(result.frames[0], args.out / f"{name}.mp4", fps=8)


show("plain")
with attnctl.control(pipe, PARO(args.out / "plan")):
    show("paro")
print(f"wrote {args.out / 'report.md'}, maps.png, plan, and both results")
