"""Word maps as files: tensors in safetensors, and what they are in JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from attnctl.core.sites import Site
from attnctl.data.record import RecordError
from attnctl.errors import ConfigError
from attnctl.plans.reading import Expected, open_tensors, read_json
from attnctl.plans.writing import publish

__all__ = ["SCHEMA", "Of", "Reduce", "describe", "read_fields", "save"]

SCHEMA = 1
Of = Literal["words", "points", "concepts"]
Reduce = Literal["mean", "sum", "max"]
_KIND = "word_maps"
_JSON = Expected("a description of word maps", RecordError)
_TENSORS = Expected("the tensors of word maps", RecordError)
_MOST = 1 << 20  # sites, words, heads, places: no count or size in a description reaches this
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(maps: Any) -> dict[str, Any]:
    """Describe `WordMaps` in plain JSON values: words, prompts, tokens, layers, steps, grid, normalisation."""
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


def save(maps: Any, path: str | Path, *, force: bool = False) -> None:
    """Write `WordMaps` as `<name>.safetensors` and `<name>.json`, both or neither.

    Raises:
        ConfigError: The name does not end in .safetensors, or `about` holds what JSON has not.
        FileExists: One of the two files is there and `force` is not set.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"Maps are kept in .safetensors files, got {path.name!r}.")
    try:
        text = json.dumps(describe(maps), indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The facts about these maps cannot be kept in JSON: {error}.") from None
    tensors = {name: layer.detach().cpu().contiguous() for name, layer in maps.layers.items()}
    content = to_bytes(tensors, metadata={"format": "pt", "attnctl": f"{_KIND} {SCHEMA}"})
    publish({path: content, path.with_suffix(".json"): text.encode()}, force=force)


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, as the fields of `WordMaps`.

    Raises:
        RecordError: A file is missing or damaged, of another schema, or the two do not belong together.
    """
    path = Path(path)
    about = read_json(path.with_suffix(".json"), _JSON, kind=_KIND, schema=SCHEMA)
    if path.suffix != ".safetensors" or not path.is_file():
        raise RecordError(f"There are no maps {path.name}: expected a .safetensors file that attnctl wrote.")
    try:
        fields = _fields(about)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecordError(f"The JSON of {path.name} is damaged: {error!r:.160}.") from None
    with open_tensors(path, _TENSORS) as tensors:
        if {s.name for s in fields["sites"]} != set(tensors.keys()):
            raise RecordError(f"The JSON of {path.name} is damaged: its layers are not those of the tensors.")
        layers = {s.name: tensors.get_tensor(s.name) for s in fields["sites"]}
    for site in fields["sites"]:
        _check_layer(path.name, site, layers[site.name], fields)
    return {**fields, "layers": layers}


def _check_layer(name: str, site: Site, layer: torch.Tensor, fields: Mapping[str, Any]) -> None:
    """Raise RecordError unless the tensor of a site has the shape that the description says."""
    shape = (len(fields["prompts"]), len(fields["words"]))
    if layer.dtype not in _DTYPES or layer.ndim != 7 or not layer.numel():
        raise RecordError(f"{name} is damaged: {site.name} is {layer.dtype} {list(layer.shape)}; expected 7 axes.")
    if tuple(layer.shape[:2]) != shape or site.grid != tuple(layer.shape[4:]):
        raise RecordError(
            f"{name} and its JSON do not belong together: {site.name} has the shape {tuple(layer.shape)}, "
            f"expected {shape[0]} images, {shape[1]} words and the grid {site.grid}."
        )
    heads = site.heads if fields["heads"] is None else len(fields["heads"])
    for axis, title, n in ((2, "steps", len(fields["steps"])), (3, "heads", heads)):
        expected = n if title in fields["keep"] else 1
        if layer.shape[axis] != expected:
            raise RecordError(f"{name}: {site.name} has {layer.shape[axis]} {title}; the JSON lists {expected}.")


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Check the description value by value.

    Raises:
        KeyError, TypeError, ValueError: Something is missing or is no such thing.
    """
    sites = tuple(_site(item) for item in _list(data["layers"], "layers"))
    if not sites or len({s.name for s in sites}) != len(sites):
        raise ValueError("its layers are not those of the tensors")
    words, prompts, keep = (_texts(data[name], name) for name in ("words", "prompts", "keep"))
    tokens = tuple(tuple(_wholes(p, "tokens") for p in _list(row, "tokens")) for row in _list(data["tokens"], "tokens"))
    if not words or not prompts or len(tokens) != len(prompts) or any(len(row) != len(words) for row in tokens):
        raise ValueError("its tokens are not one list a word for each prompt")
    for name, value, choices in (
        ("reduce", data["reduce"], get_args(Reduce)),
        ("of", data.get("of", "words"), get_args(Of)),
        ("rows", data["rows"], ("cond", "uncond")),
        *(("keep", value, ("steps", "heads")) for value in keep),
    ):
        if value not in choices:
            raise ValueError(f"{'its maps are of' if name == 'of' else f'{name} is'} {value!r:.40}")
    if not isinstance(data["about"], dict):
        raise TypeError("about is no object")
    return {
        "words": words,
        "sites": sites,
        "steps": _wholes(data["steps"], "steps"),
        "prompts": prompts,
        "tokens": tokens,
        "heads": None if data["heads"] is None else _wholes(data["heads"], "heads"),
        "rows": data["rows"],
        "reduce": data["reduce"],
        "keep": keep,
        "of": data.get("of", "words"),
        "about": data["about"],
    }


def _site(item: Any) -> Site:
    if not isinstance(item, dict):
        raise TypeError(f"a layer is {item!r:.40}")
    name, kind = _texts([item["name"], item["kind"]], "layer")
    heads, width, depth = _wholes([item["heads"], item["head_dim"], item["depth"]], "layer")
    frames, h, w = _wholes(item["grid"], "grid")
    return Site(name, kind, heads, width, depth, grid=(frames, h, w))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not all(isinstance(text, str) for text in _list(value, name)):
        raise TypeError(f"{name} is {value!r:.40}")
    return tuple(value)


def _wholes(value: Any, name: str) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < _MOST for n in _list(value, name)):
        raise TypeError(f"{name} is {value!r:.40}")
    return tuple(value)
