"""What a picture cannot have been made with: fields of a record that its own file, its command or its pixels deny."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnctl.data.record import Record, RecordError, pixels_sha256, read, sidecar
from attnctl.data.specs import control_to_dict, parse_control
from attnctl.errors import AttnctlError

__all__ = ["doubts"]

_FLAGS = ("steps", "guidance", "negative", "width", "height", "model", "backend")
_NUMBERS = ("steps", "width", "height")


def doubts(path: Path, records: Sequence[Record]) -> list[str]:
    """Name fields that were changed after a picture was made: those that contradict what else its files say.

    Args:
        path: The PNG, or the JSON beside it.
        records: What was read from it.

    Returns:
        A sentence for each contradiction, the most telling ones first; none where all agrees.
    """
    other = sidecar(path) if path.suffix.lower() != ".json" else path.with_suffix(".png")
    texts = _beside(path, other, records)
    if len(records) == len(records[0].shows) == 1:
        texts += _pixels(path if other.suffix == ".json" else other, records[0])
    return texts + [text for record in records for text in _command(record)]


def _beside(path: Path, other: Path, records: Sequence[Record]) -> list[str]:
    """Compare a picture's record with the one in the file beside it."""
    try:
        theirs = read(other) if other.is_file() else tuple(records)
    except RecordError:
        return []
    if len(theirs) != len(records):
        return [f"{other.name} has {len(theirs)} record(s), and {path.name} {len(records)}"]
    texts: dict[str, str] = {}
    for mine, their in zip(records, theirs, strict=True):
        a, b = mine.to_dict(), their.to_dict()
        for name in a:
            if a[name] != b[name]:
                texts.setdefault(name, f"{name}={_short(a[name])} in {path.name} is {_short(b[name])} in {other.name}")
    return list(texts.values())


def _pixels(picture: Path, record: Record) -> list[str]:
    """Compare the hash of a picture that is there, and its size, with the record's."""
    from PIL import Image

    if picture.suffix.lower() != ".png" or not picture.is_file():
        return []
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            size, digest = image.size, pixels_sha256(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    if digest == record.sha256[record.shows[0]]:
        return []
    if "num_frames" not in record.options and size != (record.width, record.height):
        return [f"width={record.width} and height={record.height}: {picture.name} has {size[0]}x{size[1]} pixels"]
    return [f"sha256: the pixels of {picture.name} are others"]


def _command(record: Record) -> list[str]:
    """Compare a record with the options of the command line that it names."""
    try:
        words = shlex.split(record.command)
    except ValueError:
        return []
    if words[:2] != ["attnctl", "generate"] or "--from" in words or "--prompts" in words or "--compare" in words:
        return []
    given: dict[str, list[str]] = {}
    for flag, value in itertools.pairwise(words):
        if flag.startswith("--"):
            given.setdefault(flag[2:], []).append(value)
    texts = []
    for name in _FLAGS:
        for text in given.get(name, ())[-1:]:
            recorded = getattr(record, name)
            if not _same(name, text, recorded):
                texts.append(f"{name}={_short(recorded)}: its command says --{name} {text[:80]}")
    if given.get("prompt") and not set(record.prompts) <= set(given["prompt"]):
        texts.append(f"prompts={_short(record.prompts)}: its command says --prompt {given['prompt'][0][:80]!r}")
    first = int(given["seed"][-1]) if given.get("seed", ["x"])[-1].isdigit() else 0
    if min(record.seeds) < first:
        texts.append(f"seeds={_short(record.seeds)}: its command says --seed {first}")
    return texts + _controls(record, given.get("control", []))


def _controls(record: Record, texts: Sequence[str]) -> list[str]:
    try:
        controls = [control_to_dict(parse_control(text)) for text in texts]
    except AttnctlError:  # names that this version does not know, or files that are elsewhere
        return []
    controls = [control for control in controls if control["method"] != "Capture"]
    if json.loads(json.dumps(controls)) == json.loads(json.dumps(list(record.controls))):
        return []
    names = ", ".join(str(control.get("method")) for control in record.controls) or "none"
    return [f"controls ({names}): its command says {' '.join(texts)[:120] or 'none'}"]


def _same(name: str, text: str, recorded: Any) -> bool:
    try:
        if name == "guidance":
            return recorded is not None and float(text) == float(recorded)
        if name in _NUMBERS:
            # A size may have been brought to multiples of the model's cells.
            return abs(int(text) - int(recorded)) <= (64 if name != "steps" else 0)
    except ValueError:
        return True
    if name == "model":  # a path is cut down to its last part in both
        return text == recorded or "/" in text or recorded == Path(text).name
    return bool(text == recorded)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
