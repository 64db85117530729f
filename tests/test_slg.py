"""SLG against a block that returns its input, on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from contract import middle, run

import attnctl
from attnctl.errors import ConfigError, NeverApplied
from attnctl.processors import SLG


@pytest.mark.parametrize("name", ["sd15", "sd3", "sd35", "flux", "pixart", "wan", "ltx", "qwen", "cogvideox"])
def test_slg_equals_a_block_that_returns_its_input(name: str) -> None:
    model, inputs = zoo.build(name)
    site = middle(model)
    block = model.get_submodule(site.rpartition(".")[0])
    guided = run(model, inputs, SLG(scale=1.0, sites=site, start=0.0, stop=1.0))
    with torch.no_grad():
        plain = zoo.call(model, inputs)

        def give_back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            given = [*args, *kwargs.values()]
            if isinstance(output, torch.Tensor):
                return args[0] if args else kwargs["hidden_states"]
            fit = {tuple(t.shape): t for t in reversed(given) if isinstance(t, torch.Tensor) and t.ndim == 3}
            return tuple(None if o is None else fit[tuple(o.shape)] for o in output)

        handle = block.register_forward_hook(give_back, with_kwargs=True)
        skipped = zoo.call(model, inputs)
        handle.remove()
    expected = plain + (plain - skipped)
    assert (guided - expected).norm() <= 1e-5 * expected.norm()
    assert (plain - skipped).norm() > 0.01 * plain.norm()


def test_slg_published_default_and_window() -> None:
    control = SLG()
    assert (control.scale, control.start, control.stop) == (2.8, 0.01, 0.2)
    big, _ = zoo.build("sd3", num_layers=24)
    sites = attnctl.control(big, SLG()).report()
    for block in ("transformer_blocks.7.attn", "transformer_blocks.8.attn", "transformer_blocks.9.attn"):
        assert block in sites
    attnctl.handle_of(big).detach()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SLG(scale=math.inf),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_block_that_never_runs_is_an_error() -> None:
    model, inputs = zoo.build("latte")
    with (
        attnctl.control(model, SLG(sites="temporal_transformer_blocks.1", start=0.0, stop=1.0), layout="cond"),
        pytest.raises(NeverApplied, match=r"temporal_transformer_blocks\.1"),
        torch.no_grad(),
    ):
        zoo.call(model, inputs | {"enable_temporal_attentions": False})
