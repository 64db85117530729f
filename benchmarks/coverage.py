"""Every control on every denoiser class of the installed diffusers: `python benchmarks/coverage.py`.

    python benchmarks/coverage.py                    # build every class tiny, run every control on it, write the result
    python benchmarks/coverage.py --only wan_vace ltx2 --show   # these models, printed and not written

Each class is built with tiny random weights (tests/zoo.py) and called once under each control:

through     every site is wrapped and computed as before: the prediction is the same, bit for bit
acts        the control changed the prediction (or recorded maps), which is finite; after detaching, the prediction and
            the variables of every module are as before
refused     attnctl said in words (an error, or a warning) why it does not act, and left everything as before
fault       an exception of somebody else, no effect without a word, or something left behind
roles       which rows of queries PAG changes at each of its sites, against a measurement that asks no table: with all
            attention silenced, rows that move with the image alone are the image's. PAG may change no others
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.append(str(ROOT / "benchmarks"))  # behind, for `coverage` is also what measures tests

import conftest  # noqa: E402, F401  (first: offline, quiet, one thread)
import diffusers  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from contract import Replace, Through, snapshot  # noqa: E402
from coverage_settings import OF_PIPELINES, SEVERAL, Model, settings  # noqa: E402
from torch import Tensor  # noqa: E402
from zoo_loop import IMAGE_INPUTS, Loop  # noqa: E402

import attnctl  # noqa: E402
from attnctl.core.call import AttnCall, Proceed  # noqa: E402
from attnctl.core.hosts.families import family_of  # noqa: E402
from attnctl.data.controls import controls  # noqa: E402
from attnctl.data.coverage import STORED, Cell  # noqa: E402
from attnctl.data.provenance import versions  # noqa: E402
from attnctl.errors import AttnctlError, NeverApplied  # noqa: E402
from attnctl.processors import PAG, Capture  # noqa: E402

RESULT = Path(__file__).parent / "results" / "coverage.json"
PADDED = frozenset({"zimage"})  # pad tokens stand behind the image's, which hear of nothing
FRAMES = 4  # the least that BroadWay takes
SILENT = "no effect, and no word of it"


# One cell


def cell(name: str, cls: Any, model: Model) -> Cell:
    """Run one control on one model."""
    before = snapshot(model.module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            acts = _acts(settings(name, cls, model), model)
            words = [str(w.message) for w in said if str(w.message).startswith("attnctl")]
            found = Cell("acts") if acts else Cell("refused", words[0]) if words else Cell("fault", SILENT)
        except AttnctlError as error:
            found = Cell("refused", f"{type(error).__name__}: {str(error)[:400]}")
        except Exception as error:
            found = Cell("fault", f"{type(error).__name__}: {str(error)[:200]}")
    left = _left(before, model)
    return Cell("fault", left) if left else found


def _acts(control: Any, model: Model) -> bool:
    """Run a model under a control; tell whether it did something."""
    if type(control).moves_latents:
        pipe = Loop(model.module, diffusers.DDIMScheduler())
        plain = pipe(model.inputs)
        with attnctl.control(pipe, control, layout="cond"):
            out = pipe(model.inputs)
    else:
        plain = model.plain
        layout = "cond" if type(control).__name__ in SEVERAL else model.layout
        with attnctl.control(model.module, control, layout=layout) as handle:
            handle.set_step(1, 3, 600.0)
            out = model.run()
            if isinstance(control, Capture):
                return torch.equal(out, plain) and _recorded(handle.result(control))
    if not out.isfinite().all():
        raise ArithmeticError("the prediction is not finite")
    return not torch.equal(out, plain)


def _left(before: dict[str, Any], model: Model) -> str:
    """Say what a control left behind."""
    after = snapshot(model.module)
    one, other = (model.without_own(x) for x in (before, after))
    if one.keys() != other.keys() or any(other[k] is not v for k, v in one.items()):
        return f"left behind: {sorted(k for k in one.keys() | other.keys() if one.get(k) is not other.get(k))[:4]}"
    return "" if torch.equal(model.run(), model.plain) else "the prediction differs after detaching"


def _recorded(maps: Any) -> bool:
    return bool(maps.layers) and all(bool(layer.isfinite().all()) for layer in maps.layers.values())


def through(model: Model) -> str:
    """Wrap every site and change nothing; say "exact", or what went wrong."""
    try:
        with attnctl.control(model.module, Through(), layout=model.layout):
            same = torch.equal(model.run(), model.plain)
        return "exact" if same and torch.equal(model.run(), model.plain) else "differs"
    except NeverApplied:  # sites that this call does not use: conditions that it lacks, attention without softmax
        seen = Replace(function=lambda call, proceed: proceed(call), sites=[*model.calls])
        with attnctl.control(model.module, seen, layout=model.layout):
            same = torch.equal(model.run(), model.plain)
        return "exact" if same and torch.equal(model.run(), model.plain) else "differs"
    except AttnctlError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Roles


def moved(value: Any) -> Any:
    """Return other tokens in place of some: zeros stay zeros, ids change."""
    if isinstance(value, Tensor):
        return value + (value != 0) if value.is_floating_point() else (value + 1) % (value.max() + 1)
    return type(value)(moved(x) for x in value)


@contextlib.contextmanager
def silenced(model: Model, seen: dict[tuple[str, int], Tensor]) -> Iterator[None]:
    """Let no token hear of another, and note the queries of each attention call."""

    def silent(call: AttnCall, proceed: Proceed) -> Tensor:
        seen[call.site.name, call.index] = call.q
        return torch.zeros_like(proceed(call))

    with attnctl.control(model.module, Replace(function=silent, sites=[*model.calls]), layout=model.layout):
        yield


def image_rows(model: Model) -> dict[tuple[str, int], Tensor]:
    """Find the query rows [N] of each attention call that move with the image alone."""
    keys = [k for k in IMAGE_INPUTS if k in model.inputs] or ["input_ids"]
    one: dict[tuple[str, int], Tensor] = {}
    other: dict[tuple[str, int], Tensor] = {}
    for calls, changed in ((one, {}), (other, {k: moved(model.inputs[k]) for k in keys})):
        with silenced(model, calls):
            zoo.call(model.module, model.inputs | changed)
    return {where: (q != other[where]).any(-1).any(1).any(0) for where, q in one.items() if where in other}


def roles(model: Model) -> dict[str, Any]:
    """Compare the rows that PAG changes at each of its sites with the image's."""
    names = [s.name for s in model.sites("self", "joint") if s.name in model.calls]
    if not names:
        return {"sites": 0, "wrong": []}
    try:
        image = image_rows(model)
    except Exception as error:
        return {"sites": len(names), "wrong": [f"{type(error).__name__}: {error}"]}
    sites = tuple(s for s in attnctl.find_sites(model.module) if s.name in names)
    perturb = PAG(sites=names).branch(sites, model.module).perturb
    assert perturb is not None
    wrong: list[str] = []
    refused = 0

    def compare(call: AttnCall, proceed: Proceed) -> Tensor:
        nonlocal refused
        out = proceed(call)
        try:
            new = perturb(call, proceed)
        except AttnctlError:
            refused += 1
            return out
        changed = ((new - out).abs() > 1e-4 * out.abs().max()).flatten(0, 1).any(-1).any(0)
        extra = changed & ~image[call.site.name, call.index]
        if extra.any() and model.name not in PADDED:
            wrong.append(f"{call.site.name}: {int(extra.sum())} of {len(extra)} rows are not the image's")
        return out

    with attnctl.control(model.module, Replace(sites=names, function=compare), layout=model.layout):
        model.run()
    return {"sites": len(names), "refused": refused, "wrong": wrong}


