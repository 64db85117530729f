"""Run controls on a tiny model on the pretend CUDA device and print the waits after the first step (test_stalls.py).

python tests/stalling.py FAMILY       every control that a bare model takes
python tests/stalling.py pipelines    those that need a pipeline: latents that move, edits, motion
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pretend_cuda
import torch
import zoo
import zoo_pipelines as pipes
from contract import own
from fatezero_runs import BASE, SOURCE, TARGET, call_of, latents
from test_paro import plan_for
from torch import Tensor, nn

import attnctl
from attnctl.core.control import Control
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.ghost import text_arguments
from attnctl.errors import AttnctlError
from attnctl.pipelines import invert
from attnctl.plans import Online
from attnctl.processors import (
    NAG,
    PAG,
    PARO,
    SEG,
    SLG,
    TPG,
    AgentAttention,
    AStar,
    AttendExcite,
    BroadWay,
    Capture,
    Consistent,
    EnhanceAVideo,
    FateZero,
    IRDiffusion,
    MasaCtrl,
    PromptToPrompt,
    Regions,
    SoftPAG,
    SparseAttention,
    StyleAligned,
    TextCenGenMaps,
)

STEPS = 3
NEAR = 1e-4
# What these families refuse, so that a refusal hides no wait.
_NO_FRAMES, _FRAMES = {"AgentAttention", "EnhanceAVideo"}, {"AgentAttention", "SEG"}
_UNEVEN = {"PAG", "SEG", "SEG, mean", "NAG", "Capture", "Capture, heads", "Capture, points"}
_UNEVEN |= {"Regions", "TextCenGenMaps", "IRDiffusion", "StyleAligned", "MasaCtrl", "Consistent"}
REFUSED: dict[str, set[str]] = {
    "sd15": {"EnhanceAVideo"},
    "animatediff": {"EnhanceAVideo"},
    **dict.fromkeys(("sd3", "flux", "cogview4", "qwen"), _NO_FRAMES),
    "lumina2": _NO_FRAMES | _UNEVEN,
    **dict.fromkeys(("hunyuanvideo", "wan", "cogvideox"), _FRAMES),
}


def controls(model: nn.Module, inputs: Any, other: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Control]]]:
    """Return makers of controls; those that a family has no place for are refused when they are attached.

    Args:
        model: A tiny denoiser.
        inputs: The arguments of its call.
        other: Those of another text.
    """
    sites = own(attnctl.find_sites(model))
    middle, last = sites[len(sites) // 2], sites[-1]
    heads = [(middle.name, 0), (last.name, last.heads - 1)]
    yield "PAG", lambda: PAG(sites=middle.name)
    yield "PAG, adaptive", lambda: PAG(sites=middle.name, adaptive=0.5)
    yield "SoftPAG, heads", lambda: SoftPAG(u=0.6, heads=heads)
    for target in ("uniform", "query_mean", "argmax"):
        yield f"SoftPAG, {target}", lambda target=target: SoftPAG(u=0.6, sites=middle.name, target=target)
    yield "SEG", lambda: SEG(sites=middle.name, sigma=2.0)
    yield "SEG, mean", lambda: SEG(sites=middle.name, sigma=math.inf)
    yield "SLG", lambda: SLG(sites=middle.name, start=0.0, stop=1.0)
    yield "TPG", lambda: TPG(sites=middle.name)
    yield "NAG", NAG
    yield "AgentAttention", lambda: AgentAttention(max_downsample=4)
    yield "EnhanceAVideo", lambda: EnhanceAVideo(weight=4.0)
    yield "Capture", lambda: Capture(words=(1, 2))
    yield "Capture, heads", lambda: Capture(words=(1,), heads=(0, 1), keep=("heads",))
    points: Any = ((0.5, 0.5), (0.1, 0.9))
    if family_of(model).all_frames:
        points = ((0.5, 0.5, 0), (0.1, 0.9, 1))
    yield "Capture, points", lambda: Capture(points=points)
    plan = plan_for(model, inputs, density=0.5, block_q=16, block_k=16)  # as few launches as reach every line
    yield "PARO", lambda: PARO(plan, kernel="gather")
    looking = [site.name for site in sites if site.kind in ("self", "joint")]
    for by in ("pooled", "map"):
        blocks = Online(density=0.5, by=by, every=2, block=16)  # type: ignore[arg-type]
        yield f"SparseAttention, {by}", lambda blocks=blocks: SparseAttention(blocks, sites=looking)
    yield "TextCenGenMaps", lambda: TextCenGenMaps(concepts=(1, 2), theta=0.0)
    text = {name: value for name, value in other.items() if name in inputs and "pooled" not in name}
    yield "Regions", lambda: Regions(embeds=(text,), areas=((0, 0, 0.5, 1),), stop=1.0)
    for sharing in (StyleAligned, MasaCtrl, Consistent):
        yield sharing.__name__, lambda sharing=sharing: sharing(start=0.0)
    halves = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    boxes: Any = (halves, halves)
    yield "IRDiffusion", lambda: IRDiffusion(boxes=boxes, sites=looking, start=0.0, isolate_until=1.0)


def outputs(model: nn.Module, inputs: Any, control: Control) -> tuple[list[Tensor], list[list[str]]]:
    """Return the predictions of all steps, and the waits of each."""
    found, waits = [], []
    layout = "uncond_first" if isinstance(control, NAG) else "cond"
    with attnctl.control(model, control, layout=layout) as handle:  # type: ignore[arg-type]
        for step in range(STEPS):
            handle.set_step(step, STEPS, timestep=900 - 200 * step)
            with pretend_cuda.Stalls() as stalls:
                found.append(pretend_cuda.back(zoo.call(model, inputs)).clone())
            waits.append(stalls.found)
    return found, waits


def pipeline_controls() -> Iterator[tuple[str, str, Control, int]]:
    """Return pipelines, what is controlled, the controls, and how many waits a step may have."""
    words = ("bear", "water")
    yield "sd", "AStar", AStar(concepts=words, stop=1.0), 0
    sides = [[[1.0, 0.0]], [[0.0, 1.0]]]
    yield "sd", "AStar, masks", AStar(concepts=words, stop=1.0, masks=sides, binarise="otsu"), 0
    yield "sd", "AttendExcite", AttendExcite(concepts=words, thresholds=(), stop=1.0), 0
    # A threshold is held against the loss before each update that it may ask for: here one, which it does not.
    yield "sd", "AttendExcite, threshold", AttendExcite(concepts=words, thresholds=((0.6, 0.0),), stop=1.0), 1
    yield "sd", "PAG, adaptive", PAG(adaptive=0.5), 0
    yield "sd", "Capture, words", Capture(words=words), 0
    yield "sd", "PromptToPrompt", PromptToPrompt(source=SOURCE, target=TARGET, blend_words=("bear",)), 0
    for store in ("recompute", "qk", "maps"):
        yield "sd", f"FateZero, {store}", FateZero(source=SOURCE, target=TARGET, store=store), 0
    # The queries that follow the edit are counted once per step.
    yield "sd", "FateZero, masks", dataclasses.replace(BASE, blend_latents=True), 1
    yield "animatediff", "BroadWay", BroadWay(alpha=0.5, beta=1.5, stop=1.0), 0
    yield "animatediff", "BroadWay, tau", BroadWay(alpha=0.5, beta=1.5, tau=2, stop=1.0), 0
    yield "animatediff", "BroadWay, mask", BroadWay(motion=1.0, mask=[[0.0, 1.0]], beta_scope="sample", stop=1.0), 0
    yield "cogvideox", "BroadWay, all frames", BroadWay(alpha=0.0, beta=1.1, stop=1.0), 0


def waits_of_steps(name: str, control: Control) -> list[list[str]]:
    """Run a pipeline on the pretend device under a control; return the waits of each step."""
    pipe, kwargs = pipes.build(name)
    if name == "animatediff":
        kwargs["num_frames"] = 8
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            pretend_cuda.move_module(part)
    seen: list[int] = []
    with pretend_cuda.Stalls() as stalls, contextlib.ExitStack() as stack:
        if isinstance(control, FateZero):
            inversion = stack.enter_context(invert(pipe, pretend_cuda.moved(latents()), control=control, steps=STEPS))
            control = dataclasses.replace(control, inversion=inversion)
            kwargs = call_of(inversion)
        elif isinstance(control, PromptToPrompt):
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            edit = {"prompt": [SOURCE, TARGET], "negative_prompt": ["ugly"] * 2, "latents": noise.repeat(2, 1, 1, 1)}
            kwargs = {**kwargs, **edit, "height": 16, "width": 16}
        elif name == "sd":
            kwargs = {**kwargs, "prompt": SOURCE}
        kwargs = pretend_cuda.moved(kwargs) | {"num_inference_steps": STEPS, "output_type": "latent"}

        def mark(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
            seen.append(len(stalls.found))
            return tensors

        with attnctl.control(pipe, control):
            pipe(**kwargs, callback_on_step_end=mark)
    return [stalls.found[a:b] for a, b in itertools.pairwise(seen)]


def pipeline_main(chosen: Sequence[str]) -> int:
    """Print a line for every wait after the first step of a pipeline's run."""
    for name, what, control, most in pipeline_controls():
        if chosen and what not in chosen:
            continue
        waits = waits_of_steps(name, control)
        worst = max(waits, key=len)
        if len(worst) > most:
            for line in dict.fromkeys(worst):
                print(f"{name}, {what}: {worst.count(line)} x {line}")
    return 0


