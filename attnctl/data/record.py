"""Records: everything needed to make a picture again, kept inside it and beside it.

One `Record` describes one pipeline call. A file that shows images of it carries the record twice: in the
PNG's text chunk "attnctl" and as `<name>.json` beside it. A sheet of several calls carries a list of records.
A record says which of the call's images the file shows: only a whole batch is made again bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from attnctl.data.png import png_with_text, text_of_png
from attnctl.errors import AttnctlError, nearest
from attnctl.plans.reading import Expected, parse_json, read_bytes
from attnctl.plans.writing import publish

__all__ = [
    "SCHEMA",
    "Record",
    "RecordError",
    "pixels_sha256",
    "png_bytes",
    "read",
    "save_image",
    "sidecar",
]

SCHEMA = 1
CHUNK = "attnctl"
_DEEPEST = 50  # levels of lists and objects: no record has ten
_MOST_PICTURES = 1_024  # of one call of a pipeline
_MOST_LISTED = 10_000  # entries of a list or an object: sites, settings of a scheduler, options
_LONGEST = 100_000  # characters of a text: prompts, the command
_MOST_CONTROLS = 100
_LARGEST = 1 << 63  # of a whole number: seeds are the largest there are


class RecordError(AttnctlError):
    """A record is missing, damaged, foreign, or of another schema."""


_FILE = Expected("a record of attnctl", RecordError, 16 << 20)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_json(value: Any, depth: int = 0) -> bool:
    if depth > _DEEPEST or (isinstance(value, (Mapping, list)) and len(value) > _MOST_LISTED):
        return False
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool) or _is_text(value) or _is_number(value)


def _many(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) <= _MOST_LISTED and all(map(inner, value))


def _maybe(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or inner(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_json(value)


_EXPECTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "pipeline", "backend", "dtype", "device", "generator_device"), _is_text),
    **dict.fromkeys(("hardware", "command"), _is_text),
    **dict.fromkeys(("steps", "width", "height", "threads"), _is_whole),
    **dict.fromkeys(("negative", "revision"), _maybe(_is_text)),
    "prompts": _many(_is_text),
    "seeds": _many(_is_whole),
    "sha256": _many(lambda v: _is_text(v) and re.fullmatch("[0-9a-f]{64}", v) is not None),
    "shows": _many(_is_whole),
    "sites": _many(_many(_is_text)),
    "guidance": _maybe(_is_number),
    "controls": _many(_is_object),
    "options": _is_object,
    "scheduler": _is_object,
    "versions": lambda v: _is_object(v) and all(map(_is_text, v.values())),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Describe one pipeline call, and which of its images a file shows.

    Args:
        prompts: One prompt per image.
        seeds: One seed per image; each image has its own generator.
        sha256: One hash per image, over its size and its RGB bytes.
        shows: The indices of the images that the file shows.
        negative: The negative prompt, the same for all images.
        guidance: The guidance scale; None where the pipeline has none.
        options: Other arguments of the call, such as `true_cfg_scale`.
        controls: The controls in order, as `attnctl.data.specs.control_to_dict` writes them.
        sites: The names of the sites that each control reached.
        backend: The kernel backend that was asked for.
        model: A hub id, "shapes:text2image", or the last part of a local folder's path.
        revision: The hub commit, or the fingerprint of a local folder.
        scheduler: The scheduler's configuration, with its class under "_class_name".
        threads: The number of threads that torch used; sums on a CPU can depend on it.
        hardware: The instruction set of the CPU, or the name of the accelerator.

    Raises:
        RecordError: the fields do not fit together.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sha256: tuple[str, ...]
    shows: tuple[int, ...]
    steps: int
    width: int
    height: int
    model: str
    pipeline: str
    scheduler: dict[str, Any]
    negative: str | None = None
    guidance: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    controls: tuple[dict[str, Any], ...] = ()
    sites: tuple[tuple[str, ...], ...] = ()
    backend: str = "auto"
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    generator_device: str = "cpu"
    threads: int = 1
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        for name, expected in _EXPECTED.items():
            value = getattr(self, name)
            if not expected(value):
                raise RecordError(f"The record's {name!r} is damaged: {value!r:.120}.")
        n = len(self.prompts)
        if n > _MOST_PICTURES or len(self.controls) > _MOST_CONTROLS:
            raise RecordError(
                f"The record is of {n} pictures under {len(self.controls)} controls; expected at most {_MOST_PICTURES} "
                f"of one call, and {_MOST_CONTROLS} controls."
            )
        if not n or len(self.seeds) != n or len(self.sha256) != n:
            counts = f"{n} prompts, {len(self.seeds)} seeds and {len(self.sha256)} hashes"
            raise RecordError(f"A record has one prompt, one seed and one hash per image, got {counts}.")
        if not self.shows or not all(0 <= i < n for i in self.shows):
            raise RecordError(f"The record shows images {self.shows} of {n}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, schema number first."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA, **{k: _plain(v) for k, v in values.items()}}

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """Read what `to_dict` wrote.

        Raises:
            RecordError: another schema, an unknown or missing key, or a value of the wrong type.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise RecordError("This is not a record of attnctl: there is no 'schema' in it.")
        if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
            raise RecordError(f"The record has schema {data['schema']!r:.40}; this version reads schema {SCHEMA}.")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields and key != "schema":
                raise RecordError(f"The record has an unknown key {key!r:.60}." + nearest(str(key), fields))
        for name, f in fields.items():
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if needed and name not in data:
                raise RecordError(f"The record has no {name!r}.")
        return cls(**{k: _frozen(k, v) for k, v in data.items() if k != "schema"})


