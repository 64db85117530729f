"""The contract of every denoiser family: nothing changes while a control is inactive, the guidance is what its
definition says, site facts are what a run shows, and nothing is left behind."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
import zoo
from contract import Replace, Through, assert_clean, distance, guidances, perturbed, snapshot
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.errors import UnsupportedModelError
from attnctl.processors import PAG

pytestmark = pytest.mark.usefixtures("no_grad")

METHODS = ("PAG", "SoftPAG")
EXACT = {name: 1e-12 if name not in contract.SINGLE_INSIDE else 1e-5 for name in zoo.NAMES}
JOINT = tuple(
    n
    for n in zoo.NAMES
    if n
    in {
        *("sd3", "sd35", "flux", "flux2", "auraflow", "lumina2", "cogview4", "qwen", "zimage"),
        *("cogvideox", "cogvideox_rope", "hunyuanvideo", "mochi"),
    }
)


@functools.cache
def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Build a denoiser once for the whole file: a test that left a trace would break the next."""
    return build(name, dtype)


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Build a denoiser with prompts of different lengths where image tokens keep their place all the same."""
    model, inputs = zoo.build(name, dtype=dtype)
    if name == "lumina2":
        inputs["encoder_attention_mask"] = torch.ones_like(inputs["encoder_attention_mask"])
    return model, inputs


@pytest.fixture(params=zoo.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Name one denoiser."""
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_inactive_is_bit_exact(name: str, method: str) -> None:
    model, inputs = built(name)
    guidance = guidances(model)[method]
    plain = zoo.call(model, inputs)
    off = type(guidance)(**{**vars(guidance), "scale": 0.0})
    with attnctl.control(model, off, layout="cond") as handle:
        assert torch.equal(zoo.call(model, inputs), plain)
        assert handle.passes == 0
    late = type(guidance)(**{**vars(guidance), "start": 0.5, "stop": 0.75})
    with attnctl.control(model, late, layout="cond") as handle:
        for step in (0, 1, 3):
            handle.set_step(step, 4)
            assert torch.equal(zoo.call(model, inputs), plain)
        assert handle.passes == 0
        handle.set_step(2, 4)
        assert not torch.equal(zoo.call(model, inputs), plain)
        handle.enabled = False
        assert torch.equal(zoo.call(model, inputs), plain)
        handle.enabled = True
        assert not torch.equal(zoo.call(model, inputs), plain)
        assert handle.passes == 2


def test_pass_through_is_bit_exact_at_every_site(name: str) -> None:
    model, inputs = built(name)
    plain = zoo.call(model, inputs)
    through = Through()
    with attnctl.control(model, through, layout="cond"):
        assert torch.equal(zoo.call(model, inputs), plain)
    assert {call.site.name for call in through.seen} == {s.name for s in attnctl.find_sites(model)}


@pytest.mark.parametrize("method", METHODS)
def test_active_differs_and_detach_is_exact(name: str, method: str) -> None:
    model, inputs = built(name)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    handle = attnctl.control(model, guidances(model)[method], layout="cond")
    guided = zoo.call(model, inputs)
    assert guided.isfinite().all()
    assert distance(guided, plain) > 1e-3
    assert handle.passes == 1
    assert handle.report()
    handle.detach()
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


class Boom(RuntimeError):
    """What a test raises."""


@pytest.mark.parametrize("where", ["base", "perturbed"])
def test_an_exception_in_either_pass_leaves_no_trace(name: str, where: str) -> None:
    model, inputs = built(name)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    handle = attnctl.control(model, guidances(model)["SoftPAG"], layout="cond")
    guided = zoo.call(model, inputs)

    def fail(*_: Any) -> None:
        if (handle._watched[0].state.phase != "base") == (where == "perturbed"):
            raise Boom

    hook = contract.own(attnctl.find_sites(model))[-1].module.register_forward_pre_hook(fail)
    with pytest.raises(Boom):
        zoo.call(model, inputs)
    hook.remove()
    assert torch.equal(zoo.call(model, inputs), guided)
    handle.detach()
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_replay_follow_the_definition(name: str, method: str) -> None:
    model, inputs = built(name, torch.float64)
    guidance = guidances(model)[method]
    plain = zoo.call(model, inputs)
    p = perturbed(model, guidance, zoo.take(inputs, [1]))
    delta = guidance.scale * (plain[1:] - p)
    results = []
    for replay in (True, False):
        with attnctl.control(model, guidance, layout="uncond_first", replay=replay) as handle:
            for _ in range(2):  # the first pass learns what to replay, the second does
                results.append(zoo.call(model, inputs))
            assert handle.passes == 2
            if replay and handle._watched[0].prefix is not None:
                assert handle._watched[0].prefix.chosen
    for result in results:
        assert distance(result, torch.cat([plain[:1] + delta, plain[1:] + delta])) <= EXACT[name]
        assert distance(result, results[-1]) <= EXACT[name]
    with attnctl.control(model, guidance, layout="cond"):
        both = zoo.call(model, inputs)
    q = perturbed(model, guidance, inputs)
    assert distance(both, plain + guidance.scale * (plain - q)) <= EXACT[name]


