"""What BroadWay costs and what it does: `python benchmarks/broadway.py cost|run|effects > benchmarks/results/....json`.

cost     time of the temporal attention core at real shapes: plain, as published (FFT of whole maps), ours; one run,
         interleaved, the least of several repeats in process time; with memory as the C library handles it, and kept
run      FLOPs of SD 1.5 AnimateDiff at 512 px and 16 frames (meta device), plain and active, and what the default
         window adds to a whole run; maps of frames by frames that are made
effects  the shipped video model: motion, direction, warp error and flicker, paired with plain, 95 % bootstrap intervals

The table goes to stderr, the JSON to stdout. Videos whose marks `--log` holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pages import keep_freed_memory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.kernels.bands import Band, filter_frames, motion_beta
from attnctl.kernels.temporal import Layer, Reference, centred_map, guided_maps, output_like, weigh
from attnctl.processors import BroadWay

# Grid of positions (of each of two rows), heads, frames, channels a head, tau.
SHAPES = (
    ((32, 32), 8, 16, 40, 7),
    ((16, 16), 8, 16, 80, 7),
    ((16, 16), 8, 24, 80, 7),
    ((16, 16), 8, 32, 80, 7),
    ((16, 16), 8, 32, 80, 15),
)
LIMIT, RUN_LIMIT = 1.15, 0.01
MORE_MOTION, WARP_LIMIT = 1.25, 1.1
PART = 12  # videos that are marked, and logged, together
TUNING_SEED, REPORT_SEED = 40_000, 500_000
_COARSE = ["down", "mid", "up.0"]
_STEADY = {"beta": 1.0, "energy_floor": False, "start": 0.2}
# The knob and the presets; enhancement alone by gain and window, by band, by stage; with guidance; guidance afterwards.
CANDIDATES: tuple[tuple[BroadWay, ...], ...] = (
    *((BroadWay(motion=m),) for m in (1.0, 2.0, 4.0)),
    (BroadWay(motion=1.0, stop=0.4),),
    (BroadWay.preset("videocrafter2"),),
    *(
        (BroadWay(alpha=0.0, beta=beta, start=start, stop=stop),)
        for start, stop, gains in (
            (0.0, 0.1, (6.0, 12.0)), (0.0, 0.2, (2.0, 4.0, 8.0)), (0.0, 0.4, (2.0,)), (0.0, 1.0, (1.4,)),
            (0.1, 0.2, (6.0,)), (0.1, 0.3, (2.0, 3.0, 4.0)), (0.1, 0.4, (3.0,)), (0.1, 0.5, (2.0,)),
            (0.1, 0.6, (2.5,)), (0.1, 0.8, (2.0,)), (0.1, 1.0, (1.6,)), (0.2, 0.4, (2.0, 4.0)), (0.2, 0.8, (2.0,)),
            (0.3, 0.6, (2.0,)),
        )
        for beta in gains
    ),
    (BroadWay(alpha=0.0, beta=4.0, tau=3),),
    (BroadWay(alpha=0.0, beta={"up.1": 4.0}),),
    *((BroadWay(alpha=0.0, beta={"up.0": 4.0}, stop=stop),) for stop in (0.2, 0.5, 1.0)),
    *((BroadWay(alpha=0.0, beta={"up.0": 10.0}, stop=stop),) for stop in (0.2, 0.5)),
    (BroadWay(alpha=0.0, beta={"up.0": 20.0}),),
    (BroadWay(alpha=0.0, beta={"up.0": 10.0, "up.1": 1.5}, stop=0.4),),
    (BroadWay(alpha=0.0, beta={"up.0": 4.0, "up.1": 2.0}, start=0.1, stop=0.3),),
    *((BroadWay(alpha=0.0, beta=4.0, sites=_COARSE, stop=stop),) for stop in (0.2, 0.5)),
    (BroadWay(alpha=0.2, beta=6.0, stop=0.1),),
    (BroadWay(alpha=0.2, beta=3.0),),
    (BroadWay(alpha=0.2, beta=3.0, start=0.1, stop=0.5),),
    *((BroadWay(alpha=0.0, beta=4.0), BroadWay(**_STEADY, stop=stop)) for stop in (0.6, 1.0)),
)  # fmt: skip

# For video-still: gain, start and stop.
_GAINS = ((2.0, 0.0, 0.2), (4.0, 0.0, 0.2), (3.0, 0.1, 0.3), (2.0, 0.0, 0.4))
FOR_STILL = tuple((BroadWay(alpha=0.0, beta=b, start=first, stop=last),) for b, first, last in _GAINS)


def official(
    q: Tensor, k: Tensor, v: Tensor, ref: Tensor, small: tuple[int, int], big: tuple[int, int], tau: int
) -> Any:
    """Compute one guided and enhanced attention as published: whole maps, interpolation, FFT, re-normalisation."""
    heads, frames = q.shape[1:3]
    attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    planes = ref.reshape(2, *small, -1).permute(0, 3, 1, 2)
    grown = F.interpolate(planes, size=big).permute(0, 2, 3, 1).reshape(-1, heads, frames, frames)
    guided = attn + 0.6 * (grown - attn)
    half, band = len(attn) // 2, slice(frames // 2 - tau, frames // 2 + tau + 1)
    bins = torch.fft.fft(guided, dim=-1)
    power = bins[half:].abs().square() / frames
    high = power[..., band].sum(-1).mean()
    low = power.sum(-1).mean() - high
    beta = max(1.5, float(((attn[half:].square().sum(-1).mean() - low) / high).sqrt()))
    bins[..., band] *= beta
    out = torch.fft.ifft(bins, dim=-1).real
    return (out / out.sum(-1, keepdim=True)) @ v


def cost(repeats: int) -> dict[str, Any]:
    """Time the core of one attention in several forms, with the C library's memory and with memory that is kept."""
    result: dict[str, Any] = {"cost": core_times(repeats)}
    if keep_freed_memory():
        print("memory kept:", file=sys.stderr)
        result["cost_memory_kept"] = core_times(repeats)
    worst = {name: max(row["ratio"]["guided"] for row in table) for name, table in result.items()}
    return result | {"worst_guided": worst, "limit": LIMIT, "passed": max(worst.values()) <= LIMIT}


