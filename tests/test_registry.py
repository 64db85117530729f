"""Controls find their own way into records, commands and pages: what they declare, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import processes
import pytest
import torch

from attnctl.app.cli import main
from attnctl.app.ui.knobs import control_of, knobs_of
from attnctl.core.hosts.families import FAMILIES
from attnctl.core.hosts.published import Default, published_in
from attnctl.core.registry import Conflict, declared, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.data.catalogue import entry
from attnctl.data.controls import control_named, controls
from attnctl.data.specs import control_from_dict, control_to_dict, parse_control
from attnctl.errors import ConfigError, PlanError, SiteError, choice, number, whole, window
from attnctl.processors import PAG, AStar, BroadWay, Capture, Control, FateZero, Guidance, SoftPAG

ROOT = Path(__file__).parents[1]
METHODS = controls("attnctl")
OWN = """
from dataclasses import dataclass
from attnctl.processors import Control

@dataclass(frozen=True, kw_only=True)
class {name}(Control):
    factor: float = 1.2

    def wrapper(self, sites):
        return lambda call, proceed: proceed(call.with_(q=call.q * self.factor))
"""


def package(folder: Path, name: str, source: str, points: str) -> None:
    """Install a package of one module in a folder, as pip does."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attnctl.controls]\n{points}\n")


# What the package's own controls declare


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_what_readers_are_told(name: str) -> None:
    cls: Any = METHODS[name]
    about = vars(cls)["about"]
    assert isinstance(about, About)
    assert (ROOT / "docs" / "reference" / "methods" / f"{about.page}.md").is_file()
    assert about.paper or name == "Capture"
    assert all(preset.method == name for preset in vars(cls).get("presets", ()))
    for preset in vars(cls).get("presets", ()):
        parse_control(preset.form.replace("NOUNS", "('a', 'b')"))
    assert set(cls.published) <= {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", METHODS)
def test_every_number_has_a_range_and_every_field_a_meaning(name: str) -> None:
    cls: Any = METHODS[name]
    for f in dataclasses.fields(cls):
        if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
            assert declared(cls)[f.name] is not None, f.name
    assert all(f.meaning for f in entry(cls).fields), [f.name for f in entry(cls).fields if not f.meaning]


# What is refused


def _second_pag() -> None:
    type("PAG", (Guidance,), {"__module__": "elsewhere", "__qualname__": "PAG"})


def _nameless() -> None:
    type("no name", (Control,), {})


def _silent() -> None:
    type("Silent", (Control,), {"__module__": "attnctl.processors.silent"})


def _pageless() -> None:
    About(does="something", page="")


def _idle() -> None:
    About(does=" ", page="pag")


def _endless() -> None:
    knob(3.0)


def _misplaced() -> None:
    knob(3, 5, 1)


def _missing_option() -> None:
    knob("sideways", options=("rows", "columns"))


def _groundless() -> None:
    Conflict("PAG", "site", "")


def _nowhere() -> None:
    Conflict("PAG", "street", "because")  # type: ignore[arg-type]


def _undecorated() -> None:
    class Bare(Control):
        factor: float = 1.0

    Bare()


REFUSED: list[tuple[Callable[[], None], str]] = [
    (_second_pag, r"Two controls are called PAG: one of attnctl\.processors\.pag, one of elsewhere"),
    (_nameless, "called 'no name'.*give its class a name"),
    (_misplaced, r"default of knob\(\)=3 must be a whole number from 5 to 1"),
    (_missing_option, r"default of knob\(\)='sideways'"),
    (_silent, "Silent says nothing about itself.*about = About"),
    (_pageless, "page='' is empty.*name the page"),
    (_idle, "does=' ' is empty.*what the control does"),
    (_endless, r"knob\(3\.0\).*no range.*low="),
    (_groundless, "reason=''.*give names and a reason"),
    (_nowhere, "where='street' is unknown.*site, block, model"),
    (_undecorated, "Bare has fields.*no frozen dataclass.*@dataclass"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[make.__name__[1:] for make, _ in REFUSED])
def test_refused(make: Callable[[], None], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        make()
    assert controls("attnctl") == METHODS


def test_a_class_that_is_defined_again_takes_its_former_place() -> None:
    for _ in range(2):  # as a cell of a notebook that runs twice
        exec(OWN.format(name="Again"), globals())
    assert control_named("Again") is globals().pop("Again")


def test_bases_and_private_classes_are_no_methods() -> None:
    class Base(Control, abstract=True):
        pass

    class _Helper(Control):
        pass

    assert not {"Base", "_Helper", "Control", "Guidance", "LatentGuidance", "WordEdit"} & set(controls())


# Controls of a user's own


def test_a_control_of_ones_own_is_known_once_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_sharper.py").write_text(OWN.format(name="OwnSharper"))
    with pytest.raises(ConfigError, match=r"Unknown method 'OwnSharper'.*once its module is imported"):
        parse_control("OwnSharper(factor=2.0)")
    module = __import__("own_sharper")
    made = parse_control("OwnSharper(factor=2.0)")
    assert made == module.OwnSharper(factor=2.0)
    assert control_from_dict(json.loads(json.dumps(control_to_dict(made)))) == made
    assert control_of("OwnSharper", {"start": 0.5}) == module.OwnSharper(start=0.5)
    assert [k.field for k in knobs_of("OwnSharper")] == ["sites", "start", "stop"]
    assert main(["controls", "OwnSharper"]) == 0
    assert "factor" in capsys.readouterr().out


def test_a_record_is_read_in_another_process_after_the_import(tmp_path: Path) -> None:
    (tmp_path / "own_again.py").write_text(OWN.format(name="OwnAgain"))
    prompt = ["generate", "--prompt", "a red circle on gray", "--steps", "2", "--out", str(tmp_path)]
    first = [*prompt, "--control", "OwnAgain(sites='mid')"]
    call = "import sys, {0}; from attnctl.app.cli import main; sys.exit(main({1!r}))"

    def run(module: str, args: list[str]) -> subprocess.CompletedProcess[str]:
        code = call.format(module, args)
        return processes.run(code, cwd=tmp_path)

    made = run("own_again", first)
    assert made.returncode == 0, made.stderr
    (picture,) = tmp_path.glob("*.png")
    again = run("own_again", ["generate", "--from", picture.name, "--out", str(tmp_path)])
    assert again.returncode == 0, again.stderr
    assert "Identical" in again.stderr
    without = run("os", ["generate", "--from", picture.name, "--out", str(tmp_path), "--force"])
    assert without.returncode == 1
    assert "Unknown method 'OwnAgain'" in without.stderr
    assert "import own_again first" in without.stderr


def test_an_entry_point_brings_a_control_when_its_name_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "brings_one", OWN.format(name="Brought"), "Brought = brings_one:Brought")
    assert "Brought" not in controls()
    assert parse_control("Brought(factor=3.0)").factor == 3.0


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "raise RuntimeError('broken')", "x = 1"])
def test_an_entry_point_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"fails_{abs(hash(source))}"
    package(tmp_path, name, source, f"Failing = {name}:Failing")
    with pytest.raises(ConfigError, match=rf"Unknown method 'Failing'.*entry point Failing = '{name}:Failing'.*cannot"):
        parse_control("Failing")
    assert parse_control("PAG") == PAG()


