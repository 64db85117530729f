"""Agent attention and token merging: parity with the published functions, the pieces, whole UNets, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, distance, snapshot
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnctl
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels import attention
from attnctl.kernels.merging import match_tokens, merged_count, pool_cells
from attnctl.processors import PAG, AgentAttention
from attnctl.processors.agent import agent_attention

pytestmark = pytest.mark.usefixtures("no_grad")

FIXTURES = Path(__file__).parent / "fixtures" / "agentsd"
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "cases.json").read_text())["cases"]
CORE = [c for c in CASES if c["case"].startswith(("core", "fallback"))]
MERGE = [c for c in CASES if c["case"].startswith("merge")]
TOLERANCE = {"atol": 2e-5, "rtol": 0}


def heads_of(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Project tokens and split the heads."""
    return (x @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)


def rows(x: Tensor) -> Tensor:
    """Sort tokens lexicographically: the published order is not defined."""
    return torch.stack([torch.tensor(sorted(sample.tolist())) for sample in x])


@pytest.mark.parametrize("case", CORE, ids=lambda c: c["case"])
def test_core_parity(case: dict[str, Any]) -> None:
    t, p = load_file(FIXTURES / case["file"]), case["params"]
    q, k, v = (heads_of(t["hidden"], t[w], p["heads"]) for w in ("w_q", "w_k", "w_v"))
    agents = heads_of(t["agent_hidden"], t["w_q"], p["heads"])
    torch.testing.assert_close(agents, t["agent"], **TOLERANCE)
    if case["derived"]["agent_path_used"]:
        out = agent_attention(q, agents, k, v, k_scale2=p["k_scale2"], k_shortcut=p["k_shortcut"])
    else:
        out = attention(q, k, v)
    torch.testing.assert_close(out, t["attn_out"], **TOLERANCE)
    joined = out.transpose(1, 2).flatten(2) @ t["w_out"].T + t["b_out"]
    torch.testing.assert_close(joined, t["out"], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("case", MERGE, ids=lambda c: c["case"])
def test_merge_parity(case: dict[str, Any]) -> None:
    t, p, derived = load_file(FIXTURES / case["file"]), case["params"], case["derived"]
    x, n = t["hidden"], p["h"] * p["w"]
    partners = match_tokens(x, (p["h"], p["w"]), (p["sy"], p["sx"]), t.get("rand_idx"))
    assert len(partners.dst) == derived["num_dst"]
    r = merged_count(n, p["ratio"], len(partners.src))
    assert r == derived["r"]
    merge = partners.merge(r)
    torch.testing.assert_close(rows(merge(x)), rows(t["merged"]), **TOLERANCE)
    torch.testing.assert_close(merge.undo(merge(x)), t["unmerged"], **TOLERANCE)
    fewer = partners.merge(merged_count(n, p["agent_ratio"], len(partners.src)))
    agents = fewer(x)
    assert (2 * agents.shape[1] < merge(x).shape[1]) == derived["agent_path_used"]
    # As the control does it: projections first, merging after.
    q, k, v = (x @ t[w].T for w in ("w_q", "w_k", "w_v"))
    split = lambda y: y.unflatten(-1, (p["heads"], -1)).transpose(1, 2)  # noqa: E731
    if derived["agent_path_used"]:
        torch.testing.assert_close(rows(agents), rows(t["agent"]), **TOLERANCE)
        out = agent_attention(*(split(y) for y in (merge(q), fewer(q), merge(k), merge(v))))
    else:
        out = attention(*(split(merge(y)) for y in (q, k, v)))
    joined = merge.undo(out.transpose(1, 2).flatten(2)) @ t["w_out"].T + t["b_out"]
    torch.testing.assert_close(joined + x, t["block_out"], **TOLERANCE)


def test_agents_equal_the_two_maps_written_out() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 6, generator=g, dtype=torch.float64) for _ in range(3))
    a = torch.randn(2, 3, 4, 6, generator=g, dtype=torch.float64)
    s = 6**-0.5
    first = (s * a @ k.mT).softmax(-1) @ v
    want = (s**0.3 * q @ a.mT).softmax(-1) @ first + 0.075 * v
    torch.testing.assert_close(agent_attention(q, a, k, v), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (9, 7), (4, 6)])
