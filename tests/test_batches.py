"""Lists of prompts: read with care, made once, compared on sheets, shared between processes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnctl.data.prompt_files import PromptFileError, read_prompts
from attnctl.data.record import read
from attnctl.data.specs import parse_controls
from attnctl.processors import PAG, SEG

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--height", 16, "--width", 16, "--steps", 2)


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_three_kinds_of_lists_say_the_same(tmp_path: Path) -> None:
    table = 'prompt,seed,guidance,control\na cat,,,\n"a dog, and a cat",7,3.5,PAG(scale=2.0) + SEG\n'
    lines = (
        '{"prompt": "a cat"}\n\n{"prompt": "a dog, and a cat", "seed": 7, "guidance": 3.5, "control": ["PAG", "SEG"]}\n'
    )
    one, two = read_prompts(written(tmp_path / "a.csv", "\ufeff" + table))
    assert (one.number, one.prompt, one.seed, one.control) == (2, "a cat", None, None)
    assert (two.prompt, two.seed, two.guidance, two.control) == ("a dog, and a cat", 7, 3.5, ("PAG(scale=2.0) + SEG",))
    three, four = read_prompts(written(tmp_path / "a.jsonl", lines))
    assert (three.number, four.number, four.control) == (1, 3, ("PAG", "SEG"))
    assert [line.prompt for line in read_prompts(written(tmp_path / "a.txt", "a cat\r\n\r\n a dog, and a cat \n"))] == [
        one.prompt,
        two.prompt,
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.md", b"a cat", r"expected \.txt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"a\0cat", "null character"),
        ("a.txt", b"a" * 20_000, "at most 10000"),
        ("a.txt", b"a\n" * 10_001, "more than 10000 prompts"),
        ("a.csv", b"text\na cat\n", "'prompt'"),
        ("a.csv", b"prompt,prompt\na,b\n", "each once"),
        ("a.csv", b"prompt,seed\na cat,seven\n", "seed='seven' is no whole number"),
        ("a.csv", b"prompt,seed\na cat," + b"9" * 5000 + b"\n", "is no whole number"),
        ("a.csv", b"prompt,guidance\na cat,nan\n", "is no number"),
        ("a.csv", b"prompt\na, cat\n", "has 2 cells"),
        ("a.csv", b'prompt\n"a cat\n', "cannot be read"),
        ("a.csv", b"prompt,model\na cat,x/y\n", "'model'; expected some of"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.jsonl", b'{"prompt": 3}\n', "expected a text"),
        ("a.jsonl", b'{"prompt": "a", "seed": true}\n', "no whole number"),
        ("a.jsonl", b'{"prompt": "a", "control": {"method": "PAG"}}\n', "no short list of texts"),
        ("a.jsonl", b'{"prompt": "a", "from": "/etc/passwd"}\n', "'from'"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "half a character"),
        ("a.jsonl", b"[" * 5000, "cannot be read|is not|nested"),
    ],
)
def test_lists_that_cannot_be_are_refused_in_words(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=message):
        read_prompts(written(tmp_path / name, content))


def test_a_pipe_or_a_folder_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.txt", "folder.csv", "none.jsonl"):
        with pytest.raises(PromptFileError, match=name):
            read_prompts(tmp_path / name)


def test_controls_that_act_together_are_written_with_a_plus() -> None:
    assert parse_controls(' PAG(scale=2.0, sites="mid") + SEG ') == (PAG(scale=2.0, sites="mid"), SEG())
    assert parse_controls("plain") == ()
    assert parse_controls("PAG") == (PAG(),)


@pytest.fixture(scope="module")
def made(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a list with two settings and two seeds once, and return the list and its folder."""
    from attnctl.app.cli import main

    root = tmp_path_factory.mktemp("batch")
    path = written(root / "list.csv", "prompt,negative,width,seed\na cat,,,\na dog,a cat,24,5\n")
    args = ["generate", "--model", folder, "--prompts", path, *SMALL, "--num", 2, "--batch", 2]
    assert main([*map(str, args), "--compare", "plain", "PAG(scale=2.0)", "--out", str(root / "out")]) == 0
    return path, root / "out"


def again(run: Run, folder: str, made: tuple[Path, Path], *more: object) -> tuple[int, str, str]:
    args = ("generate", "--model", folder, "--prompts", made[0], *SMALL, "--num", 2, "--batch", 2)
    return run(*args, "--compare", "plain", "PAG(scale=2.0)", "--out", made[1], *more)


