"""A picture whose upper part stays free, for a title.

python examples/textcengen_sd15.py --prompt "a lighthouse in a storm" --word lighthouse
python examples/textcengen_sd15.py --prompt "a lighthouse in a storm" --maps    # in attention, without gradients
python examples/textcengen_sd15.py --shapes     # offline, with the model that attnctl ships

VRAM: about 8 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, arguments, compare, model, prompt_of

from attnctl.processors import TextCenGen, TextCenGenMaps

word = {"action": "append", "help": "a word that shall leave the space; several times for several"}
maps = {"action": "store_true", "help": "move the maps of words in attention, as the paper does, and no latents"}
args = arguments(__doc__, prompt=PROMPT, word=word, maps=maps)
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5")
prompt = prompt_of(args, "a lighthouse in a storm", "a red circle on gray")
words = tuple(args.word or (["circle"] if args.shapes else ["lighthouse"]))
space = (0.0, 0.0, 1.0, 0.4)
# On the small model gradients have another length than on Stable Diffusion 1, for which the default step is.
step = {"grad_transform": "l2", "step_size": 1.0} if args.shapes else {}
moved = TextCenGen(concepts=words, space=space, stop=0.5, **step)
control = TextCenGenMaps(concepts=words, space=space) if args.maps else moved
compare(args, pipe, prompt, control, "textcengen", guidance_scale=3.0, num_inference_steps=25)