# All


def prepared(name: str) -> Model:
    """Build a model and look at its attention calls."""
    module, inputs = zoo.build(name)
    host = zoo.HOSTS.get(name)
    layout = "cond" if host is not None and host.rows == 1 else "uncond_first"
    plain = zoo.call(module, inputs)
    before = snapshot(module)
    zoo.call(module, inputs)
    after = snapshot(module)
    own = frozenset(k for k in before.keys() | after.keys() if before.get(k) is not after.get(k))
    note = Through()
    calls: dict[str, AttnCall] = {}
    with contextlib.suppress(Exception), attnctl.control(module, note, layout=layout):  # `through` tells of it
        zoo.call(module, inputs)
    for call in note.seen:
        calls.setdefault(call.site.name, call)
    return Model(name, module, inputs, plain, calls, layout, own)


def measured(name: str) -> dict[str, Any]:
    """Run every control on one model."""
    model = prepared(name)
    kinds: dict[str, int] = {}
    with contextlib.suppress(AttnctlError):
        for site in attnctl.find_sites(model.module):
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
    entry: dict[str, Any] = {
        "class": type(model.module).__name__,
        "family": family_of(model.module).name,
        "sites": kinds,
        "through": through(model),
        "roles": roles(model) if kinds else {"sites": 0, "wrong": []},
    }
    found = controls("attnctl")
    cells = {n: cell(n, cls, model) for n, cls in found.items() if n not in OF_PIPELINES}
    return entry | {"cells": {n: [c.state, c.why] for n, c in cells.items()}}


def packed(models: dict[str, Any]) -> dict[str, Any]:
    """Write each reason once; a cell holds its number."""
    reasons = list(dict.fromkeys(why for one in models.values() for _, why in one["cells"].values() if why))
    number = {why: i for i, why in enumerate(reasons)}
    cells = {
        name: {n: [state, number[why]] if why else [state] for n, (state, why) in one["cells"].items()}
        for name, one in models.items()
    }
    states = [state for one in models.values() for state, _ in one["cells"].values()]
    classes = {one["class"] for one in models.values()}
    changed = {one["class"] for one in models.values() if one["through"] != "exact"}
    counts = {"classes": len(classes), "unchanged": len(classes - changed)}
    return {
        "versions": versions(),
        "counts": counts | {state: states.count(state) for state in ("acts", "refused", "fault")},
        "reasons": reasons,
        "models": {name: one | {"cells": cells[name]} for name, one in models.items()},
    }


def shown(models: dict[str, Any]) -> str:
    """Write one line for each model, and a line for each fault."""
    marks = {"acts": "+", "refused": "r", "fault": "X"}
    lines = []
    for name, one in models.items():
        cells = " ".join(f"{n}{marks[state]}" for n, (state, _) in one["cells"].items())
        lines.append(f"{name:17}{one['through'][:40]:12}{cells}")
        lines += [f"    {n}: {why[:150]}" for n, (state, why) in one["cells"].items() if state == "fault"]
        lines += [f"    roles: {line}" for line in one["roles"]["wrong"][:4]]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=zoo.EVERY, default=zoo.EVERY)
    parser.add_argument("--show", action="store_true", help="write no file")
    options = parser.parse_args()
    zoo.FRAMES = FRAMES
    began = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {name: measured(name) for name in options.only}
    print(shown(models), file=sys.stderr)
    print(f"{len(models)} models in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.show:
        print(json.dumps(packed(models), indent=1))
    else:
        text = json.dumps(packed(models), indent=1) + "\n"
        RESULT.write_text(text)
        STORED.write_text(text)
    return int(any(state == "fault" for one in models.values() for state, _ in one["cells"].values()))


if __name__ == "__main__":
    sys.exit(main())
