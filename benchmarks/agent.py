"""What AgentAttention saves on a UNet of Stable Diffusion 1.5's shape at 64 x 64 latents: `python benchmarks/agent.py`.

Random weights, two rows (negative prompt and prompt). Plain and controlled calls are interleaved in one run; the least
time counts, processor time where there is one thread. "attention" is the self-attention of the full-resolution sites
alone, projections, matching and merging included. The deviation of the prediction from the dense one is that of random
weights: a bound for nothing, told for completeness. "if free" is the speed-up of the denoiser that attention at full
resolution would give if it took no time at all: no method of attention can be above it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import AgentAttention

ATTENTION_LIMIT, DENOISER_LIMIT = 2.0, 1.2
CONTROLS = {
    "agents, ratio 0.4": (AgentAttention(), 0),
    "agents, no merging": (AgentAttention(ratio=0.0), 0),
    "merging alone, ratio 0.4": (AgentAttention(), 30),
}


def build(size: int, width: int) -> tuple[Any, dict[str, Any]]:
    """Build the UNet and the inputs of one call."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()
    inputs = {
        "sample": torch.randn(2, 4, size, size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 768),
    }
    return model, inputs


def now() -> float:
    """Return the time of this process where one thread computes, which others on the machine hardly change."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed_attention(model: Any, seconds: list[float]) -> list[Any]:
    """Hook the full-resolution self-attentions; each adds its time to the last entry of `seconds`."""
    began: list[float] = []
    handles = []
    for site in attnctl.find_sites(model):
        if site.kind == "self" and site.name.startswith(("down_blocks.0", "up_blocks.3")):
            assert site.module is not None
            handles.append(site.module.register_forward_pre_hook(lambda m, a: began.append(now())))

            def ended(m: Any, a: Any, out: Any) -> None:
                seconds[-1] += now() - began.pop()

            handles.append(site.module.register_forward_hook(ended))
    return handles


def measure(model: Any, inputs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Time plain and controlled calls, interleaved."""

    def call() -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def controlled(name: str) -> Callable[[], torch.Tensor]:
        control, step = CONTROLS[name]

        def run() -> torch.Tensor:
            with attnctl.control(model, control, layout="uncond_first") as handle:
                handle.set_step(step, 50)
                return call()

        return run

    runs: dict[str, Callable[[], torch.Tensor]] = {"plain": call} | {n: controlled(n) for n in CONTROLS}
    whole = {n: float("inf") for n in runs}
    inner, flops, outputs = dict(whole), {}, {}
    for name, run in runs.items():  # also warms up
        with FlopCounterMode(display=False) as counter:
            outputs[name] = run()
        flops[name] = counter.get_total_flops()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds = [0.0]
            handles = timed_attention(model, seconds)
            began = now()
            run()
            whole[name] = min(whole[name], now() - began)
            inner[name] = min(inner[name], seconds[0])
            for handle in handles:
                handle.remove()
            print(f"{name}: {whole[name]:.2f} s, attention {inner[name]:.2f} s", file=sys.stderr)
    plain = outputs["plain"]
    return {
        name: {
            "seconds": round(whole[name], 3),
            "attention_seconds": round(inner[name], 3),
            "denoiser_speedup": round(whole["plain"] / whole[name], 3),
            "attention_speedup": round(inner["plain"] / inner[name], 3),
            "denoiser_speedup_if_free": round(whole["plain"] / (whole["plain"] - inner["plain"]), 3),
            "tflop": flops[name] / 1e12,
            "deviation": float((outputs[name] - plain).norm() / plain.norm()),
        }
        for name in runs
    }


def main() -> int:
    """Print a table and JSON; exit with 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--width", type=int, default=320, help="channels at full resolution")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        table = measure(*build(options.size, options.width), options.repeats)
    for name, row in table.items():
        figures = (
            f"{row['seconds']:8.2f} s  x{row['denoiser_speedup']:.2f}",
            f"attention {row['attention_seconds']:7.2f} s  x{row['attention_speedup']:.2f}",
            f"{row['tflop']:.2f} TFLOP   deviation {row['deviation']:.3f}",
        )
        print(f"{name:26}{'   '.join(figures)}", file=sys.stderr)
    best = table["agents, ratio 0.4"]
    print(f"if free: denoiser x{best['denoiser_speedup_if_free']:.2f}", file=sys.stderr)
    passed = best["attention_speedup"] >= ATTENTION_LIMIT and best["denoiser_speedup"] >= DENOISER_LIMIT
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    print(
        json.dumps(
            {"table": table, "size": options.size, "width": options.width, "passed": passed} | versions, indent=1
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
