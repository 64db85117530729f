"""`attnctl reproduce`: every recipe at toy size, what is finished is kept, several processes, bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnctl.data.pictures import film_strip
from attnctl.data.record import read
from attnctl.data.specs import parse_control
from attnctl.errors import ConfigError, PlanError
from attnctl.pipelines.reproduce import models, networks, report, store
from attnctl.pipelines.reproduce import run as running
from attnctl.pipelines.reproduce.metrics import METRICS, by_name
from attnctl.pipelines.reproduce.networks import Networks
from attnctl.pipelines.reproduce.prompts import Asked, asked, check_extras, controls_of
from attnctl.pipelines.reproduce.recipes import Experiment, experiments, methods
from attnctl.pipelines.reproduce.run import Job, calls
from attnctl.pipelines.reproduce.store import Piece, Store
from attnctl.processors import NAG

Run = Callable[..., tuple[int, str, str]]
ONE_OF_MANY = {"astar": "animals", "attend_excite": "objects", "paro": "wan"}  # the others are the same at toy size
FEW = ("broadway", "fatezero", "paro")  # one clip does; FID needs two pictures
_LOADED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load each model once for all tests of this file, and do not time it."""
    load = models.load_model

    def shared(experiment: Experiment, model: str | None = None, **options: Any) -> Any:
        name = model or experiment.model
        if name not in _LOADED:
            _LOADED[name] = load(experiment, model, **options)
        return _LOADED[name]

    monkeypatch.setattr(models, "load_model", shared)
    monkeypatch.setattr(running, "row_seconds", lambda *args: 0.5)


@pytest.fixture(scope="module", autouse=True)
def unload() -> Iterator[None]:
    yield
    _LOADED.clear()


def toy(method: str, out: Path, *more: object) -> tuple[object, ...]:
    only = ("--only", ONE_OF_MANY[method]) if method in ONE_OF_MANY else ()
    few = ("--pictures", 1) if method in FEW else ()
    return "reproduce", method, "--toy", "--out", out, *only, *few, *more


# Recipes


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("method", methods())
def test_a_recipe_is_whole(method: str, small: bool) -> None:
    for e in experiments(method, toy=small):
        names = [v.name for v in e.variants]
        assert (
            len({Store(Path(), e, {}).path(v, Asked(0, "", 0)) for v in e.variants})
            == len(set(names))
            == len(names)
            > 1
        )
        assert not e.variants[0].controls or e.edits
        assert {m for figures in e.figures.values() for m in figures} <= set(e.metrics)
        assert set(e.figures) <= set(names)
        assert by_name(e.metrics)
        assert small or (e.gpu and min(e.weights_gb, e.memory_gb, e.row_tflop) > 0 and e.source)
        one = Asked(0, "a cat and a dog", 0, "cat, dog")
        for variant in e.variants:
            for text in controls_of(e, variant, one, plan="", heads=None):
                if "PARO(" not in text:  # it reads its plan at once
                    parse_control(text)
        if not e.edits:
            check_extras(e, asked(e))


