"""The table of controls and denoiser classes is what runs: a sample of its rows is run again."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo

from attnctl.core.hosts import classes
from attnctl.data import coverage
from attnctl.data.controls import controls

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "coverage.py"

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not BENCHMARK.is_file(), reason="the package is installed without its clone"),
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """Load benchmarks/coverage.py under a name of its own: `coverage` is what measures tests."""
    spec = importlib.util.spec_from_file_location("coverage_of_hosts", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bria", "dit", "prx", "skyreels2"])
@pytest.mark.filterwarnings("ignore:attnctl")
def test_what_is_ticked_is_what_runs(name: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", benchmark.FRAMES)
    found = benchmark.measured(name)
    row = coverage.stored()[found["class"]]
    assert (row.family, dict(row.sites), row.through) == (found["family"], found["sites"], found["through"])
    states = {n: state for n, (state, _) in found["cells"].items() if n in row.cells}  # a newer control is unknown
    assert {n: cell.state for n, cell in row.cells.items()} == states


def test_every_class_is_in_the_table_with_controls_that_there_are() -> None:
    rows = coverage.stored()
    assert rows.keys() == {*classes.denoiser_classes()}
    assert all(row.cells.keys() <= controls("attnctl").keys() for row in rows.values())


def test_the_package_holds_the_recorded_result(benchmark: Any) -> None:
    assert coverage.STORED.read_text() == benchmark.RESULT.read_text()


def test_no_class_has_a_fault() -> None:
    rows = coverage.stored()
    assert not {(c, n): cell.why for c, row in rows.items() for n, cell in row.cells.items() if cell.state == "fault"}
    assert not {c: row.wrong for c, row in rows.items() if row.wrong}
    assert not {c: row.through for c, row in rows.items() if row.through != "exact" and "refused" not in row.through}


def test_models_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "attnctl.core.hosts.classes.denoiser_classes", lambda: ("FluxTransformer2DModel", "TomorrowTransformer2DModel")
    )
    code, out, _ = run("models", "--json")
    assert code == 0
    found = json.loads(out)["models"]
    assert found["FluxTransformer2DModel"]["controls"]["PAG"]["state"] == "acts"
    assert {cell["state"] for cell in found["TomorrowTransformer2DModel"]["controls"].values()} == {"unknown"}
    code, out, _ = run("models", "TomorrowTransformer2DModel")
    assert code == 0
    assert "unknown" in out
    code, out, _ = run("models", "FLUX.1")
    assert code == 0
    assert "joint" in out
    code, _, err = run("models", "FluxTransformer")
    assert code == 2
    assert "Did you mean 'FluxTransformer2DModel'" in err
