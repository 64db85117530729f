"""Calibration of whole pipelines: what it keeps, resuming, several settings, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo_pipelines

import attnctl
from attnctl.errors import ConfigError, PlanError
from attnctl.pipelines import calibrate
from attnctl.plans import ModelPlan
from attnctl.processors import PARO

torch.set_num_threads(1)


def tiny(host: str):  # type: ignore[no-untyped-def]
    pipe, kwargs = zoo_pipelines.build(host, dtype=torch.float64)
    told = {k: kwargs.pop(k) for k in list(kwargs) if "embeds" in k or k == "prompt"}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("generator", "output_type")} | {"num_inference_steps": 2}
    return zoo_pipelines.quiet(pipe), told, kwargs


@pytest.mark.parametrize("host", ["sd3", "wan", "cogvideox", "flux"])
def test_a_full_plan_changes_nothing_and_a_thin_one_runs(host: str, tmp_path: Path) -> None:
    pipe, told, kwargs = tiny(host)
    arguments = {**kwargs, "output_type": "latent"}

    def run() -> torch.Tensor:
        out = pipe(**told, generator=torch.Generator().manual_seed(3), **arguments)
        return out[0] if isinstance(out[0], torch.Tensor) else torch.stack(list(out[0]))

    plain = run()
    found = calibrate(pipe, [told], density=1.0, block=4, call=kwargs, quiet=True)
    assert found.captured == pytest.approx(1)
    assert found.plan.density == 1
    with attnctl.control(pipe, PARO(found.plan)):
        assert (run() - plain).abs().max() <= 1e-8
    thin = calibrate(pipe, [told], density=0.4, block=4, groups=2, call=kwargs, quiet=True)
    assert 0.4 <= thin.captured < 1
    assert all(p.groups == 2 for p in thin.plan.plans.values())
    assert all(r["captured"] >= r["captured_model_order"] - 0.05 for r in thin.rows)
    folder = thin.plan.save_pretrained(tmp_path)
    with attnctl.control(pipe, PARO(str(folder))):
        sparse = run()
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, plain)
    assert torch.equal(run(), plain)


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, told, kwargs = tiny("sd3")
    settings = {"density": 0.5, "block": 4, "call": kwargs, "quiet": True, "metric": "paro"}
    prompts = [told, {**told, "guidance_scale": 3.0}, {**told, "guidance_scale": 4.0}]
    first = kwargs.get("guidance_scale")
    whole = calibrate(pipe, prompts, **settings)
    original, calls = type(pipe).__call__, []

    def stops(self, **options):  # type: ignore[no-untyped-def]
        calls.append(options.get("guidance_scale"))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, **options)

    monkeypatch.setattr(type(pipe), "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, prompts, out=tmp_path / "run", **settings)
    again = calibrate(pipe, prompts, out=tmp_path / "run", **settings)
    assert calls == [first, 3.0, 3.0, 4.0]
    assert again.plan.plans.keys() == whole.plan.plans.keys()
    for name, plan in whole.plan.plans.items():
        assert torch.equal(plan.keep, again.plan.plans[name].keep)
        assert plan.order == again.plan.plans[name].order
    with pytest.raises(PlanError, match="other prompts or settings"):
        calibrate(pipe, prompts[:2], out=tmp_path / "run", **settings)
    (tmp_path / "run" / "orders-1.safetensors").write_bytes(b"broken")
    with pytest.raises(PlanError, match=r"orders-1\.safetensors cannot be read"):
        calibrate(pipe, prompts, out=tmp_path / "run", **settings)
    assert not attnctl.handle_of(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density=0 was given"),
        ({"density": 1.01}, r"density=1\.01 was given"),
        ({"block": 0}, "block=0 was given"),
        ({"groups": -1}, "groups=-1 was given"),
        ({"metric": "best"}, "metric='best' was given"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "a cat"}, "expected a list"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    pipe, told, kwargs = tiny("sd3")
    with pytest.raises(ConfigError, match=message):
        calibrate(pipe, **({"prompts": [told], "call": kwargs} | arguments))


def test_unets_are_calibrated_level_by_level() -> None:
    pipe, told, kwargs = tiny("sd")
    found = calibrate(pipe, [told], density=0.5, block=4, call=kwargs, quiet=True)
    assert isinstance(found.plan, ModelPlan)
    assert all(grid[0] == 1 for grid in (p.grid for p in found.plan.plans.values()))  # type: ignore[index]
