"""Whole pipelines of diffusers' other denoisers under control: a cheap sample of what benchmarks/pipelines.py runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import zoo_host_pipelines as hosts

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "pipelines.py"

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not BENCHMARK.is_file(), reason="the package is installed without its clone"),
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """Load benchmarks/pipelines.py."""
    spec = importlib.util.spec_from_file_location("pipelines_of_hosts", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bria", "deepfloyd", "ddpm", "kandinsky5", "ltx2", "stable_cascade_prior", "anyflow"])
def test_pipelines_are_guided_and_captured_and_left_clean(name: str, benchmark: Any) -> None:
    found = benchmark.measured(name)
    assert found["controls"]
    assert all(cell["clean"] for cell in found["controls"].values())
    recorded = json.loads(benchmark.RESULT.read_text())["found"][name]
    states = {control: cell["state"] for control, cell in found["controls"].items()}
    assert states == {control: cell["state"] for control, cell in recorded["controls"].items()}
    assert "fault" not in states.values()


def test_the_result_is_of_all_pipelines(benchmark: Any) -> None:
    recorded = json.loads(benchmark.RESULT.read_text())
    assert recorded["found"].keys() == {*hosts.NAMES}
    assert recorded["fault"] == 0
