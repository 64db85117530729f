"""Nothing is left behind, whatever goes wrong in a pipeline under control."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from naive_guidance import build, roots

import attnctl
from attnctl.errors import AttnctlError

pytestmark = pytest.mark.usefixtures("no_grad")


class Boom(RuntimeError):
    """What a test raises."""


@pytest.mark.parametrize("recipe", ["sd", "sd3", "flux", "wan"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_exception_at_any_step(recipe: str, error: type[BaseException]) -> None:
    pipe, kwargs, guidance = build(recipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    for k in range(3):

        def stop(pipe: Any, step: int, time: Any, values: dict[str, Any], k: int = k) -> dict[str, Any]:
            if step == k:
                raise error
            return values

        with pytest.raises(error), attnctl.control(pipe, guidance):
            pipes.run(pipe, kwargs, callback_on_step_end=stop)
        assert_clean(before, *roots(pipe))
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        handle = attnctl.control(pipe, guidance)
        with pytest.raises(error):
            pipes.run(pipe, kwargs, callback_on_step_end=stop)
        assert torch.equal(pipes.run(pipe, kwargs), guided)  # the next run starts afresh
        handle.detach()
        assert_clean(before, *roots(pipe))


@pytest.mark.parametrize("where", ["base", "perturbed"])
@pytest.mark.parametrize("recipe", ["sd", "flux", "wan"])
def test_an_exception_inside_the_denoiser(recipe: str, where: str) -> None:
    pipe, kwargs, guidance = build(recipe)
    model = pipes.denoiser(pipe)
    plain = pipes.run(pipe, kwargs)
    before = snapshot(*roots(pipe))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
    handle = attnctl.control(pipe, guidance)
    last = attnctl.find_sites(model)[-1].module
    for k in range(3):
        calls = 0

        def fail(*_: Any, k: int = k, handle: attnctl.Handle = handle) -> None:
            nonlocal calls
            if (handle._watched[0].state.phase != "base") == (where == "perturbed"):
                calls += 1
                if calls == k + 1:
                    raise Boom

        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(Boom):
            pipes.run(pipe, kwargs)
        hook.remove()
        assert torch.equal(pipes.run(pipe, kwargs), guided)
        handle.detach()
        assert_clean(before, *roots(pipe))
        assert torch.equal(pipes.run(pipe, kwargs), plain)
        handle = attnctl.control(pipe, guidance)
    handle.detach()


def test_a_lost_handle_and_a_lost_pipeline() -> None:
    pipe, kwargs, guidance = build("sd", torch.float32)
    plain = pipes.run(pipe, kwargs)
    attnctl.control(pipe, guidance)  # the handle is not kept
    assert not torch.equal(pipes.run(pipe, kwargs), plain)
    found = attnctl.handle_of(pipe)
    assert found is not None
    assert attnctl.handle_of(pipe.unet) is found
    found.detach()
    assert attnctl.handle_of(pipe) is None
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    handle = attnctl.control(pipe, guidance)
    pipes.run(pipe, kwargs)
    dead = [weakref.ref(x) for x in (pipe, pipe.unet, pipe.scheduler, handle)]
    del pipe, handle, found
    gc.collect()
    assert [ref() for ref in dead] == [None] * 4


def test_saved_under_control_is_saved_clean(tmp_path: Path) -> None:
    pipe, kwargs, guidance = build("sd", torch.float32)
    plain = pipes.run(pipe, kwargs)
    pipe.save_pretrained(tmp_path / "plain")
    with attnctl.control(pipe, guidance):
        pipes.run(pipe, kwargs)
        pipe.save_pretrained(tmp_path / "controlled")
    for file in sorted((tmp_path / "plain").rglob("*")):
        if file.is_file():
            other = tmp_path / "controlled" / file.relative_to(tmp_path / "plain")
            if file.suffix == ".json":
                first, second = json.loads(file.read_text()), json.loads(other.read_text())
                assert first == second, file
            else:
                assert file.read_bytes() == other.read_bytes(), file
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "controlled", safety_checker=None)
    assert torch.equal(pipes.run(pipes.quiet(again), kwargs), plain)


def test_a_copy_of_a_controlled_pipeline_is_plain() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
        twin = copy.deepcopy(pipe.unet)
        inputs = zoo.build("sd15", dtype=torch.float64)[1]
        assert attnctl.handle_of(twin) is None
        twin(**inputs)
        assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert torch.equal(pipes.run(pipe, kwargs), plain)
    assert torch.equal(zoo.call(twin, inputs), zoo.call(pipe.unet, inputs))


def test_pipelines_that_share_components() -> None:
    pipe, kwargs, guidance = build("sd")
    plain = pipes.run(pipe, kwargs)
    other = pipes.quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe, torch_dtype=torch.float64))
    with attnctl.control(pipe, guidance):
        guided = pipes.run(pipe, kwargs)
        assert torch.equal(pipes.run(other, kwargs), guided)
        with pytest.raises(AttnctlError, match="under control already"):
            attnctl.control(other, guidance)
        assert torch.equal(pipes.run(pipe, kwargs), guided)
    assert torch.equal(pipes.run(other, kwargs), plain)