@pytest.mark.parametrize("method", METHODS)
def test_processors_by_hand_are_the_perturbed_model(name: str, method: str) -> None:
    model, inputs = build(name, torch.float64)
    guidance = guidances(model)[method]
    if isinstance(guidance, PAG):  # image_block needs a call's arguments, which processors do not see
        guidance = PAG(scale=1.0, sites=guidance.sites, scope="all")
    plain, p = zoo.call(model, inputs), perturbed(model, guidance, inputs)
    before = snapshot(model)
    made = attnctl.attn_processors(model, guidance)
    assert_clean(before, model)
    for key, processor in made.items():
        module: Any = model.get_submodule(key.removesuffix(".processor"))
        module.processor = processor
    assert distance(zoo.call(model, inputs), p) <= 1e-15
    assert distance(p, plain) > 1e-3


def test_depth_is_execution_order(name: str) -> None:
    model, inputs = built(name)
    order: list[str] = []
    sites = attnctl.find_sites(model)
    hooks = [s.module.register_forward_pre_hook(lambda m, a, n=s.name: order.append(n)) for s in sites]
    zoo.call(model, inputs)
    for hook in hooks:
        hook.remove()
    assert order == [s.name for s in sites]
    depths = [s.depth for s in sites]
    assert depths == sorted(depths)
    for before, after in itertools.pairwise(sites):
        assert after.depth == before.depth + (after.kind != "dual")


def test_site_facts_are_what_a_run_shows(name: str) -> None:
    model, inputs = built(name)
    through = Through()
    with attnctl.control(model, through, layout="cond") as handle:
        zoo.call(model, inputs)
        sites = {s.name: s for s in handle.sites}
        grid = handle._watched[0].state.grid
    assert grid is not None
    calls: dict[str, list[AttnCall]] = {}
    for call in through.seen:
        calls.setdefault(call.site.name, []).append(call)
    image = grid[0] * grid[1] * grid[2]
    text = _text_lengths(inputs)
    for site_name, site in sites.items():
        first = calls[site_name][0]
        assert first.q.shape[1] == site.heads, site_name
        assert first.q.shape[-1] == site.head_dim, site_name
        n_query, n_key = first.q.shape[-2], sum(c.k.shape[-2] for c in calls[site_name])
        if site.kind == "temporal":
            assert n_query == grid[0], site_name
        elif site.kind == "text":
            assert n_query in {*text, 32}, site_name  # Z-Image pads its text to 32
        elif site.kind == "cross":
            assert n_key in text, site_name
        elif site.kind == "joint":
            assert n_query == first.k.shape[-2], site_name
            assert n_query > image, site_name
        else:
            assert n_query == n_key, site_name
            assert n_query not in text or name == "hunyuandit", site_name


def _text_lengths(inputs: dict[str, Any]) -> set[int]:
    """Collect how many keys a cross attention may see."""
    lengths = {zoo.TEXT, 1}
    if "encoder_hidden_states" in inputs:
        lengths.add(inputs["encoder_hidden_states"].shape[1])
    if "encoder_hidden_states_image" in inputs:
        lengths.add(inputs["encoder_hidden_states"].shape[1] + inputs["encoder_hidden_states_image"].shape[1])
    if "encoder_hidden_states_t5" in inputs:
        lengths.add(zoo.TEXT + inputs["encoder_hidden_states_t5"].shape[1])
    return lengths


