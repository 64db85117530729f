"""CogVideoX with half of its attention: calibrate on one prompt, check on another, generate with the plan.

python examples/paro_cogvideox.py --prompt "a panda in a bamboo forest" --check "a boat on a lake at dawn"
python examples/paro_cogvideox.py --shapes        # offline, with the joint-attention model that attnctl ships

VRAM: about 30 GB for 49 frames of 720 x 480 in bfloat16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments, model, prompt_of

import attnctl
from attnctl.pipelines import calibrate, check_plan, write_report
from attnctl.processors import PARO

share = {"type": float, "default": 0.5, "help": "share of the blocks to compute"}
args = arguments(
    __doc__,
    seed=False,
    prompt={"help": "what to calibrate on and to show"},
    check={"help": "another prompt, to compare dense and sparse on"},
    density=share,
)
pipe = model(args, "mmdit", "CogVideoXPipeline", "THUDM/CogVideoX-5b", dtype="bfloat16", cpu=True)
prompt = prompt_of(args, "a panda plays the guitar in a bamboo forest")
if args.shapes:
    other = args.check or "a green ring and a white cross on black"
    # A grid of 16 x 16 tokens: one row of it is a block.
    block, call = 16, {"num_inference_steps": args.steps or 10, "guidance_scale": 4.0, "max_sequence_length": 0}
else:
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
