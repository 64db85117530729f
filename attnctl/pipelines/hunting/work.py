"""What the processes of a search do: pictures of candidates, their marks, and the change of the first step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from attnctl.core.attach import attach
from attnctl.core.control import Control
from attnctl.data.quiet import without_bar
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.pipelines.hunting.plan import Head, HuntPlan, Pictures
from attnctl.pipelines.hunting.rows import RowHeads
from attnctl.pipelines.refusals import explained
from attnctl.processors.pag import SoftPAG

__all__ = ["Row", "Scorer", "Unit", "cut", "draw", "first_change", "marks_of", "pictures", "units"]

Scorer: TypeAlias = Callable[[list[Any], list[str]], Any]
"""Called with images (PIL) and their prompts; returns one number for each, more being better."""

Row: TypeAlias = tuple[tuple[Head, ...], int]
"""Heads that act, and the index of a prompt-seed pair."""


@dataclass(frozen=True)
class Unit:
    """One pipeline call: its rows are the same whichever process makes it, and so are its pictures."""

    rows: tuple[Row, ...]


def units(candidates: Sequence[tuple[Head, ...]], pairs: range, plan: HuntPlan) -> list[Unit]:
    """Cut the work of a stage into pipeline calls: candidates whose last head is in one layer go together."""
    return cut([(heads, i) for heads in candidates for i in pairs], plan)


def cut(rows: Sequence[Row], plan: HuntPlan) -> list[Unit]:
    """Cut rows into pipeline calls; where the passes before a layer are replayed, that layer's rows go together."""
    layers: dict[str, list[Row]] = {}
    for heads, i in rows:
        layer = heads[-1][0] if heads and plan.replay and not plan.group else ""
        layers.setdefault(layer, []).append((heads, i))
    return [
        Unit(tuple(layer_rows[i : i + plan.batch]))
        for layer_rows in layers.values()
        for i in range(0, len(layer_rows), plan.batch)
    ]


def draw(pipe: Any, plan: HuntPlan, rows: Sequence[Row], steps: int | None = None) -> list[Any]:
    """Generate one picture a row.

    Raises:
        UnsupportedModelError: The pipeline takes no generator, or does not return one image for every prompt.
    """
    heads = tuple(h for h, _ in rows)
    control = RowHeads(rows=heads, u=plan.u, scale=plan.scale) if any(heads) else None
    return pictures(pipe, plan, [i for _, i in rows], control, steps)


def pictures(
    pipe: Any, plan: Pictures, pairs: Sequence[int], control: Control | None, steps: int | None = None
) -> list[Any]:
    """Generate one picture a pair, under a control or plain.

    Raises:
        UnsupportedModelError: The pipeline takes no generator, or does not return one image for every prompt.
    """
    options = _options(pipe, plan, pairs, steps)
    attached = contextlib.nullcontext() if control is None else attach(pipe, control, replay=plan.replay)
    with explained(pipe, plan.call), without_bar(pipe), torch.no_grad(), attached:
        images = getattr(pipe(**options), "images", None)
    if not isinstance(images, list) or len(images) != len(pairs):
        raise UnsupportedModelError(f"{type(pipe).__name__} does not return one image per prompt.")
    return images


def marks_of(scorer: Scorer, images: list[Any], prompts: list[str]) -> list[float]:
    """Have the objective mark pictures.

    Raises:
        ConfigError: It returns something else than one finite number for each.
    """
    given = scorer(images, prompts)
    given = given.detach().cpu().tolist() if isinstance(given, torch.Tensor) else given
    name = getattr(scorer, "__name__", type(scorer).__name__)
    try:
        marks = [float(x) for x in given]
    except (TypeError, ValueError):
        raise ConfigError(
            f"The objective {name} returned {type(given).__name__}; expected a number for each of {len(images)} images."
        ) from None
    if len(marks) != len(images):
        raise ConfigError(f"The objective {name} returned {len(marks)} numbers for {len(images)} images.")
    for mark, prompt in zip(marks, prompts, strict=True):
        if not math.isfinite(mark):
            raise ConfigError(
                f"The objective {name} returned {mark} for a picture of {prompt!r}; expected a finite number. Nothing "
                "of this call was kept."
            )
    return marks


def first_change(pipe: Any, plan: HuntPlan, site: str, heads: Sequence[int]) -> list[float]:
    """Measure how far each head of a layer, replaced by the identity, moves the first step's prediction.

    One base pass serves all heads of the layer, and so does what comes before the layer. Returns mean norms of c - p.
    """
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} takes no callback_on_step_end, so it cannot stop after the first step: set prune=0."
        )
    options = _options(pipe, plan, list(range(plan.prune_pairs)), None)
    options |= {"output_type": "latent", "callback_on_step_end": _stop}
    probes = [SoftPAG(heads=((site, h),), u=1.0, scale=1.0, every=plan.steps + 1) for h in heads]
    with without_bar(pipe), torch.no_grad(), attach(pipe, *probes, replay=plan.replay) as handle:
        with contextlib.suppress(_FirstStep):
            pipe(**options)
        deltas = [handle.kept(p) for p in probes]
    return [float(torch.stack([row.float().norm() for row in d]).mean()) for d in deltas]


class _FirstStep(Exception):
    """Ends a run after its first step."""


def _stop(*_: Any) -> Any:
    raise _FirstStep


def _options(pipe: Any, plan: Pictures, pairs: Sequence[int], steps: int | None) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "generator" not in parameters:
        raise UnsupportedModelError(f"{type(pipe).__name__} takes no generator, so no run of it can be repeated.")
    options: dict[str, Any] = {
        "prompt": [plan.pairs[i][0] for i in pairs],
        "generator": [torch.Generator("cpu").manual_seed(plan.pairs[i][1]) for i in pairs],
        "num_inference_steps": steps or plan.steps,
        "output_type": "pil",
    }
    if "guidance_scale" in parameters:
        options["guidance_scale"] = plan.guidance
    for name in plan.call:
        if name in options and name != "guidance_scale":
            raise ConfigError(f"The option {name!r} is set by the search itself.")
        if name not in parameters:
            raise ConfigError(f"{type(pipe).__name__} takes no {name!r}.")
    return options | dict(plan.call)
