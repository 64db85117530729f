"""Records and lists of prompts that strangers made: one error of the project's, or a run; benchmarks/ tries 1,000."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_records import record_file
from test_record import image, record
from test_security_files import peak

from attnctl.app.cli import main
from attnctl.data.record import Record, RecordError, save_image, sidecar
from attnctl.errors import AttnctlError
from attnctl.pipelines.doubts import doubts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("hostile_bench", ROOT / "benchmarks/hostile_records.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_records_and_lists_are_refused_in_words_or_run(benchmark: Any, tmp_path: Path) -> None:
    make = benchmark.cases(tmp_path)
    came = [benchmark.attempt(make(3, i)) for i in range(150)]
    assert [case for case in came if case not in ("runs", "refused")] == []
    assert {"runs", "refused"} == set(came[::2]) == set(came[1::2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 10**9}, "steps is a whole number"),
        ({"threads": 10**5}, "threads is a whole number"),
        ({"width": 4096, "height": 4096}, "at most 16 times as many"),
        ({"seeds": (2**63 - 1, 1)}, "seed is a whole number"),
        ({"options": {"max_sequence_length": 10**9}}, "expected 16384 at most"),
        ({"options": {"sigmas": [1] * 10_001}}, "'options' is damaged"),
        ({"controls": ({"method": "PAG"},) * 200}, "200 controls"),
        ({"prompts": ("a",) * 2000, "seeds": (1,) * 2000, "sha256": ("0" * 64,) * 2000}, "2000 pictures"),
        ({"prompts": ("a" * 200_000, "b")}, "'prompts' is damaged"),
    ],
)
def test_numbers_and_lengths_are_bounded_before_anything_is_built(fields: dict[str, Any], message: str) -> None:
    from attnctl.pipelines.models import load
    from attnctl.pipelines.repeat import sample_again

    before = peak()
    with pytest.raises(RecordError, match=message):
        sample_again(load("shapes:text2image"), record(**{"width": 64, "height": 64, "steps": 1} | fields))
    assert peak() - before < 200


# Records that were changed ------------------------------------------------------------------------------------------


def saved(path: Path, **fields: Any) -> Path:
    """Write a picture with its own record, and change the JSON beside it."""
    command = "attnctl generate --prompt 'a cat' --steps 4 --seed 7 --control 'PAG(scale=3.0)'"
    own = record(prompts=("a cat",), seeds=(7,), shows=(0,), sha256=("0" * 64,), command=command, controls=())
    save_image(image(), path, own)
    beside = sidecar(path)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | fields))
    return path


def told(path: Path) -> list[str]:
    from attnctl.data.record import read

    return doubts(path, read(path))


def test_what_a_picture_cannot_have_been_made_with_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", steps=30, guidance=2.0)
    found = told(sidecar(path))
    assert found[:2] == ["steps=30 in a.json is 4 in a.png", "guidance=2.0 in a.json is 0.30000000000000004 in a.png"]
    assert any(text.startswith("steps=30: its command says --steps 4") for text in found)
    assert any(text.startswith("controls (none): its command says PAG(scale=3.0)") for text in found)
    assert any("pixels" in text for text in found)


def test_a_record_that_nobody_changed_raises_no_doubt(tmp_path: Path) -> None:
    from attnctl.data.record import pixels_sha256

    own = Record.from_dict(
        record(
            prompts=("a cat",), seeds=(0,), shows=(0,), sha256=(pixels_sha256(image()),),
            command="attnctl generate --prompt 'a cat' --steps 4 --model shapes:text2image", controls=(),
        ).to_dict()
    )  # fmt: skip
    save_image(image(), tmp_path / "a.png", own)
    assert told(tmp_path / "a.png") == told(tmp_path / "a.json") == []


def test_a_changed_record_says_so_on_the_command_line(
    folder: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    size = ("--height", "16", "--width", "16", "--steps", "2", "--out", str(tmp_path))
    assert main(["generate", "--model", folder, "--prompt", "a cat", *size]) == 0
    beside = tmp_path / "a-cat-0.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"steps": 1}))
    code, out, err = run("generate", "--from", beside, "--model", folder, "--out", tmp_path / "again", "--json")
    assert code == 1
    assert json.loads(out)["denied"][0] == "steps=1 in a-cat-0.json is 2 in a-cat-0.png"
    assert "cannot have steps=1" in err


def test_the_same_seed_makes_the_same_hostile_file(tmp_path: Path) -> None:
    sound = record().to_dict()
    one, two = (record_file(random.Random(5), sound, tmp_path / name).read_bytes() for name in ("a.json", "b.json"))
    assert one == two


def test_errors_of_the_benchmark_are_the_projects(benchmark: Any) -> None:
    def refused() -> None:
        raise AttnctlError("no")

    def foreign() -> None:
        raise KeyError("x")

    assert [benchmark.attempt(case) for case in (refused, foreign, lambda: None)] == [
        "refused", "foreign KeyError: 'x'", "runs",
    ]  # fmt: skip
