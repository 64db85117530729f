"""Guidance of whole pipelines computed by hand: a second model with perturbed attention beside the first."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import zoo_pipelines as pipes
from contract import Replace, guidances
from torch import Tensor, nn

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.processors import PAG, SoftPAG

PLAIN = tuple(n for n in pipes.NAMES if n not in pipes.PAG_TWINS.values())
SEQUENTIAL = {"flux_cfg", "qwen", "wan"}
LAYOUTS = dict.fromkeys(PLAIN, "uncond_first") | dict.fromkeys(SEQUENTIAL, "sequential") | {"flux": "cond"}
EXACT = dict.fromkeys(PLAIN, 1e-12) | {"sana": 1e-5, "ltx": 1e-5}  # these two compute partly in float32


def build(recipe: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Any, dict[str, Any], PAG | SoftPAG]:
    """Build a pipeline, its call, and a PAG at one of its middle sites."""
    pipe, kwargs = pipes.build(recipe, dtype, batch)
    return pipe, kwargs, guidances(pipes.denoiser(pipe))["PAG"]


def roots(pipe: Any) -> list[Any]:
    """List what a control may touch."""
    return [*(c for c in pipe.components.values() if isinstance(c, nn.Module)), pipe.scheduler]


def naive(
    pipe: Any,
    kwargs: dict[str, Any],
    *controls: PAG | SoftPAG,
    layout: str = "uncond_first",
    weight: Callable[[int], float] = lambda step: 1.0,
    cache: Any = None,
    **overrides: Any,
) -> Tensor:
    """Run a pipeline under guidance computed by hand: a second model with perturbed attention beside the first.

    The perturbed model sees every row of every call; the rows' meaning is told by `layout`, not found out.
    """
    model: Any = pipes.denoiser(pipe)
    twins: list[tuple[float, Any]] = []
    for c in controls:
        twin = copy.deepcopy(model)
        sites = c.resolve(attnctl.find_sites(twin), family_of(twin))
        wrap = c.branch(sites, twin).perturb
        assert wrap is not None
        if cache is None:
            attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")
        else:  # a control refuses caches that skip its site; processors do not mind
            for key, processor in attnctl.attn_processors(twin, c).items():
                twin.get_submodule(key.removesuffix(".processor")).processor = processor
            twin.enable_cache(cache)
        twins.append((c.scale, twin))
    calls, memory = 0, []

    def guide(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal calls
        pred = output[0]
        step = calls // 2 if layout == "sequential" else calls
        calls += 1
        if layout == "sequential" and calls % 2 == 0:
            pred = pred + memory.pop()
        else:
            half = pred.shape[0] // 2 if layout == "uncond_first" else 0
            delta = torch.zeros_like(pred[half:])
            for scale, twin in twins:
                with twin.cache_context("perturbed") if cache else contextlib.nullcontext():
                    p = twin(*args, **given)[0]
                delta = delta + weight(step) * scale * (pred - p)[half:]
            memory[:] = [delta]
            pred = pred + (torch.cat([delta, delta]) if half else delta)
        return (pred, *output[1:]) if isinstance(output, tuple) else type(output)(sample=pred)

    hook = model.register_forward_hook(guide, with_kwargs=True)
    if cache is not None:
        model.enable_cache(cache)
    try:
        return pipes.run(pipe, kwargs, **overrides)
    finally:
        hook.remove()
        if cache is not None:
            model.disable_cache()
