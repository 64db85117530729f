"""Time the closed forms against the map forms they replace: `python benchmarks/kernels.py > kernels.json`.

image_block: 1 + T logits per image row against SDPA with the dense (N+T) x (N+T) mask, built anew for every
call, as diffusers' SD3 PAG pipeline does. identity: lerp of outputs against the explicit map (1-u) A + u I.
Every repeat runs all variants one after the other, so that a busy machine slows all of them alike; the
figures are medians. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl import kernels

SIZES = {1024: 154, 2304: 333}  # image tokens: text tokens


def dense_mask(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """Compute image_block with a full additive mask."""
    mask = q.new_zeros(q.shape[2], q.shape[2])
    mask[:n, :n] = float("-inf")
    mask[:n, :n].fill_diagonal_(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def map_form(q: Tensor, k: Tensor, v: Tensor, u: float, heads: tuple[int, ...]) -> Tensor:
    """Compute (1-u) A + u I on the selected heads by building the maps."""
    a = ((q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5).softmax(dim=-1)
    picked = list(heads)
    a[:, picked] = (1 - u) * a[:, picked] + u * torch.eye(q.shape[2], device=q.device)
    return a.to(v.dtype) @ v


def variants(q: Tensor, k: Tensor, v: Tensor, n: int) -> dict[str, Callable[[], Tensor]]:
    """Name the calls that are timed, in the order of the table."""
    some = tuple(range(0, q.shape[1], 2))
    block = partial(kernels.perturb, q, k, v, scope="image_block", image=slice(0, n))
    return {
        "plain attention": partial(kernels.attention, q, k, v),
        "image_block, closed form": block,
        "image_block, dense mask": partial(dense_mask, q, k, v, n),
        "u=0.5 half the heads, lerp": partial(kernels.perturb, q, k, v, u=0.5, heads=some),
        "u=0.5 half the heads, map": partial(map_form, q, k, v, 0.5, some),
        "u=1 half the heads, skipped": partial(kernels.perturb, q, k, v, u=1.0, heads=some),
        "u=1 half the heads, map": partial(map_form, q, k, v, 1.0, some),
    }


def measure(calls: dict[str, Callable[[], Tensor]], repeats: int, device: str) -> dict[str, float]:
    """Return the median milliseconds of every call over interleaved repeats, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def main() -> None:
    """Run the benchmark and print a table (stderr) and JSON (stdout)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    results = []
    for n, t in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        shape = 3, 1, args.heads, n + t, args.head_dim
        q, k, v = torch.randn(shape, generator=generator).to(args.device, dtype).unbind(0)
        calls = variants(q, k, v, n)
        gap = (calls["image_block, closed form"]() - calls["image_block, dense mask"]()).abs().max().item()
        gap = max(
            gap,
            (calls["u=0.5 half the heads, lerp"]() - calls["u=0.5 half the heads, map"]()).abs().max().item(),
        )
        with torch.inference_mode():
            medians = measure(calls, args.repeats, args.device)
        print(f"\nN={n} image + T={t} text tokens, largest difference {gap:.1e}", file=sys.stderr)
        for name, value in medians.items():
            print(f"  {name:30s} {value:9.2f} ms", file=sys.stderr)
        results.append({"image_tokens": n, "text_tokens": t, "max_abs_difference": gap, "median_ms": medians})
    able = [b.name for b in kernels.backends(args.device, dtype, args.head_dim).values() if b.available]
    setting = {**vars(args), "dtype": str(dtype), "torch": torch.__version__, "backends": able}
    print(json.dumps({"benchmark": "kernels", "setting": setting, "results": results}, indent=2))


if __name__ == "__main__":
    main()
