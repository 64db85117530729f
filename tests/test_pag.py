"""Fields, weights, defaults and head sets of PAG and SoftPAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from contract import Precise, Replace, own
from dense_maps import attended, bias, logits_of, values_of
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.families import FAMILIES, family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.tokens import image_keys
from attnctl.errors import ConfigError, PlanError, SiteError, UnsupportedModelError
from attnctl.plans import HeadSet
from attnctl.processors import PAG, SoftPAG

# Pairs (layer, head) as printed in arXiv 2506.10978.
SD3_HEADS = ((1, 10), (11, 15), (13, 17), (0, 23), (1, 2), (0, 15), (1, 19), (18, 11), (0, 17), (2, 3))
FLUX_HEADS = ((51, 23), (52, 22), (38, 18), (43, 17), (34, 0), (52, 6))


def at(step: int, steps: int = 10, timestep: float | None = None) -> CallState:
    """Describe a step."""
    return CallState(step=step, steps=steps, timestep=timestep)


def call(model: Any, inputs: dict[str, Any], *controls: Any) -> torch.Tensor:
    """Call a model under controls."""
    with torch.no_grad(), attnctl.control(model, *controls, layout="cond"):
        return zoo.call(model, inputs)


def test_published_defaults_of_the_fields() -> None:
    assert (PAG().scale, PAG().scope, PAG().adaptive) == (3.0, "image_block", 0.0)
    soft = SoftPAG()
    assert (soft.scale, soft.u, soft.heads, soft.target, soft.scope) == (3.0, 0.5, None, "identity", "all")


@pytest.mark.parametrize(
    ("t", "knob", "timestep"), [(1000.0, 3.0, 3.0), (900.0, 3.0 - 3.0 * 0.3**4 * 100, 2.0), (500.0, 0.0, 0.0)]
)
def test_adaptive_forms(t: float, knob: float, timestep: float) -> None:
    # ComfyUI: w - w a^4 (1000 - t); diffusers: w - a (1000 - t); both end at 0.
    assert PAG(adaptive=0.3).weight(at(0, timestep=t)) == pytest.approx(max(knob, 0.0))
    assert PAG(adaptive=0.01, adaptive_form="timestep").weight(at(0, timestep=t)) == pytest.approx(timestep)
    assert PAG(adaptive=1.0).weight(at(0, timestep=999.0)) == 0.0


def test_window_is_start_inclusive_stop_exclusive() -> None:
    weights = [PAG(scale=2.0, start=0.2, stop=0.5).weight(at(i)) for i in range(10)]
    assert weights == [0, 0, 2, 2, 2, 0, 0, 0, 0, 0]


def test_default_sites_of_real_sizes() -> None:
    # Model sizes as published; only names are needed, so nothing has weights.
    with torch.device("meta"):
        sd3, _ = zoo.build("sd3", num_layers=24)
        pixart, _ = zoo.build("pixart", num_layers=28)
    assert names(sd3) == ["transformer_blocks.13.attn"]
    assert names(pixart) == ["transformer_blocks.14.attn1"]
    unet, _ = zoo.build("sd15")
    assert names(unet) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]


def names(model: torch.nn.Module) -> list[str]:
    """Name the default sites of PAG."""
    return [s.name for s in PAG().resolve(find_sites(model), family_of(model))]


def test_every_default_has_a_source() -> None:
    assert all(default.source for f in FAMILIES for default in f.published.values())


def test_family_without_default_lists_candidates() -> None:
    flux, _ = zoo.build("flux")
    with pytest.raises(SiteError, match=r"FLUX.*transformer_blocks\.0\.attn"):
        attnctl.control(flux, PAG())


def test_report_names_source_sites_and_replay() -> None:
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, PAG(), layout="cond") as handle, torch.no_grad():
        zoo.call(model, inputs)
        text = handle.report()
    for part in ("arXiv 2403.17377", "mid_block.attentions.0", "prefix replay", "down_blocks", "kernels"):
        assert part in text


def test_paper_head_lists_address_the_right_heads() -> None:
    with torch.device("meta"):
        sd3, _ = zoo.build("sd3", num_layers=24, num_attention_heads=24, attention_head_dim=2)
        flux, _ = zoo.build("flux", num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=16)
    for model, pairs, doubles in ((sd3, SD3_HEADS, 24), (flux, FLUX_HEADS, 19)):
        control = SoftPAG(heads=HeadSet.from_pairs(pairs))
        sites = control.resolve(find_sites(model), family_of(model))
        depths = {d for d, _ in pairs}
        wanted = {f"transformer_blocks.{d}" for d in depths if d < doubles}
        wanted |= {f"single_transformer_blocks.{d - doubles}" for d in depths if d >= doubles}
        assert {s.name.removesuffix(".attn") for s in sites} == wanted
        assert {s.depth for s in sites} == depths


def test_heads_act_alone_and_together_as_the_whole_site() -> None:
    model, inputs = zoo.build("sd3", dtype=torch.float64)
    site = "transformer_blocks.2.attn"
    n = next(s.heads for s in find_sites(model) if s.name == site)
    whole = call(model, inputs, SoftPAG(u=0.7, sites=site))
    each = call(model, inputs, SoftPAG(u=0.7, heads=[(site, h) for h in range(n)]))
    assert (whole - each).norm() <= 1e-12 * whole.norm()
    one = call(model, inputs, SoftPAG(u=0.7, heads=[(site, 0)]))
    other = call(model, inputs, SoftPAG(u=0.7, heads=[(2, 1)]))
    assert (one - other).norm() > 1e-3 * one.norm()


def test_pag_is_softpag_at_full_strength() -> None:
    for name in ("sd15", "pixart", "wan"):
        model, inputs = zoo.build(name, dtype=torch.float64)
        site = [s.name for s in find_sites(model) if s.kind == "self"][1]
        hard, soft = (call(model, inputs, c) for c in (PAG(sites=site), SoftPAG(u=1.0, sites=site)))
        assert (hard - soft).norm() <= 1e-12 * hard.norm()


def test_scopes_differ_on_joint_attention() -> None:
    model, inputs = zoo.build("sd3")
    outs = [call(model, inputs, PAG(sites="transformer_blocks.2", scope=s)) for s in ("image_block", "image", "all")]
    assert all((a - b).norm() > 1e-3 * a.norm() for i, a in enumerate(outs) for b in outs[:i])


def test_linear_attention_takes_identity_and_uniform_only() -> None:
    model, inputs = zoo.build("sana")
    site = "transformer_blocks.2.attn1"
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    for target in ("identity", "uniform"):
        assert not torch.allclose(call(model, inputs, SoftPAG(u=0.5, sites=site, target=target)), plain)
    with pytest.raises(UnsupportedModelError, match="linear attention"):
        attnctl.control(model, SoftPAG(sites=site, target="query_mean"))


def test_every_reuses_the_difference() -> None:
    model, inputs = zoo.build("sd15")
    other = {**inputs, "timestep": inputs["timestep"] // 2}
    guide = PAG(scale=2.0, every=2)
    with torch.no_grad(), attnctl.control(model, guide, layout="cond") as handle:
        handle.set_step(0, 4)
        zoo.call(model, inputs)
        assert handle.passes == 1
        handle.set_step(1, 4)
        second = zoo.call(model, other)
        assert handle.passes == 1
        handle.set_step(2, 4)
        zoo.call(model, other)
        assert handle.passes == 2
        handle.enabled = False
        plain_first, plain_second = zoo.call(model, inputs), zoo.call(model, other)
    with torch.no_grad(), attnctl.control(model, PAG(scale=2.0), layout="cond"):
        delta = zoo.call(model, inputs) - plain_first
    assert torch.allclose(second, plain_second + delta, atol=1e-5)


# Head sets as files --------------------------------------------------------------------------------------------


def test_head_set_round_trip(tmp_path: Path) -> None:
    heads = HeadSet.from_pairs(SD3_HEADS, model="stabilityai/stable-diffusion-3-medium", layers=24, u=1.0, scale=3.0)
    file = heads.save_pretrained(tmp_path)
    assert HeadSet.from_pretrained(tmp_path) == heads
    assert HeadSet.from_pretrained(file) == heads
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-20]),
        lambda p: p.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94."),
        lambda p: p.write_text(p.read_text().replace('"schema": 1', '"schema": 99')),
        lambda p: p.write_text(p.read_text().replace('"layers"', '"lairs"')),
        lambda p: p.write_text(p.read_text().replace('"heads"', '"blocks"')),
        lambda p: p.write_text("[" * 100_000),
        lambda p: p.write_bytes(b" " * (5 << 20)),
        lambda p: p.unlink(),
    ],
)
def test_damaged_head_set_is_refused(tmp_path: Path, damage: Any) -> None:
    file = HeadSet.from_pairs(SD3_HEADS).save_pretrained(tmp_path)
    damage(file)
    with pytest.raises(PlanError):
        HeadSet.from_pretrained(tmp_path)


def test_pickle_by_name_is_refused_unread() -> None:
    with pytest.raises(PlanError, match="pickle"):
        HeadSet.from_pretrained("selected_heads.pkl")


@pytest.mark.parametrize("pairs", [[(0,)], [("a", -1)], [(0, 1), (0, 1)], [(0, True)], [(None, 1)], "ab", [(0, 1.5)]])
def test_bad_pairs(pairs: Any) -> None:
    with pytest.raises(SiteError):
        HeadSet.from_pairs(pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PAG(scope="rows"),  # type: ignore[arg-type]
        lambda: SoftPAG(u=1.01),
        lambda: SoftPAG(u=float("nan")),
        lambda: SoftPAG(target="mean"),  # type: ignore[arg-type]
        lambda: SoftPAG(target="uniform", scope="image_block"),
        lambda: PAG(scale=float("nan")),
        lambda: PAG(scale=float("inf")),
        lambda: PAG(every=0),
        lambda: PAG(every=1.5),  # type: ignore[arg-type]
        lambda: PAG(adaptive=1.5),
        lambda: PAG(start=-0.1),
        lambda: PAG(start=0.6, stop=0.5),
        lambda: PAG(combine="mean"),  # type: ignore[arg-type]
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# Hosts beside those of test_contract_models.py ----------------------------------------------------------------------

REFUSED = ("anyflow_far", "kandinsky6_sr", "prior", "sana_video", "sana_wm")  # the last two: linear attention alone
HOSTS = [n for n in zoo.EVERY if n not in zoo.NAMES and n not in REFUSED]


def itself(call: AttnCall, proceed: Proceed) -> Tensor:
    """Let each image token attend to itself and to what is no image; where all is image, to itself."""
    v = values_of(call)
    if call.image is None:
        return v
    logits, queries, keys = logits_of(call.q, call.k, call.scale) + bias(call.mask), call.image, image_keys(call)
    own_key = torch.eye(queries.stop - queries.start, dtype=torch.bool)
    logits[:, :, queries, keys] = logits[:, :, queries, keys].masked_fill(~own_key, -torch.inf)
    return (logits.softmax(-1).nan_to_num(0) @ v.double()).to(v.dtype)


def halfway(call: AttnCall, proceed: Proceed) -> Tensor:
    """Mix each token's attention with itself."""
    v = values_of(call)
    if call.q.shape[2] < v.shape[2]:  # the image alone asks
        v = v[:, :, image_keys(call)]
    return 0.5 * attended(call) + 0.5 * v


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_against_the_map(name: str, precise: Precise) -> None:
    model, inputs = precise(name)
    site = own(find_sites(model))[-1].name
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    for control, function in ((PAG(scale=1.0, sites=site), itself), (SoftPAG(scale=1.0, sites=site), halfway)):
        expected = plain + (plain - call(model, inputs, Replace(sites=site, function=function)))
        out = call(model, inputs, control)
        assert (out - expected).norm() / expected.norm() < 1e-12
        assert (out - plain).norm() / expected.norm() > 1e-3