HALF = """
from dataclasses import dataclass
from attnctl.processors import Control

@dataclass(frozen=True, kw_only=True)
class Half(Control):
    factors: list = []
"""


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("Dumps", "from json import dumps as Dumps", "names <function dumps.*which is no subclass of Control"),
        ("Three", "Three = 3", "names 3, which is no subclass of Control"),
        ("Leaves", "import sys; sys.exit(3)", r"cannot be imported \(SystemExit: 3\)"),
        ("Half", HALF, r"cannot be imported \(ValueError: mutable default"),
    ],
)
def test_an_entry_point_without_a_control_is_named_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, f"empty_{name.lower()}", source, f"{name} = empty_{name.lower()}:{name}")
    package(tmp_path, f"whole_{name.lower()}", OWN.format(name=f"Whole{name}"), f"W = whole_{name.lower()}:Whole{name}")
    with pytest.raises(ConfigError, match=f"Unknown method {name!r}.*entry point {name} = .*{reason}"):
        parse_control(name)
    assert parse_control(f"Whole{name}(factor=3.0)").factor == 3.0


@pytest.mark.parametrize("module", [None, 3, ["x"]])
def test_a_record_without_a_module_says_what_to_do(module: Any) -> None:
    data = {"method": "Gone", "scale": 1.0} | ({} if module is None else {"module": module})
    with pytest.raises(ConfigError, match=r"Unknown method 'Gone'.*import the module that defines it"):
        control_from_dict(data)


def test_the_package_writes_no_module_and_takes_none() -> None:
    assert "module" not in control_to_dict(PAG())
    with pytest.raises(ConfigError, match="no field 'module'"):
        control_from_dict({"method": "PAG", "module": "attnctl.processors.pag"})


