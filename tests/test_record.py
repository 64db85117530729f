"""Records: exact round trips, atomic files that never overwrite, and clear refusals of everything else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from attnctl.data import provenance
from attnctl.data.files import below, slug
from attnctl.data.record import SCHEMA, Record, RecordError, pixels_sha256, read, save_image, sidecar
from attnctl.data.specs import control_to_dict
from attnctl.errors import AttnctlError
from attnctl.plans import writing
from attnctl.plans.writing import FileExists, check_free, publish
from attnctl.processors import PAG

SHA = "0" * 64


def record(**fields: Any) -> Record:
    given: dict[str, Any] = {
        "prompts": ("a cat", "ein Bär · 熊 🐻"),
        "seeds": (7, 8),
        "sha256": (SHA, "f" * 64),
        "shows": (1,),
        "steps": 4,
        "width": 64,
        "height": 48,
        "model": "shapes:text2image",
        "pipeline": "StableDiffusionPipeline",
        "scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "trained_betas": None, "x": [1, 2.5]},
        "negative": 'quotes " and \n lines',
        "guidance": 0.1 + 0.2,
        "controls": (control_to_dict(PAG(scale=1 / 3)),),
        "sites": (("mid_block.attn1",),),
        "versions": {"torch": "2.10"},
        "command": "attnctl generate",
    }
    return Record(**given | fields)


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 6), color)


def test_a_record_survives_json_exactly() -> None:
    one = record()
    data = json.loads(json.dumps(one.to_dict()))
    assert Record.from_dict(data) == one
    assert Record.from_dict(data).to_dict() == one.to_dict()
    assert next(iter(data)) == "schema"


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=40),
    seed=st.integers(0, 2**63 - 1),
    guidance=st.floats(allow_nan=False, allow_infinity=False),
    extra=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_record_survives_json(prompt: str, seed: int, guidance: float, extra: Any) -> None:
    one = record(
        prompts=(prompt,), seeds=(seed,), sha256=(SHA,), shows=(0,), guidance=guidance, scheduler={"value": extra}
    )
    assert Record.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_file_carries_its_record_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cat.png"
    save_image(image(), path, record())
    assert read(path) == read(sidecar(path)) == (record(),)
    assert sorted(p.name for p in path.parent.iterdir()) == ["cat.json", "cat.png"]
    with Image.open(path) as saved:
        assert pixels_sha256(saved) == pixels_sha256(image())


def test_a_sheet_carries_several_records(tmp_path: Path) -> None:
    many = (record(), record(steps=5))
    save_image(image(), tmp_path / "sheet.png", many)
    assert read(tmp_path / "sheet.png") == read(tmp_path / "sheet.json") == many


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    save_image(image("red"), path, record())
    before = path.read_bytes()
    with pytest.raises(FileExists, match=r"cat\.png is already there"):
        save_image(image("blue"), path, record())
    assert path.read_bytes() == before
    save_image(image("blue"), path, record(), force=True)
    assert path.read_bytes() != before
    path.unlink()
    with pytest.raises(FileExists, match=r"cat\.json"):
        save_image(image(), path, record())
    assert not path.exists()


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing._Entry.place

    def fail_on_second(entry: Any, force: bool) -> None:
        if entry.path.suffix == ".json":
            raise KeyboardInterrupt
        real(entry, force)

    monkeypatch.setattr(writing._Entry, "place", fail_on_second)
    with pytest.raises(KeyboardInterrupt):
        save_image(image(), tmp_path / "cat.png", record())
    assert list(tmp_path.iterdir()) == []


def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    path, wins, start = tmp_path / "one.txt", [], threading.Barrier(8)

    def write(i: int) -> None:
        start.wait()
        try:
            publish({path: str(i).encode() * 1000})
            wins.append(i)
        except FileExists:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert path.read_text() == str(wins[0]) * 1000
    assert [p.name for p in tmp_path.iterdir()] == ["one.txt"]


def test_a_file_system_without_links_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(writing.os, "link", no_links)
    save_image(image(), tmp_path / "cat.png", record())
    assert read(tmp_path / "cat.png") == (record(),)
    with pytest.raises(FileExists):
        save_image(image(), tmp_path / "cat.png", record())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": SCHEMA + 1}, "schema 2"),
        ({"schema": True}, "schema True"),
        ({"schema": None}, "schema None"),
        ({"promts": ["a"]}, "unknown key 'promts'. Did you mean 'prompts'"),
        ({"steps": "4"}, "'steps' is damaged"),
        ({"steps": True}, "'steps' is damaged"),
        ({"steps": -1}, "'steps' is damaged"),
        ({"prompts": "a cat"}, "'prompts' is damaged"),
        ({"prompts": []}, "one prompt, one seed"),
        ({"seeds": [1]}, "one prompt, one seed"),
        ({"seeds": [1, 2.5]}, "'seeds' is damaged"),
        ({"shows": [2]}, "shows images"),
        ({"shows": []}, "shows images"),
        ({"sha256": ["x", SHA]}, "'sha256' is damaged"),
        ({"guidance": "3"}, "'guidance' is damaged"),
        ({"controls": [3]}, "'controls' is damaged"),
        ({"scheduler": []}, "'scheduler' is damaged"),
        ({"sites": ["mid"]}, "'sites' is damaged"),
        ({"versions": {"torch": 2}}, "'versions' is damaged"),
        ({"model": None}, "'model' is damaged"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(record().to_dict() | change))
    with pytest.raises(RecordError, match=r"bad\.json") as error:
        read(path)
    assert message in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    data = record().to_dict()
    del data["steps"]
    with pytest.raises(RecordError, match="no 'steps'"):
        Record.from_dict(data)


def test_numbers_that_json_has_not_are_refused() -> None:
    with pytest.raises(RecordError, match="'guidance' is damaged"):
        record(guidance=float("nan"))
    with pytest.raises(RecordError, match="'scheduler' is damaged"):
        record(scheduler={"x": float("inf")})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x89PNG\r\n\x1a\n", b"not a picture", b"GIF89a" + b"\0" * 40, b'{"schema": 1',
        b"[" * 200_000, b'{"schema": NaN}', b"\xff\xfe\x00", b"[]", b"3", b'{"schema": 1, "records": []}',
        b'{"schema": 1, "records": 3}', b'{"schema": 2, "records": [{}]}', b'{"a": 1}', b"9" * 10_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.png", "x.json"])
def test_foreign_files_give_one_clear_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=r"x\.(png|json)"):
        read(tmp_path / name)


def test_pictures_of_others_and_missing_files_are_refused(tmp_path: Path) -> None:
    image().save(tmp_path / "plain.png")
    with pytest.raises(RecordError, match="carries no record"):
        read(tmp_path / "plain.png")
    image().save(tmp_path / "photo.jpg")
    with pytest.raises(RecordError, match="not a readable PNG"):
        read(tmp_path / "photo.jpg")
    with pytest.raises(RecordError, match="no file"):
        read(tmp_path / "none.png")
    with pytest.raises(RecordError, match="no file"):
        read(tmp_path)
    info = PngImagePlugin.PngInfo()
    info.add_text("attnctl", "{}" + " " * (70 << 20), zip=True)  # unpacks to more than anyone should read
    image().save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(RecordError, match=r"bomb\.png"):
        read(tmp_path / "bomb.png")


def test_truncated_pngs_are_refused_or_read_right(tmp_path: Path) -> None:
    save_image(image(), tmp_path / "cat.png", record())
    whole = (tmp_path / "cat.png").read_bytes()
    for cut in range(0, len(whole), 37):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        with contextlib.suppress(RecordError):
            assert read(tmp_path / "cut.png") == (record(),)


def test_only_png_names_are_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="PNG"):
        save_image(image(), tmp_path / "cat.jpg", record())
    with pytest.raises(RecordError, match="at least one record"):
        save_image(image(), tmp_path / "cat.png", ())


def test_a_record_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().steps = 3  # type: ignore[misc]


# Names and provenance --------------------------------------------------------------------------------------------


def test_slugs_are_safe_and_distinct() -> None:
    assert slug("a red circle on gray") == "a-red-circle-on-gray"
    texts = ["../../etc/passwd", "a/b", "a\\b", "", " ", "A", "a", "CON", "con", "nul", "x" * 500, "é", "熊", "a\0b"]
    names = [slug(text) for text in texts]
    assert len(set(names)) == len(names)
    for name in names:
        assert name
        assert len(name) <= 48
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert name not in {"con", "nul"}


@given(st.text(max_size=80), st.text(max_size=80))
def test_two_texts_share_no_slug(a: str, b: str) -> None:
    assert (slug(a) == slug(b)) == (a == b)


def test_outputs_stay_below_their_folder(tmp_path: Path) -> None:
    assert below(tmp_path, "a.png") == tmp_path / "a.png"
    for name in ("../a.png", "/etc/passwd", "x/../../a"):
        with pytest.raises(AttnctlError, match="leads out"):
            below(tmp_path, name)
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnctlError, match="expected a folder"):
        below(tmp_path / "file", "a.png")


def test_all_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExists, match="b is already there"):
        check_free([tmp_path / "a", tmp_path / "b"], force=False)
    check_free([tmp_path / "a", tmp_path / "b"], force=True)


def test_command_lines_name_no_machine_paths(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    line = provenance.command_line(
        [
            "/usr/bin/attnctl", "generate", "--model", str(tmp_path / "model"), "--out=/home/me/out", "--prompt",
            "a cat and/or a dog", "--model", "stabilityai/sdxl", "--from", "~/secret/x.png", "--control",
            'SoftPAG(heads="/home/me/heads.json")', "C:\\Users\\me\\x.png",
        ]
    )  # fmt: skip
    assert line.startswith("attnctl generate --model model --out=out --prompt 'a cat and/or a dog'")
    assert "stabilityai/sdxl" in line
    for secret in ("home", "secret", "Users", str(tmp_path)):
        assert secret not in line


def test_a_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x" * (5 << 20))
    (tmp_path / "a" / "config.json").write_text("{}")
    before = provenance.fingerprint(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert provenance.fingerprint(tmp_path / "b") == before
    (tmp_path / "b" / ".cache").write_text("hidden files do not count")
    assert provenance.fingerprint(tmp_path / "b") == before
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert provenance.fingerprint(tmp_path / "b") != before


def test_versions_name_what_is_installed() -> None:
    found = provenance.versions(("torch", "no-such-package"), ("neither-this",))
    assert set(found) == {"python", "torch", "no-such-package"}
    assert found["no-such-package"] == "not installed"
