"""Random sequences, files, words and selectors: a right result or one clear error, and never a trace.

The cases are the same in every run, and few. `pytest tests/test_properties.py --hypothesis-profile=night` tries twenty
times as many, at random.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sequences import ACTIONS, HOSTS, attach, disturb, plain_results
from transformers import CLIPTokenizer

import attnctl
from attnctl.core.hosts.words import find_words
from attnctl.core.sites import KINDS, select
from attnctl.data.record import Record, RecordError, read, save_image
from attnctl.data.specs import control_from_dict, control_to_dict, methods, parse_control
from attnctl.errors import AttnctlError, ConfigError, PlanError, SiteError
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.processors import PAG, SoftPAG

MORE = settings.default.max_examples // 100  # 1, or 20 at night


def cases(n: int) -> Callable[[Any], Any]:
    """Try n cases, or twenty times as many at night."""
    return settings(
        max_examples=n * MORE, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )


def _clear(error: AttnctlError) -> None:
    """An error says something, and not more than anyone would read."""
    assert 15 < len(str(error)) < 20_000


# Sequences


@cases(14)
@given(host=st.sampled_from(HOSTS), actions=st.lists(ACTIONS, min_size=2, max_size=6))
@torch.no_grad()
def test_any_sequence_ends_clean(host: str, actions: list[tuple[str, Any]]) -> None:
    made, known = pairs.HOSTS[host](), plain_results(host)
    model = pipes.denoiser(made.pipe)
    before = snapshot(model, made.pipe.scheduler)
    names: tuple[str, ...] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for action, value in actions:
            handle = attnctl.handle_of(made.pipe)
            if action == "attach":
                names = attach(made, host, value, names, handle)
            elif action == "run":
                acts = names if handle is not None and handle.enabled else ()
                result = pairs.run(made, (), editing=False)
                key = tuple(sorted(acts))  # the order in which they were given does not matter
                assert torch.equal(result, known.setdefault(key, result)), actions
            elif action == "copy":
                assert attnctl.handle_of(copy.deepcopy(model)) is None
            elif action == "forget":
                del handle
                gc.collect()  # controls stay although nobody holds the handle
            elif handle is not None:
                disturb(made, action, value, handle)
            if attnctl.handle_of(made.pipe) is None:
                names = ()
    left = attnctl.handle_of(made.pipe)
    if left is not None:
        left.detach()
    assert_clean(before, model, made.pipe.scheduler)
    assert torch.equal(pairs.run(made, (), editing=False), known[()])


# Files that somebody else has written


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
HEADS = attnctl.HeadSet(
    pairs=(("mid_block.attentions.0.transformer_blocks.0.attn1", 1), (3, 0)), model="a/b", layers=8, u=0.5, scale=2.0
)


def _blocks() -> ModelPlan:
    keep = torch.ones(2, 2, 3, 3, dtype=torch.bool).tril()
    plan = BlockPlan.from_mask(keep, 8, ["FHW", "HWF"], 7, grid=(1, 4, 6), about={"density": 0.5})
    return ModelPlan(plans={"blocks.0.attn": plan, "blocks.1.attn": plan}, model="a/b", about={"prompts": ["x"]})


RECORD = Record(
    prompts=("a cat",),
    seeds=(7,),
    sha256=("0" * 64,),
    shows=(0,),
    steps=4,
    width=64,
    height=48,
    model="shapes:text2image",
    pipeline="StableDiffusionPipeline",
    scheduler={"_class_name": "DDIMScheduler", "x": [1, 2.5]},
    guidance=3.0,
    controls=(control_to_dict(PAG(sites="mid")),),
    sites=(("mid_block.attn1",),),
    versions={"torch": "2.10"},
)


@functools.cache
def _files() -> dict[str, dict[str, bytes]]:
    """Write one of each kind of file; name and content."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, save in (
            ("heads", lambda p: HEADS.save_pretrained(p)),
            ("blocks", lambda p: _blocks().save_pretrained(p)),
            ("record", lambda p: save_image(Image.new("RGB", (8, 6)), p / "x.png", RECORD)),
        ):
            (Path(folder) / kind).mkdir()
            save(Path(folder) / kind)
        return {
            kind.name: {f.name: f.read_bytes() for f in sorted(kind.iterdir()) if f.name != "README.md"}
            for kind in Path(folder).iterdir()
        }


