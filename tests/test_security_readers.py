"""Attacks through the values in files: one reader, and one kind of error from each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_mapfile import made
from test_record import record

from attnctl import HeadSet
from attnctl.data.clips import ClipError
from attnctl.data.maps import WordMaps
from attnctl.data.record import Record, RecordError, read, sidecar
from attnctl.data.specs import control_from_dict
from attnctl.errors import AttnctlError, ConfigError, PlanError
from attnctl.pipelines.calibration.measure import Sums, _write, read_store
from attnctl.pipelines.hunting.log import HuntLog
from attnctl.plans import BlockPlan

# One kind of error from one reader (56)


def sums() -> dict[str, Sums]:
    mass = torch.rand(2, 8, 3, 3)
    return {"a.attn": Sums({"grid": [1, 4, 6], "n_text": 7, "text_first": True}, {0: 2}, {0: mass})}


FACTS = {"a.attn": {"i": 0, "calls": {"0": 2}, "call": {"grid": [1, 4, 6], "n_text": 7, "text_first": True}}}
MASS = {"0/mass/0": torch.ones(2, 8, 3, 3)}
STORES: list[tuple[str, Any, dict[str, torch.Tensor]]] = [
    ("no facts", None, MASS),
    ("a list", [], MASS),
    ("a number", 3, MASS),
    ("no calls", {"a.attn": {"i": 0, "call": FACTS["a.attn"]["call"]}}, MASS),
    ("calls of 0", {"a.attn": FACTS["a.attn"] | {"calls": {"0": 0}}}, MASS),
    ("calls below 0", {"a.attn": FACTS["a.attn"] | {"calls": {"0": -1}}}, MASS),
    ("calls of text", {"a.attn": FACTS["a.attn"] | {"calls": {"x": 1}}}, MASS),
    ("calls of another part", {"a.attn": FACTS["a.attn"] | {"calls": {"1": 1}}}, MASS),
    ("a grid of two", {"a.attn": FACTS["a.attn"] | {"call": {"grid": [1, 2], "n_text": 0, "text_first": True}}}, MASS),
    ("a grid of text", {"a.attn": FACTS["a.attn"] | {"call": {"grid": "abc", "n_text": 0, "text_first": True}}}, MASS),
    ("an endless grid", {"a.attn": FACTS["a.attn"] | {"call": {"grid": [1, 1, 10**20], "n_text": 0}}}, MASS),
    ("another key", FACTS, MASS | {"0/odd/0": torch.ones(1)}),
    ("a key without place", FACTS, MASS | {"mass": torch.ones(1)}),
    ("a place of nobody", FACTS, {"9/mass/0": torch.ones(2, 8, 3, 3)}),
    ("three axes", FACTS, {"0/mass/0": torch.ones(8, 3, 3)}),
    ("whole numbers", FACTS, {"0/mass/0": torch.ones(2, 8, 3, 3, dtype=torch.int64)}),
    ("NaN", FACTS, {"0/mass/0": torch.full((2, 8, 3, 3), float("nan"))}),
    ("mass below 0", FACTS, {"0/mass/0": -torch.ones(2, 8, 3, 3)}),
    ("nothing", FACTS, {"none": torch.zeros(1)}),
]


@pytest.mark.parametrize("case", STORES, ids=lambda case: case[0])
def test_malformed_stores_are_refused(case: tuple[str, Any, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    _, facts, tensors = case
    path = tmp_path / "orders-0.safetensors"
    save_file(tensors, path, metadata=None if facts is None else {"sites": json.dumps(facts)})
    with pytest.raises(PlanError, match=r"Delete it and run the calibration again|is not JSON"):
        read_store(path)


def test_a_store_comes_back(tmp_path: Path) -> None:
    _write(tmp_path / "orders-0.safetensors", sums())
    again = read_store(tmp_path / "orders-0.safetensors")["a.attn"]
    assert again.calls == {0: 2}
    assert again.call == sums()["a.attn"].call


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b"3", b"null", b'{"key": 1, "marks": []}', b'{"key": "k"}', b'{"key": "k", "marks": {}}',
        b'{"key": "k", "marks": ["1"]}', b'{"key": "k", "marks": [true]}', b'{"key": "k", "marks": [1e999]}',
        b'{"key": "k", "marks": [NaN]}', b'{"key": "k", "marks": [' + b"9" * 400 + b"]}", b"[" * 5000, b"\xff\xfe",
    ],
)  # fmt: skip
def test_malformed_marks_are_refused(line: bytes, tmp_path: Path) -> None:
    HuntLog(tmp_path, {"plan": {}}).close()
    (tmp_path / "marks-000-000.jsonl").write_bytes(line + b"\n")
    with pytest.raises(PlanError, match=r"Line 1 of marks-000-000\.jsonl is damaged"):
        HuntLog(tmp_path, {"plan": {}})


def test_a_log_with_too_few_marks_is_refused(tmp_path: Path) -> None:
    log = HuntLog(tmp_path, {"plan": {}})
    log.add("k", {"marks": [1.0, 2.0]})
    assert log.marks("k", 2) == [1.0, 2.0]
    with pytest.raises(PlanError, match="holds 2 marks under k, and 3 are needed"):
        log.marks("k", 3)
    log.close()


@pytest.mark.parametrize(
    "value",
    [
        {"type": "HeadSet", "pairs": 3},
        {"type": "HeadSet", "pairs": [[1, 2]], "model": 3},
        {"type": "HeadSet", "pairs": [[1, 2]], "u": "x"},
        {"type": "HeadSet", "pairs": [[1, 2]], "layers": 2.5},
        {"type": "HeadSet", "pairs": [[1, 2]], "method": None},
        {"type": "HeadSet", "pairs": [[1, 2]], "scale": 10**400},
        {"type": "BlockPlan", "keep": [[[True]]], "block_q": 1, "block_k": 1, "order": [0], "grid": None, "n_image": 1},
        {"type": "ModelPlan", "plans": {"a": 3}},
        {"type": "ModelPlan", "plans": []},
    ],
)
def test_plans_inside_a_record_are_checked(value: Any) -> None:
    for method, name in (("SoftPAG", "heads"), ("PARO", "plan")):
        with pytest.raises(AttnctlError):
            control_from_dict({"method": method, name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"n_image": -1}, {"n_image": 10**30}, {"block_q": 0}, {"block_k": True}, {"order": (9, 0)}, {"order": 3},
        {"grid": (1, 1)}, {"grid": 5}, {"keep": torch.ones(1, 2, 0, 3, dtype=torch.bool)}, {"keep": "x"},
        {"keep": torch.zeros(1, 2, 3, 3, dtype=torch.bool)}, {"text_first": 1}, {"about": 3}, {"n_text": -1},
    ],
)  # fmt: skip
def test_a_plan_is_checked_however_it_is_made(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "keep": torch.ones(1, 2, 3, 3, dtype=torch.bool), "block_q": 8, "block_k": 8, "order": (0, 0), "grid": None,
        "n_image": 24,
    }  # fmt: skip
    BlockPlan(**fields)
    with pytest.raises(PlanError):
        BlockPlan(**fields | change)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": [10**30]}, {"tokens": 3}, {"tokens": [[[1e3]]]}, {"layers": [3]}, {"layers": {}}, {"steps": "012"},
        {"keep": ["colours"]}, {"rows": "both"}, {"about": []}, {"words": "cat"}, {"prompts": [1, 2]}, {"of": []},
        {"steps": [True]}, {"reduce": {}},
    ],
)  # fmt: skip
def test_malformed_descriptions_of_maps_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made().save(tmp_path / "m.safetensors")
    path = tmp_path / "m.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordError):
        WordMaps.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["1e999", "9" * 400, '"\\ud800"', "[" * 60 + "]" * 60, "NaN"])
def test_json_that_is_hardly_json_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "attnctl_heads.json").write_text(f'{{"kind": "heads", "schema": 1, "pairs": [[1, 2]], "u": {text}}}')
    with pytest.raises(PlanError):
        HeadSet.from_pretrained(tmp_path)
    (tmp_path / "x.json").write_text(f'{{"schema": 1, "prompts": {text}}}')
    with pytest.raises(RecordError):
        read(tmp_path / "x.json")


def test_not_a_number_is_no_guidance() -> None:
    from attnctl.pipelines.generate import Call, _check_sizes

    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            _check_sizes(Call(prompts=("a",), seeds=(0,), guidance=value))
    with pytest.raises(RecordError, match="'guidance' is damaged"):
        Record.from_dict(record().to_dict() | {"guidance": "nan"})


def test_windows_of_an_edit_are_checked(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from attnctl.pipelines.editing.files import Parts

    job: Any = SimpleNamespace(windows=range(0, 4, 4), height=8, width=6, frames=lambda first: range(4))
    parts = Parts(job, tmp_path)
    whole = torch.zeros(4, 8, 6, 3, dtype=torch.uint8)
    parts.put(0, whole.numpy(), whole.numpy())
    assert parts.get(0)[0].shape == (4, 8, 6, 3)
    for after in (None, whole[:2].clone(), whole.float(), whole[..., :2].clone()):
        tensors = {"before": whole} if after is None else {"before": whole, "after": after}
        save_file(tensors, tmp_path / "000000.safetensors")
        with pytest.raises(ClipError, match="its windows are computed again"):
            parts.get(0)
    (tmp_path / "000000.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ClipError, match="missing or damaged"):
        parts.get(0)


def test_the_sidecar_is_named_after_its_picture() -> None:
    assert sidecar("a/b.png") == Path("a/b.json")