def test_the_lists_are_those_of_the_papers_in_number_and_have_no_prompt_twice() -> None:
    folder = Path(store.__file__).parent / "prompts"
    for path in folder.glob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == len(lines) >= 20, path.name
    counts = [len(asked(e)) // e.seeds for e in experiments("astar")]
    assert counts == [66, 144, 66]
    words = [one.extra.split(", ") for e in experiments("astar") for one in asked(e)]
    assert all(len(w) == 2 for w in words)


def test_prompts_of_different_controls_share_no_call() -> None:
    (e,) = experiments("astar", "animals")
    wanted = asked(e, 130)
    units = list(calls(e, e.variants[1], wanted))
    assert [one for unit in units for one in unit] == list(wanted)
    assert all(len({one.extra for one in unit}) == 1 and len(unit) <= e.batch for unit in units)
    assert [one.seed for one in wanted] == list(range(130))
    assert [one.prompt for one in wanted[:64]] == [wanted[0].prompt] * 64 != [wanted[64].prompt] * 64
    assert max(map(len, calls(e, e.variants[0], wanted))) == e.batch


# At toy size


@pytest.mark.parametrize("method", methods())
def test_a_recipe_runs_at_toy_size(method: str, run: Run, unplugged: None, tmp_path: Path) -> None:
    code, out, err = run(*toy(method, tmp_path, "--json"))
    assert code == 0, err
    assert "images in" in err
    assert "seconds" in err
    assert "GB of memory" in err
    for data in json.loads(out)["experiments"]:
        e = experiments(method, data["experiment"].split("/")[1], toy=True)[0]
        assert data["missing"] == {}
        assert data["toy"]
        measured = {(r["variant"], r["metric"]): r for r in data["rows"]}
        assert len(measured) == len(e.variants) * len(e.metrics)
        for (variant, metric), row in measured.items():
            alone = METRICS[metric].pairs and variant == e.variants[0].name
            assert (row["measured"] is None) == alone, row
            assert alone or math.isfinite(row["measured"])
        folder = Path(data["out"])
        assert {"results.json", "results.md", "sheet.png", "reproduce.json"} <= {p.name for p in folder.iterdir()}
        assert _pixels(folder, e, 0) != _pixels(folder, e, 1)
        if not e.edits:
            (record,) = read(Store(tmp_path, e, {}).path(e.variants[1], Asked(0, "", 0)))
            assert record.steps == 2
            assert [c["method"] for c in record.controls] == [t.split("(")[0] for t in e.variants[1].controls]


def _pixels(folder: Path, e: Experiment, variant: int) -> list[bytes]:
    kept = Store(folder.parents[1], e, {})
    pieces = kept.pieces(e.variants[variant], asked(e))
    return [piece.video().tobytes() for piece in pieces]


def test_what_is_finished_is_kept_and_the_rest_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    sample = running.sample

    def counted(loaded: Any, call: Any) -> Any:
        if len(made) == 1 and "stop" in made[0]:
            raise KeyboardInterrupt
        made.append(call.prompts)
        return sample(loaded, call)

    monkeypatch.setattr(running, "sample", counted)
    args = toy("nag", tmp_path, "--metric", "right", "--json")
    made.append(("stop",))
    assert run(*args)[0] == 130  # stopped before the first picture
    made.clear()
    code, out, _ = run(*args)
    assert code == 0
    assert len(made) == 4  # two pictures of two variants, each with a negative prompt of its own
    folder = tmp_path / "nag-toy" / "schnell"
    first, second = folder / "nag" / "000000.png", folder / "nag" / "000001.png"
    before = first.read_bytes()
    assert run(*args)[0] == 0
    assert len(made) == 4
    second.with_suffix(".json").write_text("{", encoding="utf-8")  # damaged: made again, and only that
    code, again, err = run(*args)
    assert (code, len(made)) == (0, 5)
    assert "3 of them there already" in err
    assert first.read_bytes() == before
    assert json.loads(again)["experiments"][0]["rows"] == json.loads(out)["experiments"][0]["rows"]
    code, _, err = run(*args, "--seed", 5)
    assert code == 1
    assert "another seed" in err
    code, out, _ = run(*toy("nag", tmp_path, "--plan"))
    assert code == 0
    assert "4 of them there already; 0 denoiser rows; about 0 seconds" in out


def test_processes_share_the_work(tmp_path: Path) -> None:
    class Crew:
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

        def wait(self) -> None:
            pass

    (e,) = experiments("agent", toy=True)
    wanted = asked(e, 3)  # in two calls

    done = []
    for rank in range(2):
        kept = Store(tmp_path, e, {"seed": 0}, rank)
        kept.claim()
        Job(e, models.load_model(e), wanted, kept, Crew(rank, 2)).run()  # type: ignore[arg-type]
        done.append([kept.finished(v, wanted) for v in e.variants])
    assert done == [[2, 2], [3, 3]]
    assert len(list((tmp_path / "agent-toy" / "sd15").glob("marks-*.jsonl"))) == 2
    kept.claim()
    assert [len(seconds) for seconds in kept.seconds()] == [3, 3]
    with pytest.raises(PlanError, match="another seed: seed was 0 and is 1"):
        Store(tmp_path, e, {"seed": 1}).claim()


def test_a_network_that_cannot_be_had_leaves_the_rest(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, image: Any) -> str:
        raise ConfigError("no captions today")

    monkeypatch.setattr(networks.ToyNetworks, "caption", refuse)
    args = toy("attend_excite", tmp_path, "--metric", "caption", "--metric", "right", "--metric", "seconds")
    code, out, _ = run(*args)
    assert code == 1
    assert "not measured: caption: no captions today" in out
    assert len(list(tmp_path.rglob("00000*.png"))) == 4
    data = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert [r["n"] for r in data["rows"]] == [0, 0, 2, 2, 2, 2]
    code, _, err = run("reproduce", "--out", tmp_path)  # toy results are not results
    assert code == 0, err


# Plans and tables


def test_a_plan_says_the_cost_of_each_experiment_and_touches_nothing(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("reproduce", "pag", "--plan", "--json", "--out", tmp_path / "new")
    assert code == 0
    first, second = json.loads(out)["experiments"]
    assert first["pictures"] == second["pictures"] == 10_000
    assert first["rows"] == 5000 * 50 * 3
    assert second["rows"] == 5000 * 50 * 5
    assert first["seconds"] > 0
    assert first["download_gb"] == 5.5
    assert 0 < first["disk_gb"] < 100
    assert not (tmp_path / "new").exists()
    code, out, _ = run("reproduce", "fatezero", "--plan", "--out", tmp_path / "new")
    assert code == 0
    assert "2 images in 2 variants; 3,200 denoiser rows" in out


def test_the_list_says_what_was_not_run_and_not_given(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("reproduce", "--json", "--out", tmp_path)
    assert code == 0
    rows = json.loads(out)
    assert {r["measured"] for r in rows} == {"not run"}
    assert {r["experiment"].split("/")[0] for r in rows} == set(methods())
    psnr = next(r for r in rows if r["experiment"] == "paro/cogvideox" and r["metric"].startswith("PSNR"))
    assert psnr["variants"] == "PARO 0.5 / PARO 0.3 / online 0.5 / online 0.3"
    assert psnr["published"] == "29.14 / 22.89 / - / -"
    (e,) = experiments("paro", "wan")
    (tmp_path / "paro" / "wan").mkdir(parents=True)
    row = {"variant": "online 0.5", "metric": "psnr", "measured": 31.234}
    data = {"schema": 1, "kind": "reproduction", "rows": [row], "missing": {}}
    (tmp_path / "paro" / "wan" / "results.json").write_text(json.dumps(data))
    found = [r for r in report.catalogue_rows(tmp_path) if r[0] == e.label]
    assert found[0][-1] == "- / - / 31.23 / -"
    assert found[1][-1] == "not run"


# Bad input


BAD: tuple[tuple[tuple[object, ...], int, str], ...] = (
    (("pga",), 2, "Did you mean 'pag'"),
    (("pag", "--only", "x"), 2, "it has unconditional, conditional"),
    (("pag", "--metric", "fud"), 2, "Did you mean 'fid'"),
    (("pag", "--pictures", 0, "--toy"), 2, "--pictures is a whole number from 1 on"),
    (("pag", "--batch", -1, "--toy"), 2, "--batch"),
    (("pag",), 2, "give --coco DIR"),
    (("nag",), 1, "wants a GPU with about 36 GB"),
    (("pag", "--plan", "--only", "conditional", "--prompts", "EMPTY"), 1, "is empty: expected text files"),
    (("pag", "--plan", "--only", "conditional", "--prompts", "nowhere"), 1, "There is no file or folder of prompts"),
    (("pag", "--plan", "--coco", "EMPTY"), 1, "is empty: expected pictures"),
    (("pag", "--reference", "EMPTY"), 1, "is empty: expected pictures"),
    (("pag", "--plan", "--only", "conditional", "--prompts", "BYTES"), 1, "no text in UTF-8"),
    (("astar", "--plan", "--prompts", "TEXT"), 1, "has no words beside it"),
    (("nag", "--plan", "--prompts", "TEXT"), 1, "has no negative prompt beside it"),
    (("fatezero",), 1, "give --clips DIR"),
    (("fatezero", "--clips", "EMPTY"), 1, "is empty. Expected videos"),
    (("headhunter", "--plan", "--heads", "nowhere"), 1, "There are no heads"),
    (("agent", "--device", "cpu", "--metric", "none", "--model", "nonsense"), 1, "neither here nor a hub id"),
    (("agent", "--device", "cpu", "--metric", "none"), 1, "stable-diffusion-v1-5, about 5.5 GB to fetch"),
    (("nag", "--device", "cpu", "--metric", "clip"), 1, "'openai/clip-vit-large-patch14' that measures (about 1.7 GB)"),
    (("softpag", "--device", "cpu", "--metric", "pickscore"), 1, "PickScore_v1' that measures (about 3.9 GB)"),
)


@pytest.mark.parametrize(("args", "code", "message"), BAD, ids=[" ".join(map(str, a)) for a, _, _ in BAD])
def test_bad_input_is_refused_in_words(
    args: tuple[object, ...], code: int, message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("a cat and a dog\n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr("attnctl.pipelines.reproduce.costs._tflops", lambda device, dtype: 1.0)
    places = {"EMPTY": tmp_path / "empty", "TEXT": tmp_path / "prompts.txt", "BYTES": tmp_path / "bytes.txt"}
    given = [places.get(str(a), a) for a in args]
    found, _, err = run("reproduce", *given, "--out", tmp_path / "out")
    assert (found, message in err) == (code, True), err
    assert not (tmp_path / "out").exists()


def test_what_fid_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"pip install|cannot be fetched"):
        Networks("x").fetch(["inception"])
    monkeypatch.setattr(networks.torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"pt_inception-2015-12-05-6726825d.pth, 0.1 GB\) cannot be fetched"):
        Networks("x")._inception_file()
    with pytest.raises(ConfigError, match="There is no file"):
        Networks("x", inception=tmp_path / "none.pth")._inception_file()


# Parts


def test_captions_of_coco_are_one_per_picture(tmp_path: Path) -> None:
    notes = [{"image_id": i % 2, "caption": f"caption {i} "} for i in range(4)] + [{"image_id": 3}, "x"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps({"annotations": notes}))
    (_, e) = experiments("pag")
    assert [one.prompt for one in asked(e, 3, coco=tmp_path)] == ["caption 0", "caption 1", "caption 0"]
    (tmp_path / "annotations" / "captions_val.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no captions"):
        asked(e, 3, coco=tmp_path)


def test_clips_come_with_two_lines(tmp_path: Path) -> None:
    (e,) = experiments("fatezero")
    (tmp_path / "jeep").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "jeep" / "0.png")
    (tmp_path / "jeep.txt").write_text("a jeep\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"jeep.txt has 1 lines for jeep, expected two"):
        asked(e, clips=tmp_path)
    (tmp_path / "jeep.txt").write_text("a jeep\n\na red car\n", encoding="utf-8")
    (one,) = asked(e, clips=tmp_path)
    assert (one.extra, one.prompt, one.clip) == ("a jeep", "a red car", tmp_path / "jeep")
    assert "source='a jeep', target='a red car'" in controls_of(e, e.variants[1], one)[0]


def test_a_text_with_braces_stays_a_text() -> None:
    (e,) = experiments("nag")
    (text,) = controls_of(e, e.variants[1], Asked(0, "x", 0, 'a "{prompt}" {heads}'))
    assert parse_control(text) == NAG(scale=4.0, tau=2.5, alpha=0.25, negative_prompt='a "{prompt}" {heads}')


@pytest.mark.parametrize("frames", [1, 5, 8, 9])
def test_frames_are_cut_out_of_their_strip(frames: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)
    film_strip([Image.fromarray(f) for f in video]).save(tmp_path / "strip.png")
    assert (Piece(Asked(0, "", 0), tmp_path / "strip.png", None, None, frames).video() == video).all()


def test_intervals() -> None:
    values = [1.0, 2.0, 4.0]
    mean, low, high = report._interval(values, False)
    half = 1.959964 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert report._interval([3.0], False) == (3.0, None, None)
    assert report._interval([1.0, 1.0], True)[1] == pytest.approx(0.342, abs=1e-3)


def test_it_says_what_it_does_before_torch_is_imported() -> None:
    code = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit(7)

sys.meta_path.insert(0, Stop())
from attnctl.app.cli import main
main(["reproduce", "pag", "--toy", "--pictures", "1", "--plan"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7
    assert done.stderr.startswith("Importing PyTorch and diffusers")
