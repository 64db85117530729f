"""Nothing piles up over many runs, and nothing depends on the seed of Python's hashes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import zoo
import zoo_pipelines as pipes

import attnctl
from attnctl.processors import PAG, Capture, Control, SoftPAG

RUNS = 200


def _alive() -> tuple[Counter[str], int]:
    """Count living objects by type, and the bytes of living tensors."""
    gc.collect()
    objects = gc.get_objects()
    storages = {}
    for o in objects:
        if type(o) in (torch.Tensor, torch.nn.Parameter):
            storage = o.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in objects), sum(storages.values())


# In a new process: threads and leftovers of other tests make objects of their own, at any time.


def test_two_hundred_runs_leave_as_much_as_one() -> None:
    assert not processes.alone(grown_by_runs)


def test_a_stopped_run_leaves_no_more_than_a_whole_one() -> None:
    assert not processes.alone(grown_by_stopped_runs)


def grown(before: Counter[str], after: Counter[str], limit: int, held: int, holds: int) -> dict[str, tuple[int, int]]:
    """Return what has become more, by more than a limit for objects and at all for the bytes of tensors."""
    more = {name: (before[name], n) for name, n in after.items() if n > before[name] + limit}
    return more | ({"bytes of tensors": (held, holds)} if holds != held else {})


@torch.no_grad()
def grown_by_runs() -> dict[str, tuple[int, int]]:
    model, inputs = zoo.build("sd15", batch=1)
    sets: tuple[tuple[Control, ...], ...] = (
        (PAG(sites="mid"),),
        (SoftPAG(sites="up.1", every=2), Capture(words=(1,))),
    )

    def cycle(i: int) -> None:
        handle = attnctl.control(model, *sets[i % 2], layout="cond")
        for step in range(2):
            handle.set_step(step, 2)
            zoo.call(model, inputs)
        if i % 3:
            handle.detach()
        else:  # as after an exception, where nobody holds the handle
            del handle
            found = attnctl.handle_of(model)
            assert found is not None
            found.detach()

    for i in range(12):  # what the first runs leave behind for good: made classes, warmed caches
        cycle(i)
    _alive()  # looking at storages makes objects too
    before, held = _alive()
    for i in range(RUNS):
        cycle(i)
    after, holds = _alive()
    return grown(before, after, RUNS // 20, held, holds)


def grown_by_stopped_runs() -> dict[str, tuple[int, int]]:
    pipe, kwargs = pipes.build("sd")
    kwargs |= {"num_inference_steps": 2, "height": 16, "width": 16}

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    def cycle() -> None:
        with attnctl.control(pipe, PAG(sites="mid")), pytest.raises(KeyboardInterrupt), torch.no_grad():
            pipes.run(pipe, kwargs, callback_on_step_end=stop)

    for _ in range(3):
        cycle()
    _alive()
    before, held = _alive()
    for _ in range(10):
        cycle()
    after, holds = _alive()
    return grown(before, after, 1, held, holds)


# Hashes

SCRIPT = """
import hashlib, json, sys, tempfile
from pathlib import Path
import conftest, pairs, torch, zoo
import attnctl
from attnctl.data.specs import control_to_dict, methods
from attnctl.core.hosts.words import find_words

told = {"methods": list(methods())}
for name in ("sd15", "sd35", "flux", "cogvideox", "animatediff"):
    sites = attnctl.find_sites(zoo.build(name)[0])
    told[name] = [(s.name, s.kind, s.depth) for s in sites]
    for selector in (["up.1", "mid"], "*attn1", ["self", "joint"]):
        try:
            told[f"{name} {selector}"] = [s.name for s in attnctl.core.sites.select(sites, selector)]
        except attnctl.AttnctlError as error:
            told[f"{name} {selector}"] = str(error)
host = pairs.unet()
told["words"] = [list(c.positions) for c in find_words(host.pipe, pairs.SOURCE, ["bear", "water", "a"])]
left_out = ("FateZero", "PARO", "ReferenceOnly")  # they hold tensors
told["controls"] = [control_to_dict(host.first[n]) for n in host.first if n not in left_out]
with tempfile.TemporaryDirectory() as folder:
    attnctl.HeadSet.from_pairs([("b", 1), ("a", 0)], model="m").save_pretrained(folder)
    pairs.block_plan(2, 64).save_pretrained(folder)
    told["files"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}
with torch.no_grad():
    alone = [(n,) for n in host.first if n != "FateZero"]
    for names in (*alone, ("PAG", "SoftPAG"), ("AStar", "PAG"), ("PAG", "Capture")):
        out = host.run(*(host.first[n] for n in names))
        told[" ".join(names)] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    with attnctl.control(host.pipe, host.first["PAG"], host.first["Capture"]) as handle:
        told["report"] = handle.report()
        told["reached"] = [s.name for s in handle.sites]
print(json.dumps(told, indent=1))
"""


def test_two_hash_seeds_give_the_same() -> None:
    told = []
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1]
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in told[0]
