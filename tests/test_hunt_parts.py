"""Around the search for heads: what it refuses, its log, its results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from PIL import Image

import attnctl
from attnctl import HeadSet
from attnctl.errors import AttnctlError, ConfigError, PlanError
from attnctl.pipelines import HuntPlan, compose, halvings, hunt
from attnctl.pipelines.hunting.log import HuntLog, LogError

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
PAIRS = (("a cat", 0), ("a dog", 1))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


def _plan(**changes: Any) -> HuntPlan:
    common = {
        "pairs": PAIRS,
        "k": 1,
        "u": 1.0,
        "steps": 1,
        "sites": MID,
        "call": {"height": 16, "width": 16},
        "batch": 4,
    }
    return HuntPlan(**common | changes)


def _even(images: list[Any], prompts: list[str]) -> list[float]:
    return [0.5] * len(images)


# Bad input -----------------------------------------------------------------------------------------------------

SCORERS: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (lambda images, prompts: [float("nan")] * len(images), "returned nan.*finite"),
    "infinite": (lambda images, prompts: torch.full((len(images),), torch.inf), "returned inf.*finite"),
    "too short": (lambda images, prompts: [0.5], "1 numbers for 2 images"),
    "one number": (lambda images, prompts: 0.5, "float.*a number for each"),
    "text": (lambda images, prompts: ["good"] * len(images), "list.*a number for each"),
    "nothing": (lambda images, prompts: None, "NoneType.*a number for each"),
}


@pytest.mark.parametrize("name", SCORERS)
def test_bad_scorers(name: str, pipe: Any, tmp_path: Path) -> None:
    scorer, words = SCORERS[name]
    with pytest.raises(ConfigError, match=words):
        hunt(pipe, _plan(), scorer, log=tmp_path, quiet=True)
    assert not list(tmp_path.glob("*.jsonl"))  # nothing of it is kept


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "no pairs": ({"pairs": ()}, "at least one"),
    "a prompt alone": ({"pairs": ("a cat",)}, "out of range.*prompt, seed"),
    "negative seed": ({"pairs": (("a cat", -1),)}, "out of range"),
    "seed too large": ({"pairs": (("a cat", 2**63),)}, "out of range"),
    "seed as a bool": ({"pairs": (("a cat", True),)}, "out of range"),
    "pair twice": ({"pairs": (*PAIRS, PAIRS[0])}, "twice"),
    "prune_pairs out of range": ({"prune": 0.5, "prune_pairs": 3}, "out of range.*2 prompt-seed pairs"),
    "show out of range": ({"show": 3}, "out of range.*2 prompt-seed pairs"),
    "rounds": ({"rounds": 0}, "rounds=0"),
    "k": ({"k": 1.5}, "k=1.5"),
    "u": ({"u": 0.0}, "u=0.0"),
    "scale": ({"scale": float("nan")}, "scale=nan"),
    "prune": ({"prune": 1.0}, "prune=1.0"),
    "halving beyond the pairs": ({"halving": ((2, 1),)}, "below 2"),
    "halving below k": ({"halving": ((1, 0),)}, "1 \\(k\\) or more"),
    "halving with chosen heads": ({"halving": ((1, 1),), "skip_chosen": False}, "skip_chosen=True"),
    "a group of one": ({"group": 1}, "two heads or more"),
    "repeats of nothing": ({"repeats": 2}, "give group too"),
    "groups and halving": ({"group": 3, "halving": ((1, 1),)}, "nothing to halve"),
    "halving as text": ({"halving": (("1", 2),)}, "halving"),
}


@pytest.mark.parametrize("name", PLANS)
def test_bad_plans(name: str) -> None:
    changes, words = PLANS[name]
    with pytest.raises(ConfigError, match=words):
        _plan(**changes)


POOLS: dict[str, tuple[dict[str, Any], str]] = {
    "empty by heads": ({"heads": ()}, "pool is empty"),
    "empty by both": ({"heads": (("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 0),)}, "pool is empty"),
    "no such site": ({"sites": "middle"}, "(?i)middle"),
    "cross-attention": ({"sites": "cross"}, "pool"),
    "head out of range": ({"heads": ((MID, 4),)}, "out of range.*0 to 3"),
    "too small for k": ({"k": 5}, "choose 5 heads, but the pool has 4"),
    "too small after pruning": ({"k": 3, "prune": 0.5, "prune_pairs": 1}, "pool has 2 \\(4 before pruning"),
    "too small for the rounds": ({"rounds": 5}, "choose 5 heads"),
    "one group": ({"group": 4, "k": 1}, "undivided"),
    "unknown argument": ({"call": {"hight": 16}}, "takes no 'hight'"),
    "own argument": ({"call": {"generator": 1}}, "set by the search"),
}


@pytest.mark.parametrize("name", POOLS)
def test_bad_pools(name: str, pipe: Any) -> None:
    changes, words = POOLS[name]
    with pytest.raises(AttnctlError, match=words):
        hunt(pipe, _plan(**changes), _even, quiet=True)


def test_not_a_scorer_and_not_a_plan(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="callable"):
        hunt(pipe, _plan(), "pickscore", quiet=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="HuntPlan"):
        hunt(pipe, {"k": 1}, _even, quiet=True)  # type: ignore[arg-type]


# The log -------------------------------------------------------------------------------------------------------


def test_a_log_of_something_else_is_refused(pipe: Any, tmp_path: Path) -> None:
    hunt(pipe, _plan(), _even, log=tmp_path, quiet=True)
    with pytest.raises(PlanError, match=r"another plan: u was 1\.0 and is 0\.5"):
        hunt(pipe, _plan(u=0.5), _even, log=tmp_path, quiet=True)
    with pytest.raises(PlanError, match="another plan: objective was"):
        hunt(pipe, _plan(), _even, log=tmp_path, quiet=True, objective="other")
    with pytest.raises(PlanError, match="another model: fingerprint"):
        hunt(pipes.build("sd", seed=1)[0], _plan(), _even, log=tmp_path, quiet=True)


def test_a_damaged_log_is_refused(pipe: Any, tmp_path: Path) -> None:
    hunt(pipe, _plan(), _even, log=tmp_path, quiet=True)
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_text()
    for damage in ("{]\n", '{"key": "1", "marks": [NaN]}\n', '{"key": "1"}\n'):
        file.write_text(damage + whole)
        with pytest.raises(PlanError, match=r"Line 1 .*damaged.*Delete"):
            hunt(pipe, _plan(), _even, log=tmp_path, quiet=True)
    (tmp_path / "hunt.json").write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        hunt(pipe, _plan(), _even, log=tmp_path, quiet=True)


def test_a_full_disk_is_told_and_loses_nothing(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.write, []

    def write(file: int, data: bytes) -> int:
        if len(written) == 1:
            real(file, data[: len(data) // 2])  # a torn line, as a full disk leaves it
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        return real(file, data)

    plan = _plan(batch=1)
    monkeypatch.setattr("attnctl.pipelines.hunting.log.os.write", write)
    with pytest.raises(LogError, match=r"No space left.*run again"):
        hunt(pipe, plan, _even, log=tmp_path, quiet=True)
    monkeypatch.undo()
    found = hunt(pipe, plan, _even, log=tmp_path, quiet=True)
    assert found.generated == found.images - 1


def test_a_log_in_memory_only() -> None:
    log = HuntLog(None, {})
    log.add("a", {"marks": [1.0]})
    log.merge(lambda records: [*records, {"key": "b", "marks": []}])
    assert set(log.records) == {"a", "b"}


# Results -------------------------------------------------------------------------------------------------------


def test_results_are_files(pipe: Any, tmp_path: Path) -> None:
    def bright(images: list[Any], prompts: list[str]) -> list[float]:
        return [float(np.asarray(i).mean()) for i in images]

    found = hunt(pipe, _plan(k=2, show=2, rounds=2, validate=True), bright, model="tiny/sd", quiet=True)
    found.save(tmp_path)
    data = json.loads((tmp_path / "hunt_result.json").read_text())
    assert [tuple(p) for r in data["rounds"] for p in r["chosen"]] == list(found.heads.pairs)
    assert data["rounds"][1]["score"] == found.rounds[1].score
    assert HeadSet.from_pretrained(tmp_path) == found.heads
    assert "base_model: tiny/sd" in (tmp_path / "README.md").read_text()
    assert len(found.pictures) == 6
    assert Image.open(tmp_path / "grid.png").height > Image.open(tmp_path / "grid.png").width
    assert Image.open(tmp_path / "heat_map_2.png").size == found.heat_map(1).size
    with pytest.raises(AttnctlError, match="already there"):
        found.save(tmp_path)
    with pytest.raises(ConfigError, match="show=1"):
        hunt(pipe, _plan(), bright, quiet=True).grid()


def test_two_sets_act_together_each_with_its_strength(pipe: Any) -> None:
    up = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    a = HeadSet.from_pairs([(MID, 1)], u=1.0, scale=2.0)
    b = HeadSet.from_pairs([(up, 2)], u=0.5, scale=4.0)
    first, second = compose((a, 0.5), b)
    assert (first.scale, first.u, second.scale, second.u) == (1.0, 1.0, 4.0, 0.5)
    unet, inputs = zoo.build("sd15")
    plain = zoo.call(unet, inputs)
    deltas = []
    for control in (first, second):
        with attnctl.control(unet, control, layout="cond"):
            deltas.append((zoo.call(unet, inputs) - plain).detach())
    with attnctl.control(unet, *compose((a, 0.5), b), layout="cond"):
        both = zoo.call(unet, inputs)
    assert all(float(d.abs().max()) > 1e-4 for d in deltas)
    torch.testing.assert_close(both, plain + deltas[0] + deltas[1], rtol=1e-4, atol=1e-4)
    for bad in (HeadSet.from_pairs([(MID, 1)]), (a, "much"), "heads"):
        with pytest.raises(ConfigError):
            compose(bad)  # type: ignore[arg-type]


def test_a_set_is_pushed_with_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo: str, **more: Any) -> None:
            seen["repo"] = repo

        def upload_folder(self, *, folder_path: str, repo_id: str) -> str:
            seen["files"] = {p.name: p.read_text() for p in Path(folder_path).iterdir()}
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    heads = HeadSet.from_labels(
        "L1H10 L11H15", model="stabilityai/stable-diffusion-3-medium-diffusers", u=1.0, scale=3.0
    )
    assert heads.push_to_hub("me/darker") == "https://huggingface.co/me/darker"
    assert json.loads(seen["files"]["attnctl_heads.json"])["pairs"] == [[1, 10], [11, 15]]
    card = seen["files"]["README.md"]
    assert "base_model: stabilityai/stable-diffusion-3-medium-diffusers" in card
    assert "SoftPAG(heads=heads, u=1, scale=3)" in card


def test_a_card_never_replaces_a_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    HeadSet.from_pairs([(1, 2)]).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# Small things --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "pairs", "k", "stages"),
    [
        (48, 16, 6, ((2, 24), (4, 12), (8, 6))),
        (6, 4, 6, ()),
        (48, 2, 6, ()),
        (576, 20, 24, ((2, 288), (4, 144), (8, 72), (16, 36))),
    ],
)
def test_halvings(n: int, pairs: int, k: int, stages: tuple[tuple[int, int], ...]) -> None:
    assert halvings(n, pairs, k) == stages
    HuntPlan(pairs=tuple((f"p{i}", i) for i in range(pairs)), k=k, halving=stages)