def test_the_command_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["controls"]
    assert {row["name"] for row in listed} >= METHODS.keys()
    assert main(["controls", "FateZero", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["about"]["paper"] == "arXiv 2303.09535"
    assert {"AgentAttention", "FateZero", "PromptToPrompt"} <= {name for name, *_ in one["conflicts"]}
    assert main(["controls", "FateZer"]) == 2
    assert "Did you mean 'FateZero'" in capsys.readouterr().err


# Numbers of any kind


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    made = PAG(scale=np.float32(3.5), sites=np.int64(3), every=np.int64(2), start=torch.tensor(0.5))  # type: ignore[arg-type]
    assert made == PAG(scale=3.5, sites=3, every=2, start=0.5)
    assert {type(v) for v in (made.scale, made.sites, made.every, made.start)} == {int, float}
    words: Any = {"source": "a", "target": "b"}
    kinds: list[tuple[Any, Any]] = [
        (PAG(sites=(np.int32(1), "mid")), PAG(sites=(1, "mid"))),
        (PAG(sites=slice(np.int64(1), None)), PAG(sites=slice(1, None))),
        (SoftPAG(heads=[(np.int64(1), torch.tensor(2))]), SoftPAG(heads=[(1, 2)])),
        (AStar(concepts=("a", np.int64(3)), seg=np.float16(2)), AStar(concepts=("a", 3), seg=2.0)),
        (BroadWay(beta=[np.float32(1.5), 2], tau=np.int8(3)), BroadWay(beta=[1.5, 2], tau=3)),  # type: ignore[arg-type]
        (Capture(points=((np.float64(0.5), 0.25),)), Capture(points=((0.5, 0.25),))),
        (Capture(heads=(np.int64(1),)), Capture(heads=(1,))),
        (FateZero(**words, self_replace=np.float32(0.5)), FateZero(**words, self_replace=0.5)),
    ]  # fmt: skip
    for given, expected in kinds:
        assert given == expected
        assert control_from_dict(json.loads(json.dumps(control_to_dict(given)))) == expected


@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True), "3", None, 1j, np.array([3.0]), torch.ones(2)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="scale="):
        PAG(scale=value)


def test_the_checks_say_what_was_given_and_expected() -> None:
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: number(2.0, "x", 0.0, 1.0), ConfigError, r"^x=2\.0 is out of range: give a number from 0 to 1\.$"),
        (lambda: number(0, "x", above=0.0), ConfigError, "a number above 0"),
        (lambda: number(1.0, "x", 0.0, below=1.0), ConfigError, "a number from 0, below 1"),
        (lambda: number(float("inf"), "x"), ConfigError, "is infinite"),
        (lambda: number(float("nan"), "x"), ConfigError, "a finite number"),
        (lambda: number(10**400, "x"), ConfigError, "is infinite"),
        (lambda: whole(1.0, "n", 1, of="steps"), ConfigError, "must be a whole number of steps, 1 or more"),
        (lambda: whole(9, "n", 0, 8), ConfigError, "a whole number from 0 to 8"),
        (lambda: whole(0, "n", 1, error=PlanError), PlanError, "1 or more"),
        (lambda: choice("meen", "f", ("mean", "max")), ConfigError, "Choose one of mean, max. Did you mean 'mean'"),
        (lambda: choice(True, "f", (1, 2)), ConfigError, "f=True is unknown"),
        (lambda: window((0.5, 0.2), "w"), ConfigError, "a pair"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert number(float("inf"), "x", infinite=True) == float("inf")
    assert window(np.float32(0.5), "w") == (0.0, 0.5)
    assert choice(np.int64(2), "f", (1, 2)) == 2


# Published places


def sites(n: int, kind: str = "joint") -> tuple[Site, ...]:
    """Make a model of n blocks."""
    return tuple(Site(f"blocks.{i}", kind, 4, 8, i) for i in range(n))


@pytest.mark.parametrize(("n", "index"), [(24, 13), (38, 20), (2, 1), (1, 0)])
def test_a_published_depth_is_proportional(n: int, index: int) -> None:
    assert Default(depth=(13, 24), source="").of(sites(n), ("joint",), "X") == (sites(n)[index],)


@pytest.mark.parametrize(("n", "first", "last"), [(19, 15, 19), (38, 30, 38), (4, 3, 4), (1, 0, 1)])
def test_a_published_span_is_proportional(n: int, first: int, last: int) -> None:
    assert Default(span=(15, 19, 19), source="").of(sites(n), ("joint",), "X") == sites(n)[first:last]


def test_published_places_need_blocks_to_count() -> None:
    with pytest.raises(SiteError, match="X: the model has no joint attention"):
        Default(depth=(1, 2), source="").of(sites(3, "cross"), ("joint",), "X")


def test_a_controls_own_places_come_before_those_of_its_bases() -> None:
    (family,) = (f for f in FAMILIES if f.name == "Stable Diffusion 3, 3.5")
    slg: Any = METHODS["SLG"]
    assert published_in(slg, family, sites(24)).sites == tuple(f"transformer_blocks.{i}" for i in (7, 8, 9))
    assert published_in(slg, family, sites(38)) == published_in(PAG, family)  # published for 24 blocks alone

    class Elsewhere(Guidance):
        published: ClassVar[dict[str, Default]] = {family.name: Default(depth=(1, 24), source="here")}

    assert Elsewhere().default_sites(sites(24), family) == (sites(24)[1],)
    assert Elsewhere().default_source(family) == "here"
