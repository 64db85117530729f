"""Attacks through files that are read and written: each is refused in one sentence, or leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_mapfile import made
from test_record import image, record

from attnctl import HeadSet
from attnctl.data.clips import FileClip
from attnctl.data.maps import WordMaps
from attnctl.data.record import RecordError, read, save_image
from attnctl.errors import AttnctlError, PlanError
from attnctl.pipelines.calibration.measure import Sums, _write, read_store
from attnctl.pipelines.hunting.log import HuntLog
from attnctl.plans import BlockPlan, ModelPlan, writing
from attnctl.plans.writing import FileExists, WriteError, publish

HEADS = HeadSet.from_pairs([(1, 2), (3, 4)], u=0.5, scale=2.0)


def plan(n: int = 3) -> BlockPlan:
    return BlockPlan.from_mask(torch.ones(2, n, n, dtype=torch.bool).tril(), 8)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Records of any length are pictures that every reader opens (20)


@pytest.mark.parametrize("side", [384, 512, 700])
def test_a_long_record_is_a_picture_for_everybody(side: int, tmp_path: Path) -> None:
    masks = [[[float((x * 7 + y) % 11) / 10 for x in range(side)] for y in range(side)] for _ in range(2)]
    one = record(controls=({"method": "AStar", "masks": masks},))
    save_image(image(), tmp_path / "x.png", one)
    with Image.open(tmp_path / "x.png") as opened:  # with Pillow's defaults
        opened.load()
        assert opened.size == image().size
    assert read(tmp_path / "x.png") == read(tmp_path / "x.json") == (one,)


def test_a_record_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="A picture holds a record of attnctl of 16777216 bytes at most"):
        save_image(image(), tmp_path / "x.png", record(scheduler={f"{i}": "x" * 100_000 for i in range(170)}))
    with pytest.raises(RecordError, match="'command' is damaged"):
        record(command="x" * (17 << 20))
    assert not list(tmp_path.iterdir())


# Sizes (53) and kinds of files (54)


def test_a_sparse_file_is_no_plan(tmp_path: Path) -> None:
    """A file of 4 KB on the disk that claims 135 MB, and a gigabyte once it is unpacked."""
    blocks = 32768
    header = {"0": {"dtype": "U8", "shape": [blocks * blocks // 8], "data_offsets": [0, blocks * blocks // 8]}}
    text = json.dumps(header).encode()
    with (tmp_path / "attnctl_blocks.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + blocks * blocks // 8)
    site = {
        "site": "a", "groups": 1, "heads": 1, "blocks": [blocks, blocks], "block_q": 1, "block_k": 1, "order": [0],
        "grid": None, "n_image": blocks, "n_text": 0, "text_first": True, "about": {},
    }  # fmt: skip
    data = {"kind": "blocks", "schema": 1, "model": None, "about": {}, "sites": [site]}
    (tmp_path / "attnctl_blocks.json").write_text(json.dumps(data))
    before = peak()
    with pytest.raises(PlanError, match=r"claims \d+ bytes and has a hole"):
        ModelPlan.from_pretrained(tmp_path)
    assert peak() < before + 64


def test_many_sites_together_are_bounded(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "attnctl_blocks.json").read_text())
    site = data["sites"][0] | {"blocks": [1 << 15, 1 << 15]}
    data["sites"] = [site | {"site": f"s{i}"} for i in range(5)]  # each alone would pass
    (tmp_path / "attnctl_blocks.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="more than any plan has"):
        ModelPlan.from_pretrained(tmp_path)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("attnctl_blocks.json", lambda p: ModelPlan.from_pretrained(p.parent)),
    "head set": ("attnctl_heads.json", lambda p: HeadSet.from_pretrained(p.parent)),
    "record": ("x.json", read),
    "picture": ("x.png", read),
    "maps": ("x.json", lambda p: WordMaps.load(p.with_suffix(".safetensors"))),
    "search log": ("hunt.json", lambda p: HuntLog(p.parent, {"plan": {}})),
    "marks": ("marks-000-000.jsonl", lambda p: HuntLog(p.parent, {"plan": {}})),
    "store": ("orders-0.safetensors", read_store),
    "clip": ("x.mp4", FileClip),
    "frame": ("frame_1.png", lambda p: FileClip(p.parent)),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_a_device_hangs_nobody(reader: str, tmp_path: Path) -> None:
    name, act = READERS[reader]
    path = tmp_path / name
    os.mkfifo(path)
    signal.alarm(20)  # a reader that waits for a writer ends the test, not the suite
    try:
        with pytest.raises(AttnctlError, match="is a pipe, and no file"):
            act(path)
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(AttnctlError, match="is a device, and no file"):
            act(path)
    finally:
        signal.alarm(0)


# Both or neither (55)


def killed(code: str, folder: Path) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from attnctl.plans import writing
folder = Path({str(folder)!r})
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
real_place, real_sweep = writing._Entry.place, writing._sweep
{code}
writing.publish({{folder / "a.png": b"new a", folder / "a.json": b"new b"}}, force=True)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL


PLACES = {
    "before any is placed": "writing._Entry.place = die",
    "after the first": """
