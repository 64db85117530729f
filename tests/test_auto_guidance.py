"""AutoGuidance against a model whose attention outputs are dropped by hand."""

from __future__ import annotations

import pytest
import torch
import zoo
from contract import distance, middle, perturbed, run

from attnctl.errors import ConfigError
from attnctl.processors import AutoGuidance
from attnctl.processors.auto_guidance import dropped


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_equals_the_formula(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    control = AutoGuidance(scale=1.5, dropout=0.3, sites=middle(model))
    with torch.no_grad():
        plain = zoo.call(model, inputs)
        worse = perturbed(model, control, inputs)  # type: ignore[arg-type]
        guided = run(model, inputs, control)
    assert distance(guided, plain + 1.5 * (plain - worse)) <= 1e-12
    assert distance(worse, plain) > 1e-3


def test_the_worse_model_is_one_model() -> None:
    out = torch.ones(3, 2, 40, 8)
    one = dropped(out, 0.25, 7)
    assert torch.equal(one, dropped(out, 0.25, 7))
    assert torch.equal(one[0], one[2])  # rows do not differ
    assert not torch.equal(one, dropped(out, 0.25, 8))
    assert set(one.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert 0.15 < (one == 0).float().mean() < 0.35


def test_no_dropout_is_plain_bit_for_bit() -> None:
    model, inputs = zoo.build("sd15")
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    state = torch.get_rng_state()
    assert torch.equal(plain, run(model, inputs, AutoGuidance(dropout=0.0, sites="mid")))
    assert not torch.equal(plain, run(model, inputs, AutoGuidance(sites="mid")))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("fields", [{"dropout": 1.0}, {"dropout": -0.1}, {"seed": -1}, {"scale": float("nan")}])
def test_bad_fields(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AutoGuidance(**fields)