def test_every_prompt_gets_the_same_seeds_and_its_own_settings(made: tuple[Path, Path]) -> None:
    with (made[1] / "list-pictures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["prompt"], r["column"], r["seed"]) for r in rows] == [
        (prompt, column, str(seed))
        for prompt, seeds in (("a cat", (0, 1)), ("a dog", (5, 6)))
        for column in ("plain", "PAG(scale=2.0)")
        for seed in seeds
    ]
    assert [(r["width"], r["height"], r["negative"]) for r in rows[::4]] == [("16", "16", ""), ("24", "16", "a cat")]
    lines = [json.loads(line) for line in (made[1] / "list-pictures.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [row["path"] for row in rows]
    for i, row in enumerate(rows):
        (record,) = read(made[1] / row["path"])
        assert record.sha256[record.shows[0]] == row["sha256"]
        assert len(record.prompts) == 2
        assert [c["method"] for c in record.controls] == (["PAG"] if i % 4 > 1 else [])
    sheets = sorted(made[1].glob("*-compare-*.png"))
    assert len(sheets) == 2
    assert [len(read(sheet)) for sheet in sheets] == [4, 4]


def test_what_is_there_with_an_equal_record_stays(run: Run, folder: str, made: tuple[Path, Path]) -> None:
    paths = [p for p in made[1].glob("*.png") if "compare" not in p.name]
    times = {path: path.stat().st_mtime_ns for path in paths}
    first = next(path for path in paths if read(path)[0].shows == (0,))
    first.unlink()
    code, out, err = again(run, folder, made, "--json")
    assert code == 0, err
    assert "6 of 8 picture(s) are there" in err
    assert len(json.loads(out)["pictures"]) == 8
    changed = {path for path in paths if path.stat().st_mtime_ns != times[path]}
    assert len(changed) == 2  # the whole call of the missing one: its record speaks of both
    assert first in changed


def test_other_pictures_are_not_replaced(run: Run, folder: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, err = again(run, folder, made, "--dtype", "bfloat16")
    assert code == 1
    assert "dtype is 'float32', and would be 'bfloat16'" in err
    other = tmp_path / "list-pictures.csv"
    other.write_text("my,own,table\n")
    code, _, err = run("generate", "--model", folder, "--prompts", made[0], *SMALL, "--out", tmp_path)
    assert code == 1
    assert "table of something else" in err
    assert other.read_text() == "my,own,table\n"


def test_a_line_that_is_refused_does_not_stop_the_others(run: Run, folder: str, tmp_path: Path) -> None:
    path = written(
        tmp_path / "l.jsonl",
        '{"prompt": "a cat", "control": "AStar(concepts=(\'dog\', \'cat\'))"}\n{"prompt": "a dog"}\n',
    )
    code, out, err = run("generate", "--model", folder, "--prompts", path, *SMALL, "--out", tmp_path / "o", "--json")
    data = json.loads(out)
    assert code == 1, err
    assert [row["line"] for row in data["pictures"]] == [2]
    assert data["failed"][0]["lines"] == [1]
    assert "Line 1 is left out" in err


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"prompt": "a", "steps": 1000000000}', (), "line 1: steps is a whole number"),
        ('{"prompt": "a", "width": 16384, "height": 16384}', (), "pixels"),
        ('{"prompt": "a", "num": 10000000}', (), "line 1: num"),
        ('{"prompt": "a", "control": "__import__(\'os\')"}', (), "Line 1: Cannot read|Line 1: Unknown"),
        ('{"prompt": "a", "control": "PAG"}', ("--compare", "plain", "SEG"), "controls of its own"),
        ('{"prompt": "a"}\n{"prompt": "a"}', (), "same picture as line 1"),
        ('{"prompt": "a"}', ("--prompt", "b"), "leave out --prompt"),
        ('{"prompt": "a"}', ("--compare", "plain", "plain"), "two of them are the same"),
    ],
)
def test_lists_that_ask_for_what_cannot_be(
    run: Run, content: str, more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    import re

    path = written(tmp_path / "l.jsonl", content)
    code, out, err = run("generate", "--prompts", path, "--out", tmp_path / "o", *more)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert not (tmp_path / "o").exists()


class Pretend:
    """One of two processes, of which only what was gathered matters."""

    def __init__(self, rank: int, gathered: list[dict[str, Any]]) -> None:
        self.rank, self.size, self.local, self.gathered = rank, 2, rank, gathered

    def share(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.gathered += records
        return self.gathered

    def wait(self) -> None:
        pass


def test_two_processes_share_a_list(run: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one finds what the other has made; `torchrun` starts real ones (docs/howto/batches.md)."""
    path = written(tmp_path / "list.txt", "a cat\na dog\na bird\n")
    gathered: list[dict[str, Any]] = []
    args = ("generate", "--model", folder, "--prompts", path, *SMALL, "--out", tmp_path / "o", "--json")
    said = []
    for rank, made in ((1, 1), (0, 3)):
        monkeypatch.setattr("attnctl.pipelines.workers.Workers", lambda device, rank=rank: Pretend(rank, gathered))
        monkeypatch.setattr("attnctl.app.commands.batch.Batch._missing", lambda self, runs, loaded, crew: list(runs))
        code, out, err = run(*args)
        assert code == 0, err
        assert len(list((tmp_path / "o").glob("*.png"))) == made
        said.append((out, err))
    (nothing, talk), (table, more) = said
    assert nothing == ""
    assert "process 2 of 2: 2 of 2 steps" in talk
    assert "process 1 of 2: 4 of 4 steps" in more
    assert [row["line"] for row in json.loads(table)["pictures"]] == [1, 2, 3]