def pixels_sha256(image: Image.Image) -> str:
    """Hash an image's size and RGB bytes."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def sidecar(path: str | Path) -> Path:
    """Name the JSON file beside an image."""
    return Path(path).with_suffix(".json")


def save_image(
    image: Image.Image, path: str | Path, records: Record | Sequence[Record], *, force: bool = False
) -> None:
    """Write a PNG that carries its records, and the JSON beside it; both or neither.

    Raises:
        FileExists: one of the two files is there and `force` is not set.
        RecordError: `path` is not a PNG name, or there is no record.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RecordError(f"Records are kept in PNG files, got {path.name!r}.")
    many = (records,) if isinstance(records, Record) else tuple(records)
    content = png_bytes(image, many)
    publish({path: content, sidecar(path): (_dumps(many, indent=2) + "\n").encode()}, force=force)


def png_bytes(image: Image.Image, records: Record | Sequence[Record]) -> bytes:
    """Encode a PNG that carries its records.

    Raises:
        RecordError: there is no record.
    """
    many = (records,) if isinstance(records, Record) else tuple(records)
    if not many:
        raise RecordError("A PNG of attnctl needs at least one record.")
    return png_with_text(image, CHUNK, _dumps(many, indent=None), _FILE)


def read(path: str | Path) -> tuple[Record, ...]:
    """Read the records of an image, from the PNG or from its JSON.

    Raises:
        RecordError: the file is missing, damaged, or was not made by attnctl.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise RecordError(f"There is no file {path}.")
    if path.suffix.lower() == ".json":
        data = parse_json(read_bytes(path, _FILE), path.name, _FILE)
    else:
        data = parse_json(text_of_png(path, CHUNK, _FILE), path.name, _FILE)
    try:
        if isinstance(data, Mapping) and "records" in data:
            if set(data) != {"schema", "records"} or data["schema"] != SCHEMA:
                raise RecordError(f"a sheet has schema {SCHEMA} and records, got {sorted(map(str, data))!r:.200}.")
            if not isinstance(data["records"], list) or not data["records"]:
                raise RecordError("a sheet has a list of records.")
            return tuple(Record.from_dict(item) for item in data["records"])
        return (Record.from_dict(data),)
    except RecordError as error:
        raise RecordError(f"{path.name}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _frozen(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(tuple(v) if isinstance(v, list) and name == "sites" else v for v in value)


def _dumps(records: Sequence[Record], indent: int | None) -> str:
    many = [record.to_dict() for record in records]
    data = many[0] if len(many) == 1 else {"schema": SCHEMA, "records": many}
    return json.dumps(data, indent=indent, allow_nan=False)
