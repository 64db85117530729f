"""torch.compile with controls: no graph break, few graphs, equal results; what cannot work is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from contract import assert_clean, distance, guidances, perturbed, snapshot

import attnctl
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG, SoftPAG

pytestmark = pytest.mark.compile

# Lumina 2 branches on its mask, so that torch.compile does not take it in one graph when it is plain either.
WHOLE = tuple(name for name in zoo.NAMES if name != "lumina2")
# Image and text come separately into the perturbed block, so that its processor can tell them apart.
DOUBLE = ("sd3", "sd35", "qwen", "cogvideox", "cogview4")
METHODS = ("SoftPAG", "PAG")
BLOCKS = (
    "sd15",
    "sd3",
    "flux",
    "flux2",
    "pixart",
    "sana",
    "auraflow",
    "qwen",
    "cogview4",
    "wan",
    "ltx",
    "hunyuanvideo",
)


class Graphs:
    """A compiler backend that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        """Take a graph."""
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "method"), zip(WHOLE, itertools.cycle(METHODS), strict=False))
def test_whole_model_with_processors_by_hand(name: str, method: str) -> None:
    # Tracing takes most of the time, and grows with the layers.
    model, inputs = zoo.build(name, **zoo.shallow(name, 3 if method == "SoftPAG" else 2))
    guidance = guidances(model)[method]
    if isinstance(guidance, PAG) and name not in DOUBLE:
        guidance = PAG(scale=1.0, sites=guidance.sites, scope="all")
    plain, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
    made = attnctl.attn_processors(model, guidance)
    host: Any = model
    if hasattr(model, "set_attn_processor"):
        host.set_attn_processor(made)
    else:
        for key, processor in made.items():
            module: Any = model.get_submodule(key.removesuffix(".processor"))
            module.processor = processor
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert distance(zoo.unpack(compiled(**inputs)), p) < 1e-6
    assert graphs.count == 1
    assert distance(p, plain) > 1e-3


def _compile_blocks(model: Any, backend: Any) -> int:
    """Compile the repeated blocks of a model; return how many there are."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        for module in model.modules():
            if type(module).__name__.endswith("TransformerBlock") or type(module).__name__ == "HunyuanDiTBlock":
                module.compile(backend=backend, fullgraph=True)
    return sum(m._compiled_call_impl is not None for m in model.modules())


@pytest.mark.parametrize(("name", "method"), zip(BLOCKS, itertools.cycle(METHODS), strict=False))
def test_compiled_blocks_under_control(name: str, method: str) -> None:
    model, inputs = zoo.build(name)
    guidance = guidances(model)[method]
    plain = zoo.call(model, inputs)
    with attnctl.control(model, guidance, layout="uncond_first", replay=False):
        eager = zoo.call(model, inputs)
    graphs = Graphs()
    assert _compile_blocks(model, graphs) >= 4
    zoo.call(model, inputs)
    before, base = snapshot(model), graphs.count
    with attnctl.control(model, guidance, layout="uncond_first") as handle:
        counts = []
        for step in range(6):
            handle.set_step(step, 6)
            assert distance(zoo.call(model, inputs), eager) < 1e-6
            counts.append(graphs.count - base)
        assert handle.passes == 6
    assert_clean(before, model)
    assert counts[1:] == counts[1:2] * 5, counts  # nothing is compiled again after the second step
    assert counts[-1] <= 6 * len({type(m) for m in model.modules() if m._compiled_call_impl is not None}), counts
    assert distance(zoo.call(model, inputs), plain) < 1e-6


def test_compiling_blocks_under_control() -> None:
    model, inputs = zoo.build("flux")
    with attnctl.control(model, *guidances(model).values(), layout="cond") as handle:
        eager = zoo.call(model, inputs)
        _compile_blocks(model, "eager")
        assert distance(zoo.call(model, inputs), eager) < 1e-6
        assert handle.passes == 4
        assert "compiled blocks" in handle.report()


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_a_model_compiled_as_a_whole_is_refused(how: str) -> None:
    model, _ = zoo.build("sd3")
    whole: Any = model
    if how == "torch.compile":
        whole = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"compiled as a whole.*compile_repeated_blocks"):
        attnctl.control(whole, PAG(scale=3.0))
    assert_clean(before, model)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_compiling_the_whole_model_under_control(how: str) -> None:
    model, inputs = zoo.build("sd3", num_layers=2)
    plain = zoo.call(model, inputs)
    with attnctl.control(model, SoftPAG(scale=3.0, sites=1), layout="uncond_first") as handle:
        eager = zoo.call(model, inputs)
        whole: Any = model
        if how == "torch.compile":
            whole = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
        for _ in range(2):
            assert distance(zoo.unpack(whole(**inputs)), eager) < 1e-5
        assert handle.passes == 3
    assert distance(zoo.unpack(whole(**inputs)), plain) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())
