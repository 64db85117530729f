"""Calibration of whole pipelines: what it keeps, resuming, several settings, bad input."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import processes
import pytest
import torch
import zoo_pipelines

import attnctl
from attnctl.app.cli import main
from attnctl.errors import ConfigError, PlanError
from attnctl.pipelines import calibrate, check_plan, write_report
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
        ({"budget": "heads"}, "budget='heads' was given"),
        ({"eps": -1.0}, r"eps=-1\.0 was given"),
        ({"sigma": float("nan")}, "sigma=nan was given"),
        ({"alpha": 2}, "alpha=2 was given"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "a cat"}, "expected a list"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    pipe, told, kwargs = tiny("sd3")
    with pytest.raises(ConfigError, match=message):
        calibrate(pipe, **({"prompts": [told], "call": kwargs} | arguments))


def test_budgets() -> None:
    pipe, told, kwargs = tiny("sd3")
    found = {
        b: calibrate(pipe, [told], density=0.4, block=4, groups=2, budget=b, call=kwargs, quiet=True)
        for b in ("head", "site", "model")
    }
    kept = {b: torch.stack([p.keep.double().mean((-2, -1)) for p in f.plan.plans.values()]) for b, f in found.items()}
    assert all(0.4 <= k.mean() < 0.5 for k in kept.values())
    assert kept["head"].std() < min(kept["site"].std(), kept["model"].std())
    # One budget for all keeps at least as much of the whole attention.
    whole = {b: sum(r["dropped"] for r in f.rows) for b, f in found.items()}
    assert whole["model"] <= whole["head"] + 1e-9
    for f in found.values():
        for row in f.rows:
            assert row["predicted_error"] == 2 * row["dropped"]
            assert 0 <= row["dropped"] <= 1 - row["captured"] + 1e-9


def test_the_report_and_the_check(tmp_path: Path) -> None:
    pipe, told, kwargs = tiny("sd")
    found = calibrate(pipe, [told], density=0.4, block=4, call=kwargs, quiet=True, model="tiny")
    other = "two birds"
    checks = check_plan(pipe, found.plan, [other], call=kwargs)
    assert checks[0]["psnr_db"] > 0
    assert checks[0]["sites"].keys() == found.plan.plans.keys()
    assert all(0 < e < 2 for e in checks[0]["sites"].values())
    data = write_report(found, tmp_path, checks)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == data
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(name in text for name in found.plan.plans)
    assert "dB to dense" in text
    assert (tmp_path / "maps.png").stat().st_size > 1000
    full = calibrate(pipe, [told], density=1.0, block=4, call=kwargs, quiet=True)
    (exact,) = check_plan(pipe, full.plan, [other], call=kwargs | {"output_type": "latent"})
    assert max(exact["sites"].values()) < 1e-6
    assert exact["psnr_db"] is None or exact["psnr_db"] > 100
    write_report(full, tmp_path / "full")
    assert "Not checked" in (tmp_path / "full" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="at least one prompt"):
        check_plan(pipe, found.plan, [])
    assert not attnctl.handle_of(pipe)


SHARE = """
import sys, torch
torch.set_num_threads(1)
from test_calibrate import tiny
from attnctl.pipelines import calibrate
pipe, told, kwargs = tiny("sd3")
prompts = [told, {**told, "guidance_scale": 3.0}, {**told, "guidance_scale": 4.0}]
found = calibrate(pipe, prompts, density=0.5, block=4, groups=2, call=kwargs, quiet=True, out=sys.argv[1])
found.plan.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts(tmp_path: Path) -> None:
    """As under torchrun or accelerate launch: each prompt is run by one process, and both come to the same plan."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    arguments = [[str(tmp_path / "run"), str(tmp_path / str(rank))] for rank in range(2)]
    ranks = [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    for done in processes.run_all(SHARE, arguments, envs=ranks):
        assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "run").glob("*.safetensors")) == [
        f"{look}-{i}.safetensors" for look in ("masks", "orders") for i in range(3)
    ]
    one, two = (ModelPlan.from_pretrained(tmp_path / str(rank)) for rank in range(2))
    for name, plan in one.plans.items():
        assert torch.equal(plan.keep, two.plans[name].keep)
        assert plan.order == two.plans[name].order


def test_unets_are_calibrated_level_by_level() -> None:
    pipe, told, kwargs = tiny("sd")
    found = calibrate(pipe, [told], density=0.5, block=4, call=kwargs, quiet=True)
    assert isinstance(found.plan, ModelPlan)
    assert all(grid[0] == 1 for grid in (p.grid for p in found.plan.plans.values()))  # type: ignore[index]


ASKED = ["calibrate", "--prompt", "a red circle on gray", "--block", "16", "--steps", "1", "--guidance", "1"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--check", "a blue square on gray", "--option", "max_sequence_length=0", "--out", str(tmp_path / "plan")]
    assert main([*ASKED, *options, "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    names = [row["name"] for row in data["compared"]]
    said = [line.strip() for line in printed.err.splitlines()]
    assert [line for line in said if line in names] == names  # what runs is named before it runs
    assert said[-1].startswith("compare: ")
    plan = ModelPlan.from_pretrained(tmp_path / "plan")
    assert plan.model == data["model"] == "shapes:mmdit"
    assert data["bytes"] == plan.packed_bytes
    assert [s["site"] for s in data["sites"]] == list(plan.plans)
    assert data["checks"][0]["prompt"] == "a blue square on gray"
    assert {p.name for p in (tmp_path / "plan").glob("*.*")} >= {"report.md", "report.json", "maps.png"}
    assert main([*ASKED, *options]) == 1
    assert "holds a plan already" in capsys.readouterr().err
    alone = ["calibrate", "--check", "a red circle on gray", "--device", "none", "--out", str(tmp_path / "plan")]
    assert main(alone) == 1  # nothing would be written over: what is refused is the device
    assert "Unknown device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--density", "0"], "density=0.0 was given"),
        (["--block", "0"], "block=0 was given"),
        (["--steps", "0"], "--steps"),
        (["--metric", "best"], "expected one of mass, paro, paro_literal"),
        (["--budget", "heads"], "expected one of head, site, model"),
        (["--option", "height"], "expected name=value"),
    ],
)
def test_bad_usage_is_said_before_a_model_is_loaded(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, "--out", str(tmp_path), *extra]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Loading" not in told
