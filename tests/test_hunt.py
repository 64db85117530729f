"""The search for heads: every preset and saving finds a planted head, with any number of processes, after any kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_pipelines as pipes

import attnctl
from attnctl.pipelines import HuntPlan, hunt
from attnctl.pipelines.hunting.groups import deal, worth
from attnctl.pipelines.hunting.plan import Head
from attnctl.pipelines.hunting.results import Hunted
from attnctl.pipelines.hunting.work import draw, first_change, units
from attnctl.processors import SoftPAG

LAYERS = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.2.attentions.0.transformer_blocks.0.attn1",
)
PLANTED: tuple[Head, ...] = ((LAYERS[1], 2), (LAYERS[2], 1), (LAYERS[0], 3))
"""The heads that matter, the most important first."""
CALL = {"height": 16, "width": 16}
PAIRS = tuple((text, i) for i, text in enumerate(("a cat", "a dog", "two birds", "a bear")))


class Apart:
    """Mark how far pictures are from what the model draws without perturbation."""

    def __init__(self, plain: dict[str, np.ndarray]) -> None:
        self.plain = plain
        self.seen = 0

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        self.seen += len(images)
        return [float(np.abs(_array(i) - self.plain[p]).mean()) for i, p in zip(images, prompts, strict=True)]


def _array(image: Any) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def _toy() -> Any:
    """Build a pipeline in which only the planted heads move the picture much."""
    pipe, _ = pipes.build("sd")
    with torch.no_grad():
        for site in attnctl.find_sites(pipe):
            if site.kind != "self":
                continue
            weight = site.module.to_out[0].weight  # type: ignore[union-attr, index]
            for head in range(site.heads):
                place = PLANTED.index((site.name, head)) if (site.name, head) in PLANTED else None
                weight[:, head * site.head_dim : (head + 1) * site.head_dim] *= (
                    1e-3 if place is None else (8.0, 0.5, 0.1)[place]
                )
    return pipe


@pytest.fixture(scope="module")
def toy() -> Any:
    return _toy()


def _plan(pairs: tuple[tuple[str, int], ...] = PAIRS, **changes: Any) -> HuntPlan:
    common = {"k": 1, "u": 1.0, "steps": 2, "sites": LAYERS, "call": CALL, "batch": 8}
    return HuntPlan(**{"pairs": pairs, **common, **changes})


def _scorer(pipe: Any, plan: HuntPlan) -> Apart:
    images = draw(pipe, plan, [((), i) for i in range(len(plan.pairs))])
    return Apart({text: _array(image) for (text, _), image in zip(plan.pairs, images, strict=True)})


def _hunt(pipe: Any, plan: HuntPlan, **more: Any) -> tuple[Hunted, Apart]:
    scorer = _scorer(pipe, plan)
    return hunt(pipe, plan, scorer, quiet=True, **more), scorer


# What is found -------------------------------------------------------------------------------------------------

PRESETS: dict[str, Callable[[], HuntPlan]] = {
    "quality": lambda: HuntPlan.quality(
        ("a cat", "a dog"), portrait=None, k=3, steps=2, sites=LAYERS, call=CALL, batch=8
    ),
    "style": lambda: HuntPlan.style(
        "ink", ("a cat", "a dog"), rounds=3, k=1, steps=2, sites=LAYERS, call=CALL, batch=8
    ),
}
SAVINGS: dict[str, dict[str, Any]] = {
    "published": {"batch": 1, "replay": False, "baseline": False, "pairs": PAIRS[:2]},
    "chosen heads again": {"skip_chosen": False, "rounds": 2, "pairs": PAIRS[:2]},
    "replay": {"batch": 1, "pairs": PAIRS[:2]},
    "batch": {"replay": False, "batch": 5},
    "halving": {"halving": ((1, 6), (2, 3))},
    "prune": {"prune": 0.5, "prune_pairs": 1},
    "groups": {"group": 4, "repeats": 3},
    "groups, pruned, two rounds": {"group": 3, "repeats": 2, "rounds": 2, "prune": 0.25, "prune_pairs": 1},
    "restricted layers": {"sites": LAYERS[1:]},
    "restricted heads": {"heads": (*PLANTED, (LAYERS[0], 0)), "sites": None},
    "all": {"prune": 0.5, "prune_pairs": 1, "halving": ((1, 4), (2, 3)), "rounds": 2, "validate": True, "show": 1},
    "classifier-free guidance": {"guidance": 3.0, "pairs": PAIRS[:2]},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_find_the_planted_heads(name: str, toy: Any) -> None:
    plan = PRESETS[name]()
    found, scorer = _hunt(toy, plan)
    assert found.heads.pairs == PLANTED
    assert scorer.seen == plan.estimate(found.pool).marked


@pytest.mark.parametrize("name", SAVINGS)
def test_savings_find_the_planted_head(name: str, toy: Any) -> None:
    plan = _plan(**SAVINGS[name])
    found, scorer = _hunt(toy, plan)
    assert found.heads.pairs == PLANTED[: plan.rounds]
    cost = plan.estimate(found.pool)
    assert scorer.seen == cost.marked
    assert found.images == found.generated == cost.images


def test_groups_deal_every_head_once_and_find_what_each_adds() -> None:
    pool = tuple((f"layer.{i}", h) for i in range(5) for h in range(4))
    plan = _plan(group=6, repeats=3)
    rows = deal(pool, (), plan)
    assert rows == deal(pool, (), plan)
    assert len(rows) == plan.estimate(pool).search[0] == 4 * 3 * 4
    for repeat in range(3):
        for i in range(4):
            hands = [heads for heads, pair in rows[repeat * 16 : (repeat + 1) * 16] if pair == i]
            assert sorted(h for heads in hands for h in heads) == sorted(pool)
            assert {len(heads) for heads in hands} == {5}
    adds = {head: float(place) for place, head in enumerate(pool)}
    found = worth(rows, {row: 100.0 * row[1] + sum(adds[h] for h in row[0]) for row in rows}, pool)
    spread = np.array([[found[h], adds[h]] for h in pool])
    assert np.corrcoef(spread.T)[0, 1] > 0.99
    assert max(found, key=lambda h: found[h]) == pool[-1]
    after = deal(pool[1:], pool[:1], plan)  # the next round is dealt anew
    assert all(heads[0] == pool[0] for heads, _ in after)
    assert [heads[1:] for heads, _ in after] != [heads for heads, _ in rows]


def test_counts_are_those_of_the_paper() -> None:
    pool = tuple((f"layer.{i}", h) for i in range(24) for h in range(24))
    style = HuntPlan.style("ink", baseline=False, validate=False, skip_chosen=False)
    assert sum(style.estimate(pool).search) == 5 * 576 * 5 == 14_400
    skipping = HuntPlan.style("ink", baseline=False, validate=False)
    assert skipping.estimate(pool).search == tuple(5 * (576 - 3 * r) for r in range(5))
    quality = HuntPlan.quality([f"p{i}" for i in range(10)], baseline=False)
    assert (len(quality.pairs), quality.k, quality.u, quality.scale) == (20, 24, 0.25, 3.0)
    assert quality.estimate(pool).images == 20 * 576
    assert quality.estimate(pool).passes == 20 * 576 * 20 * 2


def test_the_bar_counts_every_picture_and_tells_the_best(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    plan = _plan(pairs=PAIRS[:2], batch=4)
    scorer = _scorer(toy, plan)
    capsys.readouterr()
    found = hunt(toy, plan, scorer)
    told = capsys.readouterr().err
    assert f"{found.images}/{found.images}" in told
    assert re.search(rf"best \d+\.\d+ {re.escape(PLANTED[0][0])}:{PLANTED[0][1]}", told)
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", told)  # time spent, time left


# What a call computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_rows_equal_candidates_alone(guidance: float, toy: Any) -> None:
    plan = _plan(guidance=guidance, u=0.5)
    rows = [(((LAYERS[1], 2), (LAYERS[2], 1)), 0), (((LAYERS[2], 0),), 1), ((PLANTED[0],), 2)]
    together = [_array(image) for image in draw(toy, plan, rows)]
    for (heads, i), image in zip(rows, together, strict=True):
        with attnctl.control(toy, SoftPAG(heads=heads, u=0.5, scale=3.0)):
            text, seed = plan.pairs[i]
            (alone,) = toy(
                text,
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=2,
                guidance_scale=guidance,
                **CALL,
            ).images
        assert np.abs(_array(alone) - image).max() <= 1


def test_units_keep_a_layer_together_and_to_the_batch() -> None:
    plan = _plan(batch=3)
    work = units([((LAYERS[0], 0),), ((LAYERS[1], 0),), ((LAYERS[0], 1),)], range(2), plan)
    assert [len(u.rows) for u in work] == [3, 1, 2]
    assert all(len({heads[-1][0] for heads, _ in u.rows}) == 1 for u in work)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_first_change_is_the_norm_of_the_difference(guidance: float, toy: Any) -> None:
    plan = _plan(prune=0.5, prune_pairs=2, steps=1, guidance=guidance)
    found = first_change(toy, plan, LAYERS[1], (0, 1, 2, 3))
    assert np.argmax(found) == 2
    predictions: list[torch.Tensor] = []
    for control in (None, SoftPAG(heads=[(LAYERS[1], 2)], u=1.0, scale=1.0)):
        held = attnctl.control(toy, control) if control else None
        # A hook that is added later runs later: it sees the guided prediction.
        hook = toy.unet.register_forward_hook(lambda m, a, out: predictions.append(out[0]))
        generators = [torch.Generator().manual_seed(seed) for _, seed in PAIRS[:2]]
        texts = [text for text, _ in PAIRS[:2]]
        toy(texts, generator=generators, num_inference_steps=1, guidance_scale=guidance, **CALL)
        hook.remove()
        if held:
            held.detach()
    change = (predictions[1] - predictions[0])[-2:].flatten(1).norm(dim=1).mean()
    assert found[2] == pytest.approx(float(change), rel=1e-3)


def test_nothing_is_left_on_the_pipeline(toy: Any) -> None:
    from contract import assert_clean, snapshot

    before = snapshot(toy.unet, toy.scheduler)
    plan = _plan(prune=0.5, prune_pairs=1, halving=((1, 3),), pairs=PAIRS[:2])
    _hunt(toy, plan)
    assert_clean(before, toy.unet, toy.scheduler)
    with pytest.raises(ZeroDivisionError):
        hunt(toy, plan, lambda images, prompts: 1 / 0, quiet=True)
    assert_clean(before, toy.unet, toy.scheduler)


# Processes and kills -------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {
    "rounds": 2,
    "halving": ((1, 6),),
    "prune": 0.25,
    "prune_pairs": 1,
    "batch": 3,
    "pairs": PAIRS[:2],
}


class Stops:
    """An objective after which the process is killed."""

    def __init__(self, inner: Apart, calls: int) -> None:
        self.inner, self.left = inner, calls
        self.__name__ = "Apart"

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(images, prompts)


def _work(rank: int, size: int, port: int, log: str, out: str, calls: int) -> None:
    from accelerate import PartialState

    PartialState._reset_state()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    pipe, plan = _toy(), _plan(**WIDE)
    found = hunt(pipe, plan, Stops(_scorer(pipe, plan), calls), log=log, quiet=True)
    Path(out, f"{size}-{rank}.json").write_text(json.dumps(found.to_dict()), encoding="utf-8")


def _crew(size: int, log: Path, calls: Sequence[int]) -> list[int | None]:
    """Run the search in processes of its own; return their exit codes."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    team = [fork.Process(target=_work, args=(r, size, port, str(log), str(log.parent), calls[r])) for r in range(size)]
    for process in team:
        process.start()
    until = time.monotonic() + 120
    while any(p.is_alive() for p in team) and time.monotonic() < until:
        if any(p.exitcode not in (None, 0) for p in team):  # as torchrun does
            for p in team:
                p.kill()
        time.sleep(0.05)
    for process in team:
        process.kill()
        process.join()
    return [p.exitcode for p in team]


