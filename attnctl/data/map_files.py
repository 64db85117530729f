"""Word maps as files: tensors in safetensors, and what they are in JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from attnctl.core.sites import Site
from attnctl.data.maps import Of, Reduce, WordMaps
from attnctl.data.record import RecordError
from attnctl.errors import ConfigError
from attnctl.plans.writing import publish

__all__ = ["SCHEMA", "describe", "load", "save"]

SCHEMA = 1
_KIND = "word_maps"
_LARGEST = 16 << 20  # bytes of the JSON


def describe(maps: WordMaps) -> dict[str, Any]:
    """Say in plain JSON values what maps are: words, prompts, tokens, layers, steps, grid, normalisation."""
    return {
        "schema": SCHEMA,
        "kind": _KIND,
        "words": list(maps.words),
        "prompts": list(maps.prompts),
        "tokens": [[list(places) for places in row] for row in maps.tokens],
        "layers": [
            {
                "name": s.name,
                "kind": s.kind,
                "heads": s.heads,
                "head_dim": s.head_dim,
                "depth": s.depth,
                "grid": None if s.grid is None else list(s.grid),
            }
            for s in maps.sites
        ],
        "axes": ["images", "words", "steps", "heads", "frames", "rows", "columns"],
        "steps": list(maps.steps),
        "heads": None if maps.heads is None else list(maps.heads),
        "grid": list(maps.grid),
        "rows": maps.rows,
        "reduce": maps.reduce,
        "keep": list(maps.keep),
        "of": maps.of,
        "normalisation": "share of the concepts" if maps.of == "concepts" else "probability",
        "about": dict(maps.about),
    }


def save(maps: WordMaps, path: str | Path, *, force: bool = False) -> None:
    """Write `<name>.safetensors` and `<name>.json`, both or neither.

    Raises:
        ConfigError: The name does not end in .safetensors.
        FileExists: One of the two files is there and `force` is not set.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"Maps are kept in .safetensors files, got {path.name!r}.")
    text = json.dumps(describe(maps), indent=1, allow_nan=False) + "\n"
    tensors = {name: layer.detach().cpu().contiguous() for name, layer in maps.layers.items()}
    content = to_bytes(tensors, metadata={"format": "pt", "attnctl": f"{_KIND} {SCHEMA}"})
    publish({path: content, path.with_suffix(".json"): text.encode()}, force=force)


def load(path: str | Path) -> WordMaps:
    """Read maps that `save` wrote.

    Raises:
        RecordError: A file is missing or damaged, of another schema, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    about = _json(path.with_suffix(".json"))
    if not path.is_file() or path.suffix != ".safetensors":
        raise RecordError(f"There are no maps {path.name}: expected a .safetensors file that attnctl wrote.")
    try:
        layers = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path.name} is damaged: {error}.") from None
    try:
        maps = _maps(about, layers)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RecordError(f"The JSON of {path.name} is damaged: {error!r:.120}.") from None
    shape = (len(maps.prompts), len(maps.words))
    for site in maps.sites:
        layer = layers[site.name]
        if layer.ndim != 7 or tuple(layer.shape[:2]) != shape or site.grid != tuple(layer.shape[4:]):
            raise RecordError(
                f"{path.name} and its JSON do not belong together: {site.name} has the shape {tuple(layer.shape)}, "
                f"expected {shape[0]} images, {shape[1]} words and the grid {site.grid}."
            )
        if "steps" in maps.keep and layer.shape[2] != len(maps.steps):
            raise RecordError(f"{path.name}: {site.name} has {layer.shape[2]} steps; the JSON lists {len(maps.steps)}.")
    return maps


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise RecordError(f"There is no {path.name} beside the maps: it says what they are.")
    if path.stat().st_size > _LARGEST:
        raise RecordError(f"{path.name} is larger than {_LARGEST >> 20} MiB, which no description of maps is.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise RecordError(f"{path.name} is not readable JSON.") from None
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise RecordError(f"{path.name} does not describe word maps.")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise RecordError(f"{path.name} has schema {data.get('schema')!r:.40}; this version reads schema {SCHEMA}.")
    return data


def _maps(data: Mapping[str, Any], layers: dict[str, torch.Tensor]) -> WordMaps:
    sites = []
    for item in data["layers"]:
        frames, h, w = item["grid"]
        place = (str(item["name"]), str(item["kind"]), int(item["heads"]), int(item["head_dim"]), int(item["depth"]))
        sites.append(Site(*place, grid=(int(frames), int(h), int(w))))
    if not sites or {s.name for s in sites} != layers.keys():
        raise ValueError("its layers are not those of the tensors")
    if data["reduce"] not in get_args(Reduce):
        raise ValueError(f"reduce is {data['reduce']!r}")
    if data.get("of", "words") not in get_args(Of):
        raise ValueError(f"its maps are of {data['of']!r}")
    tokens = tuple(tuple(tuple(int(p) for p in places) for places in row) for row in data["tokens"])
    if len(tokens) != len(data["prompts"]) or any(len(row) != len(data["words"]) for row in tokens):
        raise ValueError("its tokens are not one list a word for each prompt")
    return WordMaps(
        words=tuple(map(str, data["words"])),
        layers={s.name: layers[s.name] for s in sites},
        sites=tuple(sites),
        steps=tuple(map(int, data["steps"])),
        prompts=tuple(map(str, data["prompts"])),
        tokens=tokens,
        heads=None if data["heads"] is None else tuple(map(int, data["heads"])),
        rows=str(data["rows"]),
        reduce=data["reduce"],
        keep=tuple(map(str, data["keep"])),
        of=data.get("of", "words"),
        about=dict(data["about"]),
    )
