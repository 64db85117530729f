"""What a diffusers pipeline says of the run that is under way: classifier-free guidance, its scale, and the steps."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import torch

from attnctl.core.call import CallState
from attnctl.core.hosts.arguments import time_of
from attnctl.core.hosts.running import PipelineCall, call_arguments
from attnctl.core.hosts.scheduler import call_time, noise_time, step_of
from attnctl.errors import ConfigError

__all__ = ["fill_in_time", "guidance_rescale", "guidance_scale", "safe_scale", "uses_guidance"]


def uses_guidance(pipe: Any) -> bool | None:
    """Return whether a pipeline says that it uses classifier-free guidance, or None if it does not say."""
    try:
        flag = pipe.do_classifier_free_guidance
    except AttributeError:  # no such property, or one whose inputs are not set yet
        return None
    return flag if isinstance(flag, bool) else None


# Where a pipeline's call has its scale, the nearest to its formula first: a variable of the step, an argument.
_SCALES = ("current_guidance_scale", "true_cfg_scale")


def guidance_scale(pipe: Any, denoiser: torch.nn.Module, options: Mapping[str, Any]) -> float | None:
    """Return the scale of classifier-free guidance that a pipeline applies to a denoiser's prediction, or None.

    Args:
        pipe: The pipeline. Its own `guidance_scale` may be an input of the model, where the call has another scale.
        denoiser: The denoiser.
        options: Arguments and variables of the pipeline's call.
    """
    scale = next((options[name] for name in _SCALES if options.get(name) is not None), None)
    schedule, step = options.get("guidance_schedule"), options.get("i")
    if schedule is not None and isinstance(step, int):  # Ideogram 4 sets its attribute behind both predictions
        scale = float(schedule[step])
    if scale is None:
        scale = _setting(pipe, "guidance_scale", options)
        if denoiser is getattr(pipe, "transformer_2", None):  # Wan 2.2 may guide its second half otherwise
            second = getattr(pipe, "_guidance_scale_2", None)
            scale = scale if second is None else second
    return scale if isinstance(scale, (int, float)) else None


def guidance_rescale(pipe: Any, options: Mapping[str, Any] | None = None) -> float:
    """Return the factor by which a pipeline rescales its guided prediction; 0 for none.

    Args:
        pipe: The pipeline.
        options: Arguments of its call, where they are known.
    """
    return _setting(pipe, "guidance_rescale", call_arguments(pipe) if options is None else options) or 0.0


def _setting(pipe: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """Return a setting of the call that is under way: an attribute of the pipeline, or an argument of its call.

    A callback may change the attribute in the run; which of the two counts, the loop of the pipeline's call shows.
    """
    attribute, argument = getattr(pipe, name, None), arguments.get(name)
    if attribute is None:
        return argument
    kind: Any = type(pipe)
    numbers = isinstance(attribute, (int, float)) and isinstance(argument, (int, float))
    return argument if numbers and attribute != argument and _takes_argument(kind, name) else attribute


@functools.cache
def _takes_argument(pipeline: Any, name: str) -> bool:
    """Tell whether the loop of a pipeline's call reads an argument, and not the attribute of that name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(pipeline.__call__))))
    except (OSError, TypeError, SyntaxError):
        return False
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    inside = [node for loop in loops for node in ast.walk(loop) if isinstance(getattr(node, "ctx", None), ast.Load)]
    attributes = {node.attr.lstrip("_") for node in inside if isinstance(node, ast.Attribute)}
    return name not in attributes and any(isinstance(node, ast.Name) and node.id == name for node in inside)


def fill_in_time(state: CallState, scheduler: Any, call: PipelineCall, *, seen: bool, level: bool) -> None:
    """Fill in the length of a run, and where the call that is under way stands in it.

    Args:
        state: The call of the denoiser.
        scheduler: The scheduler of the run, or None.
        call: The call of the pipeline.
        seen: Whether the beginning of the run was seen, so that its steps are counted; else the timestep tells.
        level: Whether the noise level is asked for, which may wait for the device.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return
    if state.steps is None:
        steps = vars(call.pipe).get("_num_timesteps")  # image to image runs the end of the scheduler's list alone
        state.steps = min(int(steps), len(timesteps)) if steps else len(timesteps)
        if not seen:
            state.step = step_of(scheduler, state.steps, time_of(state.bound), call.values.get("timesteps"))
    if level:
        state.timestep = noise_time(scheduler, call_time(scheduler, state.bound))


def safe_scale(modes: set[str], pipe: Any, state: CallState) -> float | None:
    """Return the CFG scale if guidance must leave the prompt rows alone, else None.

    Args:
        modes: The fields `combine` of the controls that guide this call.
        pipe: The pipeline, or None.
        state: The call.

    Raises:
        ConfigError: The modes differ, or the pipeline does not say what "rescale_safe" needs.
    """
    explicit = modes - {"auto"}
    if len(explicit) > 1:
        raise ConfigError(f"Controls ask for different ways to combine: {sorted(explicit)}. Use one.")
    cfg = len(state.rows.groups) > 1 or uses_guidance(pipe) is True or hasattr(pipe, "unconditional_transformer")
    if explicit == {"add"} or not (explicit or (cfg and guidance_rescale(pipe, state.options) > 0)):
        return None
    name = type(pipe).__name__
    if state.rows.role == "thirds":
        raise ConfigError(
            f'combine="rescale_safe" needs one guidance scale, and {name} has two, for its text and for its picture. '
            'Use combine="add", without guidance_rescale.'
        )
    if state.options.get("use_dynamic_cfg") and guidance_rescale(pipe, state.options) == 0:
        return None  # without rescaling, d on both halves comes to the same, and no scale need be known
    if not cfg:
        raise ConfigError(
            'combine="rescale_safe" needs classifier-free guidance that the pipeline tells of; this run has no '
            f'negative prompt, or {name} does not say so. Use combine="add".'
        )
    assert state.denoiser is not None
    assert state.family is not None
    scale = guidance_scale(pipe, state.denoiser, state.options)
    if scale is None:
        raise ConfigError(f'combine="rescale_safe" needs the CFG scale, which {name} does not tell. Use combine="add".')
    scale = scale + 1 if state.family.from_prompt else scale
    if scale == 1:
        raise ConfigError('combine="rescale_safe" cannot divide by guidance_scale - 1 = 0. Use combine="add".')
    return float(scale)
