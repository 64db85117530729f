"""Where an image attends to the words of its prompt: exact maps, recorded while it is made, and overlays of them.

python examples/word_maps.py --prompt "a fox and a red sled in the snow" --word fox --word "red sled"
python examples/word_maps.py --shapes        # offline, with the model that attnctl ships

VRAM: about 4 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

from _run import PROMPT, arguments, draw, model, prompt_of

import attnctl
from attnctl.data.map_pictures import overlay_word, words_sheet
from attnctl.processors import Capture

word = {"action": "append", "help": "a word or phrase of the prompt; several times for several"}
args = arguments(__doc__, prompt=PROMPT, word=word)
pipe = model(args, "text2image", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", cpu=True)
prompt = prompt_of(args, "a fox and a red sled in the snow")
words = args.word or (["circle", "square"] if args.shapes else ["fox", "red sled", "snow"])
# The second half of the run: by then every object has its place.
with attnctl.control(pipe, Capture(words=words, start=0.5)) as handle:
    image = draw(args, pipe, prompt, guidance_scale=3.0, num_inference_steps=25)
    maps = handle.maps

words_sheet(image, maps, title=prompt).save(args.out / "words.png")
overlay_word(image, maps, words[0]).save(args.out / "overlay.png")
maps.save(args.out / "word_maps.safetensors", force=True)
for word in words:
    area = maps.mask(word)[0].float().mean()
    print(f"{word}: highest share of attention {maps[word].max():.3f}, mask covers {area:.0%} of the image")
print(f"wrote {args.out / 'words.png'}, {args.out / 'overlay.png'} and {args.out / 'word_maps.safetensors'}")
