"""Every pair of controls on tiny pipelines: both act, in either order, and leave nothing; or they are refused."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, snapshot

import attnctl
from attnctl.core.conflicts import conflict_between
from attnctl.errors import AttnctlError, ConflictError
from attnctl.processors import APG, TPG, Capture
from attnctl.processors.combining.combiner import Combining

DOCS = Path(__file__).parents[1] / "docs/reference/pairs.md"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("host", pairs.HOSTS)
def test_every_pair(host: str) -> None:
    made = pairs.HOSTS[host]()
    made.plain(())  # what a pipeline's own first run leaves on it
    before = snapshot(pipes.denoiser(made.pipe), made.pipe.scheduler)
    for names in pairs.PAIRS:
        controls = pairs.pair(made, names)
        if controls is None:
            continue
        if pairs.meet(made.pipe, controls):
            _refused(made, controls)
        else:
            _together(made, names, controls)
        assert_clean(before, pipes.denoiser(made.pipe), made.pipe.scheduler)
    assert torch.equal(pairs.run(made, ()), made.plain(()))


def _refused(made: pairs.Host, controls: tuple[Any, Any]) -> None:
    a, b = controls
    rule = conflict_between(type(a), type(b))
    assert rule is not None
    for order in ((a, b), (b, a)):
        with pytest.raises(ConflictError, match="cannot act together") as error:
            attnctl.control(made.pipe, *order)
        assert rule.reason in str(error.value)
        assert attnctl.handle_of(made.pipe) is None
    early, late = (dataclasses.replace(c, **w) for c, w in ((a, {"stop": 0.5}), (b, {"start": 0.5, "stop": 1.0})))
    attnctl.control(made.pipe, early, late).detach()  # one after the other


def _together(made: pairs.Host, names: tuple[str, str], controls: tuple[Any, Any]) -> None:
    both = made.run(*controls)
    # Rules do what APG does in the same place: one of them is turned round for all.
    ruled = any(isinstance(c, Combining) and not isinstance(c, APG) for c in controls)
    turned = both if ruled else made.run(*controls[::-1])
    assert both.isfinite().all(), names
    if pairs.commute(type(controls[0]), type(controls[1])):
        assert torch.equal(both, turned), names
    for one, other in (controls, controls[::-1]):  # neither is undone by the other
        looks = isinstance(other, Capture)
        assert torch.equal(both, made.alone(one, other)) == looks, names


def test_refused_pairs_meet_only_where_the_rule_says() -> None:
    """Rules of a site or a block leave alone what shares none."""
    made = pairs.unet()
    first = made.first
    apart = (dataclasses.replace(first["PARO"], sites="up.1"), first["AgentAttention"])
    with pytest.raises(ConflictError, match=r"at up_blocks\.1"):
        attnctl.control(made.pipe, *apart)
    assert any(rule.where == "block" for rule in TPG.conflicts)
    apart = (dataclasses.replace(first["TPG"], sites="mid"), first["PARO"])
    assert made.run(*apart).isfinite().all()


def test_what_no_host_takes_is_refused_by_the_methods_themselves() -> None:
    lonely = [names for names in pairs.PAIRS if not pairs.hosts_of(names)]
    assert lonely
    everything = {n: c for make in pairs.HOSTS.values() for n, c in make().first.items()}
    for names, make in itertools.product(lonely, pairs.HOSTS.values()):
        host = make()
        with pytest.raises(AttnctlError):
            attnctl.control(host.pipe, *(host.first.get(n, everything[n]) for n in names))
        assert attnctl.handle_of(host.pipe) is None


def test_every_method_is_paired() -> None:
    assert {n for make in pairs.HOSTS.values() for n in make().first} == pairs.METHODS.keys()


def test_every_conflict_names_classes_that_there_are() -> None:
    bases = {base.__name__ for cls in pairs.METHODS.values() for base in cls.__mro__}
    declared = {name for cls in pairs.METHODS.values() for conflict in cls.conflicts for name in conflict.names}
    assert declared <= bases


def test_the_table_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == pairs.markdown(), "run: python tests/pairs.py > docs/reference/pairs.md"
