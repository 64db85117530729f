"""Search Stable Diffusion 3 for the attention heads of a style, and draw with them (HeadHunter, arXiv 2506.10978).

    python examples/hunt_sd3.py --style "golden hour"
    python examples/hunt_sd3.py --shapes        # offline, in seconds, with the model that attnctl ships

The search is the affordable one: pruning by the first step, successive halving, several candidates in a call. It needs
PickScore (hf download yuvalkirstain/PickScore_v1) and goes on where it was stopped; `torchrun --nproc-per-node 8`
shares it between GPUs. VRAM: about 24 GB with PickScore beside the model in float16 (an estimate, not measured).
"""

from __future__ import annotations

import torch
from _run import arguments
from PIL import Image

import attnctl
from attnctl.data.pictures import pair
from attnctl.pipelines import HuntPlan, hunt
from attnctl.pipelines.hunting.scorers import ShapesJudge, pick_score

args = arguments(
    __doc__,
    shapes="use the shipped model and its judge",
    seed=False,
    style={"default": "golden hour", "help": "what to search for"},
    prompt={"help": "what to draw with the heads that were found"},
)

if args.shapes:
    pipe = attnctl.load_shapes("mmdit")
    prompt, call = args.prompt or "a red circle and a blue square on gray", {"max_sequence_length": 0}
    pairs = (("a green ring and a white cross on black", 0), ("a yellow square and a red ring on gray", 1))
    # One of eight layers, so that it takes seconds.
    plan = HuntPlan(pairs=pairs, k=2, u=0.5, scale=2.5, steps=6, guidance=3.0, sites=6, batch=6, call=call)
    objective = ShapesJudge()
else:
    import os

    from diffusers import StableDiffusion3Pipeline

    if not torch.cuda.is_available():
        raise SystemExit("This model needs a CUDA GPU; --shapes runs anywhere.")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    pipe = StableDiffusion3Pipeline.from_pretrained(
        "stabilityai/stable-diffusion-3-medium-diffusers", torch_dtype=torch.float16
    ).to(device)
    prompt, call = args.prompt or f"{args.style}, a harbour", {}
    plan = HuntPlan.style(args.style, prune=0.5, halving=((2, 48),), batch=4, show=1)
    objective = pick_score(device)

cost = plan.estimate(plan.pool(attnctl.find_sites(pipe)))
print(f"{cost.images} images, {cost.passes} rows through the denoiser")
result = hunt(
    pipe, plan, objective, log=args.out / "log", model="shapes:mmdit" if args.shapes else pipe.config._name_or_path
)
result.save(args.out, force=True)
for number, part in enumerate(result.rounds, 1):
    for site, head in part.chosen:
        print(f"round {number}: {site} head {head}, mark {part.scores[site, head]:.3f}")


def draw() -> Image.Image:
    """Generate from the same noise every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(prompt, num_inference_steps=args.steps or 20, guidance_scale=3.0, generator=generator, **call).images[0]


plain = draw()
with attnctl.control(pipe, result.control()):
    hunted = draw()
plain.save(args.out / "plain.png")
hunted.save(args.out / "hunted.png")
pair(plain, hunted, ("plain", "the heads found"), title=prompt).save(args.out / "pair.png")
print(f"wrote {args.out / 'plain.png'}, {args.out / 'hunted.png'}, pair.png, the head set and its heat map")
