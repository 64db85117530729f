"""Bad input: one clear error each, which says what was given, expected and to do; nothing is left behind."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from torch import nn

import attnctl
from attnctl.errors import (
    AttnctlError,
    BackendError,
    ConfigError,
    ConflictError,
    PlanError,
    SiteError,
    UnsupportedModelError,
)
from attnctl.processors import PAG, SoftPAG

pytestmark = pytest.mark.usefixtures("no_grad")


MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def sd() -> tuple[Any, dict[str, Any]]:
    """Build one pipeline for the whole file: what a case left behind would fail the next."""
    return pipes.build("sd")


# Fields


NAN, INF = math.nan, math.inf
FIELDS: list[tuple[Callable[[], Any], type[AttnctlError], str]] = [
    *((lambda v=v: PAG(scale=v), ConfigError, "scale=.*finite number") for v in (NAN, INF, -INF, True, "3", None)),
    *((lambda v=v: SoftPAG(u=v), ConfigError, "u=.*0 to 1") for v in (-0.1, 1.1, NAN, INF, True, "0.5", None)),
    *((lambda v=v: PAG(start=v), ConfigError, "start=.*0 to 1") for v in (-0.1, 1.5, NAN, INF, False, "0")),
    *((lambda v=v: PAG(stop=v), ConfigError, "stop=.*0 to 1") for v in (-0.1, 1.5, NAN, True)),
    (lambda: PAG(start=0.7, stop=0.3), ConfigError, "start=0.7 lies after stop=0.3.*fractions"),
    *((lambda v=v: PAG(adaptive=v), ConfigError, "adaptive=.*0 to 1") for v in (-1.0, 2.0, NAN, INF, True)),
    (lambda: PAG(adaptive=-1.0, adaptive_form="timestep"), ConfigError, "adaptive=-1.0"),
    (lambda: PAG(adaptive=INF, adaptive_form="timestep"), ConfigError, "infinite.*finite"),
    (lambda: PAG(adaptive_form="cosine"), ConfigError, "cosine.*knob, timestep"),
    (lambda: PAG(combine="mul"), ConfigError, "mul.*auto, add, rescale_safe"),
    (lambda: PAG(scope="text"), ConfigError, "scope='text'.*all, image, image_block"),
    (lambda: SoftPAG(target="zero"), ConfigError, "zero.*identity, uniform, query_mean, argmax"),
    (lambda: SoftPAG(target="uniform", scope="image_block"), ConfigError, "image_block.*Use scope"),
    *((lambda v=v: PAG(every=v), ConfigError, "every=.*1 or more") for v in (0, -1, 1.5, True, None)),
    (lambda: SoftPAG(heads=[(0, -1)]), SiteError, "head -1"),
    (lambda: SoftPAG(heads=[(0, True)]), SiteError, "True"),
    (lambda: SoftPAG(heads=[(0, 1.0)]), SiteError, "head 1.0"),
    (lambda: SoftPAG(heads=[(0, 1, 2)]), SiteError, "pairs"),
    (lambda: SoftPAG(heads=[(1.5, 0)]), SiteError, "pairs"),
    (lambda: SoftPAG(heads=[(0, 1), (0, 1)]), SiteError, "twice"),
    (lambda: SoftPAG(heads="all"), SiteError, "pairs"),
]


@pytest.mark.parametrize("case", range(len(FIELDS)))
def test_fields(case: int) -> None:
    make, error, words = FIELDS[case]
    with pytest.raises(error, match=f"(?s){words}"):
        make()


# Attaching


ATTACH: list[tuple[str, Any, type[AttnctlError], str]] = [
    ("misspelt site", PAG(sites=MID.replace("attn1", "atn1")), SiteError, f"atn1.*Did you mean.*{re.escape(MID)}"),
    ("unknown glob", PAG(sites="*.attn9"), SiteError, r"attn9.*Kinds here"),
    ("unknown stage", PAG(sites="down.9"), SiteError, "down.9"),
    ("depth too large", PAG(sites=99), SiteError, "99 is out of range.*0 to"),
    ("depth too small", PAG(sites=-99), SiteError, "-99 is out of range"),
    ("range too long", PAG(sites=range(90)), SiteError, "depths 0 to"),
    ("empty range", PAG(sites=range(0)), SiteError, "range"),
    ("empty list", PAG(sites=[]), SiteError, "empty|nothing|at least one"),
    ("empty text", PAG(sites=""), SiteError, "''"),
    ("wrong type", PAG(sites=1.5), SiteError, "1.5"),
    ("bool", PAG(sites=True), SiteError, "True"),
    ("none in a list", PAG(sites=[None]), SiteError, "None"),
    ("cross only", PAG(sites="cross"), SiteError, "self.*only cross.*sites='self' selects what it acts on"),
    ("one cross site", PAG(sites=MID.replace("attn1", "attn2")), SiteError, "only cross"),
    ("kind that is not here", PAG(sites="joint"), SiteError, "joint.*Kinds here: cross, self"),
    ("head too large", SoftPAG(heads=[(MID, 4)]), SiteError, "head 4.*heads 0 to 3"),
    ("head of an unknown site", SoftPAG(heads=[("mid.attn", 0)]), SiteError, "mid.attn.*Did you mean"),
    ("head of many sites", SoftPAG(heads=[("*attn1", 0)]), SiteError, "full name"),
    ("head of cross attention", SoftPAG(heads=[(MID.replace("attn1", "attn2"), 0)]), SiteError, "cross"),
    ("no heads", SoftPAG(heads=[]), SiteError, "empty"),
    ("heads outside sites", SoftPAG(heads=[(MID, 0)], sites="down.0"), SiteError, "leaves out"),
    ("not a control", "PAG", ConfigError, "'PAG' is not a control"),
    ("a class", PAG, ConfigError, "is not a control.*PAG\\(scale"),
    ("good and bad", (PAG(sites="mid"), PAG(sites=99)), SiteError, "99"),
]


@pytest.mark.parametrize("case", ATTACH, ids=lambda c: c[0])
def test_attaching(sd: tuple[Any, dict[str, Any]], case: tuple[str, Any, type[AttnctlError], str]) -> None:
    pipe, _ = sd
    _, controls, error, words = case
    before = snapshot(pipe.unet, pipe.scheduler)
    for make in (attnctl.control, lambda pipe, *c: attnctl.attn_processors(pipe.unet, *c)):
        with pytest.raises(error, match=f"(?s){words}"):
            make(pipe, *(controls if isinstance(controls, tuple) else (controls,)))
        assert_clean(before, pipe.unet, pipe.scheduler)


def test_arguments_of_control(sd: tuple[Any, dict[str, Any]]) -> None:
    pipe, _ = sd
    before = snapshot(pipe.unet, pipe.scheduler)
    guidance = PAG(sites="mid")
    with pytest.raises(ConfigError, match="no control"):
        attnctl.control(pipe)
    with pytest.raises(BackendError, match=r"turbo.*auto.*sdpa"):
        attnctl.control(pipe, guidance, backend="turbo")
    with pytest.raises(ConfigError, match=r"diagonal.*uncond_first"):
        attnctl.control(pipe, guidance, layout="diagonal")  # type: ignore[arg-type]
    for nothing in (None, "sd", 3, object()):
        with pytest.raises(UnsupportedModelError, match="no `unet` or `transformer`"):
            attnctl.control(nothing, guidance)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        attnctl.control(nn.Linear(2, 2), guidance)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        attnctl.find_sites(pipe.vae.quant_conv)
    assert_clean(before, pipe.unet, pipe.scheduler)


def test_a_family_without_published_sites_lists_candidates() -> None:
    model, _ = zoo.build("flux")
    before = snapshot(model)
    with pytest.raises(SiteError, match=r"(?s)no publication.*transformer_blocks\.0\.attn.*find_sites"):
        attnctl.control(model, PAG())
    assert_clean(before, model)


def test_text_only_sites_are_refused() -> None:
    model, _ = zoo.build("hunyuanvideo")
    before = snapshot(model)
    for sites in ("text", "context_embedder*"):
        with pytest.raises(SiteError, match="only text"):
            attnctl.control(model, PAG(sites=sites))
    assert_clean(before, model)


def test_linear_attention_has_no_map() -> None:
    model, _ = zoo.build("sana")
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"linear attention.*identity or uniform"):
        attnctl.control(model, SoftPAG(sites="*attn1", target="argmax"))
    assert_clean(before, model)


# Order of calls


def test_handles_out_of_order(sd: tuple[Any, dict[str, Any]]) -> None:
    pipe, kwargs = sd
    plain = pipes.run(pipe, kwargs)
    before = snapshot(pipe.unet, pipe.scheduler)
    handle = attnctl.control(pipe, PAG(sites="mid"))
    for target in (pipe, pipe.unet):
        with pytest.raises(ConflictError, match=r"(?s)under control already.*handle_of"):
            attnctl.control(target, PAG(sites="mid"))
        with pytest.raises(ConflictError, match="under control already"):
            attnctl.attn_processors(pipe.unet, PAG(sites="mid"))
    assert attnctl.handle_of(pipe) is handle
    assert not torch.equal(pipes.run(pipe, kwargs), plain)
    handle.detach()
    handle.detach()
    assert_clean(before, pipe.unet, pipe.scheduler)
    handle.enabled = False
    with pytest.raises(ConflictError, match="detached"):
        handle.enabled = True
    assert not handle.enabled
    assert "detached" in handle.report()
    second = attnctl.control(pipe, PAG(sites="mid"))
    handle.detach()  # an old handle does not take off a newer one
    assert attnctl.handle_of(pipe) is second
    assert not torch.equal(pipes.run(pipe, kwargs), plain)
    second.detach()
    assert_clean(before, pipe.unet, pipe.scheduler)
    assert torch.equal(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("step", [(-1, 4), (4, 4), (0, 0), (3, 2), (True, 4), (0.5, 4), (0, 4.0), (math.nan, 4)])
def test_steps_of_a_hand_written_loop(step: tuple[Any, Any]) -> None:
    model, inputs = zoo.build("sd15")
    before = snapshot(model)
    handle = attnctl.control(model, PAG(sites="mid", start=0.5), layout="cond")
    with pytest.raises(ConfigError, match=r"set_step\(.*step"):
        handle.set_step(*step)
    with pytest.raises(ConfigError, match=r"set_step\(i, n\)"):
        zoo.call(model, inputs)
    handle.detach()
    assert_clean(before, model)


def test_a_bare_model_does_not_tell_its_rows_or_timestep() -> None:
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, PAG(sites="mid")), pytest.warns(UserWarning, match='layout="uncond_first"'):
        zoo.call(model, inputs)
    with attnctl.control(model, PAG(sites="mid", adaptive=0.5), layout="cond") as handle:
        handle.set_step(0, 4)
        with pytest.raises(ConfigError, match="timestep=t"):
            zoo.call(model, inputs)
    with (
        attnctl.control(model, PAG(sites="mid"), layout="uncond_first"),
        pytest.raises(UnsupportedModelError, match=r"even number of rows.*3"),
    ):
        zoo.call(model, zoo.build("sd15", batch=3)[1])


# Plans


GOOD = attnctl.HeadSet.from_pairs([(MID, 1)])


def _pickle(path: Path) -> Path:
    file = path / "heads.json"
    file.write_bytes(pickle.dumps(GOOD))
    return file


def _write(text: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        file = path / "heads.json"
        file.write_text(text)
        return file

    return write


def _named(name: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / name).write_text(json.dumps(GOOD.to_dict()))
        return path / name

    return write


def _with(**changes: Any) -> Callable[[Path], Path]:
    return _write(json.dumps(GOOD.to_dict() | changes))


PLANS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("pickle under a JSON name", _pickle, "not JSON"),
    *((f"named {end}", _named(f"heads{end}"), "pickle.*JSON") for end in (".pt", ".pkl", ".bin", ".ckpt", ".pth")),
    ("truncated", _write(json.dumps(GOOD.to_dict())[:-20]), "not JSON"),
    ("empty", _write(""), "not JSON"),
    ("a list", _write("[1, 2]"), "not a head set"),
    ("a number", _write("NaN"), "not a head set"),
    ("deep", _write("[" * 100_000), "not JSON"),
    ("huge", _write(" " * (5 << 20)), "bytes"),
    ("another kind", _with(kind="blocks"), "kind 'heads'"),
    ("newer schema", _with(schema=99), "schema 99.*schema 1"),
    ("schema as text", _with(schema="1"), "schema '1'"),
    ("schema as bool", _with(schema=True), "schema True"),
    ("unknown field", _with(modle="sd"), "modle.*Did you mean 'model'"),
    ("pairs missing", _with(pairs=None), "pairs"),
    ("pair too long", _with(pairs=[[1, 2, 3]]), "pairs"),
    ("negative head", _with(pairs=[[1, -2]]), "head -2"),
    ("bool head", _with(pairs=[[1, True]]), "True"),
    ("pair twice", _with(pairs=[[1, 2], [1, 2]]), "twice"),
    ("layers as text", _with(layers="many"), "layers"),
    ("u as text", _with(u="0.5"), "u='0.5'"),
    ("absent", lambda path: path / "heads.json", "does not exist"),
    ("empty folder", lambda path: path, "does not exist"),
]


@pytest.mark.parametrize("case", PLANS, ids=lambda c: c[0])
def test_damaged_plans(tmp_path: Path, case: tuple[str, Callable[[Path], Path], str]) -> None:
    _, make, words = case
    with pytest.raises(PlanError, match=f"(?s){words}"):
        attnctl.HeadSet.from_pretrained(make(tmp_path))


def test_a_plan_of_another_model_is_refused(sd: tuple[Any, dict[str, Any]]) -> None:
    pipe, _ = sd
    before = snapshot(pipe.unet, pipe.scheduler)
    plan = attnctl.HeadSet.from_pairs([(1, 2)], layers=24, model="stabilityai/stable-diffusion-3")
    with pytest.raises(PlanError, match=r"(?s)24.*(depths|layers)"):
        attnctl.control(pipe, SoftPAG(heads=plan))
    assert_clean(before, pipe.unet, pipe.scheduler)
