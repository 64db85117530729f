"""How far each method is from its formula: `python benchmarks/fidelity.py`.

Each row computes one method twice on the same random numbers: as the package does, in float32, and as the paper writes
it, in float64 with every map spelled out. It prints the largest absolute difference of any element, and the largest
element, so that the one can be held against the other. Beside that, what recorded word maps weigh while a run keeps
them, against the maps that they are made of; and how much of the source is annotated.

The table goes to stderr, the JSON to stdout; the exit code is 1 if a difference is above 1e-5 of the largest element.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  (first: offline, quiet, one thread)
import formulas_vision  # noqa: E402, F401  (enters its rows)
import torch  # noqa: E402
from contract import Replace  # noqa: E402
from formulas import ROWS  # noqa: E402

import attnctl  # noqa: E402
from attnctl.data.provenance import versions  # noqa: E402
from attnctl.processors import AttnCall, Capture, Proceed  # noqa: E402

LIMIT = 1e-5


def _tensor_bytes() -> int:
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_of_maps(steps: int = 10) -> dict[str, int]:
    """Count the bytes that one recorded word holds after a run of a shipped model, and those of the maps behind it."""
    pipe = attnctl.load_shapes("mmdit")
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "max_sequence_length": 0, "output_type": "latent"}
    entries: list[int] = []

    def count(seen: AttnCall, proceed: Proceed) -> torch.Tensor:
        entries.append(seen.q.shape[0] * seen.q.shape[1] * seen.q.shape[2] * seen.k.shape[2])
        return proceed(seen)

    def run() -> None:
        pipe("a red circle on gray", generator=torch.Generator().manual_seed(0), **call)

    with attnctl.control(pipe, Replace(function=count)):
        run()
    before = _tensor_bytes()
    with attnctl.control(pipe, Capture(words=("circle",))) as handle:
        run()
        held = _tensor_bytes() - before
        assert handle.maps.words == ("circle",)
    return {"steps": steps, "calls": len(entries), "held": held, "maps_one_by_one": 4 * sum(entries)}


def annotated() -> dict[str, int]:
    """Count functions of the package, and those whose parameters and results are all annotated."""
    total = whole = 0
    for path in (ROOT / "attnctl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            named = [a for a in given if a is not None and a.arg not in ("self", "cls")]
            total += 1
            whole += node.returns is not None and all(a.annotation is not None for a in named)
    return {"functions": total, "annotated": whole}


def main() -> int:
    """Compare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="some of the rows")
    options = parser.parse_args()
    rows = {}
    for name in options.only or ROWS:
        formula, function = ROWS[name]
        got, want = function()
        assert got.dtype == torch.float32, name
        off, largest = float((got.double() - want).abs().max()), float(want.abs().max())
        rows[name] = {"formula": formula, "difference": off, "largest": largest}
        print(f"{name:44}{off:10.1e} of {largest:8.3g}   {formula}", file=sys.stderr)
    worst = max(r["difference"] / r["largest"] for r in rows.values())
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": rows, "worst": worst}
    if not options.only:
        result |= {"maps": weight_of_maps(), "source": annotated()}
        print(f"{result['maps']}\n{result['source']}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
