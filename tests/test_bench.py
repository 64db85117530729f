"""`attnctl bench`: every benchmark is listed, runs as listed, and its figures are found where the list says."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from attnctl.app.cli import main
from attnctl.app.commands.bench import catalogue, figures_of

FOLDER = Path(__file__).parents[1] / "benchmarks"
KNOWN = {b.name: b for b in catalogue(FOLDER)}


def test_every_script_is_listed() -> None:
    scripts = {p.name for p in FOLDER.glob("*.py") if "ArgumentParser(" in p.read_text(encoding="utf-8")}
    assert scripts == {b.script for b in KNOWN.values()}


@pytest.mark.parametrize("name", KNOWN)
def test_arguments_are_those_of_the_script(name: str) -> None:
    source = (FOLDER / KNOWN[name].script).read_text(encoding="utf-8")
    for arguments in (KNOWN[name].args, KNOWN[name].quick or ()):
        for option in (a for a in arguments if a.startswith("-")):
            assert f'"{option}"' in source, option


def test_figures_are_where_the_list_says() -> None:
    for benchmark in KNOWN.values():
        file = FOLDER / "results" / benchmark.out
        if benchmark.out and file.is_file():
            found = figures_of(benchmark, json.loads(file.read_text(encoding="utf-8")))
            if benchmark.name == "host_matrix":  # measured host by host
                assert found
            else:
                assert found.keys() == benchmark.figures.keys(), benchmark.name


def _folder(path: Path, code: str) -> Path:
    (path / "results").mkdir(parents=True)
    (path / "bench.toml").write_text(
        '[one]\nscript = "one.py"\nabout = "a sum"\nargs = ["2"]\nquick = ["1"]\nout = "one.json"\n'
        'figures = { "the sum" = "sums/0", "absent" = "no/where" }\n[two]\nscript = "one.py"\nabout = "no smoke run"\n'
    )
    (path / "one.py").write_text(code)
    (path / "results" / "one.json").write_text('{"sums": [40.0]}')
    return path


SUM = "import json, sys\nprint('talk', file=sys.stderr)\nprint(json.dumps({'sums': [40 + int(sys.argv[1])]}))\n"


def test_runs_are_written_with_machine_versions_and_commands(tmp_path: Path, capsys: Any) -> None:
    folder, out = _folder(tmp_path / "b", SUM), tmp_path / "bench.json"
    assert main(["bench", "--quick", "--folder", str(folder), "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(out.read_text())
    assert {"date", "command", "machine", "versions"} <= facts.keys()
    (run,) = facts["runs"]
    assert (run["name"], run["command"], run["code"]) == ("one", "python benchmarks/one.py 1", 0)
    assert run["figures"] == {"the sum": 41}
    assert str(tmp_path) not in facts["command"]
    assert main(["bench", "--only", "one", "--folder", str(folder), "--out", str(out)]) == 1  # it is there already
    assert "--force" in capsys.readouterr().err
    assert main(["bench", "--only", "one", "--folder", str(folder), "--out", str(out), "--force"]) == 0
    assert "the sum 42" in capsys.readouterr().out


def test_what_fails_is_said(tmp_path: Path, capsys: Any) -> None:
    folder = _folder(tmp_path / "b", "import sys\nsys.exit(3)\n")
    assert main(["bench", "--quick", "--folder", str(folder), "--out", str(tmp_path / "x.json")]) == 1
    assert "failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["runs"][0]["code"] == 3


def test_results_of_the_repository_are_shown(tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "--show", "--folder", str(_folder(tmp_path / "b", SUM))]) == 0
    told = capsys.readouterr().out
    assert "the sum 40" in told
    assert "python benchmarks/one.py 2" in told
    assert main(["bench", "--list"]) == 0
    assert "FLOPs and time of PAG" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: Any) -> None:
    for arguments, words in (
        (["--only", "pagg"], "Did you mean 'pag'"),
        (["--folder", str(tmp_path)], "part of the repository"),
        (["--only", "hunt", "--quick"], "leave out --quick"),
    ):
        assert main(["bench", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_the_page_of_results_is_written_from_them() -> None:

    sys.path.insert(0, str(FOLDER))
    try:
        page = runpy.run_path(str(FOLDER / "tables.py"))["markdown"]()
    finally:
        sys.path.remove(str(FOLDER))
    for benchmark in KNOWN.values():
        recorded = benchmark.out and (FOLDER / "results" / benchmark.out).is_file()
        special = benchmark.name in ("reliability", "host_matrix")
        assert (f"| {benchmark.name} |" in page) == bool(recorded and not special)
    assert page.count("\n## ") == 3
