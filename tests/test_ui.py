"""`attnctl ui` without a browser: knobs, models, and what the page does."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_pipelines
from PIL import Image

from attnctl.app.cli import main
from attnctl.app.commands.common import UsageError
from attnctl.app.demo import SHEETS, Sheet
from attnctl.app.ui import actions, video_actions
from attnctl.app.ui.actions import Ask
from attnctl.app.ui.knobs import about, control_of, knobs_of, preset, selector
from attnctl.app.ui.models import Models, combiners, offered
from attnctl.app.ui.video_actions import EditAsk
from attnctl.data.controls import controls
from attnctl.data.record import pixels_sha256, read
from attnctl.data.specs import methods, parse_control
from attnctl.errors import AttnctlError, ConfigError
from attnctl.processors import APG, PAG, SEG, AStar, BroadWay, GuidanceInterval

PROMPT = "a red circle and a blue square on gray"
CLIP = "a red circle moving right fast on gray"
OFFERED = [name for name in offered() if name in controls("attnctl")]


@pytest.fixture(scope="module")
def models() -> Models:
    torch.set_num_threads(1)
    return Models()


def ask(**changes: Any) -> Ask:
    return Ask(**{"model": "shapes:text2image", "prompt": PROMPT, "seed": 3, "steps": 2, "guidance": 3.0, **changes})


# Knobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OFFERED)
def test_knobs_stand_at_the_defaults(method: str) -> None:
    knobs = knobs_of(method)
    assert {"sites", "start", "stop"} <= {knob.field for knob in knobs}
    made = control_of(method, {knob.field: knob.default for knob in knobs}, prompt=PROMPT)
    concepts = {"concepts": ("circle", "square")} if hasattr(made, "concepts") else {}
    assert made == methods()[method](**concepts)
    for knob in knobs:
        assert knob.name == f"{method}_{knob.field}"
        if knob.kind == "slider":
            assert knob.span[0] <= knob.default <= knob.span[1]
        if knob.kind == "choice":
            assert knob.default in knob.choices
    assert about(method).endswith(".")


def test_knobs_make_controls() -> None:
    assert control_of("PAG", {"scale": 2.0, "sites": "mid", "every": 2.0}) == PAG(scale=2.0, sites="mid", every=2)
    assert control_of("PAG", {"sites": "up.0, 6"}) == PAG(sites=("up.0", 6))
    assert control_of("SEG", {"sigma": "inf"}) == SEG()
    assert control_of("SEG", {"sigma": "2.5"}) == SEG(sigma=2.5)
    assert control_of("APG", {"scale": ""}) == APG()
    assert control_of("APG", {"scale": "4"}) == APG(scale=4.0)
    assert control_of("GuidanceInterval", {"interval": "0.1, 0.7"}) == GuidanceInterval(interval=(0.1, 0.7))
    assert control_of("BroadWay", {"motion": ""}) == BroadWay()
    assert control_of("AStar", {"concepts": "cat"}, prompt="a cat") == AStar(concepts=("cat",))
    assert [selector(text) for text in ("", None, "6", "mid", "1, up.1")] == [None, None, 6, "mid", (1, "up.1")]


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.model)
def test_settings_of_the_shipped_models_are_those_of_the_demo(sheet: Sheet) -> None:
    for form in (form for panel in sheet.panels for form in panel.controls):
        shown = parse_control(form.replace("NOUNS", "('circle', 'square')"))
        assert control_of(type(shown).__name__, {}, sheet.model, PROMPT) == shown


def test_knobs_go_before_settings() -> None:
    made = control_of("AttendExcite", {"step_size": 1.0, "sites": "mid"}, "shapes:text2image", PROMPT)
    assert (made.step_size, made.sites, made.thresholds) == (1.0, "mid", ())
    assert control_of("PAG", {"sites": ""}, "shapes:mmdit").sites is None
    assert preset("somebody/model", "PAG") == {}


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("PGA", {}, "Unknown method 'PGA'"),
        ("PAG", {"start": 2.0}, "start=2.0 is out of range"),
        ("SEG", {"sigma": "wide"}, "sigma='wide' is not a number"),
        ("AStar", {"concepts": ""}, "Name the concepts"),
        ("GuidanceInterval", {"interval": "0.1"}, "or a pair (start, end) of them"),
        ("GuidanceInterval", {"interval": "early, late"}, "interval='early' is not a number"),
        ("PAG", {"scope": "some"}, "scope='some' is unknown"),
    ],
)
def test_knobs_refuse(method: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        control_of(method, values, prompt="a cat")


# Models ----------------------------------------------------------------------------------------------------------


def test_models_tell_what_they_take(models: Models) -> None:
    takes = set(models.takes("shapes:mmdit"))
    assert set(OFFERED) - {"AgentAttention", "BroadWay"} >= takes >= {"PAG", "SoftPAG", "SEG", "AStar", "TPG", "NAG"}
    assert {"NAG", "AgentAttention", "PAG", "AttendExcite", *combiners()} <= set(models.takes("shapes:text2image"))
    assert {"APG", "CFGZeroStar", "CFGPlusPlus"} <= set(combiners())
    assert "BroadWay" in models.takes("shapes:video")
    assert "EnhanceAVideo" in models.takes("shapes:videodit")
    pipe = models.get("shapes:text2image").pipe
    assert not any("attnctl" in type(p).__module__ for p in pipe.unet.attn_processors.values())
    with pytest.raises(ConfigError, match="no model 'other'"):
        models.get("other")


def test_a_given_model_comes_first(tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny-sd")
    zoo_pipelines.build("sd")[0].save_pretrained(folder)
    models = Models(folder)
    assert models.images[0] == folder
    assert models.edits == (folder, "shapes:text2image", "shapes:mmdit", "shapes:videodit")
    assert "PAG" in models.takes(folder)
    done = actions.compare(models, ask(model=folder, prompt="a cat", steps=2), [PAG(scale=2.0)])
    assert actions.image_marks(done, "a cat")[0] == ["", "seconds"]
    with pytest.raises(AttnctlError, match="Cannot load"):
        Models(str(tmp_path))


# Pictures --------------------------------------------------------------------------------------------------------


def test_compare(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    control = control_of("AttendExcite", {}, "shapes:text2image", PROMPT)
    done = actions.compare(models, ask(), [control], lambda: steps.append(1))
    assert len(steps) == 4
    assert done.controlled is not None
    assert done.plain.record.sha256 != done.controlled.record.sha256
    assert "guidance forwards" in done.report
    header, rows = actions.image_marks(done, PROMPT)
    assert [row[0] for row in rows] == ["plain", "controlled"]
    assert all(len(row) == len(header) for row in rows)

    path = actions.keep(tmp_path, "a picture", done.controlled)
    assert main(["generate", "--from", path, "--out", str(tmp_path / "again")]) == 0
    for n, line in enumerate(done.commands.splitlines()):
        capsys.readouterr()
        assert main([*shlex.split(line)[1:], "--out", str(tmp_path / str(n)), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)["images"][0]["sha256"]
        assert made == done.runs[n][1].record.sha256[0]


def test_without_a_method_there_is_one_picture(models: Models) -> None:
    done = actions.compare(models, ask(steps=1), [])
    assert done.controlled is None
    assert [name for name, _, _ in done.runs] == ["plain"]
    assert "as it is" in done.report


def test_words_and_heads(models: Models, tmp_path: Path) -> None:
    made = actions.words(models, ask(), ["circle", "square"]) | actions.heads(models, ask(), "circle", "up_blocks")
    assert sorted(made) == ["heads", "steps", "words"]
    for name, content in made.items():
        path = actions.keep_bytes(tmp_path, f"{name}.png", content)
        assert read(path)[0].prompts == (PROMPT,)
        with Image.open(path) as image:
            assert image.width > 300
    done = actions.heads(models, ask(model="shapes:mmdit", steps=1), "square", 6)
    assert done["heads"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"seed": -1}, "Seed is a whole number"),
        ({"seed": 1.5}, "Seed is a whole number"),
        ({"steps": 0}, "Steps is a whole number"),
    ],
)
def test_requests_refuse(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ask(**changes)


def test_actions_refuse(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttnctlError, match="'cat' is not in the prompt"):
        actions.words(models, ask(), ["cat"])
    with pytest.raises(UsageError, match="Choose a word"):
        actions.heads(models, ask(), "")
    with pytest.raises(AttnctlError, match="matches"):
        actions.heads(models, ask(), "circle", "down.7")
    monkeypatch.setattr(actions, "_MOST_TILES", 3)
    with pytest.raises(UsageError, match="Name fewer layers"):
        actions.heads(models, ask(), "circle")
    with pytest.raises(AttnctlError, match="BroadWay"):
        actions.compare(models, ask(), [BroadWay()])


# Videos ----------------------------------------------------------------------------------------------------------


def test_video(models: Models, tmp_path: Path) -> None:
    done = actions.compare(models, ask(model="shapes:video", prompt=CLIP, steps=1), [BroadWay(motion=1.0)])
    header, rows = video_actions.video_marks(done, CLIP)
    assert header[-2:] == ["motion, px a frame", "seconds"]
    assert len(rows) == 2
    assert video_actions.video_marks(done, "a horse")[0] == ["", "seconds"]
    pytest.importorskip("av")
    film = video_actions.film(tmp_path, CLIP, done.plain.videos[0], done.plain.record)
    shown = video_actions.preview(tmp_path, done.plain.videos[0])
    assert film is not None
    assert shown is not None
    assert pixels_sha256(done.plain.images[0]) == done.plain.record.sha256[0]


def test_edit(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("av")
    words = {"source": "a red circle on gray", "target": "a blue circle on gray"}
    asked = EditAsk(
        model="shapes:text2image", files=video_actions.sample_clip(tmp_path), steps=2, frames=2, blend="circle", **words
    )
    steps: list[int] = []
    made = video_actions.edit(models, asked, tmp_path, lambda: steps.append(1))
    assert len(steps) == asked.ticks(models) == 4
    assert [Path(f).suffix for f in made.files] == [".mp4", ".json"]
    assert made.before is not None
    assert made.after is not None
    assert "FateZero" in made.report
    assert "--blend circle" in made.command
    record = Path(made.files[1]).read_text(encoding="utf-8")
    assert str(tmp_path) not in record


def test_edit_of_pictures_and_animations_on_transformers(models: Models, tmp_path: Path) -> None:
    words = {"source": "a red circle on gray", "target": "a blue circle on gray", "model": "shapes:mmdit", "steps": 2}
    frames = [Image.new("RGB", (64, 64), (100 + 20 * i, 100, 100)) for i in range(3)]
    paths = [tmp_path / f"f{i}.png" for i in (2, 10, 1)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    several = EditAsk(files=[str(p) for p in paths], frames=2, mask=str(mask), **words)
    assert several.ticks(models) is None
    made = video_actions.edit(models, several, tmp_path)
    assert "--mask" in made.command
    folder = Path(made.command.split()[2])
    assert [Image.open(p).getpixel((0, 0))[0] for p in sorted(folder.iterdir())] == [140, 100, 120]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    made = video_actions.edit(
        models, EditAsk(files=[str(tmp_path / "in.gif")], method="flowedit", share=0.5, frames=1, **words), tmp_path
    )
    assert [Path(f).suffix for f in made.files] == [".png", ".json"]
    assert "--method flowedit" in made.command
    assert "--strength 0.5" in made.command
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.mp4 is no picture"):
        video_actions.edit(models, EditAsk(files=[str(tmp_path / "a.mp4"), str(paths[0])], **words), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": None}, "no video"),
        ({"files": []}, "no video"),
        ({"method": "paint"}, "no method 'paint'"),
        ({"method": "inject", "mask": "m.png"}, "mask is for fatezero"),
        ({"share": 0.5}, "share is for flowedit and inject"),
        ({"source": ""}, "source prompt is empty"),
        ({"target": None}, "target prompt is empty"),
        ({"steps": 0}, "Steps is a whole number"),
        ({"frames": 1.5}, "Frames is a whole number"),
    ],
)
def test_edits_refuse(changes: dict[str, Any], said: str) -> None:
    fields = {"model": "shapes:text2image", "files": "x.mp4", "source": "a", "target": "b"}
    with pytest.raises(UsageError, match=said):
        EditAsk(**{**fields, **changes})  # type: ignore[arg-type]


def test_what_is_no_video_is_said(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    asked = EditAsk(model="shapes:text2image", files=str(path), source="a red circle on gray", target="a blue circle")
    with pytest.raises(AttnctlError, match="is no video that is read"):
        video_actions.edit(models, asked, tmp_path)


# The command -----------------------------------------------------------------------------------------------------


def test_gradio_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", "--no-browser"]) == 1
    assert 'pip install "attnctl[ui]"' in capsys.readouterr().err


def test_bad_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--port", "0"]) == 2
    assert "from 1 to 65535" in capsys.readouterr().err
