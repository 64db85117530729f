"""What prefix replay holds: of a row of blocks the last output alone, and what the host itself holds on to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from contract import distance, own, perturbed
from torch import Tensor, nn

import attnctl
from attnctl.core.hosts.leaves import leaves
from attnctl.processors import PAG

# Their text is longer than their tiny pictures, which real ones are not.
LONG_TEXT = {"hunyuandit": ("hidden_states", "image_rotary_emb"), "wan_i2v": ("hidden_states",)}


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a tiny denoiser in float64, with a picture that has more tokens than its text."""
    model, inputs = zoo.build(family, dtype=torch.float64)
    for name in LONG_TEXT.get(family, ()):
        given = inputs[name]
        if name == "image_rotary_emb":
            inputs[name] = tuple(x.repeat(16, 1) for x in given)
        else:
            inputs[name] = given.repeat(*[1] * (given.ndim - 2), 4, 4)
    return model, inputs


def bytes_of(store: Any) -> int:
    """Add up the bytes of all tensors that a prefix holds."""
    tensors = [leaf.tensor for output in store.values() for leaf in leaves(output) if leaf.tensor is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(model: nn.Module, inputs: dict[str, Any], guidance: PAG, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the bytes held at each perturbed pass of two calls."""
    from attnctl.core.replay import Prefix

    seen: list[int] = []
    stubs = Prefix.stubs

    def spy(self: Prefix, *args: Any) -> Any:
        result = stubs(self, *args)
        seen.append(bytes_of(self.store))
        return result

    with monkeypatch.context() as patch, attnctl.control(model, guidance, layout="cond"):
        patch.setattr(Prefix, "stubs", spy)
        for _ in range(2):
            zoo.call(model, inputs)
    return seen


def largest(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Return the bytes of the largest output of a block: of an entry of an outermost list that holds attention."""
    sizes: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in leaves(output)))

    sites = [s.name for s in own(attnctl.find_sites(model))]
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    lists = {n: m for n, m in lists.items() if any(site.startswith(f"{n}.") for site in sites)}
    outer = [m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]
    hooks = [block.register_forward_hook(note) for blocks in outer for block in blocks]
    zoo.call(model, inputs)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def last_site(model: nn.Module) -> PAG:
    """Return a guidance at the last site of a model, which has all blocks before it taken over."""
    site = own(attnctl.find_sites(model))[-1]
    return PAG(scale=2.0, sites=site.name, **({"scope": "all"} if site.kind == "joint" else {}))


@pytest.mark.parametrize("family", zoo.NAMES)
def test_at_most_two_block_outputs_are_alive(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(family)
    guidance = last_site(model)
    with torch.no_grad():
        c, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
        assert max(held(model, inputs, guidance, monkeypatch)) <= 2 * largest(model, inputs)
        with attnctl.control(model, guidance, layout="cond") as handle:
            for _ in range(2):
                assert distance(zoo.call(model, inputs), c + 2 * (c - p)) <= 1e-6
            assert handle._watched[0].prefix.chosen
            assert handle._watched[0].prefix.proven


@pytest.mark.parametrize("how", ["view", "derived", "in place", "held"])
def test_outputs_that_something_reads_later_are_not_given_up(how: str) -> None:
    model, inputs = zoo.build("pixart", dtype=torch.float64)
    blocks = model.transformer_blocks
    kept: dict[str, Tensor] = {}

    def first(module: nn.Module, args: Any, output: Tensor) -> Any:
        if how == "view":
            kept["x"] = output[:, :]
        elif how == "derived":
            kept["x"] = output * 1.0
        elif how == "held":
            kept["x"] = output
        return None

    def before_second(module: nn.Module, args: Any) -> None:
        if how == "in place":
            args[0].mul_(1.5)

    def last(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output + 0.5 * kept["x"][: len(output)] if kept else None

    hooks = [blocks[0].register_forward_hook(first), blocks[1].register_forward_pre_hook(before_second)]
    hooks.append(blocks[-1].register_forward_hook(last))
    site = own(attnctl.find_sites(model))[-1].name
    guidance = PAG(scale=2.0, sites=site)
    with torch.no_grad():
        c, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
        with attnctl.control(model, guidance, layout="cond"):
            for _ in range(3):
                assert distance(zoo.call(model, inputs), c + 2 * (c - p)) <= 1e-12
    for hook in hooks:
        hook.remove()


def test_an_output_that_the_host_writes_to_later_is_computed_again() -> None:
    # Wan Animate adds the pose to its latents in place, when another module has already run.
    model, inputs = zoo.build("wan_animate", dtype=torch.float64)
    guidance = PAG(scale=2.0, sites="blocks.2.attn1")
    with torch.no_grad():
        c, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
        with attnctl.control(model, guidance, layout="cond"):
            for _ in range(2):
                assert distance(zoo.call(model, inputs), c + 2 * (c - p)) <= 1e-6


def test_what_the_host_joins_is_kept_and_blocks_are_not() -> None:
    # Wan joins the words of its embedder with those of a picture: without the embedder's output every block sees NaN.
    model, inputs = zoo.build("wan_i2v", dtype=torch.float64)
    guidance = PAG(scale=2.0, sites="blocks.3.attn1")
    with torch.no_grad():
        c, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
        with attnctl.control(model, guidance, layout="cond") as handle:
            for _ in range(2):
                assert distance(zoo.call(model, inputs), c + 2 * (c - p)) <= 1e-6
            prefix = handle._watched[0].prefix
            assert prefix.proven
            kept = {name: all(prefix._needed[m]) for m, name in prefix.chosen.items() if name.startswith("blocks")}
    assert kept == {"blocks.0": False, "blocks.1": False, "blocks.2": True}
