"""TPG against a block whose tokens are permuted by hand, on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import run

import attnctl
from attnctl.errors import ConfigError
from attnctl.processors import TPG


def test_tpg_permutes_the_tokens_of_a_block() -> None:
    model, inputs = zoo.build("pixart")
    site = "transformer_blocks.2.attn1"
    guided = run(model, inputs, TPG(scale=1.0, sites=site, seed=5))
    block = model.get_submodule("transformer_blocks.2")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))

    def shuffle(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0][:, order], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"][:, order]}

    with torch.no_grad():
        plain = zoo.call(model, inputs)
        handle = block.register_forward_pre_hook(shuffle, with_kwargs=True)
        shuffled = zoo.call(model, inputs)
        handle.remove()
    expected = plain + (plain - shuffled)
    assert (guided - expected).norm() <= 1e-5 * expected.norm()


def test_tpg_leaves_the_global_generator_alone_and_repeats() -> None:
    model, inputs = zoo.build("sd15")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = run(model, inputs, TPG(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run(model, inputs, TPG(seed=1)))
    assert not torch.equal(first, run(model, inputs, TPG(seed=2)))
    pipe, kwargs = pipes.build("sd")
    with torch.no_grad(), attnctl.control(pipe, TPG()):
        assert torch.equal(pipes.run(pipe, kwargs), pipes.run(pipe, kwargs))  # a run does not depend on the last one


@pytest.mark.parametrize(
    "make",
    [
        lambda: TPG(seed=-1),
        lambda: TPG(seed=1.5),
        lambda: TPG(seed=10**30),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
