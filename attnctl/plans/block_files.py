"""Block plans as files: masks of bits in safetensors, and what they are in JSON beside them.

A file is never trusted. The JSON is small and checked value by value; sizes are computed from it and held against the
tensor's before anything is unpacked, so a hostile file can neither claim memory nor index out of range.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.errors import PlanError
from attnctl.plans import hub
from attnctl.plans.reading import Expected, check_unsealed, open_tensors, read_json
from attnctl.plans.writing import publish

__all__ = ["JSON", "read_masks", "write_masks"]

SCHEMA = 1
JSON, _MASKS = "attnctl_blocks.json", "attnctl_blocks.safetensors"
_EXPECTED = Expected("a block plan", PlanError, 16 << 20)
_MAX_BITS = 1 << 33
"""Blocks in one file, a byte each once they are read; 42 layers of CogVideoX-5B in ten parts of the run have 1.6e9."""
_FACTS = {"block_q": int, "block_k": int, "n_text": int, "text_first": bool, "order": list, "groups": int, "heads": int}


def write_masks(
    folder: str | os.PathLike[str],
    sites: Sequence[tuple[Tensor, Mapping[str, Any]]],
    model: str | None,
    about: Mapping[str, Any],
    *,
    force: bool,
) -> Path:
    """Write masks and their facts into a folder, both files or neither, and return the folder.

    Args:
        folder: Made where it is missing.
        sites: The mask of every site, bool [groups, heads, query blocks, key blocks], and its other facts.
        model: Name of the model.
        about: Facts for people.
        force: Replace another plan.

    Raises:
        FileExists: Another plan is there, and `force` is not set.
        PlanError: A fact is nothing that JSON can hold.
        WriteError: The disk is full, or the folder cannot be written.
    """
    from safetensors.torch import save

    path = Path(folder)
    facts = []
    for keep, fields in sites:
        groups, heads, *blocks = keep.shape
        facts.append({"site": fields["site"], "groups": groups, "heads": heads, "blocks": blocks, **fields})
    data = {"kind": "blocks", "schema": SCHEMA, "model": model, "about": dict(about), "sites": facts}
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(f"The plan's facts cannot be kept in JSON ({error}): give numbers, text and lists.") from None
    masks = save({str(i): torch.from_numpy(np.packbits(keep.numpy())) for i, (keep, _) in enumerate(sites)})
    files = {path / _MASKS: masks, path / JSON: text.encode()}
    same = all(file.is_file() and file.read_bytes() == content for file, content in files.items())
    if not same:
        publish(files, force=force)
    return path


def read_masks(
    path_or_repo: str | os.PathLike[str], revision: str | None = None
) -> tuple[list[tuple[str, Tensor, dict[str, Any]]], str | None, dict[str, Any]]:
    """Read what `write_masks` wrote into a folder or a Hub repository.

    Returns:
        For every site its name, its mask, bool [groups, heads, query blocks, key blocks], and the other fields of a
        block plan; the name of the model; facts for people.

    Raises:
        PlanError: A file is missing, damaged, hostile or of another schema.
    """
    check_unsealed(_EXPECTED)
    folder = hub.local(path_or_repo, "a block plan")
    if not folder.is_dir():
        folder = hub.find(str(path_or_repo), (JSON, _MASKS), "a block plan", revision)
    data = read_json(folder / JSON, _EXPECTED, kind="blocks", schema=SCHEMA)
    sites, model, about = data.get("sites"), data.get("model"), data.get("about", {})
    if not isinstance(sites, list) or not isinstance(about, dict) or not isinstance(model, str | None):
        raise PlanError(f"{JSON}: expected a list of sites, a model's name or null, and facts.")
    shapes = [_shape(i, facts) for i, facts in enumerate(sites)]
    total = sum(map(math.prod, shapes))
    if total > _MAX_BITS:
        raise PlanError(f"{JSON}: {total} blocks are more than any plan has ({_MAX_BITS}). It is not read.")
    if len({facts["site"] for facts in sites}) != len(sites):
        raise PlanError(f"{JSON} names a site twice.")
    with open_tensors(folder / _MASKS, _EXPECTED) as masks:
        names = set(masks.keys())
        for i, (facts, shape) in enumerate(zip(sites, shapes, strict=True)):
            _check_mask(f"{JSON}: {facts['site'] or 'the plan'}", i, shape, masks, names)
        keeps = [_unpacked(masks.get_tensor(str(i)), shape) for i, shape in enumerate(shapes)]
    fields = ("block_q", "order", "n_text", "n_image", "text_first")
    rest = [{**{n: f.get(n) for n in fields}, "block": f["block_k"], **_optional(f)} for f in sites]
    return [(f["site"], keep, other) for f, keep, other in zip(sites, keeps, rest, strict=True)], model, about


def _shape(i: int, facts: Any) -> tuple[int, int, int, int]:
    """Check the facts of one site and return the shape of its mask."""
    if not isinstance(facts, dict) or not isinstance(facts.get("site"), str):
        raise PlanError(f"{JSON}: site {i} has no name.")
    where = f"{JSON}: {facts['site'] or 'the plan'}"
    for key, kind in _FACTS.items():
        value = facts.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise PlanError(f"{where}: {key}={value!r:.40} should be {kind.__name__}.")
    blocks, about = facts.get("blocks"), facts.get("about", {})
    whole = isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks)
    if not whole or not isinstance(about, dict) or facts["groups"] < 1 or facts["heads"] < 1:
        raise PlanError(f"{where}: groups, heads and blocks should be whole numbers above 0.")
    numbers = all(type(o) is int for o in facts["order"]) and isinstance(facts.get("grid"), list | None)
    if not numbers or type(facts.get("n_image")) not in (int, type(None)):
        raise PlanError(f"{where}: order, grid and n_image should be whole numbers.")
    return facts["groups"], facts["heads"], *facts["blocks"]


def _check_mask(where: str, i: int, shape: tuple[int, ...], masks: Any, names: set[str]) -> None:
    """Raise PlanError unless a file has the mask of a site, of as many bytes as its blocks need."""
    if str(i) not in names:
        raise PlanError(f"{where}: {_MASKS} has no mask for it.")
    part, size = masks.get_slice(str(i)), -(-math.prod(shape) // 8)
    if part.get_dtype() != "U8" or list(part.get_shape()) != [size]:
        raise PlanError(f"{where}: its mask is {part.get_dtype()} {part.get_shape()}; expected U8 [{size}].")


def _unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).view(bool).reshape(shape))


def _optional(facts: dict[str, Any]) -> dict[str, Any]:
    return {"grid": facts.get("grid"), "about": facts.get("about", {})}
