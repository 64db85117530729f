"""`attnctl maps --segment`: what expressions name in a picture or a clip, as masks, boxes and points."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctl.app.commands.common import Result, UsageError, say, table
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free, publish

__all__ = ["find"]


def find(
    path: Path,
    expressions: Sequence[str],
    out: Path,
    load: Callable[[], Any],
    look: Mapping[str, Any],
    *,
    model: str,
    force: bool,
) -> Result:
    """Find expressions in the frames of a picture or clip, and write what was found into a folder below `out`.

    Args:
        path: The picture, animation, video or folder of pictures.
        expressions: What to look for.
        out: Where the folder goes.
        load: Loads the model.
        look: Options of `refer`.
        model: The model's name, for the result.
        force: Overwrite files that are there.
    """
    from PIL import Image

    from attnctl.data.clips import ClipError, open_clip
    from attnctl.data.segments import coco, mask_picture, segments_sheet
    from attnctl.errors import ConfigError
    from attnctl.pipelines import refer

    if len({" ".join(e.split()) for e in expressions}) < len(expressions):
        raise UsageError(f"--segment names an expression twice: {', '.join(expressions)}.")
    try:
        clip = open_clip(path)
        pictures = [Image.fromarray(frame) for frame in clip.read(range(clip.count))]
    except (ClipError, ConfigError) as error:
        raise UsageError(str(error)) from None
    folder = below(out, f"{slug(path.stem)}-segments")
    names = [f"mask-{i}-{slug(e)}" for i, e in enumerate(expressions, 1)]
    ends = [f"-{n + 1:04}.png" if clip.count > 1 else ".png" for n in range(clip.count)]
    masks = [folder / f"{name}{end}" for name in names for end in ends]
    check_free([folder / "segments.json", folder / "segments.png", *masks], force=force)
    loaded, started = load(), time.perf_counter()
    segments = refer(loaded.pipe, pictures, expressions, **look)
    frames = [path.name] if clip.count == 1 else [f"{path.name}#{n + 1}" for n in range(clip.count)]
    facts = {"model": loaded.name, "revision": loaded.revision, "strength": look["strength"], "seed": look["seed"]}
    data = {"info": {"description": "found by attnctl maps --segment", **facts}, **coco(segments, frames)}
    content = {
        folder / "segments.json": (json.dumps(data, indent=1) + "\n").encode(),
        folder / "segments.png": _png(segments_sheet(pictures, segments)),
    }
    drawn = [mask for one in segments for mask in one.masks]
    content |= {place: _png(mask_picture(mask)) for place, mask in zip(masks, drawn, strict=True)}
    publish(content, force=force)
    say(f"{clip.count} picture(s) in {time.perf_counter() - started:.1f} s")
    rows = [(a["image_id"], _name(data, a), *a["bbox"], a["area"], _points(a, 1)) for a in data["annotations"]]
    head = ("picture", "expression", "left", "top", "width", "height", "pixels", "points inside")
    files = sorted(place.name for place in content)
    result = {"model": model, "folder": str(folder), "files": files, "segments": data["annotations"]}
    return Result(result, f"{table(head, rows)}\n\n{folder}: {', '.join(files[:8])}{' ...' if len(files) > 8 else ''}")


def _name(data: Mapping[str, Any], annotation: Mapping[str, Any]) -> str:
    return str(data["categories"][annotation["category_id"] - 1]["name"])


def _points(annotation: Mapping[str, Any], label: int) -> str:
    pairs = zip(annotation["point_coords"], annotation["point_labels"], strict=True)
    return " ".join(f"{x},{y}" for (x, y), point_label in pairs if point_label == label)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
