"""diffusers' own plug point: processors to hand to `set_attn_processor`."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.core.control import Control
from attnctl.core.handle import check_controls, check_hookable
from attnctl.core.hosts.processors import attach_processor
from attnctl.core.passes import resolve
from attnctl.errors import UnsupportedModelError

__all__ = ["attn_processors"]


def attn_processors(model: torch.nn.Module, *controls: Control) -> dict[str, Any]:
    """Make processors for `model.set_attn_processor`, diffusers' own plug point.

    The model that carries them computes what the controls do to attention at every call and for every row: with PAG it
    is the perturbed model p, to be combined with the plain prediction in a loop of your own. Sites that no control
    selects keep their processor. `control()` does the guidance, the extra pass and the switching by itself.

    Raises:
        SiteError: A control selects sites that do not exist or that it cannot act on.
    """
    check_controls(controls)
    check_hookable(model)
    watched = resolve(model, controls)
    made: dict[str, Any] = {}
    watched.state.family, watched.state.denoiser = watched.family, model
    for site in watched.sites:
        module: Any = site.module
        name = f"{site.name}.processor"
        link = watched.links.get(site.name)
        if link is None:
            made[name] = module.processor
            continue
        original = module.processor
        if isinstance(original, torch.nn.Module):
            raise UnsupportedModelError(
                f"{site.name} holds {type(original).__name__}, whose weights live in the model: a processor for it "
                "cannot be handed out. Use attnctl.control(model, ...)."
            )
        link.fixed = True
        made[name] = attach_processor(site, link)
        module.processor = original
        wrappers = [wrap for _, wrap in watched.base.get(site.name, [])]
        for _, branch in watched.branches:
            if branch.perturb is not None and site in branch.sites:
                wrappers.insert(0, branch.perturb)
        link.wrappers = tuple(wrappers) or None
    return made
