"""Sums of predictions by hand: whole pipelines whose scheduler is handed a sum that is computed beside them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import zoo_pipelines as pipes
from contract import Replace
from naive_guidance import LAYOUTS
from torch import Tensor

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.processors import SLG

SCALE = 4.0  # of the pipelines' calls
Rule = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""u, c and what is known of the step (step, steps, x, sigma, memory), to their sum."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a b over each row."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def apg(u: Tensor, c: Tensor, at: dict[str, Any], *, w: float, eta: float, norm: float, beta: float) -> Tensor:
    """Write APG out: unit vectors, as the paper has it."""
    d = c - u
    if "d" in at["memory"]:
        d = d + beta * at["memory"]["d"]
    at["memory"]["d"] = d
    length = dot(d, d).sqrt()
    d = torch.where(length > norm, d * norm / length, d)
    unit = c / dot(c, c).sqrt()
    along = dot(d, unit) * unit
    return u + w * (d - along + eta * along)


def zero_star(u: Tensor, c: Tensor, at: dict[str, Any], *, w: float, zero: int) -> Tensor:
    """Write CFG-Zero* out."""
    if at["step"] < zero:
        return torch.zeros_like(c)
    u = dot(c, u) / (dot(u, u) + 1e-8) * u
    return u + w * (c - u)


def tcfg(u: Tensor, c: Tensor, at: dict[str, Any], *, w: float) -> Tensor:
    """Write TCFG out with a singular value decomposition."""
    damped = []
    for a, b in zip(u, c, strict=True):
        _, _, vh = torch.linalg.svd(torch.stack([b.flatten(), a.flatten()]), full_matrices=False)
        damped.append(((a.flatten() @ vh[0]) * vh[0]).view_as(a))
    low = torch.stack(damped)
    return low + w * (c - low)


def mag(u: Tensor, c: Tensor, at: dict[str, Any], *, w: float, alpha: float) -> Tensor:
    """Write magnitude-aware guidance out."""
    ratio = (dot(c - u, c - u) / dot(u, u)).sqrt()
    return u + (1 + (w - 1) * torch.exp(-alpha * ratio)) * (c - u)


def fdg(u: Tensor, c: Tensor, at: dict[str, Any], *, scales: tuple[float, float], unpack: Any = None) -> Tensor:
    """Write frequency decoupled guidance with two levels out, on even sides."""
    shape = u.shape
    u, c = (x if unpack is None else unpack(x) for x in (u, c))
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=u.dtype) / 16
    square = torch.outer(kernel, kernel)[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), square)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, 1, *x.shape[-2:])
        small = F.interpolate(blur(x), scale_factor=0.5, mode="bilinear", align_corners=False)
        return x - blur(F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)), small

    (u_high, u_low), (c_high, c_low) = parts(u), parts(c)
    low = u_low + scales[1] * (c_low - u_low)
    high = u_high + scales[0] * (c_high - u_high)
    whole = (high + blur(F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False))).reshape(u.shape)
    return whole if unpack is None else pipes_pack(whole, shape)


def flux_grid(x: Tensor, rows: int = 8, columns: int = 6) -> Tensor:
    """Unpack FLUX's tokens [B, N, 4 C] as its pipeline does."""
    x = x.view(x.shape[0], rows, columns, x.shape[-1] // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], -1, rows * 2, columns * 2)


def pipes_pack(x: Tensor, shape: torch.Size) -> Tensor:
    """Pack latents [B, C, H, W] as FLUX's pipeline does."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(shape)


def in_x0(rule: Rule) -> Rule:
    """Put a rule between x - sigma v and its inverse: flow matching in the space of clean images."""

    def converted(u: Tensor, c: Tensor, at: dict[str, Any]) -> Tensor:
        x, sigma = at["x"], at["sigma"]
        return (x - rule(x - sigma * u, x - sigma * c, at)) / sigma

    return converted


def per_token(p: Tensor, c: Tensor) -> Tensor:
    """Scale to the length of c, as Qwen-Image does."""
    return p * c.norm(dim=-1, keepdim=True) / p.norm(dim=-1, keepdim=True)


def by_hand(recipe: str, pipe: Any, kwargs: dict[str, Any], rule: Rule, guidance: Any = None) -> Tensor:
    """Run a pipeline whose scheduler is handed rule(u, c), plus w (c - p) of one guidance, and nothing of attnctl.

    Predictions are recorded by a hook on the denoiser; p comes from a second model, perturbed in all of its calls.
    """
    model, layout = pipes.denoiser(pipe), LAYOUTS[recipe]
    twin = None if guidance is None else _perturbed(model, guidance)
    seen: list[tuple[Tensor, Tensor | None]] = []
    memory: dict[str, Any] = {}
    steps = kwargs.get("num_inference_steps", 3)

    def record(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        p = None
        if twin is not None and (layout != "sequential" or not seen):
            p = twin(*args, **given)[0]
        seen.append((output[0], p))

    step, count = pipe.scheduler.step, 0

    @functools.wraps(step)
    def handed(model_output: Tensor, t: Any, sample: Tensor, *args: Any, **more: Any) -> Any:
        nonlocal count
        if layout == "sequential":
            (c, p), (u, _) = seen
        else:
            (u, c), p = seen[0][0].chunk(2), None if seen[0][1] is None else seen[0][1].chunk(2)[1]
        seen.clear()
        if c.shape != model_output.shape:  # a variance that the pipeline cuts off
            u, c = u[:, : model_output.shape[1]], c[:, : model_output.shape[1]]
            p = None if p is None else p[:, : model_output.shape[1]]
        index = pipe.scheduler.step_index if getattr(pipe.scheduler, "step_index", None) is not None else count
        sigmas = getattr(pipe.scheduler, "sigmas", None)
        at = {"step": count, "steps": steps, "memory": memory, "x": sample}
        at["sigma"] = None if sigmas is None else float(sigmas[index])
        total = rule(u, c, at)
        if p is not None:
            total = total + guidance.scale * (c - p)
        if recipe == "qwen":
            total = per_token(total, c)
        count += 1
        return step(total.to(model_output.dtype), t, sample, *args, **more)

    hook = model.register_forward_hook(record, with_kwargs=True)
    pipe.scheduler.step = handed
    try:
        return pipes.run(pipe, kwargs)
    finally:
        del pipe.scheduler.step
        hook.remove()


def _perturbed(model: Any, guidance: Any) -> Any:
    """Copy a model and perturb all of its calls as a guidance does."""
    twin = copy.deepcopy(model)
    if isinstance(guidance, SLG):
        for block in {s.name.rpartition(".")[0] for s in guidance.resolve(attnctl.find_sites(twin), family_of(twin))}:
            twin.get_submodule(block).register_forward_hook(_give_back, with_kwargs=True)
        return twin
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    wrap = guidance.branch(sites, twin).perturb
    attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")
    return twin


def _give_back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    given = [*args, *kwargs.values()]
    if isinstance(output, Tensor):
        return args[0] if args else kwargs["hidden_states"]
    fit = {tuple(t.shape): t for t in reversed(given) if isinstance(t, Tensor) and t.ndim == 3}
    return tuple(None if o is None else fit[tuple(o.shape)] for o in output)


@functools.cache
def built(recipe: str) -> tuple[Any, dict[str, Any], Tensor]:
    """Build a pipeline and its call, guided by SCALE; return what it computes without any control, too."""
    pipe, kwargs = pipes.build(recipe, torch.float64)
    kwargs |= {} if "true_cfg_scale" in kwargs else {"guidance_scale": SCALE}
    return pipe, kwargs, pipes.run(pipe, kwargs)
