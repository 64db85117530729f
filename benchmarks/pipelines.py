"""Whole, unmodified pipelines of diffusers under control: `python benchmarks/pipelines.py`.

Each pipeline of tests/zoo_host_pipelines.py, zoo_variants.py and zoo_encoded.py (tiny random weights) runs three
steps plain, under PAG at all self and joint attention of the image (NAG where there is none), and under Capture where
text is attended to. For each run:

acts        what comes out is finite and differs (Capture: the same, and maps were recorded)
refused     attnctl said in words why not
fault       an exception of somebody else, no effect without a word
clean       after detaching, the variables of every module and the output are as before, bit for bit
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  (first: offline, quiet, one thread)
import torch  # noqa: E402
import zoo_encoded as encoded  # noqa: E402
import zoo_host_pipelines as hosts  # noqa: E402
import zoo_variants as variants  # noqa: E402
from contract import snapshot  # noqa: E402
from torch import nn  # noqa: E402

import attnctl  # noqa: E402
from attnctl.core.hosts.families import family_of  # noqa: E402
from attnctl.core.hosts.listing import denoisers_of  # noqa: E402
from attnctl.data.provenance import versions  # noqa: E402
from attnctl.errors import AttnctlError  # noqa: E402
from attnctl.processors import NAG, PAG, Capture, Control  # noqa: E402

NAMES = hosts.NAMES + variants.NAMES + encoded.NAMES
RESULT = Path(__file__).parent / "results" / "pipelines.json"


def controls_of(pipe: Any) -> list[Control]:
    """Choose what guides a pipeline, and what records its words."""
    kinds = {s.kind for s in attnctl.find_sites(pipe)}
    own = [kind for kind in ("self", "joint") if kind in kinds]
    guidance: Control = PAG(scale=2.0, sites=own) if own else NAG()
    return [guidance, *([Capture(words=(1,))] if kinds & {"cross", "joint"} else [])]


def measured(name: str) -> dict[str, Any]:
    """Run one pipeline plain and under each control."""
    pipe, kwargs = next(m for m in (hosts, variants, encoded) if name in m.NAMES).build(name)
    result: dict[str, Any] = {"pipeline": type(pipe).__name__, "controls": {}}
    plain = hosts.run(pipe, kwargs)
    try:
        denoisers = list(denoisers_of(pipe).values())
        chosen = controls_of(pipe)
    except AttnctlError as error:
        return result | {"refused": str(error)[:300]}
    result["family"] = family_of(denoisers[0]).name
    parts = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    before = snapshot(*parts)
    hosts.run(pipe, kwargs)
    after = snapshot(*parts)
    own = {k for k in before.keys() | after.keys() if before.get(k) is not after.get(k)}  # the host's own doing
    for control in chosen:
        before = snapshot(*parts)
        cell = outcome(pipe, kwargs, control, plain)
        after = snapshot(*parts)
        left = {k for k in before.keys() | after.keys() if before.get(k) is not after.get(k)} - own
        cell["clean"] = not left and torch.equal(hosts.run(pipe, kwargs), plain)
        result["controls"][type(control).__name__] = cell
    return result


def outcome(pipe: Any, kwargs: Any, control: Control, plain: torch.Tensor) -> dict[str, Any]:
    """Run a pipeline under one control."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with attnctl.control(pipe, control) as handle:
                out = hosts.run(pipe, kwargs)
                if isinstance(control, Capture):
                    steps = len(handle.result(control).steps)
                    return {"state": "acts" if torch.equal(out, plain) else "fault", "steps": steps}
                passes = handle.passes
        except AttnctlError as error:
            return {"state": "refused", "why": f"{type(error).__name__}: {str(error)[:300]}"}
        except Exception as error:
            return {"state": "fault", "why": f"{type(error).__name__}: {str(error)[:300]}"}
    if torch.equal(out, plain) or not out.isfinite().all():
        words = [str(w.message) for w in said if str(w.message).startswith("attnctl")]
        return {"state": "refused", "why": words[0]} if words else {"state": "fault", "why": "no effect or not finite"}
    return {"state": "acts", "passes": passes}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these pipelines")
    parser.add_argument("--show", action="store_true", help="write no file")
    options = parser.parse_args()
    began = time.perf_counter()
    known = json.loads(RESULT.read_text())["found"] if RESULT.is_file() else {}  # what --only leaves out is kept
    found: dict[str, Any] = {}
    bad = False
    with torch.no_grad():
        for name in options.only:
            found[name] = one = measured(name)
            cells = one["controls"]
            bad |= any(c["state"] == "fault" or not c["clean"] for c in cells.values())
            words = [
                f"{n} {c['state']}{'' if c['clean'] else ' NOT CLEAN'} {c.get('why', '')}" for n, c in cells.items()
            ]
            print(f"{name:24}{'; '.join(words) or one.get('refused', '')}"[:400], file=sys.stderr, flush=True)
    took = f"{len(found)} pipelines in {time.perf_counter() - began:.0f} s"
    found = {name: (known | found)[name] for name in NAMES if name in known | found}
    states = [c["state"] for one in found.values() for c in one["controls"].values()]
    counts = {state: states.count(state) for state in ("acts", "refused", "fault")}
    result = {"versions": versions(), "pipelines": len(found), **counts, "found": found}
    print(f"{took}; of all {len(found)}: {counts}", file=sys.stderr)
    if not options.show:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
