"""A negative prompt on distilled models that run without classifier-free guidance (NAG at CFG 1), the same noise.

    python examples/nag_few_steps.py --model flux --prompt "a portrait of an old fisherman" --negative "glasses, hat"
    python examples/nag_few_steps.py --model wan
    python examples/nag_few_steps.py --shapes        # offline, with the model that attnctl ships

flux     FLUX.1 schnell, 4 steps                              VRAM: about 36 GB at 1024 px in bfloat16
zimage   Z-Image Turbo, 9 steps                               VRAM: about 22 GB
qwen     Qwen-Image with the Lightning LoRA, 8 steps          VRAM: about 60 GB
wan      Wan 2.1 14B with the 4-step LoRA of lightx2v, GIF    VRAM: about 45 GB at 480 x 832, 49 frames

Estimates, not measured; those four have not been run here. The control encodes the negative prompt through the pipeline
itself, once per run.
"""

from __future__ import annotations

from _run import PROMPT, arguments, compare, model, prompt_of, save_gif

import attnctl
from attnctl.processors import NAG

# Settings: the authors' for FLUX schnell and for Wan in 4 steps (their nag_scale is scale + 1); none is published for
# Z-Image and Qwen-Image, whose attention is joint as FLUX's.
JOINT, VIDEO = {"scale": 4.0, "tau": 2.5, "alpha": 0.25}, {"scale": 10.0, "tau": 3.5, "alpha": 0.5}
QWEN_LORA = "lightx2v/Qwen-Image-Lightning", "Qwen-Image-Lightning-8steps-V1.0.safetensors"
WAN_LORA = "lightx2v/Wan2.1-Distill-Loras", "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
MODELS = {
    "flux": ("FluxPipeline", "black-forest-labs/FLUX.1-schnell", None, JOINT, 4, {"guidance_scale": 0.0}),
    "zimage": ("ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", None, JOINT, 9, {"guidance_scale": 0.0}),
    "qwen": ("QwenImagePipeline", "Qwen/Qwen-Image", QWEN_LORA, JOINT, 8, {"true_cfg_scale": 1.0}),
    "wan": ("WanPipeline", "Wan-AI/Wan2.1-T2V-14B-Diffusers", WAN_LORA, VIDEO, 4, {"guidance_scale": 1.0}),
}

negative = {"help": "what not to draw"}
which = {"choices": tuple(MODELS), "default": "flux", "help": "the model"}
args = arguments(__doc__, model=which, prompt=PROMPT, negative=negative)
pipeline, repository, lora, setting, steps, call = MODELS[args.model]
pipe = model(args, "mmdit", pipeline, repository, dtype="bfloat16")
if args.shapes:
    setting, steps, call = {"scale": 4.0, "tau": 2.5, "alpha": 0.5}, 10, {"guidance_scale": 1.0}
elif lora is not None:
    pipe.load_lora_weights(lora[0], weight_name=lora[1])
prompt = prompt_of(args, "a portrait of an old fisherman")
control = NAG(**setting, negative_prompt=args.negative or ("a blue square on gray" if args.shapes else "glasses, hat"))
if args.model == "wan" and not args.shapes:
    call |= {"num_frames": 49, "height": 480, "width": 832, "output_type": "pil", "num_inference_steps": steps}
    with attnctl.control(pipe, control) as handle:
        save_gif(pipe(prompt, **call).frames[0], args.out / "nag.gif", 60)
        print(handle.report())
else:
    compare(args, pipe, prompt, control, "nag", **call, num_inference_steps=steps)
