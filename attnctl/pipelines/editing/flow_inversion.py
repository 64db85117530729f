"""Inverting with a transformer: take a picture or a clip along its path to noise, and note what an edit needs.

The pipeline runs unmodified, on a `PathScheduler` that leads upwards; a control beside it notes the denoiser's inputs,
how the prompt was read and, with blend words, where the source attends to them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Control
from attnctl.core.hosts.arguments import main_name
from attnctl.core.hosts.autoencoders import Coded, Coder
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.paths import Bend, PathScheduler, Route, base_of
from attnctl.core.hosts.words import row_texts, words_in
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.flow import Rule, evaluations
from attnctl.pipelines.editing.costs import ON_DEVICE
from attnctl.pipelines.editing.probe import first_call
from attnctl.pipelines.editing.running import running_on
from attnctl.processors.editing.exchange import read_row
from attnctl.processors.editing.joint import MapAttention
from attnctl.processors.editing.rows import RowFusion, row_of, word_column
from attnctl.processors.editing.source import Inversion, Offload, SourceStore

__all__ = [
    "NoiseStart",
    "Solver",
    "call_of",
    "check_guided",
    "check_noise",
    "check_solver",
    "guides",
    "invert_flow",
    "reconstruct",
    "rule_of",
]

Solver = Literal["fireflow", "rf_solver", "euler", "uniinv", "rf_inversion"]
NoiseStart = Literal["own", "drawn"]
_RULES: dict[str, Rule] = {
    "fireflow": "fireflow",
    "rf_solver": "midpoint",
    "euler": "euler",
    "uniinv": "uniinv",
    "rf_inversion": "euler",
}


def rule_of(solver: str) -> Rule:
    """Return the rule of a solver's steps.

    Raises:
        ConfigError: There is no such solver.
    """
    if solver not in _RULES:
        raise ConfigError(f"solver={solver!r} is unknown. Choose one of {', '.join(get_args(Solver))}.")
    return _RULES[solver]


def guides(pipe: Any) -> str | None:
    """Name the argument of a pipeline's call that sets how strongly the prompt guides; None where none does."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    config: Any = pipe.transformer.config
    embedded = getattr(config, "guidance_embeds", None)
    if embedded:
        return "guidance_scale"
    true = parameters.get("true_cfg_scale")
    if true is not None:
        return None if embedded is False and true.default == 1.0 else "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in parameters else None


