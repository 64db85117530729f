"""`attnctl maps --image`: the maps of an image that exists, from one forward on its noised form."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnctl.app.commands.common import UsageError, say
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free, publish

if TYPE_CHECKING:
    from PIL import Image

    from attnctl.app.commands.maps import Maps

__all__ = ["check_image", "map_image"]

_FILES = ("words.png", "heads.png", "regions.json", "maps.safetensors", "maps.json")


def check_image(args: Maps) -> None:
    """Refuse options that say how an image is made.

    Raises:
        UsageError: One was given, the noise level is out of range, or the file is no picture.
    """
    made = {
        "--num": args.num != 1,
        "--steps": args.steps is not None,
        "--guidance": args.guidance is not None,
        "--negative": args.negative is not None or args.negative_words,
        "--gif": args.gif,
        "--control": bool(args.control),
    }
    if given := [name for name, was in made.items() if was]:
        raise UsageError(f"--image looks at a picture that is there, once: leave out {', '.join(given)}.")
    if not 0.02 <= args.strength <= 1:
        raise UsageError(f"--strength is a noise level from 0.02 to 1, got {args.strength:g}.")
    opened(args)


def opened(args: Maps) -> Image.Image:
    """Read the picture, at --width and --height where they were given."""
    from PIL import Image, UnidentifiedImageError

    assert args.image is not None
    try:
        with Image.open(args.image) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"--image {args.image} cannot be read: {error!s:.120}.") from None
    return image.resize((args.width or image.width, args.height or image.height), Image.Resampling.LANCZOS)


def map_image(args: Maps, captures: Sequence[Any]) -> dict[str, Any]:
    """Look at the picture with each capture; write the maps of the first, and heads from the second.

    Returns:
        As for an image that is made: folder, files, and what the maps are.
    """
    assert args.image is not None
    folder = below(args.out, f"{slug(args.image.stem)}-maps")
    left_out = {"heads.png": args.heads, "regions.json": args.regions}
    check_free([folder / n for n in _FILES if left_out.get(n, True)], force=args.force)

    from attnctl.data.map_files import describe, save
    from attnctl.data.map_pictures import heads_sheet, words_sheet
    from attnctl.data.map_regions import regions
    from attnctl.pipelines import image_maps
    from attnctl.pipelines.models import device_and_dtype, load

    image = opened(args)
    device, dtype = device_and_dtype(args.device, args.dtype)
    say(f"Loading {args.model} ({device}, {dtype})")
    loaded = load(args.model, revision=args.revision, device=device, dtype=dtype)
    began = time.perf_counter()
    found = [
        image_maps(loaded.pipe, image, args.prompt, capture, strength=args.strength, seed=args.seed)
        for capture in captures
    ]
    about = {**found[0].about, "model": loaded.name, "revision": loaded.revision, "image": args.image.name}
    maps, title = replace(found[0], about=about), args.prompt or args.image.name
    content = {folder / "words.png": _png(words_sheet(image, maps, title=title))}
    if args.heads:
        content[folder / "heads.png"] = _png(heads_sheet(image, found[1], title=title))
    if args.regions:
        where = regions(maps, size=(image.height, image.width))
        text = json.dumps({"height": image.height, "width": image.width, "regions": where}, indent=1) + "\n"
        content[folder / "regions.json"] = text.encode()
    publish(content, force=args.force)
    save(maps, folder / "maps.safetensors", force=args.force)
    say(f"1 picture in {time.perf_counter() - began:.1f} s")
    what = describe(maps)
    kept = {key: what[key] for key in ("grid", "normalisation", "reduce")}
    files = [*(path.name for path in content), "maps.safetensors"]
    layers = [layer["name"] for layer in what["layers"]]
    return {"folder": str(folder), "seed": args.seed, "files": files, **kept, "layers": layers, "maps": maps}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
