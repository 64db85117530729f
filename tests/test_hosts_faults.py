"""The faults of diffusers that the documentation describes are there: its scripts print what it says."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import zoo

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "hosts_faults.md"
HEAD, *SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
VERSION = "0.42.1"

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(diffusers.__version__ != VERSION, reason=f"the page describes diffusers {VERSION}"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=["seg", "pag", "layer skip", "backend"])
def test_a_script_prints_what_the_page_says(script: str) -> None:
    printed, (expected,) = io.StringIO(), re.findall(r"^# (.*)$", script, re.MULTILINE)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(HEAD + script, {})
    assert printed.getvalue().strip() == expected


def test_the_guider_of_pag_raises_on_fourteen_families() -> None:
    from diffusers.guiders import PerturbedAttentionGuidance

    raised = set()
    for name in ("sd3", "flux", "flux2", "sana", "hunyuandit", "auraflow", "lumina2", "cogvideox", "wan", "ltx",
                 "hunyuanvideo", "mochi", "cosmos", "allegro", "qwen"):  # fmt: skip
        with torch.device("meta"):
            model = zoo._FAMILIES[name](zoo.Draw(1, 0))[0]
        guider = PerturbedAttentionGuidance(perturbed_guidance_layers=[0], perturbed_guidance_start=0.0,
                                            perturbed_guidance_stop=1.0)  # fmt: skip
        guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
        try:
            for _ in range(3):
                guider.prepare_models(model)
        except (ValueError, AttributeError):
            raised.add(name)
    assert len(raised) == 14
    assert "qwen" not in raised
