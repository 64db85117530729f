"""The notebook of the tutorial runs from top to bottom, offline, and is kept without outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(code) >= 5
    assert not [c for c in code if c["outputs"] or c["execution_count"]]


def test_it_runs(tmp_path: Path) -> None:
    text = NOTEBOOK.read_text(encoding="utf-8").replace("STEPS = 20", "STEPS = 2")
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        run_plainly(json.loads(text))  # the same cells in this process
        return
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.reads(text, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in o.get("data", {}) for c in book.cells for o in c.get("outputs", ()))


def run_plainly(book: dict[str, Any]) -> None:
    """Run the code cells in one namespace."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
