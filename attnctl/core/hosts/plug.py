"""diffusers' own plug point: processors to hand to `set_attn_processor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.control import Control
from attnctl.core.handle import check_controls
from attnctl.core.hosts.hook import check_hookable
from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.hosts.processors import attach_processor
from attnctl.core.hosts.rows import Layout
from attnctl.core.hosts.stack_call import CallOnStack
from attnctl.core.live import LiveControl
from attnctl.core.passes import ControlledDenoiser, resolve
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["attn_processors"]

# What a live control may hear while only its processors run: the rest comes from a pipeline and its scheduler.
_FROM_THE_RUN = ("predicted", "after_call", "stepping", "stepped", "noise_added")


def attn_processors(target: Any, *controls: Control, layout: Layout = "auto") -> dict[str, Any]:
    """Make processors for `model.set_attn_processor`, diffusers' own plug point.

    The model that carries them computes what the controls do to attention, at every call. With a guidance such as PAG
    it is the perturbed model p, to be combined with the plain prediction in a loop of your own: `scale` and `combine`
    say how much of c - p is added, which is your part; `scale=0` hands out the model's own processors. Sites that no
    control selects keep their processor. The grid, the text and the rows of a call are read from the call of the model
    that is under way when a processor runs.

    Args:
        target: A denoiser, or a pipeline that has one.
        controls: What to do to attention.
        layout: Which rows carry the prompt, if a control needs to know: see `attnctl.control`.

    Returns:
        The processors of all attention modules, by diffusers' names.

    Raises:
        ConfigError: A control needs the run of a pipeline, which no processor sees: its steps, words, or latents.
        SiteError: A control selects sites that do not exist or that it cannot act on.
    """
    check_controls(controls)
    model = _denoiser_of(target)
    check_hookable(model)
    for c in controls:
        _refuse_run(c, type(model).__name__)
    watched = resolve(model, controls)
    watched.make_wrappers()
    _check_parts(watched)
    made: dict[str, Any] = {}
    wrappers = {site.name: _wrappers(watched, site.name) for site in watched.sites}
    reader = CallOnStack(watched, next((s.name for s in reversed(watched.sites) if wrappers[s.name]), ""), layout)
    for site in watched.sites:
        module: Any = site.module
        name = f"{site.name}.processor"
        if not wrappers[site.name]:
            made[name] = module.processor
            continue
        original = module.processor
        if isinstance(original, torch.nn.Module):
            raise UnsupportedModelError(
                f"{site.name} holds {type(original).__name__}, whose weights live in the model: a processor for it "
                "cannot be handed out. Use attnctl.control(model, ...)."
            )
        link = watched.links[site.name]
        link.reader = reader
        made[name] = attach_processor(site, link)
        module.processor = original
        link.wrappers = wrappers[site.name]
    return made


def _denoiser_of(target: Any) -> torch.nn.Module:
    models = denoisers_of(target)
    if len(models) > 1:
        raise ConfigError(
            f"{type(target).__name__} has {len(models)} denoisers: {', '.join(models)}. Make processors for each by "
            f"itself: attnctl.attn_processors(pipe.{next(iter(models))}, ...)."
        )
    return next(iter(models.values()))


def _refuse_run(control: Control, model: str) -> None:
    """Raise for a control that says by itself that it needs more than attention."""
    if control.needs_prompt():
        why = "reads the words of the prompt, which no processor is given"
    elif control.needs_steps():
        why = "depends on the step of the run (start, stop, every, adaptive and the like), which no processor is told"
    else:
        return
    raise _refusal(control, why, model)


def _check_parts(watched: ControlledDenoiser) -> None:
    """Raise for controls that act outside attention, and for two guidances, each of which needs a pass of its own."""
    name = type(watched.module).__name__
    for c, _, live in watched.parts:
        if live is None:
            continue
        if live.records:
            raise _refusal(c, "records, and what it has recorded is read from a handle", name)
        if live.changes_latents or any(getattr(type(live), n) is not getattr(LiveControl, n) for n in _FROM_THE_RUN):
            raise _refusal(c, "acts on the latents or the prediction, outside attention", name)
    for guidance, branch in watched.branches:
        if branch.blocks:
            raise _refusal(guidance, "replaces whole blocks, not their attention", name)
        if branch.begin is not None:
            raise _refusal(guidance, "prepares each perturbed pass, which no processor sees begin", name)
    if len({branch.key for _, branch in watched.branches}) > 1:
        names = " and ".join(guidance.describe() for guidance, _ in watched.branches)
        raise ConfigError(
            f"{names} each guide away from a prediction of its own, and a model that carries processors makes one "
            "prediction. Call attn_processors once for each, or use attnctl.control(pipe, ...), which runs a pass for "
            "each."
        )


def _refusal(control: Control, why: str, model: str) -> ConfigError:
    return ConfigError(
        f"{control.describe()} {why}: it cannot be a processor of {model}. Use attnctl.control(pipe, "
        f"{type(control).__name__}(...)), which follows the whole run."
    )


def _wrappers(watched: ControlledDenoiser, site: str) -> tuple[Wrapper, ...] | None:
    """Return what wraps the kernel at a site, the perturbation outermost; None where nothing does."""
    wrappers: Sequence[Wrapper] = [wrap for c, wrap in watched.base.get(site, []) if not c.is_off()]
    for guidance, branch in watched.branches[:1]:
        here = branch.perturb is not None and any(s.name == site for s in branch.sites)
        if here and guidance.weight(CallState()) != 0:
            assert branch.perturb is not None
            wrappers = [branch.perturb, *wrappers]
    return tuple(wrappers) or None