@pytest.mark.parametrize("name", JOINT)
def test_image_and_text_tokens_are_told_apart(name: str) -> None:
    # With every map the identity no token hears of another: other latents change exactly the image tokens.
    model, inputs = built(name, torch.float64)
    key = next(k for k in ("hidden_states", "x") if k in inputs)
    other = inputs | {key: [x + 1 for x in inputs[key]] if key == "x" else inputs[key] + 1}
    seen: list[list[AttnCall]] = []
    for given in (inputs, other):
        calls: list[AttnCall] = []

        def own_value(call: AttnCall, proceed: Proceed, calls: list[AttnCall] = calls) -> Tensor:
            calls.append(call)
            return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)

        with attnctl.control(model, Replace(function=own_value), layout="cond"):
            zoo.call(model, given)
        seen.append(calls)
    joint = [(a, b) for a, b in zip(*seen, strict=True) if a.site.kind == "joint"]
    assert joint
    for a, b in joint:
        assert a.image is not None
        assert a.text is not None
        n = a.q.shape[-2]
        padding = [*range(48, 64)] if name == "zimage" else []  # between image and text
        assert sorted([*range(n)[a.image], *padding, *range(n)[a.text]]) == [*range(n)]
        changed = (a.v != b.v).any(-1).any(1)  # [B, N]
        is_image = torch.zeros(n, dtype=torch.bool)
        is_image[a.image] = True
        assert not changed[:, ~is_image].any(), a.site.name
        assert changed[:, is_image].all(), a.site.name


@pytest.mark.parametrize("name", JOINT)
def test_image_block_against_a_dense_mask(name: str) -> None:
    model, inputs = built(name, torch.float64)
    sites = [s for s in attnctl.find_sites(model) if s.kind == "joint"]
    perturb = PAG(sites="joint", scope="image_block").branch(tuple(sites), model).perturb
    assert perturb is not None
    checked: list[str] = []

    def compare(call: AttnCall, proceed: Proceed) -> Tensor:
        out = proceed(call)
        new = perturb(call, proceed)
        n = call.q.shape[-2]
        allowed = torch.ones(n, n, dtype=torch.bool)
        allowed[call.image, call.image] = torch.eye(n, dtype=torch.bool)[call.image, call.image]
        mask = torch.where(allowed, 0.0, -torch.inf).double()
        if call.mask is not None:
            boolean = call.mask.dtype == torch.bool
            mask = mask + (torch.where(call.mask, 0.0, -torch.inf).double() if boolean else call.mask)
        k, v = (x.repeat_interleave(call.q.shape[1] // x.shape[1], dim=1) for x in (call.k, call.v))
        dense = F.scaled_dot_product_attention(call.q, k, v, mask, scale=call.scale)
        valid = dense.isfinite().all(-1)  # a padded token may see nothing at all
        assert distance(new[valid], dense[valid]) <= 1e-14
        assert distance(new[..., call.text, :], out[..., call.text, :]) <= 1e-15
        assert distance(new[..., call.image, :], out[..., call.image, :]) > 1e-3
        checked.append(call.site.name)
        return out

    with attnctl.control(model, Replace(sites="joint", function=compare), layout="cond"):
        zoo.call(model, inputs)
    assert set(checked) == {s.name for s in sites}


def test_uneven_prompts_of_lumina_are_refused_where_rows_differ() -> None:
    model, inputs = zoo.build("lumina2", dtype=torch.float64)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    with (
        attnctl.control(model, PAG(sites="layers.2.attn"), layout="cond"),
        pytest.raises(UnsupportedModelError, match='Use scope="all"'),
    ):
        zoo.call(model, inputs)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)
    for row in (0, 1):  # each alone has one length
        guidance = PAG(sites="layers.2.attn")
        with attnctl.control(model, guidance, layout="cond"):
            assert distance(zoo.call(model, zoo.take(inputs, [row])), plain[row : row + 1]) > 1e-3
    with attnctl.control(model, PAG(sites="layers.2.attn"), layout="uncond_first"):
        assert distance(zoo.call(model, inputs), plain) > 1e-3  # one prompt, a negative one of another length


def test_gradients(name: str) -> None:
    model, inputs = built(name)
    plain = contract.gradients(model, inputs)
    with attnctl.control(model, Through(), layout="cond"):
        assert all(map(torch.equal, contract.gradients(model, inputs), plain))
    for guidance in guidances(model).values():
        with attnctl.control(model, guidance, layout="cond"):
            guided = contract.gradients(model, inputs)
        assert all(g.isfinite().all() and not torch.equal(g, p) for g, p in zip(guided, plain, strict=True))


def test_gradient_checkpointing(name: str) -> None:
    model, inputs = build(name)
    if not getattr(model, "_supports_gradient_checkpointing", False):
        pytest.skip("the host has no gradient checkpointing")
    found: dict[bool, list[list[Tensor]]] = {}
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.train()
        runs = [contract.gradients(model, inputs)]
        for control in (Through(), *guidances(model).values()):
            with attnctl.control(model, control, layout="cond", replay=False):
                runs.append(contract.gradients(model, inputs))
        found[checkpointing] = runs
    for plain, again in zip(found[False], found[True], strict=True):
        assert all(map(torch.equal, plain, again))
