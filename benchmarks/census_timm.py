"""Count the models of timm with attention that `Capture` reads and `attnctl.swap` changes, and why others are refused.

    python benchmarks/census_timm.py                  # every name; about one second each
    python benchmarks/census_timm.py --modules eva pit  # those of some of timm's files
    python benchmarks/census_timm.py --json benchmarks/results/census_timm.json

Models are built on the meta device, so nothing is downloaded and nothing is computed: a model counts as read if one
image passes under a Capture of all its sites. The tests compare the maps of small ones with the written-out softmax.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

import attnctl
from attnctl.backbones.look.readings import reading_of
from attnctl.backbones.swap import _input_size
from attnctl.errors import AttnctlError
from attnctl.processors import Capture

ATTENTION = re.compile(r"attention|attn|MHSA|XCA|GPSA", re.IGNORECASE)
# Gates on channels or places, which weigh no tokens against each other.
GATES = re.compile(r"^(SplitAttn|SelectiveKernel|ChannelAttn|LightChannelAttn|SpatialAttn|LightSpatialAttn|Cbam)")


def attention_of(model: nn.Module) -> list[str]:
    """Name the classes in a model that attend, the innermost ones."""
    names = set()
    for module in model.modules():
        name = type(module).__name__
        if ATTENTION.search(name) and not GATES.search(name) and not name.endswith(("Block", "Stage")):
            names.add(name)
    return sorted(names)


def judge(name: str) -> dict[str, Any] | None:
    """Return what is read and swapped of a model, or None for one without attention."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    row: dict[str, Any] = {"name": name, "classes": attention_of(model), "read": "", "swap": ""}
    if not row["classes"]:
        return None
    x = torch.rand(1, *_input_size(model), device="meta")
    try:
        capture = Capture(points=((0.5, 0.5),), keep=("heads",), budget=2**40)
        with torch.no_grad(), attnctl.control(model, capture) as handle:
            model(x)
            row["sites"] = len(handle.maps.layers)
        inside = [m for m in model.modules() if reading_of(m) is not None]
        row["whole"] = len(inside) > 0 and not _unread(model)
    except (AttnctlError, RuntimeError, NotImplementedError, TypeError) as error:
        row["read"] = _short(error)
    try:
        attnctl.swap(model, "sigmoid")
        row["places"] = len(attnctl.swap_report(model).sites)
    except (AttnctlError, RuntimeError, NotImplementedError) as error:
        row["swap"] = _short(error)
    return row


def _unread(model: nn.Module) -> list[str]:
    """Name the attention of a model that lies in no site."""
    sites = [s.name for s in attnctl.find_sites(model)]
    within = [n for n, m in model.named_modules() if ATTENTION.search(type(m).__name__)]
    return [n for n in within if not any(n == s or n.startswith(f"{s}.") or s.startswith(f"{n}.") for s in sites)]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def main() -> None:
    """Judge the models, print the counts, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=[], help="timm's files to take names from, all if none")
    parser.add_argument("--first", action="store_true", help="only the first name of each file")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    own = [m for m in timm.list_modules() if not m.startswith(("agent_", "biformer"))]
    modules = args.modules or own
    names = [n for m in modules for n in (timm.list_models(module=m)[:1] if args.first else timm.list_models(module=m))]
    rows = []
    for name in tqdm(names, disable=None, desc="models", unit="model"):
        try:
            row = judge(name)
        except Exception as error:  # a model that cannot be built on the meta device
            row = {"name": name, "classes": ["?"], "read": _short(error), "swap": _short(error)}
        if row is not None:
            rows.append(row)
    read = [r for r in rows if not r["read"]]
    print(f"{len(rows)} of {len(names)} models have attention: {len(read)} are read ", end="")
    print(f"({sum(bool(r['whole']) for r in read)} at every attention), {sum(not r['swap'] for r in rows)} swapped")
    for what in ("read", "swap"):
        print(f"not {what}, by classes:")
        counts = Counter(", ".join(r["classes"]) for r in rows if r[what])
        for classes, n in counts.most_common(40):
            print(f"  {n:4} {classes}")
    if args.json:
        args.json.write_text(json.dumps({"timm": timm.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
