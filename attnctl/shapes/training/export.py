"""Finish the folder of an exported pipeline: files that every supported transformers reads, and the training record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from attnctl.shapes.tokenizer import write_tokenizer
from attnctl.shapes.training.loop import read_history, read_step

__all__ = ["put_lineage", "settle"]

_LINEAGE = "before.json"


def put_lineage(out: Path, start: Path | None) -> None:
    """Write into the folder of a run which runs it goes back to: that of `start` and the ones before it."""
    if start is None:
        return
    runs = [*_lineage(start), _run(start)]
    out.mkdir(parents=True, exist_ok=True)
    (out / _LINEAGE).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def _lineage(out: Path) -> list[dict[str, Any]]:
    path = out / _LINEAGE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _run(out: Path) -> dict[str, Any]:
    return {"step": read_step(out), "history": read_history(out)}


def _name_as_clip(target: Path) -> None:
    """Give the weights of CLIP's text encoders in `target` the prefix that older versions of transformers expect."""
    for text in target.glob("text_encoder*/model.safetensors"):
        tensors = {
            n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
            for n, t in load_file(text).items()
        }
        save_file(tensors, text, metadata={"format": "pt"})


def settle(
    out: Path, target: Path, step: int, *, tokenizer: Callable[[Path], object] = write_tokenizer, clip: bool = True
) -> None:
    """Make the pipeline saved in `target` readable everywhere and put the training record of `out` beside it.

    Args:
        out: folder of the run.
        target: folder of the pipeline.
        step: how many steps were made.
        tokenizer: writes the files of the tokenizer into a folder.
        clip: whether the text encoders are CLIP's.
    """
    # The newest transformers writes formats and names that older ones cannot read; these serve all of them.
    for folder in target.glob("tokenizer*"):
        shutil.rmtree(folder)
        tokenizer(folder)
    if clip:
        _name_as_clip(target)
    else:
        index = json.loads((target / "model_index.json").read_text(encoding="utf-8"))
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for config in target.glob("*/config.json"):
        facts = json.loads(config.read_text(encoding="utf-8"))
        if facts.pop("_name_or_path", None) is not None:  # the folder on the machine that trained it
            config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if (out / "log.jsonl").exists():
        rows = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()[4::5]
        (target / "training.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    record: dict[str, Any] = {"step": step, "history": read_history(out)}
    if before := _lineage(out):
        record["before"] = before
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)  # some writers leave it readable by its owner only
