"""Every pair of controls: tiny pipelines that take them, and the table in docs/reference/pairs.md.

python tests/pairs.py > docs/reference/pairs.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import editing_hosts
import torch
import zoo
import zoo_pipelines as pipes
from torch import Tensor

import attnctl
from attnctl.core.conflicts import conflict_between
from attnctl.core.hosts.autoencoders import Coder
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.paths import PathScheduler, Route, base_of
from attnctl.data.controls import controls
from attnctl.errors import AttnctlError
from attnctl.pipelines import invert
from attnctl.plans import BlockPlan, Online
from attnctl.processors import (
    PARO,
    AStar,
    AttendExcite,
    BroadWay,
    Capture,
    Control,
    EnhanceAVideo,
    FateZero,
    FlowEdit,
    Guidance,
    Inject,
    PromptToPrompt,
    ReferenceOnly,
    Regions,
    ShareAttention,
    SparseAttention,
    TextCenGen,
    TextCenGenMaps,
)
from attnctl.processors.combining.combiner import Combining


def _setting(cls: type) -> bool:
    """Tell whether a class is another control with other defaults, which acts as that one does."""
    known = controls("attnctl").values()
    return any(base in known for base in cls.__mro__[1:]) and not {"wrapper", "branch", "attached"} & set(vars(cls))


METHODS = {name: cls for name, cls in controls("attnctl").items() if not _setting(cls)}
SOURCE, TARGET = "a black bear in the water", "a red bear in the water"
STEPS = 2
FRAMES = 4  # the least that BroadWay takes
SMALL, TOKENS = {"height": 24, "width": 16}, 12 * 8  # tokens of the first level of a UNet


@dataclass
class Host:
    """One pipeline, and a control of every method that it takes.

    Attributes:
        name: What the table calls it.
        pipe: The pipeline.
        kwargs: Arguments of its call.
        first: One control of each method.
        second: The same, with other settings, for a method beside itself.
    """

    name: str
    pipe: Any
    kwargs: dict[str, Any]
    first: dict[str, Control]
    second: dict[str, Control]
    results: dict[Any, Tensor] = field(default_factory=dict)

    def run(self, *controls: Control) -> Tensor:
        """Run the pipeline under some controls; those that edit ask for calls of their own."""
        return run(self, controls, _editing(controls))

    def plain(self, controls: Sequence[Control]) -> Tensor:
        """Return what the pipeline computes without any control, for the same call."""
        return self._kept(("plain", _editing(controls)), lambda: run(self, (), _editing(controls)))

    def alone(self, control: Control, other: Control) -> Tensor:
        """Return what one control does by itself, for the call that a pair is given."""
        editing = _editing((control, other))
        return self._kept((id(control), editing), lambda: run(self, (control,), editing))

    def _kept(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.results:
            self.results[key] = make()
        return self.results[key]


def _editing(controls: Sequence[Control]) -> str:
    return next((n for c in controls if (n := type(c).__name__) in ("FateZero", "Inject", "FlowEdit")), "")


def run(host: Host, controls: Sequence[Control], editing: str = "") -> Tensor:
    """Run a host once; the handle is detached whatever happens."""
    kwargs = host.kwargs | host.kwargs.get("editing", {}).get(editing, {})
    kwargs.pop("editing", None)
    scheduler, before = kwargs.pop("scheduler", host.pipe.scheduler), host.pipe.scheduler
    host.pipe.scheduler = scheduler
    try:
        with attnctl.control(host.pipe, *controls) if controls else contextlib.nullcontext():
            return pipes.run(host.pipe, kwargs)
    finally:
        host.pipe.scheduler = before


POOLED = Online(density=0.4, by="pooled", every=2, block=8, rest="drop")


def block_plan(heads: int, tokens: int, text: int = 0, first: bool = False, seed: int = 0) -> BlockPlan:
    """Keep about half of the blocks of 8 x 8 image tokens."""
    n = -(-tokens // 8)
    keep = torch.rand(1, heads, n, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[..., 0] = True
    return BlockPlan.from_mask(keep, 8, None, text, block_q=8, n_image=tokens, text_first=first)


@functools.cache
def unet() -> Host:
    """Stable Diffusion with two prompts, a source and its edit, from one noise."""
    pipe, _ = pipes.build("sd")
    pipe.register_modules(unet=zoo.build("sd15", 1, **zoo.shallow("sd15"))[0])
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    words = {"source": SOURCE, "target": TARGET}
    fate = FateZero(**words, blend_words=["bear"], blend_threshold=0.6, self_replace=0.7)
    inversion = invert(pipe, 0.5 * noise + 0.5 * noise.flip(2), control=fate, steps=STEPS)
    first: dict[str, Control] = {
        "AStar": AStar(concepts=("bear", "water")),
        "AttendExcite": AttendExcite(concepts=("bear", "water"), refine_steps=2),
        "TextCenGen": TextCenGen(concepts=("bear", "water")),
        "TextCenGenMaps": TextCenGenMaps(concepts=("bear", "water"), theta=0.0),
        "Capture": Capture(words=("bear",)),
        "FateZero": dataclasses.replace(fate, inversion=inversion),
        "PARO": PARO(block_plan(4, TOKENS), sites="down.0"),
        "SparseAttention": SparseAttention(POOLED, sites="down.0"),
        "Regions": Regions(prompts=("bear",), areas=((0, 0, 0.5, 1),), stop=1.0),
        "PromptToPrompt": PromptToPrompt(**words, cross_replace=0.8, self_replace=0.7),
        "ReferenceOnly": ReferenceOnly(reference=noise[0].flip(1)),
    }
    changed: dict[str, dict[str, Any]] = {
        **{name: {"step_size": 5.0} for name in ("AStar", "AttendExcite", "TextCenGen")},
        "Capture": {"words": ("water",)},
        "FateZero": {"self_replace": 0.2},
        "PARO": {"plan": block_plan(4, TOKENS, seed=1)},
        "PromptToPrompt": {"self_replace": 0.2},
    }
    call = {"prompt": [SOURCE, TARGET], "negative_prompt": ["ugly"] * 2, "latents": noise, **SMALL}
    editing = {"FateZero": {"prompt": [TARGET] * 2, "latents": inversion.noise}}
    call |= {"num_inference_steps": STEPS, "guidance_scale": 5.0, "editing": editing}
    return _host("UNet", pipe, call, first, changed, "mid")


@functools.cache
def motion() -> Host:
    """AnimateDiff, whose UNet has temporal attention too."""
    (pipe, call), words = pipes.build("animatediff"), {"concepts": ("cat", "a")}
    pipe.register_modules(unet=zoo.build("animatediff", 1, **zoo.shallow("animatediff"))[0])
    first: dict[str, Control] = {
        "AStar": AStar(**words),
        "AttendExcite": AttendExcite(**words, refine_steps=2),
        "TextCenGen": TextCenGen(**words),
        "TextCenGenMaps": TextCenGenMaps(**words, theta=0.0),
        "BroadWay": BroadWay(stop=1.0),
        "Capture": Capture(words=("cat",)),
        "PARO": PARO(block_plan(4, TOKENS), sites="down_blocks.0.attentions"),
        "SparseAttention": SparseAttention(POOLED, sites="down_blocks.0.attentions"),
        "Regions": Regions(prompts=("cat",), areas=((0, 0, 0.5, 1),), stop=1.0),
        "ReferenceOnly": ReferenceOnly(reference=torch.ones(4, 12, 8)),
    }
    call |= {"num_inference_steps": STEPS, "num_frames": FRAMES, **SMALL}
    call |= {name: [call[name]] * 2 for name in ("prompt", "negative_prompt")}
    return _host("UNet with motion", pipe, call, first, {"BroadWay": {"alpha": 0.2}}, "mid")


@functools.cache
def joint() -> Host:
    """CogVideoX: joint attention of text and of all frames at once."""
    pipe, call = pipes.build("cogvideox")
    sites = attnctl.find_sites(pipe)
    words: dict[str, Any] = {"concepts": (1, 3), "sites": "joint", "step_size": 5.0}
    plan = block_plan(sites[0].heads, FRAMES * 6 * 4, zoo.TEXT, True)
    first: dict[str, Control] = {
        "AStar": AStar(**words),
        "AttendExcite": AttendExcite(**words, refine_steps=2),
        "BroadWay": BroadWay(alpha=0.0, stop=1.0),
        "Capture": Capture(words=(1,)),
        "TextCenGenMaps": TextCenGenMaps(concepts=(1, 3), theta=0.0),
        "PARO": PARO(plan),
        "SparseAttention": SparseAttention(POOLED),
    }
    second = block_plan(sites[0].heads, FRAMES * 6 * 4, zoo.TEXT, True, 1)
    changed = {"BroadWay": {"beta": 2.0}, "PARO": {"plan": second}}
    changed |= {"Capture": {"words": (2,)}, "AttendExcite": {"step_size": 2.0}}
    call |= {"num_inference_steps": STEPS, "num_frames": 4 * (FRAMES - 1) + 1}
    return _host("joint attention", pipe, call, first, changed, 1)


@functools.cache
def crossed() -> Host:
    """LTX: cross-attention to the text beside attention over all frames."""
    pipe, call = pipes.build("ltx")
    embeds = {
        n: torch.randn_like(x) if x.is_floating_point() else x for n, x in call.items() if n.startswith("prompt_")
    }
    first: dict[str, Control] = {
        "EnhanceAVideo": EnhanceAVideo(weight=4.0),
        "Regions": Regions(embeds=(embeds,), areas=((0, 0, 0.5, 1),), stop=1.0),
        "TextCenGenMaps": TextCenGenMaps(concepts=(1, 3), theta=0.0),
    }
    return _host("video with cross-attention", pipe, call | {"num_inference_steps": STEPS}, first, {}, 1)


@functools.cache
def flowing() -> Host:
    """SD3 with words, whose flow edits go along."""
    pipe = editing_hosts.build("sd3")
    coded = Coder(pipe).encode(editing_hosts.clip(1, 48, 64))
    words = {"source": SOURCE, "target": TARGET}
    inversion = invert(pipe, coded, SOURCE, steps=STEPS)
    first: dict[str, Control] = {
        "Inject": Inject(**words, stop=1.0, inversion=inversion),
        "Capture": Capture(words=("bear",)),
        "Regions": Regions(prompts=("bear",), areas=((0, 0, 0.5, 1),), stop=1.0),
    }
    noise = torch.randn(coded.latents.shape, generator=torch.Generator().manual_seed(0))
    call = {"prompt": TARGET, "negative_prompt": "", "latents": noise, "height": 48, "width": 64}
    call |= {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    call["scheduler"] = pipe.scheduler
    pairs = pipe.scheduler = PathScheduler(base_of(pipe.scheduler), Route(pairs=torch.zeros_like))
    call["editing"] = {
        "Inject": {"latents": inversion.noise, "scheduler": inversion.way_back()},
        "FlowEdit": {
            "prompt": [SOURCE, TARGET],
            "negative_prompt": ["", ""],
            "latents": torch.cat([coded.latents] * 2),
            "scheduler": pairs,
        },
    }
    changed = {"Inject": {"parts": ("k",)}}
    made = _host("flow with words", pipe, call, first, changed | {"Capture": {"words": ("water",)}}, 1)
    for known, settings in ((made.first, {}), (made.second, {"source_scale": 2.0})):
        known["FlowEdit"] = FlowEdit(**words, target_scale=3.0, **settings)
    return made


HOSTS = {"unet": unet, "motion": motion, "joint": joint, "crossed": crossed, "flowing": flowing}
PAIRS: tuple[tuple[str, str], ...] = tuple(itertools.combinations_with_replacement(METHODS, 2))


def _host(
    name: str,
    pipe: Any,
    call: dict[str, Any],
    first: dict[str, Control],
    changed: dict[str, dict[str, Any]],
    site: str | int,
) -> Host:
    """Add the methods that need no settings for this pipeline, and give every method a second setting."""
    alone = not isinstance(call.get("prompt"), list)
    for method, cls in METHODS.items():
        lonely = alone and issubclass(cls, ShareAttention)  # which pictures of one batch share
        control = None if method in first or lonely else _simple(pipe, cls, site)
        if control is not None:
            first[method] = control
    second: dict[str, Control] = {
        n: dataclasses.replace(c, **changed.get(n, {"start": c.stop / 2}))  # type: ignore[type-var]
        for n, c in first.items()
    }
    return Host(name, pipe, call, first, second)


def _simple(pipe: Any, cls: Any, site: str | int) -> Control | None:
    """Make a control with its defaults, if the pipeline takes it: a guidance at one site, or at all for a conflict."""
    options: dict[str, Any] = {}
    if issubclass(cls, Guidance):
        everywhere = tuple(s.name for s in attnctl.find_sites(pipe) if s.kind in cls.kinds)
        options = {"sites": everywhere if cls.conflicts else site, "start": 0.0, "stop": 1.0}
    try:
        control: Control = cls(**options)
        attnctl.control(pipe, control).detach()
    except (AttnctlError, TypeError):  # the pipeline is none for it, or it needs what is named above
        return None
    return control


def pair(host: Host, names: tuple[str, str]) -> tuple[Control, Control] | None:
    """Return the two controls of a pair, if a host takes both."""
    one, other = names
    if host.name != "UNet" and any(issubclass(METHODS[n], Combining) for n in names) and pair(unet(), names):
        return None  # sums of predictions know nothing of the model
    if host.name == "flow with words" and not {"Inject", "FlowEdit"} & set(names):
        return None  # as on other hosts
    if host.name == "UNet with motion" and "BroadWay" not in names:
        return None  # as without motion
    if host.name == "video with cross-attention" and any(pair(make(), names) for make in (unet, motion, joint)):
        return None
    seconds = host.second if one == other else host.first
    return (host.first[one], seconds[other]) if one in host.first and other in seconds else None


def meet(pipe: Any, controls: tuple[Control, Control]) -> bool:
    """Tell whether two controls that may not act together do so at one place of a pipeline."""
    rule = conflict_between(type(controls[0]), type(controls[1]))
    if rule is None or rule.where == "model":
        return rule is not None
    sites = attnctl.find_sites(pipe)
    names = [{s.name for s in c.resolve(sites, family_of(pipes.denoiser(pipe)))} for c in controls]
    if rule.where == "block":
        names = [{n.rpartition(".")[0] for n in part} for part in names]
    return bool(names[0] & names[1])


# The table


def hosts_of(names: tuple[str, str]) -> list[str]:
    """Name the hosts on which a pair is run."""
    return [make().name for make in HOSTS.values() if pair(make(), names) is not None]


def commute(first: Any, second: Any) -> bool:
    """Tell whether two controls give the same result in either order: all do but two that both move the latents."""
    return not (first.moves_latents and second.moves_latents)


def markdown() -> str:
    """Write the table of all pairs."""
    known: dict[str, Any] = METHODS
    refused, allowed, apart = [], [], []
    for names in PAIRS:
        a, b = names
        rule = conflict_between(known[a], known[b])
        hosts = ", ".join(hosts_of(names))
        if rule is not None:
            where = {"site": "at one site", "block": "in one block", "model": "in one model"}[rule.where]
            refused.append(f"| {a} | {b} | {where} | {rule.reason} |")
        elif hosts:
            order = "any" if commute(known[a], known[b]) else "as given"
            allowed.append(f"| {a} | {b} | {order} | {hosts} |")
        else:
            apart.append(f"{a} and {b}")
    lines = [
        "# Pairs of controls",
        "",
        f"{len(known)} methods make {len(PAIRS)} pairs, a method beside itself included: {len(allowed)} act together, "
        f"{len(refused)} are refused when they are attached, {len(apart)} have no kind of model in common. "
        "`tests/test_pairs.py` runs each of them. This page is written by "
        "`python tests/pairs.py > docs/reference/pairs.md`.",
        "",
        "Controls act together when they are given to one call: `attnctl.control(pipe, PAG(), AStar(...))`. Guidance "
        "adds up, a method that only looks (`Capture`) sees what the model asks for before others rewrite it, and "
        "methods at different sites do not meet. So the order in which controls are given does not matter, bit for "
        "bit, except for two that move the latents: the second starts where the first has moved them.",
        "",
        f"{', '.join(sorted(set(controls('attnctl')) - set(known)))} are another method with other defaults, and stand "
        "beside others as that one does.",
        "",
        "## Refused",
        "",
        "Only where both act at the same time (`start`, `stop`) and share what is named here; at other sites, or one "
        "after the other, they may act. The error is a `ConflictError` that gives the reason.",
        "",
        "| one | other | refused | because |",
        "|---|---|---|---|",
        *refused,
        "",
        "## No model in common",
        "",
        "; ".join(apart) + ". Each refuses the other's models.",
        "",
        "## Together",
        "",
        "| one | other | order | run on |",
        "|---|---|---|---|",
        *allowed,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    import conftest  # noqa: F401  (offline, quiet, one thread)

    sys.stdout.write(markdown())
