"""Compare ways to choose what attention computes, on a model of the user's, at one executed share of the maps.

Every control is run twice on prompts that no plan was made from: once beside the dense run, on that run's own queries
and keys, for the error of each layer and the mass that the chosen blocks hold; once by itself, for decibels and
seconds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.call import AttnCall, Proceed
from attnctl.core.live import LiveControl
from attnctl.errors import ConfigError
from attnctl.kernels.sparse import select as choices
from attnctl.pipelines.refusals import explained
from attnctl.pipelines.stepping import showing_steps
from attnctl.plans import BlockPlan, ModelPlan, Neighborhood, Online
from attnctl.plans.blocks import Blocks
from attnctl.plans.orders import permutation
from attnctl.processors import SparseAttention
from attnctl.processors.sparse.live import LiveSparse

__all__ = ["best_of", "candidates", "compare", "grid_and_steps", "short_form"]

_EVERY = (4, 6, 10, 20)
_LEAST = 0.1  # share of blocks that a step between two choices should keep at least


@dataclass
class _Marks:
    """What one control did to the attention of the dense runs."""

    error: float = 0.0
    size: float = 0.0
    captured: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Beside(SparseAttention, abstract=True):
    """Compute every attention both ways, hand the dense result on, and mark how far the sparse one is from it."""

    marks: _Marks = field(default_factory=_Marks, compare=False)

    def attached(self, *where: Any) -> LiveControl | None:
        live = super().attached(*where)
        assert isinstance(live, LiveSparse)
        return _Watch(live, self.marks)


class _Watch(LiveControl):
    def __init__(self, live: LiveSparse, marks: _Marks) -> None:
        self.live, self.marks = live, marks

    def begin_run(self) -> None:
        self.live.begin_run()

    def before_call(self, passes: Any) -> None:
        self.live.before_call(passes)

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        dense = proceed(call)
        image = call.image or slice(0, call.q.shape[2])
        want = dense[:, :, image].double()
        error = self.live.wrap(call, proceed)[:, :, image].double() - want
        self.marks.error += float(error.square().sum())
        self.marks.size += float(want.square().sum())
        blocks = self.live.blocks_of(call)
        if blocks is not None:
            self.marks.captured.append(captured(call, image, blocks))
        return dense


def captured(call: AttnCall, image: slice, blocks: Blocks) -> float:
    """Return the share of the image's attention that lies in the blocks, read off some queries of every block."""
    q, k = call.q[:, :, image], call.k[:, :, image]
    if blocks.grid is not None and blocks.order[0]:
        there = permutation(blocks.grid, blocks.order[0], blocks.block_k).to(q.device)
        q, k = q.index_select(2, there), k.index_select(2, there)
    text = torch.cat([call.k[:, :, : image.start], call.k[:, :, image.stop :]], 2)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = choices.map_scores(q, k, text, blocks.block_q, blocks.block_k, scale, 4)
    keep = blocks.keep.view(-1, q.shape[1], *scores.shape[2:])
    return float((scores * keep).sum() / scores.sum())


