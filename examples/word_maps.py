"""Where an image attends to the words of its prompt: exact maps, recorded while it is made, and overlays of them.

python examples/word_maps.py --prompt "a fox and a red sled in the snow" --word fox --word "red sled"
python examples/word_maps.py --shapes        # offline, with the model that attnctl ships

VRAM: about 4 GB at 512 px in float16 (an estimate, not measured).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attnctl
from attnctl.data.map_pictures import overlay_word, words_sheet
from attnctl.processors import Capture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use the shipped model")
parser.add_argument("--prompt", help="what to draw")
parser.add_argument("--word", action="append", help="a word or phrase of the prompt; several times for several")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()

if args.shapes:
    pipe = attnctl.load_shapes("text2image")
    prompt = args.prompt or "a red circle and a blue square on gray"
    words = args.word or ["circle", "square"]
else:
    from diffusers import StableDiffusionPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=dtype).to(
        device
    )
    prompt = args.prompt or "a fox and a red sled in the snow"
    words = args.word or ["fox", "red sled", "snow"]

# The second half of the run: by then every object has its place.
with attnctl.control(pipe, Capture(words=words, start=0.5)) as handle:
    generator = torch.Generator("cpu").manual_seed(args.seed)
    image = pipe(prompt, guidance_scale=3.0, num_inference_steps=25, generator=generator).images[0]
    maps = handle.maps

args.out.mkdir(parents=True, exist_ok=True)
words_sheet(image, maps, title=prompt).save(args.out / "words.png")
overlay_word(image, maps, words[0]).save(args.out / "overlay.png")
maps.save(args.out / "word_maps.safetensors", force=True)
for word in words:
    area = maps.mask(word)[0].float().mean()
    print(f"{word}: highest share of attention {maps[word].max():.3f}, mask covers {area:.0%} of the image")
print(f"wrote {args.out / 'words.png'}, {args.out / 'overlay.png'} and {args.out / 'word_maps.safetensors'}")
