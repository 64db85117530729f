"""What an experiment will cost: pictures, denoiser rows, seconds and gigabytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from attnctl.pipelines.reproduce.recipes import Experiment

__all__ = ["Cost", "estimate", "in_words"]

_SHARE = 1 / 3  # of a matrix product's speed: what diffusion models reach, about
_GPU = 300.0  # TFLOP per second of a matrix product on a large GPU, for plans that are made on a CPU
_BYTES = 2.0  # per pixel of a PNG with its record, about


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an experiment will cost.

    Attributes:
        pictures: Pictures of all variants.
        finished: Of them, those that are there already.
        rows: Rows that the denoiser computes for the rest, over all steps.
        seconds: Of the rest, about, on this machine with so many processes.
        download_gb: Gigabytes of weights.
        memory_gb: Gigabytes of the accelerator's memory.
        disk_gb: Gigabytes that the pictures take.
        basis: What the seconds are computed from.
        gpu_seconds: Of the rest, about, on one GPU whose matrix product reaches 300 TFLOP per second; 0 where it is
            timed.
    """

    pictures: int
    finished: int
    rows: float
    seconds: float
    download_gb: float
    memory_gb: float
    disk_gb: float
    basis: str
    gpu_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def estimate(
    experiment: Experiment,
    count: int,
    finished: Sequence[int],
    device: str,
    dtype: str,
    processes: int = 1,
    seen: Sequence[Sequence[float]] = (),
    row_seconds: float | None = None,
    clip_frames: float = 1.0,
) -> Cost:
    """Estimate the cost of an experiment.

    Args:
        experiment: The experiment.
        count: Pictures of each variant.
        finished: For each variant, how many of them are there.
        device: Where it will run.
        dtype: How precisely.
        processes: How many share the work.
        seen: For each variant, seconds of pictures that an earlier run made here.
        row_seconds: Seconds per row and step, where they have been timed.
        clip_frames: Frames of a clip to edit, each of which is a row.
    """
    rows, seconds, basis = 0.0, 0.0, "times of earlier pictures"
    for i, variant in enumerate(experiment.variants):
        left = count - finished[i]
        mine = left * experiment.steps * variant.rows * clip_frames
        rows += mine
        if i < len(seen) and seen[i]:
            seconds += left * statistics.median(seen[i])
        elif row_seconds is not None:
            seconds, basis = seconds + mine * row_seconds, "a short run here"
        else:
            speed = _tflops(device, dtype)
            seconds += mine * experiment.row_tflop / (speed * _SHARE)
            basis = (
                f"{experiment.row_tflop:g} TFLOP per row and step, at a third of the {speed:.3g} TFLOP/s of a matrix "
                f"product on {device} in {dtype}"
            )
    frames = experiment.options.get("num_frames", 1) * clip_frames
    pixels = (experiment.height or 64) * (experiment.width or experiment.height or 64) * frames
    pictures = count * len(experiment.variants)
    return Cost(
        pictures=pictures, finished=sum(finished), rows=rows, seconds=round(seconds / processes, 1),
        download_gb=experiment.weights_gb, memory_gb=experiment.memory_gb,
        disk_gb=round(pictures * pixels * _BYTES / 1e9, 3), basis=basis,
        gpu_seconds=round(rows * experiment.row_tflop / (_GPU * _SHARE), 1),
    )  # fmt: skip


def in_words(experiment: Experiment, cost: Cost, cpu: bool = False) -> str:
    """Say what an experiment will cost, in one line; `cpu` where that was estimated for one."""
    wanted = f"; on a GPU of {_GPU:g} TFLOP/s {_hours(cost.gpu_seconds)}" if experiment.gpu and cpu else ""
    there = f", {cost.finished} of them there already" if cost.finished else ""
    return (
        f"{experiment.label}: {cost.pictures} images in {len(experiment.variants)} variants{there}; {cost.rows:,.0f} "
        f"denoiser rows; about {cost.seconds:,.0f} seconds ({_hours(cost.seconds)}; {cost.basis}){wanted}; "
        f"{cost.download_gb:g} GB to fetch, {cost.memory_gb:g} GB of memory, {cost.disk_gb:g} GB of disk"
    )


def _hours(seconds: float) -> str:
    if seconds < 90:
        return "a minute or less"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"


@cache
def _tflops(device: str, dtype: str) -> float:
    """Time a matrix product, in TFLOP per second."""
    import torch

    n = 1024 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))

    def run() -> float:
        began = time.perf_counter()
        for _ in range(3):
            product = a @ a
        float(product[0, 0])  # waits for an accelerator
        return (time.perf_counter() - began) / 3

    run()
    return 2 * n**3 / min(run(), run()) / 1e12
