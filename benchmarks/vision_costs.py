"""Measure what forms of attention save: mixtures of heads, neighbourhoods, and efficient probing.

    python benchmarks/vision_costs.py --threads 1

Times are the least of several runs of one image, without gradients. FLOPs are those of the products behind the
projections, counted by torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnctl.backbones.mixers import Slot
from attnctl.backbones.mixers.moh import MoHMixer
from attnctl.backbones.mixers.softmax import NeighborhoodMixer
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.probing import probe


def least(call: Callable[[], Any], runs: int) -> float:
    """Return the least milliseconds of a call."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def flops(call: Callable[[], Any]) -> int:
    """Count the products of a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def heads(runs: int) -> dict[str, Any]:
    """Compare a mixture with half of its heads in use with softmax: 12 heads, 196 tokens."""
    q, k, v, x = *(torch.randn(1, 12, 196, 64) for _ in range(3)), torch.randn(1, 196, 768)
    mixer = MoHMixer(Slot(768, 12, (14, 14), 0, 0.125), shared=3, topk=3).eval()
    nn.init.normal_(mixer.gates["route"].weight)

    def softmax() -> Any:
        return attend(q, k, v, None, 0.125)

    def mixed() -> Any:
        return mixer(q, k, v, x, (14, 14))

    routers = sum(2 * 196 * gate.weight.numel() for gate in mixer.gates.values())
    share = (flops(mixed) - routers) / flops(softmax)
    times = {"softmax_ms": least(softmax, runs), "moh_ms": least(mixed, runs)}
    return {
        "heads_in_use": 0.5,
        "flops_share": share,
        "flops_share_with_routers": flops(mixed) / flops(softmax),
    } | times


def neighbourhood(runs: int) -> dict[str, Any]:
    """Compare windows of 7 x 7 on a map of 56 x 56 with softmax over the map: 2 heads of 32 channels."""
    q, k, v = (torch.randn(1, 2, 56 * 56, 32) for _ in range(3))
    mixer = NeighborhoodMixer(Slot(64, 2, (56, 56), 0, 32**-0.5))
    window = least(lambda: mixer(q, k, v, q, (56, 56)), runs)
    softmax = least(lambda: attend(q, k, v, None, 32**-0.5), runs)
    return {"softmax_ms": softmax, "neighbourhood_ms": window, "times_faster": softmax / window}


def probes(runs: int) -> dict[str, Any]:
    """Compare the heads that ask a frozen backbone: 768 channels, 197 tokens, 1000 classes."""

    class Tokens(nn.Module):
        num_features = 768

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    x, rows = torch.randn(8, 197, 768), {}
    for head in ("linear", "ep", "mha"):
        probed = probe(Tokens(), 1000, head).eval()
        size = sum(p.numel() for n, p in probed.named_parameters() if n.startswith("pool"))
        rows[head] = {"pool_parameters": size, "pool_ms": least(lambda p=probed: p.pool(x), runs)}  # type: ignore[misc]
    return rows


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        result = {"moh": heads(args.runs), "neighborhood": neighbourhood(args.runs), "probes": probes(args.runs)}
    print(json.dumps({"torch": torch.__version__, "threads": args.threads} | result))


if __name__ == "__main__":
    main()