@pytest.mark.parametrize("count", [0, 5, 1000])
def test_merging_keeps_sums_and_undoing_finds_every_place(grid: tuple[int, int], count: int) -> None:
    g = torch.Generator().manual_seed(1)
    n = grid[0] * grid[1]
    x = torch.randn(3, n, 5, generator=g, dtype=torch.float64)
    partners = match_tokens(x, grid, (4, 4) if min(grid) >= 4 else (2, 2))
    assert sorted(torch.cat([partners.src, partners.dst]).tolist()) == list(range(n))
    merge = partners.merge(min(count, len(partners.src)))
    y = merge(x)
    assert y.shape[1] == n - merge.gone.shape[1]
    weights = torch.cat([torch.ones(3, merge.kept.shape[1]), merge.counts], 1)
    torch.testing.assert_close((y * weights[..., None]).sum(1), x.sum(1))
    back = merge.undo(y)
    for b in range(3):
        torch.testing.assert_close(back[b, merge.kept[b]], x[b, merge.kept[b]])
        torch.testing.assert_close(back[b, merge.gone[b]], back[b, merge.dst[merge.target[b]]])


def test_random_cells_name_one_token_each() -> None:
    choice = torch.tensor([[3, 0], [1, 2]])
    partners = match_tokens(torch.randn(1, 20, 4), (4, 5), (2, 2), choice)
    assert partners.dst.tolist() == [6, 2, 11, 17]
    with pytest.raises(ConfigError, match="4 x 4"):
        match_tokens(torch.randn(1, 20, 4), (4, 4), (2, 2))
    with pytest.raises(ConfigError, match="at least one whole cell"):
        match_tokens(torch.randn(1, 6, 4), (2, 3), (4, 4))


def test_cells_are_averaged_with_their_cut_ones() -> None:
    x = torch.arange(15.0).view(1, 15, 1)
    pooled = pool_cells(x, (3, 5), (2, 2)).flatten().tolist()
    assert pooled == [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]


# Whole UNets


@pytest.mark.parametrize("name", ["sd15", "sd2", "animatediff"])
@pytest.mark.parametrize("fields", [{}, {"ratio": 0.0}, {"metric": "norm"}, {"use_rand": False}], ids=str)
def test_contract(name: str, fields: dict[str, Any]) -> None:
    model, inputs = zoo.build(name)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    with attnctl.control(model, AgentAttention(stop=0.8, **fields), layout="uncond_first") as handle:
        assert {s.name.split(".")[1] for s in handle.sites} == {"0", "2"}
        handle.set_step(9, 10)
        assert torch.equal(zoo.call(model, inputs), plain)
        handle.set_step(0, 10)
        early = zoo.call(model, inputs)
        assert torch.equal(zoo.call(model, inputs), early), "the same step draws the same cells"
        handle.set_step(5, 10)
        late = zoo.call(model, inputs)
        assert torch.equal(late, plain) == (fields.get("ratio") == 0)
        assert 1e-4 < distance(early, plain) < 1
        handle.set_step(1, 10)
        assert torch.equal(zoo.call(model, inputs), early) == (fields.get("ratio") == 0 or "use_rand" in fields)
        handle.enabled = False
        assert torch.equal(zoo.call(model, inputs), plain)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