def candidates(density: float, block: int, grid: Sequence[int], steps: int) -> dict[str, SparseAttention]:
    """Return controls that compute one share of the maps, by name.

    Args:
        density: The share, over a whole run.
        block: Tokens in a block.
        grid: Frames, rows and columns of the image tokens.
        steps: Denoising steps.
    """
    made: dict[str, Any] = {"pooled": Online(density=density, by="pooled", every=4, block=block)}
    made["antidiagonal"] = Online(density=density, by="antidiagonal", every=4, block=block)
    for every in _EVERY:
        chosen = -(-steps // every) / steps  # the share of steps that choose, and are dense
        rest = (density - chosen) / (1 - chosen) if chosen < 1 else 0.0
        if rest >= _LEAST:
            made["map"] = Online(density=round(rest, 4), every=every, block=block)
            break
    for every in _EVERY:
        rest = density - -(-steps // every) / steps  # steps that choose compute both
        if rest >= _LEAST:
            made["map, carried on"] = Online(density=round(rest, 4), every=every, block=block, carry=True)
            break
    long = [n for n in grid if n > 1]
    side = density ** (1 / max(len(long), 1))
    made["windows"] = Neighborhood(window=tuple(max(1, round(side * n)) for n in long))
    return {name: SparseAttention(select) for name, select in made.items()}


def compare(
    pipe: Any,
    controls: Mapping[str, SparseAttention],
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    seed: int = 1000,
    call: Mapping[str, Any] | None = None,
    announce: Callable[[str], object] = lambda text: None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run controls beside dense attention.

    Args:
        pipe: A diffusers pipeline.
        controls: What to compare, by name.
        prompts: Texts, or arguments of the call in their place.
        seed: Of the first prompt's noise; prompt i has seed + i.
        call: Other arguments of the pipeline call.
        announce: Called with the name of what runs next.
        quiet: Show no progress.

    Returns:
        For every control its name and short form, the executed share of the maps between image tokens (None for a plan:
        its own density says it), the relative L2 error of attention on the dense run's inputs, the share of the
        attention that its blocks hold (None where there are no blocks), mean decibels to the dense result (None where
        it is the same), and seconds of a run, dense and sparse.

    Raises:
        ConfigError: There is no prompt, or no control.
    """
    if isinstance(prompts, str) or not prompts or not controls:
        raise ConfigError(f"prompts={prompts!r:.80}, {len(controls)} controls: expected at least one of each.")
    runs = [_runner(pipe, prompt, seed + i, call) for i, prompt in enumerate(prompts)]
    beside = sum(_by_run(control) for control in controls.values())
    with showing_steps(pipe, call, (1 + len(controls)) * len(runs) + beside, "compare", quiet=quiet) as shown:
        announce("dense")
        shown.describe("dense")
        dense = _timed(runs)
        rows = []
        for name, control in controls.items():
            announce(name)
            shown.describe(name)
            rows.append(_compared(pipe, name, control, runs, *dense))
    return rows


def _by_run(control: SparseAttention) -> bool:
    """Tell whether a control chooses its blocks while it runs, and has no plan."""
    return not isinstance(control.select, (ModelPlan, BlockPlan, str))


def _compared(
    pipe: Any,
    name: str,
    control: SparseAttention,
    runs: Sequence[Callable[[], Any]],
    dense: Sequence[np.ndarray],
    dense_seconds: float,
) -> dict[str, Any]:
    """Run one control beside the dense results."""
    marks, by_run = _Marks(), _by_run(control)
    if by_run:
        beside = _Beside(
            control.select, sites=control.sites, dense_steps=control.dense_steps,
            dense_layers=control.dense_layers, kernel=control.kernel, marks=marks,
        )  # fmt: skip
        with attach(pipe, beside):
            runs[0]()
    with attach(pipe, control) as handle:
        results, seconds = _timed(runs)
        share = handle.result(control) if by_run else None
    decibels = [_decibels(a, b) for a, b in zip(dense, results, strict=True)]
    return {
        "name": name, "control": short_form(control), "executed": share,
        "layer_error": (marks.error / marks.size) ** 0.5 if marks.size else None,
        "captured": float(np.mean(marks.captured)) if marks.captured else None,
        "psnr_db": None if all(np.isinf(decibels)) else round(float(np.mean(np.clip(decibels, 0, 100))), 2),
        "dense_seconds": round(dense_seconds, 3), "seconds": round(seconds, 3),
    }  # fmt: skip


def grid_and_steps(
    pipe: Any, prompt: str | Mapping[str, Any], call: Mapping[str, Any] | None = None
) -> tuple[tuple[int, ...], int]:
    """Run a pipeline once and return frames, rows and columns of its image tokens, and its steps.

    Raises:
        ConfigError: No self- or joint attention with a known token grid was seen.
    """
    watch = SparseAttention(Online(density=1.0))  # dense
    with attach(pipe, watch) as handle:
        _runner(pipe, prompt, 0, {"output_type": "latent", **dict(call or {})})()
        grids = [site.grid for site in handle.sites if site.grid is not None and site.kind in watch.kinds]
    if not grids:
        raise ConfigError("No self- or joint attention with a known token grid was seen: nothing can be compared.")
    return max(grids, key=math.prod), len(pipe.scheduler.timesteps)


def best_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row whose results are nearest to dense ones."""
    return max(rows, key=lambda row: float("inf") if row["psnr_db"] is None else row["psnr_db"])


def short_form(control: SparseAttention) -> str:
    """Write a control as the command line takes it."""
    if isinstance(control.select, (ModelPlan, BlockPlan)):
        return "PARO(plan=...)"
    select = control.select
    assert dataclasses.is_dataclass(select)
    changed = {f.name: getattr(select, f.name) for f in dataclasses.fields(select)}
    shown = [f"{f.name}={changed[f.name]!r}" for f in dataclasses.fields(select) if changed[f.name] != f.default]
    return f"SparseAttention(select={type(select).__name__}({', '.join(shown)}))"


def _runner(pipe: Any, prompt: str | Mapping[str, Any], seed: int, call: Mapping[str, Any] | None) -> Callable[[], Any]:
    inputs = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
    settings = {"output_type": "np", **dict(call or {}), **inputs}

    def run() -> np.ndarray:
        with explained(pipe, call or ()):
            out = pipe(**settings, generator=torch.Generator().manual_seed(seed))[0]
        return out.double().cpu().numpy() if isinstance(out, Tensor) else np.asarray(out, np.float64)

    return run


def _timed(runs: Sequence[Callable[[], Any]]) -> tuple[list[np.ndarray], float]:
    began = time.perf_counter()
    results = [run() for run in runs]
    return results, (time.perf_counter() - began) / len(runs)


def _decibels(dense: np.ndarray, sparse: np.ndarray) -> float:
    error = float(((dense - sparse) ** 2).mean())
    peak = 1.0 if dense.min() >= 0 and dense.max() <= 1 else float(dense.max() - dense.min())
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
