"""PAG and SoftPAG against recorded runs: diffusers' PAG pipelines, and HeadHunter's definition for single heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import attnctl
from attnctl.processors import PAG, SoftPAG

FIXTURES = Path(__file__).parent / "fixtures" / "pag"
CASES = sorted(p.relative_to(FIXTURES) for p in FIXTURES.glob("*/cases/*.json"))
TOLERANCE = 1e-4  # relative L2, as the fixtures' README asks


def load(case: Path) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Load a recorded case: the plain pipeline, its call, the recorded tensors, the description."""
    info = json.loads((FIXTURES / case).read_text())
    tensors = load_file((FIXTURES / case).with_suffix(".safetensors"))
    cls = getattr(diffusers, info["plain_class"])
    folder = FIXTURES / case.parts[0] / "pipeline"
    pipe = cls.from_pretrained(folder, **dict.fromkeys(info["null_components"]), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if "scheduler_config" in info:
        pipe.scheduler = getattr(diffusers, info["scheduler"]).from_config(info["scheduler_config"])
    call = {k: v for k, v in info["call"].items() if not k.startswith("pag_")}
    call |= {k.removeprefix("in."): v for k, v in tensors.items() if k.startswith("in.")}
    return pipe, call, tensors, info


def guidance_of(info: dict[str, Any]) -> PAG | SoftPAG:
    """Say what was recorded in attnctl's words."""
    if "heads" in info:
        return SoftPAG(
            scale=info["perturb_guidance_scale"],
            u=info["interpolation_u"],
            heads=[tuple(pair) for pair in info["heads"]],
        )
    adaptive = info["call"].get("pag_adaptive_scale", 0.0)
    return PAG(
        scale=info["call"]["pag_scale"],
        sites=info["resolved_attention_modules"],
        adaptive=adaptive,
        adaptive_form="timestep",
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute the relative L2 distance of a to b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("case", CASES, ids=lambda p: f"{p.parts[0]}-{p.stem}")
def test_recorded_run(case: Path) -> None:
    pipe, call, tensors, info = load(case)
    with attnctl.control(pipe, guidance_of(info)) as handle:
        out = pipe(**call, output_type="latent").images
    assert distance(out, tensors["out.latents"]) <= TOLERANCE
    assert distance(out, tensors["control.no_pag_latents"]) > 0.02
    assert handle.passes > 0
    plain = pipe(**call, output_type="latent").images
    assert distance(plain, tensors["control.no_pag_latents"]) <= TOLERANCE


def test_all_cases_are_here() -> None:
    assert len(CASES) == 25
