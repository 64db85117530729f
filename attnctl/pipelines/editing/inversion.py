"""DDIM inversion: take pictures or the frames of a video back to the noise that a model makes them of.

"Denoising Diffusion Implicit Models", arXiv 2010.02502, run backwards with the prompt that describes the source and
without classifier-free guidance. The pipeline runs unmodified; a control beside it notes every latent on the way, and
the attention that an edit asks to keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.autoencoders import Coded, Coder
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites, halve
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.data.clips import open_clip
from attnctl.errors import ConfigError, UnsupportedModelError, shown, window
from attnctl.pipelines.editing.codec import check_pipeline, encode, latent_factor
from attnctl.pipelines.editing.flow_inversion import invert_flow
from attnctl.pipelines.editing.running import running_on
from attnctl.processors.editing.align import follow_table
from attnctl.processors.editing.engine import SourcePass
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.fusion import frame_indices
from attnctl.processors.editing.prompts import site_factors
from attnctl.processors.editing.source import Inversion, Offload, SourceAttention, SourceStore, check_room

__all__ = ["ddim_of", "estimate_bytes", "inverse_of", "invert"]

_STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "Consistency", "Cogvideo", "VQDiffusion", "UnCLIP", "AMUSEd")


def ddim_of(scheduler: Any) -> Any:
    """Make the DDIM scheduler of the noise that a scheduler is configured for; the scheduler itself if it is DDIM.

    Raises:
        UnsupportedModelError: Its noise or its steps cannot be run backwards.
    """
    from diffusers import DDIMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    if not hasattr(scheduler, "config"):
        raise UnsupportedModelError(f"{shown(scheduler)} was given; expected a scheduler of diffusers, pipe.scheduler.")
    name, config = type(scheduler).__name__, dict(scheduler.config)
    sde = str(config.get("algorithm_type", "")).startswith("sde")
    if sde or any(part in name for part in _STOCHASTIC):
        raise UnsupportedModelError(
            f"{name} adds fresh noise at every step (or jumps), so no inversion leads back through it. Set "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config) first."
        )
    if not hasattr(scheduler, "alphas_cumprod") or "beta_schedule" not in config:
        raise UnsupportedModelError(
            f"{name} does not run on the noise schedule of DDIM, so attnctl cannot invert it. Editing works with the "
            "models of SD 1, SD 2 and SDXL."
        )
    copied = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    options = {n: config[n] for n in (*copied, "rescale_betas_zero_snr") if n in config}
    spacing = config.get("timestep_spacing")
    return DDIMScheduler(
        **options,
        clip_sample=False,
        set_alpha_to_one=bool(config.get("set_alpha_to_one", False)),
        steps_offset=int(config.get("steps_offset", 1)),
        timestep_spacing=spacing if spacing in ("leading", "trailing") else "leading",
    )


def inverse_of(ddim: Any) -> Any:
    """Make the inverse of a DDIM scheduler.

    Raises:
        UnsupportedModelError: It has settings that the inverse does not know.
    """
    from diffusers import DDIMInverseScheduler

    config = dict(ddim.config)
    if config.get("thresholding") or config.get("timestep_spacing") not in ("leading", "trailing"):
        raise UnsupportedModelError(
            f"A DDIMScheduler with thresholding={config.get('thresholding')} and "
            f"timestep_spacing={config.get('timestep_spacing')!r} cannot be inverted; use no thresholding, and leading "
            "or trailing."
        )
    # Every value, because from_config drops those that equal the host's defaults: pipelines change steps_offset.
    names = [
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "clip_sample",
        "set_alpha_to_one",
        "steps_offset",
        "prediction_type",
        "clip_sample_range",
        "timestep_spacing",
        "rescale_betas_zero_snr",
    ]
    return DDIMInverseScheduler(**{n: config[n] for n in names if n in config})


@dataclass(frozen=True, kw_only=True)
class _Record(Control):
    """Note the latents of an inversion, and the attention that an edit wants kept."""

    edit: FateZero
    inversion: Inversion = field(compare=False, repr=False)

    def resolve(self, sites: Sequence[Any], family: Any) -> tuple[Any, ...]:
        return self.edit.resolve(sites, family)

    def attached(self, sites: Any, denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _Recorder(self, denoiser, pipe)


class _Recorder(LiveControl):
    def __init__(self, control: _Record, denoiser: torch.nn.Module, pipe: Any) -> None:
        self.inversion = control.inversion
        self.source = SourcePass(control.edit, denoiser, pipe)
        self.source.indices = self.inversion.indices
        store = self.inversion.store
        self.attention = None if store is None else SourceAttention(store, "maps" if store.mode == "maps" else "qk")
        self.writers: dict[str, Wrapper] = {}
        self.inversion.settings = {"keyed": self.source.keyed}

    def begin_run(self) -> None:
        self.inversion.latents.clear()

    def before_call(self, passes: LiveDenoiser) -> None:
        state, inversion = passes.state, self.inversion
        inversion.latents.append(state.bound["sample"])
        if not inversion.inputs:
            inversion.inputs = {n: v for n, v in state.bound.items() if n not in ("sample", "timestep")}
        steps, s = int(state.steps or 0), state.step
        follow = self.source.plan.follow(steps)
        wanted = self.source.needed(steps - 1 - s, steps, follow) if self.attention is not None else []
        names = {site.name for site in wanted}
        plain, write = self.source.writer(s, None), self.source.writer(s, self.attention)
        self.writers = {n: write if n in names else plain for n in self.source.names}

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        return self.writers[call.site.name](call, proceed)


@torch.no_grad()
def invert(
    pipe: Any,
    frames: Any,
    prompt: str | None = None,
    *,
    control: FateZero | None = None,
    steps: int = 50,
    offload: Offload = "none",
    folder: str | Path | None = None,
    budget: int | None = None,
    rows: Sequence[int] | None = None,
    total: int | None = None,
    step: Callable[[], object] | None = None,
    solver: str = "fireflow",
    noise: str = "own",
) -> Inversion:
    """Take frames back to noise.

    Args:
        pipe: A pipeline of a Stable Diffusion UNet (SD 1, SD 2, SDXL), which DDIM inverts whatever its scheduler, or of
            a transformer, which is inverted along its flow.
        frames: uint8 RGB [n, height, width, 3], an image, a list of images, a path, or latents [n, C, h, w].
        prompt: What the frames show; the control's source by default.
        control: The edit that follows: it says which frames self-attention looks at, and what to keep.
        steps: Steps T, as many as the edit's.
        offload: Where stored attention goes (modes "qk" and "maps"): "none", "cpu" or "disk".
        folder: Where "disk" makes its temporary folder.
        budget: Most bytes to store; None for what is free.
        rows: The clip's frame in each row, where `frames` is a window of a clip of `total` frames.
        step: Called after every step.
        solver: On transformers, the rule of the steps: "fireflow", "rf_solver", "euler", "uniinv" or "rf_inversion".
        noise: On transformers, where the source's noise begins: "own" or "drawn" (see `edit_video`).

    Returns:
        The inversion; close it (it is a context manager) to let go of stored attention.

    Raises:
        ConfigError: No prompt, or frames that do not fit the model.
        MemoryBudgetError: What would be stored does not fit; nothing has run yet.
        UnsupportedModelError: The scheduler or the model cannot be inverted.
    """
    text = _source_of(prompt, control, steps)
    if getattr(pipe, "unet", None) is None and getattr(pipe, "transformer", None) is not None:
        coded = frames if isinstance(frames, Coded) else Coder(pipe).encode(frames_of(frames))
        store: dict[str, Any] = {"offload": offload, "folder": folder}
        return invert_flow(pipe, coded, text, edit=control, steps=steps, solver=solver, noise=noise, step=step, **store)
    check_pipeline(pipe)
    ddim = ddim_of(pipe.scheduler)
    inverse = inverse_of(ddim)
    x = frames if isinstance(frames, Tensor) else encode(pipe, frames_of(frames))
    edit = control or FateZero(source=text, target=text, keys="self", equalizer={})
    n = x.shape[0]
    indices = frame_indices(edit.keys, n if total is None else total, rows)
    inversion = Inversion(text, [], (), {}, edit.keys, indices)
    if edit.store != "recompute":
        needed = estimate_bytes(pipe.unet, edit, n, x.shape[-2], x.shape[-1], steps)[edit.store]
        check_room(needed, offload, x.device, budget, folder)
        inversion.store = SourceStore(edit.store, offload, folder)
    h, w = (int(s) * latent_factor(pipe) for s in x.shape[-2:])
    try:
        with (
            running_on(pipe, inverse, step) as options,
            attach(pipe, _Record(edit=dataclasses.replace(edit, inversion=None), inversion=inversion), layout="cond"),
        ):
            # Pipelines do not say whether they keep the batch of what they are given: one prompt a frame.
            last = pipe(
                prompt=[text] * n,
                latents=x,
                num_inference_steps=steps,
                guidance_scale=1.0,
                output_type="latent",
                height=h,
                width=w,
                return_dict=False,
                **options,
            )[0]
            inversion.timesteps = tuple(int(t) for t in inverse.timesteps.tolist())
    except BaseException:
        inversion.close()
        raise
    inversion.latents.append(last)
    return inversion


def _source_of(prompt: str | None, control: FateZero | None, steps: Any) -> str:
    """Return the prompt that describes the source."""
    text = prompt if prompt is not None else control.source if control is not None else None
    if text is None or (control is not None and control.source != text):
        raise ConfigError(
            f"invert() was given prompt={prompt!r} and a control for {control.source if control else None!r}: give one "
            "prompt that describes the source."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r}: give a whole number of steps, 1 or more.")
    return text


def frames_of(source: Any) -> np.ndarray:
    """Read all frames of a clip: a path, frames, an image or a list of images."""
    clip = open_clip(source)
    return clip.read(range(clip.count))


def estimate_bytes(
    denoiser: torch.nn.Module, control: FateZero, frames: int, height: int, width: int, steps: int
) -> dict[str, int]:
    """Say what each mode of the store would keep for a whole run, in bytes, before the run.

    Args:
        denoiser: The UNet (a meta device will do).
        control: The edit, whose windows say which steps are kept.
        frames: Frames of the clip, or of one window of it.
        height: Rows of the latents.
        width: Columns of the latents.
        steps: Steps of the run.

    Returns:
        "recompute" (the latents of all steps), "qk" and "maps"; the latter two include the latents.
    """
    sites, family = find_sites(denoiser), family_of(denoiser)
    size = next(denoiser.parameters()).element_size()
    fused, masks = control.groups(sites, family)
    keyed = {s.name for s in control.keyed(sites, family)}
    factors = site_factors(sites)
    many = max(1, len(frame_indices(control.keys, frames)[0]))
    config: Any = denoiser.config
    text = 77
    windows = control._windows
    spans = [window(v, "cross_replace") for v in windows.values()] + ([] if "default_" in windows else [(0.0, 1.0)])
    follow = sum(follow_table(steps, span, {}, text) for span in spans)
    assert isinstance(follow, Tensor)
    qk = maps = 0
    texts: set[str] = set()
    for k in range(steps):
        self_on, cross_on, mask_on = control.needed(k, steps, follow)
        wanted = {s.name: s for s in fused if (s.kind == "self" and self_on) or (s.kind == "cross" and cross_on)}
        wanted |= {s.name: s for s in masks} if mask_on else {}
        for name, s in wanted.items():
            h, w = halve(height, width, factors[name].bit_length() - 1)
            n, channels = h * w, s.heads * s.head_dim
            if s.kind == "cross":
                qk += frames * n * channels + (0 if name in texts else frames * text * channels)
                maps += frames * s.heads * n * text
                texts.add(name)
            else:
                qk += 2 * frames * n * channels
                maps += frames * s.heads * n * n * (many if name in keyed else 1)
    latents = (steps + 1) * frames * int(config.in_channels) * height * width * size
    return {"recompute": latents, "qk": latents + qk * size, "maps": latents + maps * size}
