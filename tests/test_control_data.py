"""Controls as data: exact round trips through JSON, the short form of a command, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from attnctl import HeadSet
from attnctl.data.specs import control_from_dict, control_to_dict, methods, parse_control
from attnctl.errors import AttnctlError, ConfigError
from attnctl.processors import PAG, SoftPAG


@pytest.mark.parametrize(
    "control",
    [
        PAG(),
        PAG(scale=0.1 + 0.2, sites="mid", start=0.25, stop=0.75, adaptive=0.5, every=3),
        PAG(sites=("mid", 3, range(1, 9, 2), slice(None, 4))),
        SoftPAG(u=0.25, heads=(("mid_block.attn1", 3), (11, 15)), scope="all"),
        SoftPAG(heads=HeadSet.from_pairs([(1, 2), ("a.b", 0)], model="some/model", u=0.25)),
    ],
)
def test_a_control_survives_json_exactly(control: Any) -> None:
    data = control_to_dict(control)
    again = control_from_dict(json.loads(json.dumps(data)))
    assert again == control
    assert type(again) is type(control)
    assert data["method"] == type(control).__name__
    assert set(data) == {"method", *(f.name for f in dataclasses.fields(control))}


def test_infinity_survives_json() -> None:
    from attnctl.processors import SEG

    for sigma in (float("inf"), 3.0):
        data = json.dumps(control_to_dict(SEG(sigma=sigma)), allow_nan=False)
        assert control_from_dict(json.loads(data)) == SEG(sigma=sigma)
    assert parse_control("SEG(sigma=inf)") == SEG(sigma=float("inf"))


def test_every_method_survives_json() -> None:
    assert {"PAG", "SoftPAG"} <= set(methods())
    assert not {"Control", "Guidance"} & set(methods())
    for name, cls in methods().items():
        try:
            control = cls()
        except (TypeError, ConfigError):  # a method with required fields has its own test
            continue
        assert control_from_dict(json.loads(json.dumps(control_to_dict(control)))) == control, name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "PAGG"}, "Unknown method 'PAGG'; known: .*Did you mean 'PAG'"),
        ({"method": "PAG", "scal": 3}, "no field 'scal'.*Did you mean 'scale'"),
        ({"method": "PAG", "scale": "big"}, "scale"),
        ({"method": "PAG", "start": 2}, "start"),
        ({"scale": 3}, "method"),
        ({"method": 3}, "method"),
        ([], "method"),
        ({"method": "SoftPAG", "heads": {"type": "Path", "x": 1}}, "unknown type 'Path'"),
        ({"method": "SoftPAG", "heads": {"type": ["HeadSet"]}}, r"unknown type \['HeadSet'\]"),
        ({"method": "PAG", "sites": [{"type": {"type": "slice"}}]}, r"unknown type \{'type': 'slice'\}"),
        ({"method": "PAG", "sites": {"type": "range", "start": 0, "stop": 3, "step": 0}}, "not 0"),
        ({"method": "PAG", "sites": {"type": "range", "start": 0}}, "start, stop and step"),
    ],
)
def test_bad_control_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(AttnctlError, match=message):
        control_from_dict(data)


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("PAG", PAG()),
        (" PAG() ", PAG()),
        ('PAG(scale=2, sites="mid")', PAG(scale=2, sites="mid")),
        ("PAG(sites=['mid', 'up.0'])", PAG(sites=("mid", "up.0"))),
        ("PAG(sites=range(4, 8), stop=.5)", PAG(sites=range(4, 8), stop=0.5)),
        ("SoftPAG(heads=[('mid_block.attn1', 3), (1, 2)], u=1)", SoftPAG(heads=(("mid_block.attn1", 3), (1, 2)), u=1)),
    ],
)
def test_the_short_form_is_read(text: str, control: Any) -> None:
    assert parse_control(text) == control


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "PAG(", "PAG(3)", "PAG(**{'scale': 3})", "PAG(*[1])", "PAG(scale=3)(4)", "os.system('x')", "PAG; PAG",
        "PAG(scale=__import__('os').getpid())", "PAG(scale=open('x'))", "PAG(scale=[x for x in (1,)])", "lambda: PAG",
        "PAG(scale=3, scale=4)", "PAG(scale=1+2j)", "PAG(sites=range(1, k=2))", "PAG(sites=range())", "Nope()",
        "PAG(scal=3)", "PAG(scale='x')", "Control()", "PAG\0", "(" * 5000, "PAG(sites=" + "(" * 5000, "P" * 200_000,
        "getattr(PAG, 'mro')", "PAG.__class__", "attnctl.processors.PAG()", "PAG(scale=f'{3}')",
    ],
)  # fmt: skip
def test_nothing_else_is_read_as_a_control(text: str) -> None:
    with pytest.raises(AttnctlError):
        parse_control(text)


def test_what_json_cannot_hold_is_refused() -> None:
    for value in (object(), float("nan"), {1: 2}, {"type": "x"}, b"x"):
        with pytest.raises(ConfigError, match=r"PAG\.sites"):
            control_to_dict(PAG(sites=(value,)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a control"):
        control_to_dict(PAG)
    with pytest.raises(ConfigError, match="not a control"):
        control_to_dict("PAG")