def test_merging_before_the_projections_gives_the_same() -> None:
    model, inputs = zoo.build("sd15", dtype=torch.float64)
    site = next(
        s for s in attnctl.find_sites(model) if s.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    )
    block = model.get_submodule(site.name.rpartition(".")[0])
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
        site.module.register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    control = AgentAttention(sites=site.name, use_rand=False, agents_stop=1.0)
    with attnctl.control(model, control, layout="uncond_first"):
        zoo.call(model, inputs)
    for hook in hooks:
        hook.remove()
    x, attn = seen["x"], site.module
    y = block.norm1(x)
    partners = match_tokens(x, (16, 12), (4, 4))
    merge = partners.merge(int(0.4 * 192))
    agents = partners.merge(len(partners.src))(y)
    split = lambda t: t.unflatten(-1, (site.heads, -1)).transpose(1, 2)  # noqa: E731
    m = merge(y)
    out = agent_attention(split(attn.to_q(m)), split(attn.to_q(agents)), split(attn.to_k(m)), split(attn.to_v(m)))
    want = merge.undo(attn.to_out[0](out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(seen["out"], want, atol=1e-12, rtol=0)


def test_its_pipeline_run_is_repeatable_and_leaves_generators_alone() -> None:
    pipe, kwargs = pipes.build("sd")
    plain = pipes.run(pipe, kwargs, num_inference_steps=5)
    state = torch.random.get_rng_state()
    with attnctl.control(pipe, AgentAttention()) as handle:
        first = pipes.run(pipe, kwargs, num_inference_steps=5)
        assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=5), first)
        assert "arXiv 2312.08874" in handle.report()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert distance(first, plain) > 1e-4
    with attnctl.control(pipe, AgentAttention(seed=1)):
        assert not torch.equal(pipes.run(pipe, kwargs, num_inference_steps=5), first)
    assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=5), plain)


def test_with_pag_the_perturbed_pass_shares_the_cells() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    controls = (AgentAttention(), PAG(scale=2.0, sites="up.1"))
    results = []
    for replay in (True, False):
        with attnctl.control(pipe, *controls, replay=replay) as handle:
            results.append(pipes.run(pipe, kwargs))
            assert handle.passes == 3
    assert distance(*results) < 1e-12
    with attnctl.control(pipe, AgentAttention(), PAG(scale=0.0, sites="up.1")):
        assert distance(pipes.run(pipe, kwargs), results[0]) > 1e-4


def test_attention_flops_at_the_published_ratio() -> None:
    """At 64 x 64: 2,458 tokens and 256 agents, plus the matching."""
    n, c, heads = 4096, 320, 8
    with torch.device("meta"):
        q = torch.empty(1, heads, n, c // heads)
        m, a = torch.empty(1, heads, 2458, c // heads), torch.empty(1, heads, 256, c // heads)
        with FlopCounterMode(display=False) as dense:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        with FlopCounterMode(display=False) as ours:
            agent_attention(m, a, m, m)
            torch.empty(1, 3840, c) @ torch.empty(1, c, 256)
    assert n - int(0.4 * n) == 2458
    assert ours.get_total_flops() < 0.11 * dense.get_total_flops()


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "ratio=1.5 is out of range"),
        ({"ratio": -0.1}, "ratio=-0.1 is out of range"),
        ({"ratio": True}, "out of range"),
        ({"agent_ratio": 2.0}, "agent_ratio=2.0 is out of range"),
        ({"agents_stop": -1.0}, "agents_stop"),
        ({"cell": 1}, "cell=1 must be"),
        ({"late_cell": 2.5}, "late_cell=2.5 must be"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "4294967295"),
        ({"max_downsample": 3}, "Choose one of 1, 2, 4, 8"),
        ({"k_scale2": float("nan")}, "k_scale2"),
        ({"metric": "keys"}, "block, norm"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AgentAttention(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("flux", {}, UnsupportedModelError, "merged tokens have no meaning"),
        ("pixart", {"sites": "self"}, UnsupportedModelError, "Stable Diffusion UNets"),
        ("sdxl", {}, SiteError, "max_downsample=2"),
        ("sd15", {"sites": "cross"}, SiteError, "acts on self attention"),
    ],
)
def test_models_that_do_not_fit_are_refused(name: str, fields: dict[str, Any], error: type, message: str) -> None:
    model, _ = zoo.build(name)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attnctl.control(model, AgentAttention(**fields), layout="cond")
    assert_clean(before, model)


def test_sdxl_acts_one_level_down() -> None:
    model, inputs = zoo.build("sdxl")
    with attnctl.control(model, AgentAttention(max_downsample=2, agents_stop=1.0), layout="uncond_first"):
        assert zoo.call(model, inputs).isfinite().all()


def test_it_can_be_written_down() -> None:
    control = AgentAttention(ratio=0.3, metric="norm")
    assert control_from_dict(control_to_dict(control)) == control
