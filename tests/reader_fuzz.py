"""Feed every reader of files with tampered files, made from a seed: only the project's own errors may come out.

`benchmarks/fuzz_readers.py` runs the same for minutes; `tests/test_fuzz_readers.py` for seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from test_mapfile import made
from test_record import record

from attnctl import HeadSet
from attnctl.data.clips import FileClip, mp4_bytes
from attnctl.data.maps import WordMaps
from attnctl.data.record import Record, read, save_image
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import AttnctlError
from attnctl.pipelines.calibration.measure import read_store
from attnctl.pipelines.hunting.log import HuntLog
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.plans.orders import LAYOUTS
from attnctl.processors import PAG, AStar, SoftPAG

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1.5, -0.0, 1e308, "", "x", "\ud800", "a/b", "../x",
    [], [[]], {}, {"type": "range", "start": 0, "stop": 10**15, "step": 1}, {"type": "HeadSet"}, [[1, 2]] * 3, "NaN",
)  # fmt: skip
RAW = (b"NaN", b"1e999", b"9" * 400, b"[" * 300, b"\xff\xfe", b"\0", b"-", b'"', b"}", b"null", b"\n")


@dataclass(frozen=True)
class Reader:
    """One reader: files that it reads, by name, and what a reader does with their folder."""

    files: dict[str, bytes]
    act: Callable[[Path], object]


@dataclass
class Found:
    """What came out: how many files were read and refused, and what is no error of the project's."""

    read: int = 0
    refused: int = 0
    foreign: list[str] = field(default_factory=list)


def _written(write: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {p.name: p.read_bytes() for p in sorted(Path(name).iterdir()) if p.name != "README.md"}


def _records(folder: Path) -> None:
    for name in ("x.png", "x.json"):
        for one in read(folder / name):
            assert Record.from_dict(json.loads(json.dumps(one.to_dict()))) == one
            for control in one.controls:
                _control(control)


def _control(data: Any) -> None:
    """Make a control of what a record says; its own refusal is right."""
    with contextlib.suppress(AttnctlError):
        control_to_dict(control_from_dict(data))


def _maps(folder: Path) -> None:
    maps = WordMaps.load(folder / "m.safetensors")
    maps.stacked()
    repr(maps)


def _log(folder: Path) -> None:
    log = HuntLog(folder, {"plan": {"k": 1}, "model": "tiny"})
    for key in log.records:
        log.marks(key, 2)
    log.close()


def _store(folder: Path) -> None:
    for sums in read_store(folder / "orders-0.safetensors").values():
        sums.average()
        sums.by_group()


def _clip(folder: Path) -> None:
    (path,) = folder.iterdir()
    clip = FileClip(path)
    clip.read(range(min(clip.count, 3)))


def _log_files(folder: Path) -> None:
    log = HuntLog(folder, {"plan": {"k": 1}, "model": "tiny"})
    for key in ("k1", "k2"):
        log.add(key, {"rows": [[["a.b", 1]], 0], "marks": [0.5, -1.25]})
    log.close()


def readers() -> dict[str, Reader]:
    """Write one of each kind of file."""
    keep = torch.ones(2, 2, 3, 3, dtype=torch.bool).tril()
    plan = BlockPlan.from_mask(keep, 8, ["FHW", "HWF"], 7, grid=(1, 4, 6), about={"density": 0.5})
    heads = HeadSet.from_pairs([("mid.attn1", 1), (3, 0)], model="a/b", layers=8, u=0.5, scale=2.0)
    controls = (PAG(sites=range(1, 9, 2)), SoftPAG(heads=heads), AStar(concepts=("cat", "dog")))
    one = record(controls=tuple(map(control_to_dict, controls)))
    facts = {"a.attn": {"i": 0, "calls": {"0": 2}, "call": {"grid": [1, 4, 6], "n_text": 7, "text_first": True}}}
    store = save(
        {"0/mass/0": torch.rand(2, len(LAYOUTS), 3, 3, generator=torch.Generator().manual_seed(0))},
        metadata={"sites": json.dumps(facts)},
    )
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24), dtype=np.uint8)
    frames = [Image.fromarray(one).convert("RGB") for one in noise]
    found = {
        "record": Reader(_written(lambda p: save_image(Image.new("RGB", (8, 6)), p / "x.png", one)), _records),
        "maps": Reader(_written(lambda p: made().save(p / "m.safetensors")), _maps),
        "plan": Reader(
            _written(lambda p: ModelPlan(plans={"a": plan, "b": plan}, model="a/b").save_pretrained(p)),
            lambda p: ModelPlan.from_pretrained(p).density,
        ),
        "head set": Reader(_written(heads.save_pretrained), lambda p: HeadSet.from_pretrained(p).card()),
        "hunt log": Reader(_written(_log_files), _log),
        "calibration store": Reader({"orders-0.safetensors": store}, _store),
        "mp4": Reader({"a.mp4": mp4_bytes([np.asarray(f) for f in frames], 8)}, _clip),
    }
    for name in ("PNG", "GIF", "WEBP", "JPEG", "TIFF", "BMP"):
        buffer, moving = io.BytesIO(), name in ("PNG", "GIF", "WEBP", "TIFF")
        frames[0].save(buffer, name, **({"save_all": True, "append_images": frames[1:]} if moving else {}))
        found[name.lower()] = Reader({f"a.{name.lower()}": buffer.getvalue()}, _clip)
    return found


