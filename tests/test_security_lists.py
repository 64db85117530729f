"""Attacks through lists of prompts, folders of pictures and regions: SECURITY.md's promises for what came last."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_security_files import peak

from attnctl.data.specs import control_from_dict, parse_control
from attnctl.errors import AttnctlError, ConfigError
from attnctl.pipelines.vision.folders import check_pictures, find_classes, find_masks, open_picture, read_mask

Run = Callable[..., tuple[int, str, str]]


# Lists of prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unplugged")
@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("PARO(plan='somebody/plan')", "Nothing is fetched|nothing is fetched|not on this machine"),
        ("PARO(plan='/dev/zero')", "does not exist"),
        ("__import__('os').mkdir('evil')", "Line 1"),
        ("PAG(scale=__import__('os').mkdir('evil'))", "not a literal"),
    ],
)
def test_a_list_evaluates_fetches_and_reads_nothing(
    run: Run, control: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"prompt": "a red circle on gray", "control": control}))
    code, _, err = run("generate", "--prompts", path, "--steps", 1, "--out", tmp_path / "o")
    assert code in (1, 2)
    assert re.search(message, err), err
    assert not (tmp_path / "evil").exists()
    assert list((tmp_path / "o").glob("*.png")) == []


def test_names_from_a_list_stay_below_the_folder(tmp_path: Path) -> None:
    from attnctl.data.prompt_files import read_prompts
    from attnctl.pipelines.batches import Column, jobs_of
    from attnctl.pipelines.generate import Call

    path = tmp_path / "list.txt"
    path.write_text("../../etc/passwd\n/dev/null\nC:\\Windows\ncon\n\u202etxt.exe\n" + "a" * 9_000 + "\n")
    usual = Call(prompts=("",), seeds=(0,))
    lines, out = read_prompts(path), tmp_path / "out"
    jobs = jobs_of(lines, [Column("plain", ())], usual, seed=0, num=2, out=out, controls_of={})
    assert len({job.path for job in jobs}) == 12
    assert {job.path.parent for job in jobs} == {out}
    assert all(len(job.path.name) < 100 and job.path.name.isascii() for job in jobs)


# Folders of pictures ------------------------------------------------------------------------------------------------


def bomb(path: Path, side: int = 60_000) -> Path:
    """Write a PNG of some bytes that claims to be as large as a city."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1_000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_a_picture_that_claims_to_be_huge_is_not_decoded(tmp_path: Path) -> None:
    before = peak()
    for side in (9_000, 60_000):  # the first is below Pillow's own limit
        for read in (open_picture, read_mask):
            with pytest.raises(ConfigError, match=r"pixels|cannot be read"):
                read(bomb(tmp_path / "a.png", side))
    assert peak() - before < 100


def test_another_format_under_a_pictures_name_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/tmp/evil) (w) file closefile\n%%EOF\n")
    for read in (open_picture, read_mask):
        with pytest.raises(ConfigError, match="no picture, or damaged"):
            read(path)


def test_pipes_and_devices_in_a_folder_are_not_read(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        os.mkfifo(folder / "pipe.png")
        (folder / "zero.png").symlink_to("/dev/zero")
        (folder / "loop").symlink_to(folder)
    began = time.perf_counter()
    split = find_classes(tmp_path)
    assert {p.name for p, _ in (*split.train, *split.test)} == {"0.png", "1.png"}
    with pytest.raises(ConfigError, match="pipe"):
        check_pictures([tmp_path / "cats" / "pipe.png"])
    assert time.perf_counter() - began < 10


def test_a_list_of_classes_is_bounded(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("L", (8, 8), i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "classes.txt").write_bytes(b"a\n" * (1 << 20))
    with pytest.raises(ConfigError, match="at most 1048576"):
        find_masks(tmp_path)


# Regions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ["a"], "areas": [[0, 0, 1e308, 1]]},
        {"prompts": ["a"], "areas": [[0, 0, "1", 1]]},
        {"prompts": ["a"], "areas": [[[2.0, 3.0]]]},
        {"prompts": ["a"], "areas": [[[[1.0]]]]},
        {"prompts": ["a"], "areas": [{"type": "range", "start": 0, "stop": 10**18, "step": 1}]},
        {"prompts": "a", "areas": {"type": "range", "start": 0, "stop": 10**18, "step": 1}},
        {"prompts": [["a"]], "areas": [[0, 0, 1, 1]]},
        {"prompts": ["a"] * 5, "areas": [[0, 0, 1, 1]]},
        {"prompts": ["a"], "areas": [[0, 0, 1, 1]], "embeds": [{"a": [1]}]},
        {"prompts": ["a"], "areas": [[0, 0, 1, 1]], "base": 1e400},
    ],
)
def test_hostile_regions_are_refused_in_words(fields: dict[str, Any]) -> None:
    began, before = time.perf_counter(), peak()
    with pytest.raises(AttnctlError):
        control_from_dict({"method": "Regions", **fields})
    assert time.perf_counter() - began < 5
    assert peak() - before < 100


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/passwd", "none.png"])
def test_a_file_of_a_region_is_a_picture_or_refused(name: str) -> None:
    import attnctl

    control = parse_control(f"Regions(prompts=('a dog',), areas=('{name}',))")
    with (
        pytest.raises(AttnctlError, match=Path(name).name),
        attnctl.control(attnctl.load_shapes("text2image"), control),
    ):
        pass