def _read(kind: str, folder: Path) -> None:
    """Read a folder as somebody would who believes what it says; refuse it with one clear error, or use it."""
    errors = {"heads": PlanError, "blocks": PlanError, "record": RecordError}[kind]
    for name in ("x.png", "x.json") if kind == "record" else ("",):
        try:
            if kind == "heads":
                found = attnctl.HeadSet.from_pretrained(folder)
                assert attnctl.HeadSet.from_dict(found.to_dict()) == found
                SoftPAG(heads=found)
            elif kind == "blocks":
                plans = ModelPlan.from_pretrained(folder)
                assert 0 < plans.density <= 1
            else:
                for record in read(folder / name):
                    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
                    for control in record.controls:
                        _control(control)
        except errors as error:
            _clear(error)


def _control(data: Any) -> None:
    try:
        made = control_from_dict(data)
    except AttnctlError as error:
        _clear(error)
    else:
        assert control_from_dict(json.loads(json.dumps(control_to_dict(made)))) == made


def _with_files(kind: str, change: Callable[[str, bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in _files()[kind].items():
            (Path(name) / file).write_bytes(change(file, content))
        _read(kind, Path(name))


KIND = st.sampled_from(["heads", "blocks", "record"])


@cases(60)
@given(kind=KIND, at=st.floats(0, 1), which=st.integers(0, 3))
def test_truncated_files(kind: str, at: float, which: int) -> None:
    files = list(_files()[kind])
    cut = files[which % len(files)]
    _with_files(kind, lambda name, content: content[: int(at * len(content))] if name == cut else content)


@cases(150)
@given(
    kind=KIND, flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4)
)
def test_files_with_flipped_bits(kind: str, flips: list[tuple[float, int]]) -> None:
    def flipped(name: str, content: bytes) -> bytes:
        data = bytearray(content)
        for where, bit in flips:
            data[int(where * len(data))] ^= 1 << bit
        return bytes(data)

    _with_files(kind, flipped)


@cases(200)
@given(kind=KIND, where=st.integers(0, 60), value=JSON, key=st.none() | st.text(max_size=6))
@example(kind="record", where=12, value=10**400, key=None)
@example(kind="heads", where=6, value=math.nan, key=None)
def test_files_with_other_values(kind: str, where: int, value: Any, key: str | None) -> None:
    def changed(name: str, content: bytes) -> bytes:
        if not name.endswith(".json"):
            return content
        data = json.loads(content)
        places = list(_places(data))
        holder, at = places[where % len(places)]
        if key is not None and isinstance(holder, dict):
            holder[key] = value
        else:
            holder[at] = value
        return json.dumps(data).encode()

    _with_files(kind, changed)


def _places(data: Any) -> Any:
    """List every place of a JSON value that can be written to."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


@pytest.mark.parametrize("kind", ["heads", "blocks", "record"])
@pytest.mark.parametrize("text", ["9" * 5000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "-0", "1e999"])
def test_files_with_hostile_numbers_and_depths(kind: str, text: str) -> None:
    def changed(name: str, content: bytes) -> bytes:
        if not name.endswith(".json"):
            return content
        data = json.loads(content)
        data["about" if kind == "blocks" else "model" if kind == "heads" else "options"] = "HERE"
        return json.dumps(data).replace('"HERE"', text).encode()

    _with_files(kind, changed)


def test_a_head_set_of_many_pairs_is_read_in_no_time(tmp_path: Path) -> None:
    data = HEADS.to_dict() | {"pairs": [[i, 0] for i in range(50_000)]}
    (tmp_path / "attnctl_heads.json").write_text(json.dumps(data))
    assert len(attnctl.HeadSet.from_pretrained(tmp_path).pairs) == 50_000


# Controls as data


@cases(150)
@given(method=st.sampled_from(sorted(methods())), pick=st.integers(0, 30), value=JSON)
def test_any_value_of_any_field(method: str, pick: int, value: Any) -> None:
    fields = [f.name for f in dataclasses.fields(methods()[method]) if f.init and f.name not in ("plan", "inversion")]
    _control({"method": method, fields[pick % len(fields)]: value})


@cases(150)
@given(text=st.text(max_size=40) | st.text("PAG(scale=3.0, sites'*mid1-[]){}:\"\\", max_size=30))
def test_any_text_as_a_control(text: str) -> None:
    try:
        control = parse_control(text)
    except AttnctlError as error:
        _clear(error)
    else:
        assert control_from_dict(control_to_dict(control)) == control


# Words


@functools.cache
def _tokenizer_pipe() -> Any:
    return pipes.build("sd")[0]


TEXT = st.text(max_size=60) | st.text("aäb ß'-İıﬁ熊🐻é\u0301\u200d,.#1", max_size=40)


@cases(120)
@given(prompt=TEXT, pick=st.floats(0, 1, exclude_max=True), word=st.text(max_size=8))
def test_words_of_any_prompt(prompt: str, pick: float, word: str) -> None:
    pipe = _tokenizer_pipe()
    parts = prompt.split()
    for wanted in ([parts[int(pick * len(parts))]] if parts else []) + [word]:
        try:
            (found,) = find_words(pipe, prompt, [wanted])
        except ConfigError as error:
            _clear(error)
            continue
        assert found.positions == tuple(sorted(set(found.positions)))
        assert 0 <= found.positions[0] <= found.positions[-1] < pipe.tokenizer.model_max_length
        assert len(found.tokens) == len(found.positions)


@cases(60)
@given(words=st.lists(st.sampled_from(["bear", "Dog", "water", "a", "2"]), min_size=1, max_size=12))
def test_every_word_of_a_plain_prompt_is_found_at_its_own_tokens(words: list[str]) -> None:
    pipe, prompt = _tokenizer_pipe(), " ".join(words)
    tokenizer: CLIPTokenizer = pipe.tokenizer
    ids = tokenizer(prompt)["input_ids"]
    found = find_words(pipe, prompt, list(dict.fromkeys(w.lower() for w in words)))
    for concept in found:
        spelled = "".join(tokenizer.convert_ids_to_tokens(ids[p]) for p in concept.positions)
        count = [w.lower() for w in words].count(concept.word)
        assert spelled == (concept.word + "</w>") * count
    places = sorted(p for concept in found for p in concept.positions)
    assert places == list(range(1, len(ids) - 1))


# Selectors


@functools.cache
def _sites(name: str) -> tuple[attnctl.Site, ...]:
    return attnctl.find_sites(zoo.build(name)[0])


PIECES = [
    "down",
    "up",
    "mid",
    "blocks",
    "attentions",
    "transformer_blocks",
    "attn1",
    "attn2",
    "single",
    "motion_modules",
]
PART = st.one_of(
    st.integers(-30, 30),
    st.sampled_from([*KINDS, "mid", "down.0", "up.1", "*attn1", "down_blocks.1", 10**30, "", " "]),
    st.builds(range, st.integers(-3, 12), st.integers(-3, 40), st.integers(1, 4)),
    st.builds(slice, st.none() | st.integers(-40, 40), st.none() | st.integers(-40, 40)),
    st.lists(st.sampled_from([*PIECES, "0", "1", "*", "?", "[0-2]", "[!x]", "["]), max_size=7).map(".".join),
    st.text("*?[]!a.d0-", max_size=30),
    st.none() | st.booleans() | st.floats() | st.text(max_size=12),
)


@cases(300)
@given(name=st.sampled_from(["sd15", "animatediff", "sd35", "flux"]), selector=PART | st.lists(PART, max_size=4))
@example(name="sd15", selector="*a" * 60)
def test_any_selector(name: str, selector: Any) -> None:
    sites = _sites(name)
    try:
        found = select(sites, selector)
    except SiteError as error:
        _clear(error)
        return
    assert found
    assert found == tuple(s for s in sites if s in found)  # each once, as they run
    if isinstance(selector, list):
        assert {s.name for s in found} == {s.name for part in selector for s in select(sites, part)}
    elif isinstance(selector, int) and not isinstance(selector, bool):
        assert {s.depth for s in found} == {selector % (max(s.depth for s in sites) + 1)}
    elif selector in KINDS:
        assert {s.kind for s in found} == {selector}
