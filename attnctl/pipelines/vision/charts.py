"""Pictures of a finished training: its curve, the confusion matrix or the IoU per class, and some answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from attnctl.data.pictures import blank_figure
from attnctl.pipelines.vision.folders import IGNORED
from attnctl.pipelines.vision.runs import Run
from attnctl.plans.writing import publish

__all__ = ["write_charts"]


def write_charts(
    out: Path,
    run: Run,
    model: nn.Module,
    losses: Sequence[float],
    scores: Sequence[float],
    matrix: Tensor,
    examples: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Path, ...]:
    """Write a run's model, description and pictures, all or none; return the files.

    matrix: counts [true, answered]. examples: images, truths and answers. Raises: WriteError where the disk is full.
    """
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    content = {
        "model.safetensors": save(state, metadata={"format": "pt"}),
        "run.json": run.to_json().encode(),
        "curve.png": _curve(losses, scores, "accuracy" if run.task == "classify" else "mean IoU"),
        "predictions.png": _answers(run, examples),
    }
    if run.task == "classify":
        content["confusion.png"] = _confusion(run, matrix)
    else:
        content["iou.png"] = _iou(run)
    files = {out / name: data for name, data in content.items()}
    publish(files, force=True)
    return tuple(files)


def _curve(losses: Sequence[float], scores: Sequence[float], name: str) -> bytes:
    figure = blank_figure(6, 3.5)
    left = figure.subplots()
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, color="C0")
    left.set(xlabel="epoch", ylabel="training loss")
    right = left.twinx()
    right.plot(epochs, scores, color="C1")
    right.set(ylabel=f"test {name}", ylim=(0, 1))
    return _png(figure)


def _confusion(run: Run, matrix: Tensor) -> bytes:
    n = len(run.classes)
    figure = blank_figure(3 + 0.5 * n, 2.5 + 0.5 * n)
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for row in range(n):
        for column in range(n):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, int(matrix[row, column]), ha="center", va="center", color=color)
    axes.set(xlabel="answered", ylabel="true", xticks=range(n), yticks=range(n))
    axes.set_xticklabels(run.classes, rotation=45, ha="right")
    axes.set_yticklabels(run.classes)
    axes.set_title(f"{run.scores['accuracy']:.1%} of {int(matrix.sum())} test pictures right")
    return _png(figure)


def _iou(run: Run) -> bytes:
    iou = run.scores["iou"]
    figure = blank_figure(6, 1.5 + 0.35 * len(iou))
    axes = figure.subplots()
    axes.barh(list(iou), list(iou.values()), color="C0")
    for row, value in enumerate(iou.values()):
        axes.text(min(value + 0.01, 0.93), row, f"{value:.2f}", va="center")
    axes.set(xlabel="intersection over union", xlim=(0, 1), title=f"mean IoU {run.scores['mean_iou']:.3f}")
    axes.invert_yaxis()
    return _png(figure)


def _answers(run: Run, examples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bytes:
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (run.mean, run.std))
    shown = examples[:8]
    figure = blank_figure(1.6 * max(1, len(shown)), 2.2 if run.task == "classify" else 5)
    rows = figure.subplots(1 if run.task == "classify" else 3, max(1, len(shown)), squeeze=False)
    for axes in rows.flat:
        axes.axis("off")
    for column, (image, truth, answer) in enumerate(shown):
        rows[0, column].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0))
        if run.task == "classify":
            right = bool(truth == answer)
            said = run.classes[int(answer)] + ("" if right else f"\nis {run.classes[int(truth)]}")
            rows[0, column].set_title(said, color="black" if right else "red", fontsize=8)
            continue
        top = len(run.classes) - 1
        rows[1, column].imshow(truth.masked_fill(truth == IGNORED, 0), vmin=0, vmax=max(1, top), cmap="tab10")
        rows[2, column].imshow(answer, vmin=0, vmax=max(1, top), cmap="tab10")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()
