"""The commands, run as a user runs them: results and talk, exit codes, records, nothing overwritten."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo_pipelines

import attnctl
import attnctl.processors
from attnctl.app.cli import main
from attnctl.app.commands.bench import catalogue, command_of
from attnctl.app.commands.common import table, wilson
from attnctl.app.demo import SHEETS
from attnctl.app.panels import PANELS, Panel
from attnctl.data.record import read

Run = Callable[..., tuple[int, str, str]]


# Help and usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("--help",), ("demo", "--help"), ("generate", "--help"), ("env", "--help")])
def test_help_is_no_failure(run: Run, args: tuple[str, ...]) -> None:
    code, out, _ = run(*args)
    assert code == 0
    assert "usage: attnctl" in out


def test_the_commands_import_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'cv2', 'matplotlib', 'xformers', 'PIL', 'numpy'}"
    new = "set(sys.modules) - before"
    code = f"import sys, attnctl; before = set(sys.modules); import attnctl.app.cli; print(sorted({heavy} & ({new})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_the_installed_command_works() -> None:
    command = Path(sys.executable).with_name("attnctl")
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("demo", "generate", "maps", "sites", "env"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "--prompt", " "),
        ("generate", "--prompt", "a", "--num", "0"),
        ("generate", "--prompt", "a", "--num", "two"),
        ("generate", "--prompt", "a", "--seed", "-1"),
        ("generate", "--prompt", "a", "--steps", "0"),
        ("generate", "--prompt", "a", "--width", "-8"),
        ("generate", "--prompt", "a", "--control", "PAG(3)"),
        ("generate", "--prompt", "a", "--control", "PAG(scal=3)"),
        ("generate", "--prompt", "a", "--control", "PARO()"),
        ("generate", "--prompt", "a", "--control", "StyleAligned()", "--num", "2"),
        ("generate", "--prompt", "a", "--control", "FlowEdit(source='a', target='b')"),
        ("generate", "--prompt", "a", "--control", "__import__('os').getcwd()"),
        ("generate", "--prompt", "a", "--from", "x.png"),
        ("generate", "--from", "x.png", "--steps", "3"),
        ("generate", "--from", "x.png", "--compare", "plain"),
        ("edit", "x.png", "--source", " ", "--target", "a"),
        ("generate", "--prompt", "a", "--trust-remote-code"),
        ("demo", "--all", "--steps", "0"),
        ("demo", "--steps", "3"),
        ("sites", "a", "b"),
    ],
)
def test_usage_errors_exit_with_2(run: Run, args: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.strip()
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sites", "no/such/place"), "no/such/place"),
        (("sites", "shapes:nothing"), "Unknown shapes model 'nothing'"),
        (("generate", "--from", "none.png"), "There is no file none.png"),
        (("generate", "--prompt", "a", "--model", "nobody/nothing-1"), "Cannot load 'nobody/nothing-1'"),
        (("generate", "--prompt", "a", "--device", "tpu"), "Unknown device 'tpu'"),
        (("generate", "--prompt", "a", "--dtype", "int8"), "Unknown dtype 'int8'"),
        (("generate", "--prompt", "a", "--device", "cuda:99"), "no device 'cuda:99'"),
    ],
)
def test_failures_are_one_line_and_exit_with_1(
    run: Run, args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("attnctl: ")
    assert message in last
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(attnctl.AttnctlError, match="no file"):
        main(["generate", "--from", "none.png", "--debug"])


def test_the_help_of_generate_names_every_control_that_it_takes(run: Run) -> None:
    from attnctl.app.commands.generate import CONTROLS
    from attnctl.data.controls import controls

    elsewhere = {"Capture", "FateZero", "FlowEdit", "Inject"}
    assert set(CONTROLS.split(", ")) == set(controls("attnctl")) - elsewhere
    assert CONTROLS in " ".join(run("generate", "--help")[1].replace("│", " ").split())


def test_lines_tell_how_far_a_job_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from attnctl.data import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(40, "step", "job") as bar:
        assert capsys.readouterr().err == "job: 0 of 40 steps\n"  # at once
        for i in range(40):
            bar.describe(f"picture {i // 20 + 1} of 2")
            now[0] += 1
            bar.update()
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "job: 1 of 40 steps, picture 1 of 2, 1 s, about 39 s left"
    assert between[0] == "job: 3 of 40 steps, picture 1 of 2, 3 s, about 37 s left"
    assert 4 < len(between) < 15
    assert last == "job: 40 of 40 steps: 40 s"
    with progress.Progress(40, "step", "job") as bar:
        now[0] += 30
        bar.ready()  # the model is loaded: what that took says nothing of the steps
        now[0] += 1
        bar.update()
    assert capsys.readouterr().err.splitlines()[1] == "job: 1 of 40 steps, 31 s, about 39 s left"
    with progress.Progress(3, "step", quiet=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    assert list(progress.tracked([1, 2], "file", "check")) == [1, 2]
    assert [progress.in_words(s) for s in (3.6, 200, 9000)] == ["4 s", "3 min", "2.5 h"]


# sites and env ---------------------------------------------------------------------------------------------------


def test_sites_lists_what_find_sites_finds(run: Run, folder: str) -> None:
    code, out, _ = run("sites", folder, "--json")
    assert code == 0
    data = json.loads(out)
    found = attnctl.find_sites(zoo_pipelines.build("sd")[0])
    assert [s["name"] for s in data["sites"]] == [s.name for s in found]
    assert [(s["depth"], s["kind"], s["heads"], s["head_dim"]) for s in data["sites"]] == [
        (s.depth, s.kind, s.heads, s.head_dim) for s in found
    ]
    code, out, err = run("sites", folder)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["depth", "name", "kind", "heads", "head", "dim", "grid"]
    assert len(lines) == len(found) + 2
    assert f"{len(found)} sites" in err


def test_sites_reads_no_weights(run: Run, folder: str, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run("sites", bare)[0] == 0


def test_a_probe_shows_what_each_attention_sees(run: Run) -> None:
    code, out, _ = run("sites", "shapes:mmdit", "--probe", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["model"] == "shapes:mmdit"
    assert sum(row["layers"] for row in data["seen"]) == len(attnctl.find_sites(attnctl.load_shapes("mmdit")))
    for row in data["seen"]:
        assert row["kind"] == row["by counts"] == "joint"
        assert row["image keys"] != "-"
        assert row["text keys"] != "-"
    assert "SD3Transformer2DModel" in data["row"]


def test_env_names_versions_and_kernels(run: Run) -> None:
    code, out, _ = run("env", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["versions"]["attnctl"] == attnctl.__version__
    assert {"torch", "diffusers", "transformers", "python"} <= set(data["versions"])
    kernels = {k["name"]: k for k in data["kernels"]}
    assert kernels["sdpa"]["available"]
    assert all(k["available"] or k["reason"] for k in kernels.values())
    sparse = {k["name"]: k for k in data["block_sparse_kernels"]}
    assert sparse["gather"]["available"]
    assert all(k["available"] or k["reason"] for k in sparse.values())
    code, out, err = run("env")
    assert code == 0
    assert "kernel" in out
    assert err == ""


def test_a_closed_pipe_is_no_traceback(folder: str) -> None:
    command = f"{sys.executable} -m attnctl sites {folder} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env={**os.environ})
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("depth")


# demo ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unplugged")
def test_the_demo_draws_judges_and_can_be_repeated(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--prompts", 2, "--seeds", 2, "--steps", 3, "--rows", 2, "--batch", 3)
    monkeypatch.setattr("attnctl.app.commands.demo.PANELS", tuple(quick(panel) for panel in PANELS[:1]))
    code, out, err = run("demo", "--all", *small, "--out", tmp_path, "--json")
    assert code == 0, err
    *pictures, video = json.loads(out)["sheets"]
    assert video["model"] == "shapes:video"
    assert [panel["name"] for panel in video["panels"]] == ["plain", "BroadWay"]
    assert all(panel["direction"]["n"] == 1 for panel in video["panels"])
    assert [len(r.controls) for r in read(tmp_path / "demo-video.png")] == [0, 1]
    for sheet, found in zip(SHEETS, pictures, strict=True):
        assert found["model"] == sheet.model
        assert [panel["name"] for panel in found["panels"]] == [panel.name for panel in sheet.panels]
        n = 4 // sheet.share
        assert found["images_per_panel"] == n
        for panel in found["panels"]:
            for mark in ("present", "bound", "right"):
                one = panel[mark]
                assert one["n"] == n
                assert 0 <= one["low"] <= one["k"] / n <= one["high"] <= 1
        records = read(tmp_path / f"{sheet.file}.png")
        assert [len(r.controls) for r in records] == [len(panel.controls) for panel in sheet.panels]
        assert {r.seeds for r in records} == {tuple(range(min(3, n)))}
        assert {r.shows for r in records} == {tuple(range(min(2, n)))}
        assert (tmp_path / f"{sheet.maps}.png").exists() == bool(sheet.maps)
    code, _, err = run("demo", "--all", *small, "--out", tmp_path)
    assert code == 1
    assert "already there" in err
    code, out, err = run("generate", "--from", tmp_path / "demo-text2image.png", "--out", tmp_path / "again", "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["identical"] is True
    assert len(again["images"]) == 2 * len(SHEETS[0].panels)


@pytest.mark.usefixtures("unplugged")
def test_the_demo_makes_one_sheet_and_one_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [next(panel for panel in PANELS if panel.kind == kind) for kind in ("pictures", "words", "clip", "vision")]
    monkeypatch.setattr("attnctl.app.commands.demo.PANELS", tuple(map(quick, few)))
    code, out, err = run("demo", "--out", tmp_path)
    assert code == 0, err
    for panel in few:
        assert panel.title.partition(":")[0] in out
        assert panel.recorded.command in out
    assert "100 of 100 parts" in err
    assert [len(r.controls) for r in read(tmp_path / "demo.png")] == [0, 1, 0, 1, 0, 0]


def quick(panel: Panel) -> Panel:
    return dataclasses.replace(panel, steps=2 if panel.kind != "vision" else 1)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_the_demo_says_what_was_recorded(panel: Panel) -> None:
    said, root = panel.recorded, Path(__file__).parents[1] / "benchmarks"
    data = json.loads((root / "results" / said.file).read_text(encoding="utf-8"))

    def at(place: str) -> Any:
        found = data
        for key in place.split("/"):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    plain, control, gain, n = said.places
    assert (at(plain), at(control), tuple(at(gain))) == (said.plain, said.control, said.gain)
    assert math.prod(at(part) for part in n.split(" * ")) == said.n
    assert said.command in {command_of(one) for one in catalogue(root) if one.out == said.file}


def test_the_script_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/reference/records.md").read_text(encoding="utf-8")
    script = text.split("## From a script")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/reference/records.md", "exec"), {})
    (record,) = read("out/circle.png")
    assert record.seeds == (7,)


def test_the_readme_names_every_command_family_and_method() -> None:
    from attnctl.core.hosts.families import FAMILIES
    from attnctl.data.controls import controls

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in (*controls("attnctl"), "attnctl demo", "attnctl generate", "attnctl sites", "attnctl env"):
        assert name in text, name
    for family in FAMILIES:
        assert f"| {family.name}" in text, f"the README's table lacks {family.name}"


# Small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)]
)
def test_wilson_matches_the_textbook(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_tables_align() -> None:
    assert table(("name", "n"), [("a", 1), ("bcd", 100)]) == "name    n\n----  ---\na       1\nbcd   100"


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["generate", "--prompt", "a red circle on gray"],
        ["maps", "--prompt", "a red circle on gray"],
        ["calibrate", "--model", "shapes:mmdit", "--prompt", "a red circle on gray"],
        ["hunt", "--model", "shapes:mmdit", "--pairs", "1"],
        ["reproduce", "pag", "--toy"],
    ],
    ids=lambda command: command[0],
)
def test_an_output_folder_that_cannot_be_written_is_said_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("attnctl.pipelines.models.load", work)
    (tmp_path / "file").write_text("no folder")
    assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 1
    assert re.search(r"Nothing can be written into .*: file is no folder\. Choose another", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_finding_out_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    from attnctl.plans.writing import WriteError, check_free

    check_free([tmp_path / "new" / "deep" / "a.png"], force=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match="Nothing can be written into /proc/none"):
        check_free(["/proc/none/a.png"], force=True)


@pytest.mark.parametrize("flag", ["--prompts", "--from"])
def test_a_folder_in_the_place_of_a_file_has_a_name(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", flag, ".", "--out", "nowhere"]) == 1
    assert "attnctl: . is " in capsys.readouterr().err


def test_a_control_that_cannot_be_parsed_is_said_without_a_place_in_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a red circle", "--control", "PAG("]) == 2
    said = capsys.readouterr().err
    assert "Cannot read the control 'PAG(' ('(' was never closed); expected a method" in said
