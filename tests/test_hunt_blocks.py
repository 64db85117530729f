"""The search for the block to perturb: it finds a planted block, goes on after a stop, and names what it cannot try."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_pipelines as pipes

import attnctl
from attnctl.app.cli import main
from attnctl.data.specs import parse_control
from attnctl.errors import ConfigError, PlanError, SiteError
from attnctl.pipelines.hunting.blocks import BlockHunt, RankedBlocks, hunt_blocks
from attnctl.processors import PAG, SLG

PLANTED = "mid_block.attentions.0.transformer_blocks.0.attn1"
PAIRS = tuple((text, i) for i, text in enumerate(("a cat", "a dog", "two birds", "a bear")))
FIELDS: dict[str, Any] = {"pairs": PAIRS, "steps": 1, "call": {"height": 16, "width": 16}, "batch": 4}


@pytest.fixture(scope="module")
def toy() -> Any:
    """Build a pipeline in which the self-attention of one block moves the picture, and the others hardly do."""
    pipe, _ = pipes.build("sd")
    with torch.no_grad():
        for site in attnctl.find_sites(pipe):
            if site.kind == "self":
                site.module.to_out[0].weight *= 4.0 if site.name == PLANTED else 1e-3  # type: ignore[union-attr, index]
    return pipe


class Apart:
    """Mark how far pictures are from plain ones."""

    def __init__(self, pipe: Any) -> None:
        self.seen = 0
        ranked = BlockHunt(**FIELDS)
        from attnctl.pipelines.hunting.work import pictures

        images = pictures(pipe, ranked, range(len(PAIRS)), None)
        self.plain = {text: np.asarray(i).astype(float) for (text, _), i in zip(PAIRS, images, strict=True)}

    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        self.seen += len(images)
        return [
            float(np.abs(np.asarray(i).astype(float) - self.plain[p]).mean())
            for i, p in zip(images, prompts, strict=True)
        ]


def test_a_planted_block_is_found_and_a_stopped_search_goes_on(toy: Any, tmp_path: Path) -> None:
    scorer = Apart(toy)
    plan = BlockHunt(**FIELDS, methods=("PAG", "SEG"), halving=((2, 4),))
    count = len(plan.candidates(attnctl.find_sites(toy)))
    found = hunt_blocks(toy, plan, scorer, log=tmp_path)
    assert isinstance(found, RankedBlocks)
    assert found.ranking[0][1] == PLANTED
    assert found.images == scorer.seen == plan.images(count) == 4 + 2 * count + 2 * 4
    assert found.seen[found.ranking[0]] == 4
    assert found.seen[found.ranking[-1]] == 2
    assert found.control() == plan.control(found.ranking[0])
    assert hunt_blocks(toy, plan, scorer, log=tmp_path).ranking == found.ranking
    assert scorer.seen == found.images  # everything was in the log
    with pytest.raises(PlanError, match="steps"):
        hunt_blocks(
            toy, BlockHunt(**FIELDS | {"steps": 2}, methods=("PAG", "SEG"), halving=((2, 4),)), scorer, log=tmp_path
        )
    data = json.loads(found.save(tmp_path / "out").read_text())
    assert parse_control(data["control"]) == found.control()
    worse = hunt_blocks(toy, plan, lambda images, prompts: [-x for x in Apart.__call__(scorer, images, prompts)])
    assert worse.gains[worse.ranking[0]][0] <= 0
    assert worse.control() is None


def test_methods_and_blocks(toy: Any) -> None:
    sites = attnctl.find_sites(toy)
    plan = BlockHunt(**FIELDS, scale=2.0)
    candidates = plan.candidates(sites)
    assert {m for m, _ in candidates} == {"PAG", "SEG", "SLG", "STG"}
    assert plan.control(("PAG", PLANTED)) == PAG(scale=2.0, sites=PLANTED)
    assert plan.control(("SLG", PLANTED)) == SLG(scale=2.0, sites=PLANTED, start=0.0, stop=1.0)
    one = BlockHunt(**FIELDS, sites="mid", methods=("SLG",))
    assert one.candidates(sites) == (("SLG", PLANTED),)


def test_what_cannot_be_tried_is_told(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnctl.pipelines.hunting import blocks

    def bad(**fields: Any) -> Any:
        return PAG(**fields | {"sites": "attn2"})

    monkeypatch.setitem(blocks.METHODS, "SEG", bad)
    found = hunt_blocks(toy, BlockHunt(**FIELDS, sites="mid", methods=("PAG", "SEG")), Apart(toy))
    assert found.ranking == (("PAG", PLANTED),)
    assert set(found.refused) == {("SEG", PLANTED)}
    assert found.to_dict()["refused"][0]["reason"]


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": ()},
        {"methods": ("TPG",)},
        {"baseline": False},
        {"pairs": ()},
        {"scale": 0.0},
        {"halving": ((4, 2),)},
        {"batch": 0},
    ],
)
def test_bad_plans(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BlockHunt(**FIELDS | changes)


def test_no_block_to_try(toy: Any) -> None:
    with pytest.raises(SiteError):
        BlockHunt(**FIELDS, sites="attn2").candidates(attnctl.find_sites(toy))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["hunt", "--unit", "block", "--model", "shapes:mmdit", "--sites", "7", "--method", "slg", "--pairs", "1"]
    args += ["--steps", "2", "--out", str(tmp_path / "blocks")]
    assert main([*args, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "2 images" in told
    assert "SLG" in told
    command = told.splitlines()[-1]
    if command.startswith("  attnctl"):  # the one candidate may be worth nothing
        assert parse_control(shlex.split(command)[-1]) == SLG(
            scale=2.5, sites="transformer_blocks.7.attn", start=0.0, stop=1.0
        )
    assert json.loads((tmp_path / "blocks" / "blocks.json").read_text())["images"] == 2
    assert main([*args, "--k", "3", "--force"]) == 2
    assert "--k is for a search for heads" in capsys.readouterr().err
    assert main(["hunt", "--method", "pag"]) == 2
    assert "--method is for --unit block" in capsys.readouterr().err
