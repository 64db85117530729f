"""The template of docs/tutorial/own_control.md: a control outside the package does what one inside does."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from contract import Replace, assert_clean, distance, perturbed, snapshot

import attnctl
from attnctl.errors import ConfigError
from attnctl.processors import SoftPAG

SCRIPT = Path(__file__).parents[1] / "examples" / "own_control.py"
SITE = "transformer_blocks.2.attn"


def own() -> Any:
    """Load the example as a module."""
    spec = importlib.util.spec_from_file_location("own_control", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["own_control"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_uses_public_names_only() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    modules = [line.split()[1] for line in text.splitlines() if line.startswith("from attnctl")]
    assert set(modules) <= {"attnctl.core.registry", "attnctl.data.about", "attnctl.processors"}
    assert "._" not in text


def test_it_equals_logits_divided_by_the_temperature() -> None:
    q, k, v = (
        torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )

    class Call:
        """As much of an AttnCall as the control looks at."""

        scale = None

        def __init__(self) -> None:
            self.q = q

        def with_(self, *, scale: float) -> torch.Tensor:
            return attnctl.attention(q, k, v, scale=scale)

    out = own().Tempered(temperature=3.0).flattened(Call(), lambda result: result)
    expected = torch.softmax(q @ k.mT / (3.0 * 8**0.5), -1) @ v
    assert distance(out, expected) < 1e-12


def test_limits_are_the_plain_and_the_even_map() -> None:
    model, inputs = zoo.build("sd3", dtype=torch.float64)
    with torch.no_grad():
        plain = zoo.call(model, inputs)
        same = perturbed(model, own().Tempered(temperature=1.0, sites=SITE), inputs)
        flat = perturbed(model, own().Tempered(temperature=1e9, sites=SITE), inputs)
        even = perturbed(model, SoftPAG(u=1.0, target="uniform", sites=SITE), inputs)
    assert distance(same, plain) < 1e-12
    assert distance(flat, even) < 1e-6
    assert distance(flat, plain) > 1e-6


def test_it_guides_composes_and_leaves_no_trace() -> None:
    model, inputs = zoo.build("sd3", dtype=torch.float64)
    guide = own().Tempered(scale=2.0, sites=SITE)
    with torch.no_grad():
        plain, before = zoo.call(model, inputs), snapshot(model)
        damaged = perturbed(model, guide, inputs)
        with attnctl.control(model, guide, layout="cond") as handle:
            guided = zoo.call(model, inputs)
            handle.enabled = False
            off = zoo.call(model, inputs)
        assert_clean(before, model)
        with attnctl.control(model, guide, SoftPAG(scale=1.0, sites=SITE), layout="cond") as handle:
            zoo.call(model, inputs)
            assert handle.passes == 2
    assert distance(guided, plain + 2.0 * (plain - damaged)) < 1e-12
    assert torch.equal(off, plain)
    assert torch.equal(zoo.call(model, inputs).detach(), plain)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_it_refuses_what_it_cannot_do(value: float) -> None:
    with pytest.raises(ConfigError, match="temperature="):
        own().Tempered(temperature=value)


def test_the_shorter_one_of_the_page_works_as_printed() -> None:
    page = (SCRIPT.parents[1] / "docs/tutorial/own_control.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Sharper" in c)
    names: dict[str, Any] = {"__name__": "sharper"}
    exec(compile(code, "extending.md", "exec", dont_inherit=True), names)
    model, inputs = zoo.build("sd15", dtype=torch.float64)

    def by_hand(call: Any, proceed: Any) -> torch.Tensor:
        logits = call.q @ call.k.mT * call.q.shape[-1] ** -0.5
        return torch.softmax(1.2 * logits, -1) @ call.v

    with torch.no_grad():
        plain, before = zoo.call(model, inputs), snapshot(model)
        with attnctl.control(model, names["Sharper"](sites="mid"), layout="cond"):
            sharper = zoo.call(model, inputs)
        assert_clean(before, model)
        where = names["Sharper"](sites="mid").resolve(attnctl.find_sites(model), None)
        with attnctl.control(model, Replace(function=by_hand, sites=[s.name for s in where]), layout="cond"):
            expected = zoo.call(model, inputs)
    assert distance(sharper, expected) < 1e-12
    assert distance(sharper, plain) > 1e-6