def core_times(repeats: int) -> list[dict[str, Any]]:
    """Time every form at every shape."""
    table = []
    for grid, heads, frames, channels, tau in SHAPES:
        positions, small = 2 * grid[0] * grid[1], (grid[0] // 2, grid[1] // 2)
        generator = torch.Generator().manual_seed(0)

        def made(n: int, f: int = frames, c: int = channels, h: int = heads, g: Any = generator) -> Tensor:
            return torch.randn(n, f, h * c, generator=g).unflatten(2, (h, c)).transpose(1, 2)

        q, k, v = made(positions), made(positions), made(positions)
        centred = centred_map(made(positions // 4), made(positions // 4))
        layer, band = Layer(2, grid, slice(1, 2)), Band.of(frames, tau)
        forms: dict[str, Callable[[], Any]] = {
            "plain": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "official": lambda a=(q, k, v, centred + 1 / frames, small, grid, tau): official(*a),
            "guided": lambda a=(q, k, v, centred, small, layer, band): guided(*a),
            "reference": lambda a=(q, k, v, layer, band): reference(*a),
            "values": lambda q=q, k=k, v=v, b=band: F.scaled_dot_product_attention(q, k, filter_frames(v, b, 1.5)),
        }
        if band.mean_only:
            forms["output"] = lambda q=q, k=k, v=v: stretched(q, k, v)
        times = least(forms, repeats)
        error = (forms["guided"]() - forms["official"]()).abs().max()
        table.append(
            {
                "shape": f"{positions} x {heads}, F {frames}, D {channels}, tau {tau}",
                "plain_ms": round(1e3 * times["plain"], 2),
                "ratio": {n: round(t / times["plain"], 3) for n, t in times.items() if n != "plain"},
                "largest_difference_from_official": float(error),
            }
        )
        print(table[-1], file=sys.stderr)
    return table


def guided(q: Tensor, k: Tensor, v: Tensor, ref: Tensor, small: tuple[int, int], layer: Layer, band: Band) -> Tensor:
    """Compute one guided and enhanced attention as attnctl does, energies included."""
    out = output_like(v)
    pieces, energies = guided_maps(q, k, layer, Reference(ref, 2, small), alpha=0.6, band=band, out=out)
    assert energies is not None
    total = energies.sum(1)
    return weigh(pieces, v, band, motion_beta(total[0], total[1], total[2], 1.5), out)


def reference(q: Tensor, k: Tensor, v: Tensor, layer: Layer, band: Band) -> Tensor:
    """Compute one enhanced attention whose maps guide others."""
    out = output_like(v)
    return weigh(guided_maps(q, k, layer, out=out)[0], v, band, 1.5, out)


def stretched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the output form, mu + beta (A v - mu)."""
    out = F.scaled_dot_product_attention(q, k, v)
    return torch.lerp(v.mean(-2, keepdim=True).expand_as(out), out, 1.5)


def least(forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the least process time of each form over interleaved repeats."""
    times = dict.fromkeys(forms, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up, and being slower never counts
        for name, form in forms.items():
            began = time.process_time()
            form()
            times[name] = min(times[name], time.process_time() - began)
    return times


def run_flops() -> dict[str, Any]:
    """Count one step of SD 1.5 AnimateDiff, plain and active."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        model = diffusers.UNetMotionModel.from_unet2d(unet, diffusers.MotionAdapter(use_motion_mid_block=False))
        model = model.to("meta")
        inputs = {
            "sample": torch.empty(2, 4, 16, 64, 64),
            "timestep": torch.tensor(1),
            "encoder_hidden_states": torch.empty(32, 77, 768),
        }

    def count() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs, return_dict=False)
        return int(counter.get_total_flops())

    plain = count()
    result: dict[str, Any] = {"plain_tflop": plain / 1e12, "active": {}}
    for control in (BroadWay(), BroadWay(alpha=0.0)):
        with attnctl.control(model, control, layout="uncond_first") as handle:
            handle.set_step(0, 50)
            active = count()
        added = 0.2 * (active / plain - 1)
        result["active"][control.describe()] = {"tflop": active / 1e12, "whole_run_adds": added}
        print(f"{control.describe():20} step {active / plain - 1:+.4%}, whole run {added:+.4%}", file=sys.stderr)
    result["passed"] = all(a["whole_run_adds"] <= RUN_LIMIT for a in result["active"].values())
    return result


def interval(values: np.ndarray, base: np.ndarray | None = None, draws: int = 10_000) -> list[float]:
    """Return the mean (or the ratio of means to `base`) and its bootstrap interval over the pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), (draws, len(values)))
    drawn = values[picks].mean(1)
    point = values.mean()
    if base is not None:
        drawn, point = drawn / base[picks].mean(1), point / base.mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [round(float(x), 4) for x in (point, low, high)]


def once(log: Path | None, key: list[Any], run: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what was run under a key, from the log where it is there."""
    lines = log.read_text(encoding="utf-8").splitlines() if log is not None and log.exists() else []
    for line in lines:
        entry = json.loads(line)
        if entry["key"] == key:
            found: list[dict[str, Any]] = entry["rows"]
            return found
    rows = run()
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")
    return rows


def called(controls: Sequence[BroadWay]) -> str:
    """Name controls that act together."""
    return " + ".join(control.describe() for control in controls)


def flow_of(item: tuple[Any, dict[str, Any]]) -> float:
    """Return how much more moves."""
    return float(item[1]["flow_ratio_moving"][0])


def right_of(item: tuple[Any, dict[str, Any]]) -> tuple[float, float]:
    """Return what right videos, and those of the right direction, have gained."""
    return item[1]["right_points"][0], item[1]["direction_points"][0]


def warp_of(item: tuple[Any, dict[str, Any]]) -> float:
    """Return how much more tears."""
    return float(item[1]["warp_error_ratio"][0])


def flow_as_asked(prompts: Sequence[str]) -> np.ndarray:
    """Measure the mean flow of clips that are drawn as the prompts ask, NaN where nothing moves."""
    from attnctl.data.motion import measure
    from attnctl.shapes.motion import Clip, parse_clip, render_clip, sample_clip
    from attnctl.shapes.scenes import Scene

    rng, flows = np.random.default_rng(0), []
    for prompt in prompts:
        scene, (motion,) = parse_clip(prompt)
        if motion.direction == "still":
            flows.append(np.nan)
            continue
        drawn, asked = sample_clip(rng, motion), scene.things[0]
        thing = replace(drawn.scene.things[0], color=asked.color, shape=asked.shape)
        clip = Clip(Scene((thing,), scene.background), drawn.velocities)
        flows.append(measure(render_clip(clip)).motion_mean)
    return np.array(flows)


def choices(table: Sequence[tuple[Sequence[BroadWay], dict[str, Any]]]) -> dict[str, Sequence[BroadWay]]:
    """Choose what is reported of the settings that were tried."""
    aimed = [(c, r) for c, r in table if r["direction_points"][0] >= -2]
    # What moves enough and as asked, at the least warp error; if nothing does, what moves most.
    moved = [(c, r) for c, r in aimed if r["flow_ratio_moving"][0] >= MORE_MOTION]
    chosen, _ = min(moved or [max(aimed or table, key=flow_of)], key=warp_of)
    gentle = [(c, r) for c, r in aimed if warp_of((c, r)) <= WARP_LIMIT]
    runs = {"more motion": chosen, "self-guidance alone": (BroadWay(beta=1.0, energy_floor=False),)}
    if gentle:
        runs["gentle motion"] = max(gentle, key=flow_of)[0]
    return runs


def effects(model: str, n: int, n_tune: int, steps: int, folder: Path | None, log: Path | None) -> dict[str, Any]:
    """Choose settings on some prompts and report on others, paired by prompt and noise."""
    from attnctl.data.motion import NO_MOTION
    from attnctl.shapes.load import WEIGHTS, load_shapes
    from attnctl.shapes.motion import clip_prompts
    from attnctl.shapes.training.evaluate_video import generate_clips, mark

    pipe: Any = load_shapes(model, folder=folder)
    told = (folder or WEIGHTS / model) / "evaluation.json"
    scale = json.loads(told.read_text())["scale"] if told.is_file() else 3.0

    def rows(prompts: Sequence[str], seed: int, controls: Sequence[BroadWay]) -> list[dict[str, Any]]:
        began, name = time.perf_counter(), called(controls) or "plain"
        found: list[dict[str, Any]] = []
        for first in range(0, len(prompts), PART):
            part = prompts[first : first + PART]

            def run(part: Sequence[str] = part, seed: int = seed + first) -> list[dict[str, Any]]:
                with attnctl.control(pipe, *controls) if controls else nullcontext():
                    videos = generate_clips(pipe, part, scale=scale, seed=seed, steps=steps)
                return [{k: v if isinstance(v, str) else float(v) for k, v in m.items()} for m in mark(videos, part)]

            found += once(log, [name, list(part), seed + first, steps, scale], run)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return found

    def compared(plain: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
        moves = np.array([not r["asked"].startswith("still") for r in plain])
        column = lambda t, key: np.array([float(r[key]) for r in t])  # noqa: E731
        known = ~np.isnan(column(plain, "warp_error") + column(other, "warp_error"))
        flow = column(plain, "motion_mean"), column(other, "motion_mean")
        result: dict[str, Any] = {
            "warp_error_ratio": interval(column(other, "warp_error")[known], column(plain, "warp_error")[known]),
            "right_points": interval(100 * (column(other, "right") - column(plain, "right"))),
            "direction_points": interval(100 * (column(other, "direction") - column(plain, "direction"))),
            "speed_points": interval(100 * (column(other, "speed") - column(plain, "speed"))),
            "speed_share": [round(100 * float(column(t, "speed").mean()), 1) for t in (plain, other)],
            "direction_share": [round(100 * float(column(t, "direction").mean()), 1) for t in (plain, other)],
            "right_share": [round(100 * float(column(t, "right").mean()), 1) for t in (plain, other)],
            "flicker_ratio": interval(np.nan_to_num(column(other, "flicker")), np.nan_to_num(column(plain, "flicker"))),
        }
        if moves.any():
            result["flow_ratio_moving"] = interval(flow[1][moves], flow[0][moves])
        if not moves.all():
            result["still_share"] = [float((f[~moves] < NO_MOTION).mean()) for f in flow]
            result["still_judged"] = [
                round(100 * float(column(t, "direction")[~moves].mean()), 1) for t in (plain, other)
            ]
            result["still_videos"] = int((~moves).sum())
            result["still_flow"] = [float(f[~moves].mean()) for f in flow]
        return result

    tuning = clip_prompts(11, n_tune)
    base = rows(tuning, TUNING_SEED, ())
    candidates = FOR_STILL if model == "video-still" else CANDIDATES
    table = [(c, compared(base, rows(tuning, TUNING_SEED, c))) for c in candidates]
    runs = {"as asked": max(table, key=right_of)[0]} if model == "video-still" else choices(table)
    prompts = clip_prompts(12, n)
    plain = rows(prompts, REPORT_SEED, ())
    figures = {name: compared(plain, rows(prompts, REPORT_SEED, c)) for name, c in runs.items()}
    for name, row in figures.items():
        print(f"{name} ({called(runs[name])}): {row}", file=sys.stderr)
    asked = flow_as_asked(prompts)
    made, moves = np.array([float(r["motion_mean"]) for r in plain]), ~np.isnan(asked)
    beyond = interval(made[moves], asked[moves])
    print(f"flow of plain videos against clips drawn as asked: {beyond}", file=sys.stderr)
    return {
        "model": model,
        "videos": n,
        "plain_flow_against_asked": beyond,
        "steps": steps,
        "cfg": scale,
        "controls": {name: called(c) for name, c in runs.items()},
        "effects": figures,
        "tuning": [{"control": called(c), **r} for c, r in table],
    }


def main() -> int:
    """Run one study and print it; exit with 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("cost", "run", "effects"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-n", type=int, default=128, help="videos of the report")
    parser.add_argument("--tune", type=int, default=12, help="videos of every setting tried")
    parser.add_argument("--steps", type=int, default=10, help="effects: denoising steps")
    parser.add_argument("--model", choices=("video", "video-still"), default="video", help="effects: on this model")
    parser.add_argument("--folder", type=Path, help="other weights of it")
    parser.add_argument("--log", type=Path, help="effects: JSON lines of what was made, to go on from")
    parser.add_argument("--threads", type=int, help="1 for cost, all for effects if not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or (1 if options.study == "cost" else os.cpu_count() or 1))
    result: dict[str, Any] = {"study": options.study, "machine": platform.machine(), "torch": torch.__version__}
    with torch.no_grad():
        if options.study == "cost":
            result |= cost(options.repeats)
        elif options.study == "run":
            result |= run_flops()
        else:
            result |= effects(options.model, options.n, options.tune, options.steps, options.folder, options.log)
    print(json.dumps(result, indent=1))
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
