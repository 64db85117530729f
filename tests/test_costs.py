"""What the how-to pages say of methods: the denoiser's further calls are counted, and each row names its test."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairs
import pytest
import zoo_pipelines as pipes

from attnctl.data.controls import controls

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:attnctl")]
HOWTO = Path(__file__).parents[1] / "docs" / "howto"
CALLS = {"none": 0.0, "1 per step": 1.0, "1 per step, of the reference": 1.0, "1 per region and run": 1 / pairs.STEPS}
FIRST = {"BroadWay": "motion", "EnhanceAVideo": "crossed", "Inject": "flowing", "FlowEdit": "flowing"}


def rows(page: str) -> Iterator[list[str]]:
    """Return the cells of each row of a page's table."""
    lines = (HOWTO / page).read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    return ([cell.strip() for cell in line.strip("|").split("|")] for line in table)


COSTS = {name: cells[1] for cells in rows("cost.md") for name in re.findall(r"`(\w+)`", cells[0])}


def test_rows_name_methods_and_their_fields() -> None:
    assert set(COSTS) <= set(controls("attnctl"))
    fields = {f.name for cls in controls("attnctl").values() for f in dataclasses.fields(cls)}
    named = {word for cells in rows("cost.md") for word in re.findall(r"`(\w+)`", cells[3])}
    assert named - set(controls("attnctl")) <= fields


@pytest.mark.parametrize("host", ["unet", "motion", "crossed", "flowing"])
def test_further_calls_are_as_many_as_the_page_says(host: str) -> None:
    made = pairs.HOSTS[host]()
    for name, control in made.first.items():
        if FIRST.get(name, "unet") != host or name not in COSTS:
            continue
        changes: dict[str, Any] = {"refine_steps": 0} if name == "AttendExcite" else {}
        if name not in ("FateZero", "Inject", "FlowEdit"):
            changes |= {"start": 0.0, "stop": 1.0}
        under = dataclasses.replace(control, **changes)  # type: ignore[type-var]
        editing = pairs._editing((under,))
        further = calls(made, (under,), editing) - calls(made, (), editing)
        assert further == CALLS[COSTS[name]] * pairs.STEPS, name


def calls(made: pairs.Host, under: tuple[Any, ...], editing: str) -> int:
    """Count the calls of the denoiser in one run."""
    model, count = pipes.denoiser(made.pipe), []
    forward = model.forward

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        pairs.run(made, under, editing)
    finally:
        del model.forward
    return len(count)


def test_each_way_of_running_names_its_tests() -> None:
    known = set(
        re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in Path(__file__).parent.glob("*.py")), re.M)
    )
    for cells in rows("offload.md"):
        named = re.findall(r"`(test_\w+)`", cells[2])
        assert named, cells[0]
        assert set(named) <= known, cells[0]