def main() -> int:
    """Print a line for every wait after the first step, and for every prediction that is not the CPU's."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    name = sys.argv[1]
    if name == "pipelines":
        zoo.FRAMES = 8  # long enough for a band of frequencies
        return pipeline_main(sys.argv[2:])
    config = zoo.shallow(name)  # every layer of a kind runs the same lines
    model, inputs = zoo.build(name, **config)
    other = text_arguments(zoo.build(name, seed=1, **config)[1], inputs)
    makers, refused = dict(controls(model, inputs, other)), set()
    card, given = pretend_cuda.move_module(zoo.build(name, **config)[0]), pretend_cuda.moved(inputs)
    plain = zoo.call(model, inputs)
    for what, make in makers.items():
        try:
            computed, waits = outputs(card, given, make())
        except AttnctlError:
            refused.add(what)
            continue
        # No kernel for blocks runs on a card that only pretends: there sparse attention is dense.
        wanted = [plain] * STEPS if what.startswith("SparseAttention") else outputs(model, inputs, make())[0]
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(computed, wanted, strict=True))
        if apart > NEAR:
            print(f"{name}, {what}: {apart:.1e} from the CPU's")
        for line in dict.fromkeys(waits[-1]):
            print(f"{name}, {what}: {waits[-1].count(line)} x {line}")
    if name in REFUSED and refused != REFUSED[name]:
        print(f"{name} refuses {sorted(refused)}, expected {sorted(REFUSED[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