def call_of(
    pipe: Any, prompt: Any, coded: Coded, latents: Tensor, steps: int, guidance: float, negative: str = ""
) -> dict[str, Any]:
    """Write the arguments of a pipeline's call."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {
        "prompt": prompt,
        "latents": latents,
        "num_inference_steps": steps,
        "height": coded.height,
        "width": coded.width,
        "num_frames": coded.frames,
        "negative_prompt": negative,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "latent",
        "return_dict": False,
    }
    scale = guides(pipe)
    if scale == "true_cfg_scale" or getattr(pipe.transformer.config, "guidance_embeds", None):
        call["negative_prompt"] = (negative or " ") if scale == "true_cfg_scale" and guidance > 1 else None
    elif isinstance(prompt, list):
        call["negative_prompt"] = [negative] * len(prompt)
    if scale is not None:
        call[scale] = guidance
    return {n: v for n, v in call.items() if n in parameters and v is not None}


def check_solver(solver: str, edit: Any) -> None:
    """Refuse an edit that asks an inversion what it has not seen.

    Raises:
        ConfigError: Blend words, or stored attention, of a path that went up with the empty prompt.
    """
    stored = getattr(edit, "store", "recompute") != "recompute"
    if solver == "rf_inversion" and (edit.blend_words is not None or stored):
        what = f"store={edit.store!r} keeps" if stored else "blend_words are looked for in"
        raise ConfigError(
            f"{type(edit).__name__}: {what} the source's attention during its inversion, and rf_inversion goes up with "
            'the empty prompt. Choose another solver, or store="recompute" and a mask in place of words.'
        )


def check_noise(solver: str, noise: str) -> None:
    """Refuse a beginning of the noise that there is not, or that the solver has in itself.

    Raises:
        ConfigError: It is one.
    """
    if noise not in get_args(NoiseStart):
        raise ConfigError(f"noise={noise!r} is unknown. Choose one of {', '.join(get_args(NoiseStart))}.")
    if noise == "drawn" and solver == "rf_inversion":
        raise ConfigError(
            'rf_inversion bends the whole path to noise that is drawn: noise="drawn" adds nothing. Leave it out.'
        )


@dataclass(frozen=True, kw_only=True)
class _Note(Control):
    """Note what an edit needs of its source, in every call of the denoiser."""

    edit: Any = None
    inversion: Inversion = field(compare=False, repr=False)
    path: PathScheduler = field(compare=False, repr=False)
    keep: bool = False

    def resolve(self, sites: Sequence[Any], family: Any) -> tuple[Any, ...]:
        return () if self.edit is None else self.edit.resolve(sites, family)

    def needs_prompt(self) -> bool:
        return True

    def attached(self, sites: Any, denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _Noter(self, denoiser, pipe)


class _Noter(LiveControl):
    def __init__(self, control: _Note, denoiser: torch.nn.Module, pipe: Any) -> None:
        self.control, self.pipe, self.inversion = control, pipe, control.inversion
        self.fusion = None
        if control.edit is not None and hasattr(control.edit, "groups"):
            self.fusion = RowFusion(control.edit, find_sites(denoiser), family_of(denoiser))
        self.sums: Tensor | None = None
        self.count = 0
        self.tokens: tuple[int, ...] = ()

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        state, inversion = passes.state, self.inversion
        if not inversion.inputs:
            inversion.inputs = {n: v for n, v in state.bound.items() if n != main_name(state.bound)}
            row = row_texts(state.prompts, state.rows.prompts, "invert")[0]
            inversion.readings = read_row(row, self.pipe, "invert")
            words = () if self.fusion is None else self.control.edit.blend_sides[0]
            self.tokens = tuple(p for c in (words_in(inversion.readings, words) if words else ()) for p in c.positions)
        if not self.control.keep:
            return None
        # A source pass: the denoiser sees the stored latents of this level, whatever the pipeline holds.
        name, bound = main_name(state.bound), dict(state.bound)
        bound[name] = inversion.between(self.control.path.at[state.step]).to(bound[name])
        return bound

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        if self.fusion is None:
            return proceed(call)
        alone = call.index == 0
        if self.control.keep and alone and call.site.name in self.fusion.fused:
            row, store = row_of(call, 0), self.inversion.store
            assert store is not None
            if store.mode == "maps":
                row = {"map": MapAttention.of(row["q"], row["k"], call.scale, row.get("mask")).map}
            store.put(call.state.step, call.site.name, row)
        elif self.tokens and alone and call.site.name in self.fusion.masking:
            share = word_column(call, 0, self.tokens)
            self.sums = share if self.sums is None else self.sums + share
            self.count += 1
            self.inversion.grid = call.on_image()[1]
        return proceed(call)

    def after_call(self, output: Any) -> Any:
        if self.sums is not None:
            step = len(self.inversion.columns)
            self.inversion.columns.append((self.control.path.at[step], self.sums / self.count))
            self.sums, self.count = None, 0
        return None


@torch.no_grad()
def invert_flow(
    pipe: Any,
    coded: Coded,
    prompt: str,
    *,
    edit: Any = None,
    steps: int = 28,
    solver: str = "fireflow",
    noise: str = "own",
    offload: Offload = "none",
    folder: Any = None,
    options: Mapping[str, Any] | None = None,
    gamma: float = 0.5,
    generator: torch.Generator | None = None,
    step: Callable[[], object] | None = None,
) -> Inversion:
    """Take a picture or a clip to noise along its flow.

    Args:
        pipe: A pipeline of a transformer.
        coded: The source in latents, as `Coder(pipe).encode` makes them.
        prompt: What it shows.
        edit: The edit that follows, which says what to keep; None for latents alone.
        steps: Steps of the path, as many as the edit's.
        solver: "fireflow", "rf_solver", "euler", "uniinv", or "rf_inversion", which bends the path towards a noise.
        noise: Where the source's noise begins: "own", what the model sees in it; or "drawn", in which the first step
            goes straight to noise drawn anew. Flat pictures (drawings, renders) have next to none of their own, and
            the path ends at a noise too weak for an edit to be led by.
        offload: Where stored attention goes (stores "qk" and "maps").
        folder: Where "disk" makes its temporary folder.
        options: Further arguments of the pipeline's call, such as max_sequence_length.
        gamma: How strongly "rf_inversion" bends.
        generator: Draws the noise of "rf_inversion", and that of noise="drawn".
        step: Called after every evaluation.

    Raises:
        UnsupportedModelError: The scheduler or the model cannot be inverted.
    """
    x = coded.latents
    size = (steps + 1) * x.numel() * x.element_size()
    device = x.device if size <= ON_DEVICE else torch.device("cpu")
    bend = None
    check_noise(solver, noise)
    if solver == "rf_inversion" or noise == "drawn":
        draw = generator or torch.Generator("cpu").manual_seed(0)
        end = _as_run(pipe, torch.randn(x.shape, generator=draw, dtype=torch.float32).to(x.device), coded)
        first = len(evaluations(rule_of(solver), (0.0, 1.0)))
        bend = Bend(end, gamma) if solver == "rf_inversion" else Bend(end, 1.0, first)
    inversion = Inversion(prompt, [], (), {}, "self", rule=solver)

    def note(i: int, at: Tensor) -> None:
        del inversion.latents[i:]
        inversion.latents.append(at.to(device, x.dtype))

    path = PathScheduler(base_of(pipe.scheduler), Route(rule_of(solver), up=True, bend=bend), note)
    inversion.path, inversion.settings = path, {"model": type(pipe.transformer).__name__}
    # RF-Inversion goes up with the empty prompt.
    text = "" if solver == "rf_inversion" else prompt
    control = _Note(edit=None if edit is None else replace(edit, inversion=None), inversion=inversion, path=path)
    if solver == "rf_inversion":
        control = replace(control, edit=None)
    call = call_of(pipe, text, coded, x, steps, 1.0) | dict(options or {})
    with running_on(pipe, path, step) as more, attach(pipe, control, layout="cond"):
        pipe(**call | more)
    inversion.levels = tuple(path.levels)
    if text != prompt:  # the source's row beside the edit has the source's prompt
        call = call_of(pipe, prompt, coded, x, steps, 1.0) | dict(options or {})
        shown = first_call(pipe, base_of(pipe.scheduler), call)
        inversion.inputs, inversion.readings = shown.inputs, shown.readings
    if edit is not None and getattr(edit, "store", "recompute") != "recompute":
        inversion.store = SourceStore(edit.store, offload, folder)
        try:
            _keep_attention(pipe, inversion, coded, edit, step, options)
        except BaseException:
            inversion.close()
            raise
    return inversion


def _as_run(pipe: Any, x: Tensor, coded: Coded) -> Tensor:
    """Pack noise as a run holds it (FLUX.2 packs what it is given)."""
    if hasattr(pipe, "_patchify_latents") and x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    return x


def _keep_attention(
    pipe: Any, inversion: Inversion, coded: Coded, edit: Any, step: Callable[[], object] | None, options: Any
) -> None:
    """Run the source once more along the way back, and store what it attends with."""
    path = inversion.way_back()
    control = _Note(edit=replace(edit, inversion=None, blend_words=None), inversion=inversion, path=path, keep=True)
    start = Coder(pipe).again(inversion.noise, coded)
    call = call_of(pipe, inversion.prompt, coded, start, inversion.steps, 1.0) | dict(options or {})
    with running_on(pipe, path, step) as more, attach(pipe, control, layout="cond"):
        pipe(**call | more)


@torch.no_grad()
def reconstruct(
    pipe: Any,
    inversion: Inversion,
    coded: Coded,
    step: Callable[[], object] | None = None,
    options: Mapping[str, Any] | None = None,
) -> float:
    """Go the way back with the source's prompt; return how near it comes, as PSNR of the latents in dB."""
    ends: list[Tensor] = []

    def note(i: int, x: Tensor) -> None:
        ends[:] = [x]

    path = inversion.way_back(note)
    start = Coder(pipe).again(inversion.noise.to(coded.latents), coded)
    call = call_of(pipe, inversion.prompt, coded, start, inversion.steps, 1.0) | dict(options or {})
    with running_on(pipe, path, step) as more:
        pipe(**call | more)
    x = inversion.latents[0].float()
    error = float((ends[0].to(x) - x).square().mean())
    inversion.psnr = math.inf if error == 0 else 10 * math.log10(float(x.max() - x.min()) ** 2 / error)
    return inversion.psnr


def check_guided(pipe: Any) -> None:
    """Refuse a model that was distilled without guidance, whose edit nothing could steer.

    Raises:
        UnsupportedModelError: It is one.
    """
    if guides(pipe) is None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} runs a model that was distilled without guidance: the target's prompt could not be "
            "given more weight than the source's. Edit with a model that takes guidance (FLUX.1-dev, say)."
        )
