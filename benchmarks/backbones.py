"""Time and memory of the vision backbones.

    python benchmarks/backbones.py --routing            # gather of bi-level routing against the expanded gather
    python benchmarks/backbones.py --throughput         # images per second, eager and compiled, beside timm's models

Tables go to stderr, one JSON line to stdout. Models are timed in turns; each side of the routing comparison runs in a
fresh process, whose peak resident set is its memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from attnctl.backbones.modules.routing import (
    BiLevelRoutingAttention,
    gather_windows,
    split_windows,
    top_windows,
    window_means,
)

MODELS = (
    "biformer_tiny",
    "agent_deit_tiny",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_tf_224",
)


def plain_gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather chosen windows from a view expanded to every pair of windows: the form that is easy to write."""
    b, n, t, c = x.shape
    k = index.shape[-1]
    pairs = x[:, None].expand(b, n, n, t, c)
    return pairs.gather(2, index[..., None, None].expand(b, n, k, t, c)).flatten(2, 3)


def routing_step(gather: Callable[[Tensor, Tensor], Tensor], module: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """Run routing attention with one of the gathers; returns the output map before the depthwise branch."""
    h, w = x.shape[1:3]
    wh, ww = module.window_of(h, w)
    q, k, v = split_windows(module.qkv(x), wh, ww).chunk(3, dim=-1)
    _, index = top_windows(window_means(q).detach(), window_means(k).detach(), module.topk, module.scale)
    chosen = gather(torch.cat([k, v], dim=-1), index).flatten(0, 1)
    heads = [module._heads(y) for y in (q.flatten(0, 1), *chosen.chunk(2, dim=-1))]
    out = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=module.scale)
    return module.wo(out.transpose(1, 2).flatten(2))


def routing_side(side: str, args: argparse.Namespace, queue: Any) -> None:
    """Time forward and backward of one side and report the growth of the peak resident set."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module = BiLevelRoutingAttention(args.dim, args.dim // 32, 7, topk=args.topk)
    x = torch.randn(args.batch, args.side, args.side, args.dim, requires_grad=True)
    gather = gather_windows if side == "flat" else plain_gather
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, computed = [], []
    for _ in range(args.repeats):
        start, begun = time.perf_counter(), time.process_time()
        routing_step(gather, module, x).sum().backward()
        times.append(time.perf_counter() - start)
        computed.append(time.process_time() - begun)
        grad, x.grad = x.grad, None
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    spent = {"seconds": statistics.median(times), "cpu_seconds": statistics.median(computed)}
    queue.put(spent | {"peak_mib": peak, "grad_norm": float(grad.norm())})


def routing(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the two gathers, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, Any] = {}
    for side in ("expanded", "flat"):
        queue = context.Queue()
        process = context.Process(target=routing_side, args=(side, args, queue))
        process.start()
        rows[side] = queue.get()
        process.join()
        row = rows[side]
        print(
            f"{side:9s} {row['seconds']:8.3f} s, {row['cpu_seconds']:8.3f} s computed, peak +{row['peak_mib']:.1f} MiB",
            file=sys.stderr,
        )
    plain, flat = rows["expanded"], rows["flat"]
    rows["speedup"] = plain["seconds"] / flat["seconds"]
    rows["cpu_speedup"] = plain["cpu_seconds"] / flat["cpu_seconds"]  # holds on a busy machine too
    rows["memory_ratio"] = flat["peak_mib"] / plain["peak_mib"]
    rows["shape"] = {"batch": args.batch, "side": args.side, "dim": args.dim, "windows": 49, "topk": args.topk}
    print(
        f"{rows['speedup']:.2f} x faster ({rows['cpu_speedup']:.2f} x less computed), "
        f"{rows['memory_ratio']:.2f} of the memory",
        file=sys.stderr,
    )
    return rows


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Count images per second of every model at its own input size, eager and compiled, in turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    runs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    for name in args.models:
        model = timm.create_model(name).eval().to(device)
        x = torch.randn(args.batch, *model.pretrained_cfg["input_size"], device=device)
        runs[name] = (model, x)
        if not args.eager:
            runs[f"{name} compiled"] = (torch.compile(model), x)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    computed: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for name, (run, x) in runs.items():
            start = time.perf_counter()
            run(x)  # compile and warm up
            print(f"{name}: first call {time.perf_counter() - start:.1f} s", file=sys.stderr)
        for _ in range(args.repeats):
            for name, (run, x) in runs.items():
                start, begun = time.perf_counter(), time.process_time()
                run(x)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
                computed[name].append(time.process_time() - begun)
    rows, busy = (
        {name: args.batch / statistics.median(t) for name, t in times.items()} for times in (seconds, computed)
    )
    for name, rate in rows.items():
        print(f"{name:42s} {rate:8.2f} images/s, {busy[name]:8.2f} a second computed", file=sys.stderr)
    result: dict[str, Any] = {"device": device, "batch": args.batch, "images_per_second": rows}
    # On a busy machine the clock tells little; what one thread computed still compares.
    return result | ({"images_per_cpu_second": busy} if device == "cpu" else {})


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routing", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=56, help="tokens per side of the routed map")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    if not (args.routing or args.throughput):
        parser.error("nothing to do: give --routing or --throughput")
    result: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads}
    if args.routing:
        result["routing"] = routing(args)
    if args.throughput:
        result["throughput"] = throughput(args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
