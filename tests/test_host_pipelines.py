"""Whole pipelines of diffusers' other denoisers under control: a cheap sample of what benchmarks/pipelines.py runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import zoo_host_pipelines as hosts
import zoo_variants as variants
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

import attnctl
from attnctl.processors import PAG, Capture

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


@pytest.mark.parametrize(
    "name",
    ["bria", "deepfloyd", "ddpm", "kandinsky5", "ltx2", "stable_cascade_prior", "anyflow", "pix2pix", "sdxl_inpaint"],
)
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
    assert recorded["found"].keys() == {*hosts.NAMES, *variants.NAMES}
    assert recorded["fault"] == 0


@pytest.mark.parametrize("name", ["cosmos1", "ltx_i2v", "ltx_condition"])
def test_steps_are_counted_whatever_a_pipeline_hands_to_its_scheduler(name: str) -> None:
    """Cosmos steps both predictions first; LTX steps all frames but those that are given."""
    pipe, kwargs = variants.build(name)
    guidance, maps = PAG(scale=2.0, start=0.4, sites="self"), Capture(words=(1,))
    with attnctl.control(pipe, guidance, maps) as handle:
        variants.run(pipe, kwargs, steps=4)
        assert handle.passes == 2
        steps = handle.result(maps).steps
    assert len(steps) == 4


def test_the_grid_is_read_off_the_places_of_tokens() -> None:
    pipe, kwargs = variants.build("ltx_condition")
    late = {"image": None, "conditions": [LTXVideoCondition(image=variants.PICTURE, frame_index=8)]}
    control = Capture(words=(1,))
    with attnctl.control(pipe, control) as handle:
        variants.run(pipe, kwargs | late)
        maps = handle.result(control)
    assert next(iter(maps.values())).shape == (1, 3, 6, 4)


def test_what_was_recorded_outlasts_timesteps_that_nothing_runs_at() -> None:
    """Wan Animate sets them again after its last segment."""
    pipe, kwargs = hosts.build("wan_animate")
    control = Capture(words=(1,))
    with attnctl.control(pipe, control) as handle:
        hosts.run(pipe, kwargs)
        assert len(handle.result(control).steps) == 3