def _same(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    return {name: data[name] for name in ("heads", "rounds", "change", "baseline", "images")}


def test_any_number_of_processes_finds_the_same(tmp_path: Path) -> None:
    answers = []
    for size in (1, 2, 3):
        log = tmp_path / str(size) / "log"
        assert _crew(size, log, [10_000] * size) == [0] * size
        answers += [_same(log.parent / f"{size}-{rank}.json") for rank in range(size)]
        lines = [line for path in log.glob("*.jsonl") for line in path.read_text().splitlines()]
        keys = [json.loads(line)["key"] for line in lines]
        assert len(keys) == len(set(keys))  # nothing was done twice
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["heads"]["pairs"][0] == list(PLANTED[0])


def test_a_killed_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "log"
    assert _crew(1, whole, [10_000]) == [0]
    log = tmp_path / "killed" / "log"
    assert _crew(1, log, [3]) == [-signal.SIGKILL]
    marked = sum(len(json.loads(line)["marks"]) for p in log.glob("*.jsonl") for line in p.read_text().splitlines())
    with next(iter(log.glob("*.jsonl"))).open("a") as torn:  # what a kill inside a write leaves
        torn.write('{"key": "0123", "ma')
    assert -signal.SIGKILL in _crew(2, log, [10_000, 2])
    assert _crew(1, log, [10_000]) == [0]
    assert marked > 0
    assert _same(log.parent / "1-0.json") == _same(whole.parent / "1-0.json")
    keys = [json.loads(line)["key"] for p in log.glob("*.jsonl") for line in p.read_text().split("\n")[:-1]]
    assert len(keys) == len(set(keys))


def test_a_finished_search_generates_nothing_again(toy: Any, tmp_path: Path) -> None:
    plan = _plan(pairs=PAIRS[:2])
    first, _ = _hunt(toy, plan, log=tmp_path)
    again, scorer = _hunt(toy, plan, log=tmp_path)
    assert again.heads == first.heads
    assert (again.generated, scorer.seen, again.images) == (0, 0, first.images)