def tampered(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four changes: cut, flipped bits, other bytes, parts moved, other values in its JSON."""
    for _ in range(rng.randint(1, 4)):
        way = rng.randrange(7)
        at, size = rng.randrange(len(content) + 1), len(content)
        if way == 0:
            content = content[:at]
        elif way == 1 and content:
            data = bytearray(content)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
            content = bytes(data)
        elif way == 2:
            # Headers lie at the beginning, and sizes in them.
            at = rng.randrange(min(size, 64) + 1)
            content = content[:at] + rng.choice((b"\xff" * 4, b"\0" * 4, rng.randbytes(4))) + content[at + 4 :]
        elif way == 3:
            content = content[:at] + rng.choice(RAW) + content[at:]
        elif way == 4:
            other = rng.randrange(size + 1)
            content = content[:at] + content[other : other + rng.randint(0, 200)] + content[at:]
        else:
            content = _other_value(content, rng)
    return content


def _other_value(content: bytes, rng: random.Random) -> bytes:
    """Change a value of a JSON file, of each line of one, or of the header of a safetensors file."""
    if content[8:9] == b"{":
        size = int.from_bytes(content[:8], "little")
        header = _other_value(content[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    lines = content.split(b"\n") if content.startswith(b'{"key"') else [content]
    at = rng.randrange(len(lines))
    try:
        data = json.loads(lines[at])
    except (ValueError, RecursionError):
        return content
    places = list(_places(data))
    if not places:
        return content
    holder, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif rng.random() < 0.3 and isinstance(holder[key], str) and holder[key].startswith("{"):
        holder[key] = _other_value(holder[key].encode(), rng).decode("utf-8", "replace")
    else:
        holder[key] = rng.choice(ODD)
    lines[at] = json.dumps(data).encode()
    return b"\n".join(lines)


def _places(data: Any) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


def attempt(reader: Reader, seed: str, found: Found, folder: Path) -> None:
    """Tamper with one file of a reader, let it read, and note what comes out."""
    rng = random.Random(seed)
    chosen = rng.choice(list(reader.files))
    for old in folder.iterdir():
        old.unlink()
    for name, content in reader.files.items():
        (folder / name).write_bytes(tampered(content, rng) if name == chosen else content)
    try:
        reader.act(folder)
        found.read += 1
    except AttnctlError as error:
        found.refused += 1
        if not 10 < len(str(error)) < 5000:
            found.foreign.append(f"{seed}: a message of {len(str(error))} characters")
    except Exception as error:  # what this looks for
        found.foreign.append(f"{seed}: {type(error).__name__}: {error!s:.160}")
