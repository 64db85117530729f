"""What an edit along a flow costs: `python benchmarks/edit_costs.py > benchmarks/results/edit_costs.json`.

Two parts. Work: on tiny models of eight hosts, an inversion and an edit are run with FateZero (store="recompute") and
without it; counted are rows in the denoiser's first block and floating point operations (torch's counter). The
image has twice as many tokens as the text or more: a real one has eight times as many (FLUX.1 at 1024 pixels) to 64
times (Wan 14B at 480p), and the fewer there are, the more of the work is keys of the second text.
The branches run plainly are the source's way up, and the edit's way down with guidance. Memory: what is kept of the
source at the shapes of FLUX.1 at 1024 pixels and of Wan 2.1 14B at 480p with 81 frames, by the arithmetic that
`attnctl edit` prints before it runs; the models are built without weights. Tables go to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import editing_hosts as hosts  # noqa: E402

import attnctl  # noqa: E402
from attnctl.core.hosts.autoencoders import Coder  # noqa: E402
from attnctl.core.hosts.families import family_of  # noqa: E402
from attnctl.core.hosts.listing import find_sites  # noqa: E402
from attnctl.pipelines.editing.costs import Shape, flow_costs, in_words  # noqa: E402
from attnctl.pipelines.editing.flow_inversion import call_of, invert_flow  # noqa: E402
from attnctl.pipelines.editing.running import running_on  # noqa: E402
from attnctl.processors import FateZero  # noqa: E402

STEPS, GUIDANCE = 8, 3.0
SIDE = 32  # tokens along a side of the picture
MOST_RATIO, MOST_BYTES = 1.6, 64 << 20


def _products(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count the two products of an attention of these shapes."""
    return int(sdpa_flop_count(q, k, v))


class Counted:
    """Counts rows in a denoiser's first block and operations while it is entered."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Calls that a control adds do not pass the hooks of the denoiser itself.
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(list(m.parameters())))
        self.block, self.rows = blocks[0], 0
        # torch counts the products of its fused kernels, all but that of the CPU.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.flops = FlopCounterMode(display=False, custom_mapping={fused: _products})

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.rows += len(x)

    def __enter__(self) -> Counted:
        self.hook = self.block.register_forward_pre_hook(self._note, with_kwargs=True)
        self.flops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.flops.__exit__(*error)
        self.hook.remove()


def once(pipe: Any, coded: Any, control: FateZero | None) -> tuple[int, int]:
    """Invert and edit; return rows and operations."""
    with Counted(pipe.transformer) as count, torch.no_grad():
        inversion = invert_flow(pipe, coded, hosts.SOURCE, edit=control, steps=STEPS)
        start = Coder(pipe).again(inversion.noise.to(coded.latents), coded)
        call = call_of(pipe, hosts.TARGET, coded, start, STEPS, GUIDANCE)
        with running_on(pipe, inversion.way_back()) as more:
            if control is None:
                pipe(**call | more)
            else:
                with attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)):
                    pipe(**call | more)
    return count.rows, int(count.flops.get_total_flops())


def work(name: str) -> dict[str, Any]:
    """Compare one host with the branches run plainly, in both windows of half and of all steps."""
    pipe = hosts.build(name)
    coder = Coder(pipe)
    m = coder.multiple
    coded = coder.encode(hosts.clip(coder.frames(5) if coder.video else 1, SIDE * m, SIDE * m))
    plain, found = once(pipe, coded, None), {}
    for share in (0.5, 1.0):
        control = FateZero(source=hosts.SOURCE, target=hosts.TARGET, cross_replace=share, self_replace=share)
        edited = once(pipe, coded, control)
        found[f"windows of {share:g}"] = {
            "rows": round(edited[0] / plain[0], 3),
            "flops": round(edited[1] / plain[1], 3),
        }
    return found


def real() -> dict[str, tuple[torch.nn.Module, Shape, int]]:
    """Build the real models without weights; return them with the shapes of a run and its steps."""
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        wan = diffusers.WanTransformer3DModel()
    return {
        "FLUX.1-dev, 1024x1024": (flux, Shape(64 * 64, 512, 64 * 64 * 64, 2, 2), 25),
        "Wan 2.1 14B, 832x480, 81 frames": (wan, Shape(21 * 30 * 52, 512, 16 * 21 * 60 * 104, 4, 2), 50),
    }


def memory() -> dict[str, Any]:
    """Compute what is kept at real shapes."""
    control, found = FateZero(source="a", target="b", cross_replace=0.5, self_replace=0.5), {}
    for name, (model, shape, steps) in real().items():
        sites = control.resolve(find_sites(model), family_of(model))
        costs = flow_costs(control, sites, shape, steps, "fireflow")
        print(f"{name}, {steps} steps\n{in_words(costs)}", file=sys.stderr, flush=True)
        found[name] = {"steps": steps, **costs}
    return found


def main() -> int:
    """Count and print; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="*", choices=tuple(hosts.HOSTS), default=list(hosts.HOSTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"work": {}, "memory": memory()}
    print("| host | windows | rows | FLOPs |\n|---|---|---|---|", file=sys.stderr)
    for name in options.hosts:
        found["work"][name] = work(name)
        for windows, ratio in found["work"][name].items():
            print(f"| {name} | {windows} | {ratio['rows']} | {ratio['flops']} |", file=sys.stderr, flush=True)
    right = all(r["flops"] <= MOST_RATIO for rows in found["work"].values() for r in rows.values())
    right &= all(c["device_bytes"] <= MOST_BYTES for c in found["memory"].values())
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    print(json.dumps(found | {"holds": right, "versions": versions, "machine": platform.machine()}, indent=1))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
