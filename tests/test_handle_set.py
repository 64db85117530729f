"""A live handle: `handle.set` replaces fields of a control between runs, checked as at attaching."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, snapshot

import attnctl
from attnctl.errors import AttnctlError, ConfigError, ConflictError, SiteError
from attnctl.processors import PAG, PARO, SEG, Capture, EnhanceAVideo


@pytest.fixture(scope="module")
def sd() -> tuple[Any, dict[str, Any]]:
    pipe, kwargs = pipes.build("sd")
    return pipe, kwargs | {"num_inference_steps": 2}


def test_equals_a_fresh_attachment(sd: tuple[Any, dict[str, Any]]) -> None:
    pipe, kwargs = sd
    plain, before = pipes.run(pipe, kwargs), snapshot(pipe.unet, pipe.scheduler)
    changes: list[dict[str, Any]] = [{"scale": 2.0}, {"scale": 2.0, "stop": 0.5}, {"sites": "up.1"}, {"scale": 0.0}]
    first, words = PAG(sites="mid"), Capture(words=(1,))
    with attnctl.control(pipe, first, words) as handle:
        pipes.run(pipe, kwargs)
        control: Any = 0
        for change in changes:
            maps = handle.result(words)
            control = handle.set(control, **change)
            assert handle.controls == (control, words)
            assert torch.equal(
                next(iter(handle.result(words).layers.values())), next(iter(maps.layers.values()))
            )  # what another control has recorded stays
            now = pipes.run(pipe, kwargs)
            with pytest.raises(ConfigError, match=r"PAG\(sites=.*is none of the attached controls"):
                handle.result(first)
            handle.detach()
            with attnctl.control(pipe, control):
                assert torch.equal(pipes.run(pipe, kwargs), now)
            handle = attnctl.control(pipe, control, words)
            pipes.run(pipe, kwargs)
        assert torch.equal(now, plain)  # scale=0
        assert "scale=0.0" in handle.report()
    handle.detach()
    assert_clean(before, pipe.unet, pipe.scheduler)


BAD: list[tuple[Any, dict[str, Any], type[AttnctlError], str]] = [
    (0, {"scael": 2.0}, ConfigError, "no field 'scael'.*Did you mean 'scale'"),
    (0, {"scale": "much"}, ConfigError, "scale='much'"),
    (0, {"start": 0.9, "stop": 0.1}, ConfigError, "lies after stop"),
    (0, {"sites": "nowhere"}, SiteError, "nowhere"),
    (0, {"sites": "cross"}, SiteError, "cross"),
    (2, {"scale": 2.0}, ConfigError, r"2 is none of the attached controls \(0: PAG"),
    (True, {"scale": 2.0}, ConfigError, "True is none"),
    (SEG(), {"scale": 2.0}, ConfigError, "none of the attached"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: str(c[1]))
def test_what_cannot_be_changes_nothing(sd: tuple[Any, dict[str, Any]], case: Any) -> None:
    pipe, _ = sd
    control, fields, error, words = case
    with attnctl.control(pipe, PAG(sites="mid"), SEG(sites="mid")) as handle:
        attached = handle.controls, snapshot(pipe.unet, pipe.scheduler)
        with pytest.raises(error, match=f"(?s){words}"):
            handle.set(control, **fields)
        assert handle.controls == attached[0]
        after = snapshot(pipe.unet, pipe.scheduler)
        assert {name for name in after if after[name] is not attached[1][name]} == set()


def test_conflicts_are_checked_as_at_attaching() -> None:
    from pairs import block_plan

    model, _ = zoo.build("wan")
    tokens = 3 * 4 * 6
    first, second = (PARO(block_plan(2, tokens), sites=depth) for depth in (0, 2))
    handle = attnctl.control(model, first, second)
    with pytest.raises(ConflictError, match="PARO and PARO cannot act together"):
        handle.set(second, sites=0)
    assert handle.set(second, sites=4).sites == 4
    handle.detach()


def test_not_during_a_run_and_not_when_detached(sd: tuple[Any, dict[str, Any]]) -> None:
    pipe, kwargs = sd
    handle = attnctl.control(pipe, PAG(sites="mid"))

    def change(pipe: Any, step: int, time: Any, values: Any) -> Any:
        handle.set(0, scale=1.0)
        return values

    with pytest.raises(ConflictError, match="run of the model is under way"):
        pipes.run(pipe, kwargs, callback_on_step_end=change)
    assert handle.set(0, scale=1.0).scale == 1.0  # the run broke off
    handle.detach()
    with pytest.raises(ConflictError, match="detached"):
        handle.set(0, scale=2.0)


def test_a_hand_written_loop_sets_between_its_runs() -> None:
    model, inputs = zoo.build("wan")
    control = EnhanceAVideo(weight=1.0, stop=0.5)
    with torch.no_grad(), attnctl.control(model, control) as handle:
        for i in range(2):
            handle.set_step(i, 2)
            if i:
                with pytest.raises(ConflictError, match="under way"):
                    handle.set(control, weight=2.0)
            zoo.call(model, inputs)
        stronger = handle.set(control, weight=4.0)
        handle.set_step(0, 2)
        seen = zoo.call(model, inputs)
        handle.detach()
        with attnctl.control(model, stronger) as fresh:
            fresh.set_step(0, 2)
            assert torch.equal(zoo.call(model, inputs), seen)


def test_a_backbone_sets_its_capture() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=2, num_classes=3
    ).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), attnctl.control(model, Capture(words=("class",))) as handle:
        model(x)
        assert handle.set(0, words=("mean",)).words == ("mean",)
        model(x)
        assert set(handle.maps.words) == {"mean"}
        with pytest.raises(ConfigError, match="no token"):
            handle.set(0, words=("mouth",))
        assert handle.maps.words == ("mean",)
