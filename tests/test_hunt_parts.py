"""Around the search for heads: what it refuses, its log, objectives, head sets as published, and the command."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import perturbed
from PIL import Image

import attnctl
from attnctl import HeadSet
from attnctl.app.cli import main
from attnctl.data.specs import parse_control
from attnctl.errors import AttnctlError, ConfigError, PlanError, SiteError
from attnctl.pipelines import HuntPlan, compose, halvings, hunt
from attnctl.pipelines.hunting.log import HuntLog, LogError
from attnctl.pipelines.hunting.scorers import BlipScore, ClipScore, ShapesJudge, harmonic, objective_of
from attnctl.processors import SoftPAG

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


# Published lists: layer and head as the paper counts them ------------------------------------------------------

SD3_LISTS = ("L1H10", "L11H15", "L13H17", "L0H23", "L1H2,L1H10", "L0H15 L1H19", "L18H11 L0H17 L2H3", "L14H7 L14H17")
FLUX_LISTS = ("L51H23 L52H22", "L38H18 L43H17", "L34H0 L52H6")


@pytest.fixture(scope="module")
def sd3() -> Any:
    return zoo.build("sd3", num_layers=24, num_attention_heads=24, attention_head_dim=4, caption_projection_dim=96)


@pytest.fixture(scope="module")
def flux() -> Any:
    config = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 4}
    return zoo.build("flux", **config, axes_dims_rope=(0, 2, 2))


@pytest.mark.parametrize(("name", "labels"), [*(("sd3", t) for t in SD3_LISTS), *(("flux", t) for t in FLUX_LISTS)])
def test_published_lists_address_the_right_heads(
    name: str, labels: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, inputs = request.getfixturevalue(name)
    layers = {"sd3": 24, "flux": 57}[name]
    HeadSet.from_labels(labels, layers=layers, u=1.0, scale=3.0).save_pretrained(tmp_path)
    heads = HeadSet.from_pretrained(tmp_path)
    got = perturbed(model, SoftPAG(heads=heads, u=1.0), inputs)

    wanted: dict[str, list[int]] = {}
    for layer, head in heads.pairs:
        assert isinstance(layer, int)
        block = f"transformer_blocks.{layer}.attn"
        if name == "flux" and layer >= 19:
            block = f"single_transformer_blocks.{layer - 19}.attn"
        wanted.setdefault(block, []).append(head)
    # By hand: SDPA is replaced by v in these heads, in the calls of these modules alone.
    expected = _by_hand(model, inputs, wanted)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((got - zoo.call(model, inputs)).abs().max()) > 1e-6


def _by_hand(model: Any, inputs: dict[str, Any], wanted: dict[str, list[int]]) -> torch.Tensor:
    real, current = torch.nn.functional.scaled_dot_product_attention, []

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        out = real(query, key, value, *args, **more)
        heads = current[-1] if current else []
        return torch.stack([value[:, h] if h in heads else out[:, h] for h in range(out.shape[1])], 1)

    handles = []
    for module_name, heads in wanted.items():
        module = model.get_submodule(module_name)
        handles.append(module.register_forward_pre_hook(lambda m, a, heads=heads: current.append(heads)))
        handles.append(module.register_forward_hook(lambda m, a, out: current.clear()))
    torch.nn.functional.scaled_dot_product_attention = sdpa
    try:
        return zoo.call(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("text", ["", "L1", "1H2", "L1H10;L-1H2", "L1H10 L1H10", "layer 1"])
def test_bad_labels(text: str) -> None:
    with pytest.raises(SiteError):
        HeadSet.from_labels(text)


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


def test_the_judge_marks_what_was_asked() -> None:
    from attnctl.shapes.scenes import Scene, Thing, render

    scene = Scene((Thing("circle", "red", 18, 18, 10), Thing("square", "blue", 45, 45, 10)), "gray")
    image = Image.fromarray(render(scene))
    asked = ["a red circle and a blue square on gray", "a red circle and a blue ring on gray", "a white ring on gray"]
    right, half, wrong = ShapesJudge()([image] * 3, asked)
    assert right > 0.95 > half > wrong == 0


def _clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(pipes.TOKENIZER)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_and_pickscore_are_cosines(tmp_path: Path) -> None:
    folder = str(_clip(tmp_path))
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    marks = ClipScore(folder)(images, ["a cat", "a black bear"])
    assert len(marks) == 2
    assert all(abs(m) <= 100 for m in marks)
    assert ClipScore(folder)(images[:1], ["a cat"]) == pytest.approx(marks[:1], abs=1e-3)
    own = ClipScore(folder, factor=None)
    assert own(images, ["a cat", "a black bear"]) == pytest.approx(
        [m / 100 * float(own.model.logit_scale.exp().detach()) for m in marks], abs=1e-4
    )
    both = harmonic(lambda i, p: [1.0] * len(i), lambda i, p: [3.0] * len(i))
    assert both(images, ["", ""]) == [1.5, 1.5]
    with pytest.raises(ConfigError, match="positive"):
        harmonic(lambda i, p: [-1.0], lambda i, p: [3.0])(images[:1], [""])


def test_blip_marks_by_log_odds(tmp_path: Path) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]", "a", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "projection_dim": 8,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, image_text_hidden_size=8
    )
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path)
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(str(tmp_path / "vocab.txt"))
    )
    processor.save_pretrained(tmp_path)
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    scorer = BlipScore(str(tmp_path))
    marks = scorer(images, ["a cat", "a dog"])
    assert len(marks) == 2
    assert scorer(images[1:], ["a dog"]) == pytest.approx(marks[1:], abs=1e-4)


def test_missing_weights_say_how_to_fetch_them() -> None:
    for make in (lambda: ClipScore("nobody/nothing"), lambda: BlipScore("nobody/nothing")):
        with pytest.raises(ConfigError, match=r"not on this machine.*hf download nobody/nothing"):
            make()


def test_objectives_by_name() -> None:
    assert isinstance(objective_of("shapes"), ShapesJudge)
    assert objective_of("os.path:basename") is os.path.basename
    with pytest.raises(ConfigError, match="Did you mean 'pickscore'"):
        objective_of("pick_score")
    for name in ("nowhere:f", "os:nothing", "os:name"):
        with pytest.raises(ConfigError):
            objective_of(name)


# The command ---------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["hunt", "--model", "shapes:mmdit", "--heads", "L7H0 L7H3", "--pairs", "1", "--k", "1", "--steps", "2"]
    args += ["--show", "1", "--batch", "2", "--out", str(tmp_path / "heads"), "--json"]
    assert main([*args, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pool"], told["images"], told["images_per_round"]) == (2, 2 + 1 + 3, [2])
    assert told["passes"] == 2 * ((2 + 2) * 3 + 2 * 2)
    assert told["hours"] > 0
    assert not (tmp_path / "heads").exists()
    assert main(args) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["images"] == told["images"] == done["generated"]
    assert {p.name for p in (tmp_path / "heads").iterdir()} == {
        "README.md", "attnctl_heads.json", "grid.png", "heat_map_1.png", "hunt_result.json", "log",
    }  # fmt: skip
    assert main(args) == 1  # there is a result already
    assert "already there" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["generated"] == 3  # the log had the rest
    assert main([*args[:-1], "--force"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])  # the command that uses what was found
    assert words[:4] == ["attnctl", "generate", "--model", "shapes:mmdit"]
    assert parse_control(words[-1]) == SoftPAG(
        heads=HeadSet.from_pretrained(tmp_path / "heads").pairs, u=0.5, scale=2.5
    )


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    args = ["hunt", "--model", "shapes:mmdit", "--heads", "L7H0 L7H3", "--pairs", "2", "--k", "1", "--steps", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "attnctl.app.cli", *args, "--out", str(tmp_path / "heads"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # of both processes, one says what was found
    assert (told["processes"], told["images"]) == (2, 2 * 2 + 2)
    logs = {p.name.split("-")[1]: p.read_text().splitlines() for p in (tmp_path / "heads" / "log").glob("*.jsonl")}
    assert set(logs) == {"000", "001"}
    assert sum(len(json.loads(line)["marks"]) for lines in logs.values() for line in lines) == told["images"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--pairs", "65"), "--pairs 65 is out of range"),
        (("--pairs", "0"), "--pairs 0 is out of range"),
        (("--preset", "style"), "--style"),
        (("--preset", "quality"), "--prompt"),
        (("--heads", "L1"), "L1H10"),
        (("--k", "0"), "k=0"),
        (("--option", "height"), "height"),
    ],
)
def test_usage_errors(more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hunt", *more]) in (1, 2)
    assert words in capsys.readouterr().err
