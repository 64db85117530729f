"""The closed forms of the PAG family against the reference code of HeadHunter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from attnctl import kernels

FIXTURES = Path(__file__).parent / "fixtures" / "pag" / "headhunter_qkv"
INDEX = json.loads((FIXTURES / "index.json").read_text())


def fixture_cases() -> list[dict]:
    known = ("identity", "uniform", "seg", "argmax", "temp", "logit_II_identity")
    return [c for c in INDEX["cases"] if c["name"].startswith(known)]


@pytest.mark.parametrize("case", fixture_cases(), ids=lambda c: f"{c['file']}-{c['name']}")
def test_headhunter_parity(case: dict) -> None:
    t, layout = load_file(FIXTURES / f"{case['file']}.safetensors"), INDEX["layouts"][case["file"]]
    n, m = layout["N"], layout["T"]
    text_first = layout["order"] == "text_then_image"
    image, text = (slice(m, m + n), slice(0, m)) if text_first else (slice(0, n), slice(n, n + m))
    kind, _, strength = case["name"].partition("_u") if "_u" in case["name"] else (case["name"], "", "1")
    how: dict = {
        "u": float(strength.split("_")[0]),
        "heads": tuple(case["heads"]),
        "image": image,
        "text": text,
    }
    if kind.startswith("temp"):
        how["target"] = partial(kernels.temperature, x=float(kind.removeprefix("temp")))
    elif kind.startswith("seg"):
        how |= {"target": "query_mean", "scope": {"all": "all", "img": "image", "txt": "text"}[kind[4:]]}
    elif kind == "logit_II_identity":
        how["scope"] = "image_block"
    else:
        how["target"] = kind
    plain = kernels.attention(t["q"], t["k"], t["v"])
    out, want = kernels.perturb(t["q"], t["k"], t["v"], **how), t[f"out.{case['name']}"]
    assert (out - want).abs().max() <= 2e-5
    assert (plain - want).norm() / plain.norm() > 0.05, "a no-op must not pass"


def test_every_parity_case_is_found() -> None:
    assert len(fixture_cases()) == 46
