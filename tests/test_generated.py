"""What the docs read off the code is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import the script that writes the docs."""
    monkeypatch.syspath_prepend(DOCS)
    import generate as module

    return module


def test_generated_parts_are_current(generate: object) -> None:
    assert not generate.outdated(), "run: python docs/generate.py"  # type: ignore[attr-defined]


def test_a_mark_without_its_control_or_page_is_refused(generate: object, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: reference Nothing -->\nold\n<!-- end -->\n")
    with pytest.raises(LookupError, match="Nothing"):
        generate.written(page)  # type: ignore[attr-defined]
    with pytest.raises(LookupError, match=r"There is no page .*nothing\.md"):
        generate.page("nothing")  # type: ignore[attr-defined]


def test_text_around_the_marks_stays(generate: object, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- generated: reference SLG -->\nold\n<!-- end -->\n\nafter\n")
    text = generate.written(page)  # type: ignore[attr-defined]
    assert text.startswith("before\n\n<!-- generated: reference SLG -->\n\nEvery field")
    assert text.endswith("\n\n<!-- end -->\n\nafter\n")
    assert "old" not in text
    assert "\n| `scale` | 2.8 |" in text
    assert "generate" in sys.modules
