"""Every method is its formula, written out map by map in float64: the rows of benchmarks/fidelity.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from attnctl.data.controls import controls

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, FOLDER)
try:
    import formulas_vision  # noqa: F401  (enters its rows)
    from formulas import ROWS
finally:
    sys.path.remove(FOLDER)  # where scripts have the names of methods

NAMES = {"AStar": "A-STAR", "AttendExcite": "Attend-and-Excite", "EnhanceAVideo": "Enhance-A-Video"}
NAMES |= {"PromptToPrompt": "prompt-to-prompt"}
ELSEWHERE = {"FlowEdit": "test_flow_paths.py", "Inject": "test_edit_transformers.py"}


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_its_formula(name: str) -> None:
    got, want = ROWS[name][1]()
    assert (got.dtype, want.dtype) == (torch.float32, torch.float64)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()
    assert want.abs().max() > 0


def test_every_method_has_a_row() -> None:
    """Or a test of its own, which compares it with its formula."""
    for method, cls in controls("attnctl").items():
        own = Path(__file__).with_name(ELSEWHERE.get(method, f"test_{cls.about.page}.py"))  # type: ignore[attr-defined]
        assert any(NAMES.get(method, method) in name for name in ROWS) or own.is_file(), method
