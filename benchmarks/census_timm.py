"""Count the models of timm with attention that `Capture` reads and `attnctl.swap` changes, and why others are refused.

    python benchmarks/census_timm.py                  # every name
    python benchmarks/census_timm.py --modules eva pit  # those of some of timm's files
    python benchmarks/census_timm.py --each           # a run of every name instead of one per kind
    python benchmarks/census_timm.py --json benchmarks/results/census_timm.json

Every name is built on the meta device, so nothing is downloaded and nothing is computed, and its attention is listed.
Models of one class with the same classes of attention are one kind: its smallest member runs one image under a Capture
of all sites, and one after a swap of all places. The tests compare maps of small models with the written-out softmax.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
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
from attnctl.backbones.find_grids import image_size
from attnctl.backbones.look.readings import reading_of
from attnctl.backbones.places import place_of
from attnctl.errors import AttnctlError
from attnctl.processors import Capture

ATTENTION = re.compile(r"attention|attn|MHSA|XCA|GPSA|SHSA|LiteMLA|LambdaLayer", re.IGNORECASE)
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


def build(name: str) -> nn.Module:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def describe(name: str) -> dict[str, Any] | None:
    """List the attention of a model, or return None for one without."""
    model = build(name)
    classes = attention_of(model)
    if not classes:
        return None
    kinds = {f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}
    attend = sorted(
        k for k in kinds if ATTENTION.search(k.rpartition(".")[2]) and not GATES.search(k.rpartition(".")[2])
    )
    row: dict[str, Any] = {"name": name, "model": type(model).__name__, "classes": classes, "read": "", "swap": ""}
    row["kind"] = " ".join([type(model).__name__, *attend])
    row["size"] = sum(p.numel() for p in model.parameters())
    row["sites"] = sum(reading_of(m) is not None for m in model.modules())
    row["places"] = sum(place_of(m) for m in model.modules())
    row["whole"] = row["sites"] > 0 and not _unread(model)
    return row


def judge(name: str) -> dict[str, str]:
    """Run a model once while it is read, and once after a swap; return what refused."""
    model, answers = build(name), {"read": "", "swap": ""}
    x = torch.rand(1, *image_size(model), device="meta")
    try:
        sites = attnctl.find_sites(model)
        asked = {"points": ((0.5, 0.5),)} if any(s.kind == "self" for s in sites) else {}
        capture = Capture(keep=("heads",), budget=2**40, **asked)
        with torch.no_grad(), attnctl.control(model, capture) as handle:
            model(x)
            assert handle.maps.layers
    except (AttnctlError, RuntimeError, NotImplementedError, TypeError) as error:
        answers["read"] = _short(error)
    try:
        attnctl.swap(model, "sigmoid")
        with torch.no_grad():
            model(x)
        attnctl.unswap(model)
    except (AttnctlError, RuntimeError, NotImplementedError) as error:
        answers["swap"] = _short(error)
    return answers


def _unread(model: nn.Module) -> list[str]:
    """Name the attention of a model that lies in no site."""
    sites = [s.name for s in attnctl.find_sites(model)]
    within = [n for n, m in model.named_modules() if ATTENTION.search(type(m).__name__)]
    return [n for n in within if not any(n == s or n.startswith(f"{s}.") or s.startswith(f"{n}.") for s in sites)]


def _may_attend(module: str) -> bool:
    """Return whether one of timm's files names attention at all."""
    try:
        source = inspect.getsource(importlib.import_module(f"timm.models.{module}"))
    except ImportError:
        return False  # of attnctl
    return (
        re.search(r"class \w*(Attention|Attn|MHSA|XCA|SHSA)|import.*Attention|Attention\w*,|attn", source) is not None
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def _write(path: Path, rows: list[dict[str, Any]], count: int, part: bool) -> None:
    """Write rows and their counts; where a part was judged, the other rows of the file stay as they are."""
    shown = ("name", "model", "classes", "read", "swap", "sites", "places", "whole")
    kept = [{k: r.get(k) for k in shown} for r in rows]
    before = json.loads(path.read_text()) if part and path.exists() else None
    if before is not None and before["timm"] == timm.__version__:
        fresh = {r["name"]: r for r in kept}
        kept = [fresh.pop(r["name"], r) for r in before["rows"]] + list(fresh.values())
        count = before["models"]
    read = [r for r in kept if not r["read"]]
    result = {
        "timm": timm.__version__,
        "models": count,
        "attention": len(kept),
        "read": len(read),
        "whole": sum(bool(r["whole"]) for r in read),
        "swapped": sum(not r["swap"] for r in kept),
        "rows": kept,
    }
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(f"{path.name}: {len(kept)} models with attention, {len(read)} read, {result['swapped']} swapped")


def main() -> None:
    """Judge the models, print the counts, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=[], help="timm's files to take names from, all if none")
    parser.add_argument("--each", action="store_true", help="run every name, not one of each kind")
    parser.add_argument("--first", action="store_true", help="only the first name of each file")
    parser.add_argument("--json", type=Path, help="write every row to this file; with --modules, its other rows stay")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    own = [m for m in timm.list_modules() if _may_attend(m)]
    modules = args.modules or own
    names = [n for m in modules for n in (timm.list_models(module=m)[:1] if args.first else timm.list_models(module=m))]
    rows = []
    for name in tqdm(names, disable=None, desc="models", unit="model"):
        try:
            row = describe(name)
        except Exception as error:  # a model that cannot be built on the meta device
            row = {
                "name": name,
                "classes": ["?"],
                "kind": name,
                "size": 0,
                "read": _short(error),
                "swap": _short(error),
            }
        if row is not None:
            rows.append(row)
    answers: dict[str, dict[str, str]] = {}
    for row in tqdm(sorted(rows, key=lambda r: r["size"]), disable=None, desc="runs", unit="model"):
        key = row["name"] if args.each else row["kind"]
        if row["classes"] != ["?"]:
            if key not in answers:
                answers[key] = judge(row["name"]) | {"run": row["name"]}
            row |= answers[key]
    read = [r for r in rows if not r["read"]]
    print(f"{len(rows)} of {len(names)} models have attention: {len(read)} are read ", end="")
    print(f"({sum(bool(r.get('whole')) for r in read)} at every attention), {sum(not r['swap'] for r in rows)} swapped")
    for what in ("read", "swap"):
        print(f"not {what}, by classes:")
        counts = Counter(", ".join(r["classes"]) for r in rows if r[what])
        for classes, n in counts.most_common(40):
            print(f"  {n:4} {classes}")
    if args.json:
        _write(args.json, rows, len(names), part=bool(args.modules))


if __name__ == "__main__":
    main()