def place(entry, force):
    if entry.path.suffix == ".json": die()
    real_place(entry, force)
writing._Entry.place = place""",
    "inside the second": """
def replace(a, b, real=os.replace):
    real(a, b)
    if str(b).endswith("a.json"): die()
os.replace = replace
def link(a, b, real=os.link, **kw):
    real(a, b, **kw)
    if str(b).endswith("a.json"): die()
os.link = link""",
    "when all are placed": "writing._sweep = die",
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("older", [False, True], ids=["new", "over older ones"])
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_leaves_both_or_neither(place: str, older: bool, tmp_path: Path) -> None:
    names = ("a.png", "a.json")
    if older:
        publish({tmp_path / name: b"old" for name in names})
    killed(PLACES[place], tmp_path)
    publish({tmp_path / "other.txt": b"x"})  # the next start
    found = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert found.pop("other.txt") == b"x"
    whole = {"a.png": b"new a", "a.json": b"new b"}
    assert found == (whole if place == "when all are placed" else dict.fromkeys(names, b"old") if older else {})


def test_a_failing_second_replace_puts_the_first_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(image("red"), tmp_path / "x.png", record())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = os.replace

    def replace(a: Any, b: Any) -> None:
        if str(b).endswith("x.json") and str(a).endswith(".new"):
            raise PermissionError(errno.EACCES, "Permission denied", str(b))
        real(a, b)

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(WriteError, match=r"Permission denied: choose another folder\. Nothing was written"):
        save_image(image("blue"), tmp_path / "x.png", record(steps=9), force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_journal_of_somebody_else_moves_no_file_outside(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    inner = tmp_path / "out"
    inner.mkdir()
    for name in ("../precious", str(precious)):
        journal = {"schema": 1, "kind": "publishing", "files": [[name, False, "0" * 64]]}
        (inner / ".attnctl-0123456789ab.placing").write_text(json.dumps(journal))
        publish({inner / "a.txt": b"a"}, force=True)
        assert precious.read_text() == "x"
        assert [p.name for p in inner.iterdir()] == ["a.txt"]


def test_what_another_run_is_writing_stays(tmp_path: Path) -> None:
    entry = writing._Entry(tmp_path / "a.txt", "0123456789ab", False, "0" * 64)
    with writing._journal([entry], entry.token) as journal:
        entry.draft.write_bytes(b"half")
        publish({tmp_path / "b.txt": b"b"})
        assert journal.exists()
        assert entry.draft.exists()


# Modes, full disks, overwriting (57)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_every_file_has_the_mode_that_umask_says(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        HEADS.save_pretrained(tmp_path / "heads")
        plan().save_pretrained(tmp_path / "plan")
        made().save(tmp_path / "maps.safetensors")
        save_image(image(), tmp_path / "x.png", record())
        log = HuntLog(tmp_path / "log", {"plan": {}})
        log.add("k", {"marks": [1.0]})
        log.close()
        _write(tmp_path / "orders-0.safetensors", sums())
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(modes) == 11
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_a_head_set_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    HEADS.save_pretrained(tmp_path)
    HEADS.save_pretrained(tmp_path)  # the same: nothing to say
    other = HeadSet.from_pairs([(7, 8)])
    with pytest.raises(FileExists, match=r"attnctl_heads\.json is already there"):
        other.save_pretrained(tmp_path)
    assert HeadSet.from_pretrained(tmp_path) == HEADS
    other.save_pretrained(tmp_path, force=True)
    assert HeadSet.from_pretrained(tmp_path) == other


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    for save in (
        lambda: save_image(image(), tmp_path / "x.png", record()),
        lambda: HEADS.save_pretrained(tmp_path),
        lambda: made().save(tmp_path / "m.safetensors"),
    ):
        with pytest.raises(WriteError, match=r"the disk is full \(\d+ bytes are needed\): free some space"):
            save()
    assert not list(tmp_path.iterdir())


def sums() -> dict[str, Sums]:
    mass = torch.rand(2, 6, 3, 3)
    return {"a.attn": Sums({"grid": [1, 4, 6], "n_text": 7, "text_first": True}, {0: 2}, {0: mass})}
