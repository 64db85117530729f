"""Losses on concept maps: recorded cases, closed-form gradients, properties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.processors.latent import losses
from attnctl.processors.latent.fields import step_sizes

FIXTURES = Path(__file__).parent / "fixtures" / "astar"
CASES = ("nonsquare_multitoken", "single_concept", "three_raw_smooth", "two_ae_smooth", "two_raw")


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one recorded case."""
    return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")


def aggregate(case: dict[str, Any], tensors: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> Tensor:
    """Average layers and heads: [1, T, h, w]."""
    layers = [tensors[f"{prefix}.{i}"].to(dtype) for i in range(case["layers"])]
    return torch.cat(layers).mean(0).T.reshape(1, case["T"], case["H"], case["W"])


def concept_maps(case: dict[str, Any], attention: Tensor) -> Tensor:
    """Normalise, blur and average over the tokens of each concept, as the case says."""
    x = losses.token_softmax(attention) if case["mode"] == "ae" else attention
    x = losses.smooth(x) if case["smooth"] else x
    return torch.stack([x[:, tokens].mean(1) for tokens in case["concepts"]], 1)


def grid_last(grad: Tensor) -> Tensor:
    """Turn [1, T, h, w] into the order of the recordings, [h, w, T]."""
    return grad[0].permute(1, 2, 0)


@pytest.mark.parametrize("name", CASES)
def test_astar_equals_the_recordings_in_float64(name: str) -> None:
    case, want = load(name)
    attention = aggregate(case, want, "probs", torch.float64).requires_grad_()
    maps = concept_maps(case, attention)
    mask = losses.binarise(concept_maps(case, aggregate(case, want, "prev_probs", torch.float64)), case["threshold"])
    seg, ret = losses.segregation(maps), losses.retention(maps, mask)
    near = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(maps[0], want["astar.maps"], **near)
    assert torch.equal(mask[0], want["astar.prev_mask"])
    for key, loss in (("seg", seg), ("ret", ret)):
        torch.testing.assert_close(loss, want[f"astar.L_{key}"], **near)
        by_maps, by_attention = torch.autograd.grad(loss.sum(), (maps, attention), retain_graph=True)
        torch.testing.assert_close(by_maps[0], want[f"astar.dL{key}_dmaps"], **near)
        torch.testing.assert_close(grid_last(by_attention), want[f"astar.dL{key}_dA"], **near)
    by_max = losses.normalise(maps, "max")
    seg, ret = losses.segregation(by_max), losses.retention(by_max, mask)
    torch.testing.assert_close(by_max[0], want["astarmax.maps"], **near)
    torch.testing.assert_close(seg, want["astarmax.L_seg"], **near)
    torch.testing.assert_close(ret, want["astarmax.L_ret"], **near)
    (grad,) = torch.autograd.grad((seg + ret).sum(), attention)
    torch.testing.assert_close(grid_last(grad), want["astarmax.dL_dA"], **near)


@pytest.mark.parametrize("name", CASES)
def test_float32_losses_equal_the_recordings(name: str) -> None:
    case, want = load(name)
    maps = concept_maps(case, aggregate(case, want, "probs", torch.float32))
    near = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(losses.segregation(maps), want["astar.L_seg"].float(), **near)
    torch.testing.assert_close(losses.retention(maps, want["astar.prev_mask"]), want["astar.L_ret"].float(), **near)


@pytest.mark.parametrize("name", CASES)
def test_attend_excite_equals_diffusers(name: str) -> None:
    case, want = load(name)
    attention = aggregate(case, want, "probs", torch.float32)
    torch.testing.assert_close(grid_last(attention), want["ae.aggregated"], rtol=1e-5, atol=1e-7)
    attention = want["ae.aggregated"].permute(2, 0, 1)[None].requires_grad_()
    maps = losses.smooth(losses.token_softmax(attention))[:, case["ae_indices"]]
    torch.testing.assert_close(maps[0], want["ae.smoothed"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(maps.amax((2, 3))[0], want["ae.max"], rtol=1e-5, atol=1e-7)
    loss = losses.attend_excite(maps)
    torch.testing.assert_close(loss, want["ae.loss"], rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), attention)
    torch.testing.assert_close(grid_last(grad), want["ae.grad_wrt_aggregated"], rtol=1e-4, atol=1e-6)


def test_kernel_equals_diffusers() -> None:
    dot = torch.zeros(5, 5)
    dot[2, 2] = 1
    torch.testing.assert_close(losses.smooth(dot)[1:4, 1:4], load("two_raw")[1]["ae.gauss_kernel"])


@pytest.mark.parametrize("n", [10, 25, 50])
def test_step_sizes_equal_the_recordings(n: int) -> None:
    want = json.loads((FIXTURES / "step_sizes.json").read_text())["sizes"][str(n)]
    assert [step_sizes(20.0, i, n) for i in range(n)] == pytest.approx(want, rel=1e-12)


def draw(seed: int, *shape: int) -> Tensor:
    """Draw maps in float64 with values in (0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), size=SIZES, factor=st.floats(1e-3, 1e3))
def test_segregation_is_bounded_symmetric_and_scale_free(seed: int, size: Any, factor: float) -> None:
    maps = draw(seed, *size)
    value, pairs = losses.segregation(maps), math.comb(size[1], 2)
    assert ((value >= 0) & (value <= pairs / 2 + 1e-12)).all()
    torch.testing.assert_close(losses.segregation(maps.flip(1)), value)
    torch.testing.assert_close(losses.segregation(maps * factor), value)
    same = maps[:, :1].expand(-1, size[1], -1, -1)
    torch.testing.assert_close(losses.segregation(same), torch.full_like(value, pairs / 2))
    torch.testing.assert_close(value, torch.cat([losses.segregation(m[None]) for m in maps]))


def test_disjoint_maps_are_segregated() -> None:
    maps = torch.zeros(1, 3, 3, 4)
    for c in range(3):
        maps[0, c, c] = 0.5
    assert losses.segregation(maps).item() == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), c=st.integers(1, 4))
def test_retention_ends(seed: int, c: int) -> None:
    masks = (draw(seed, 2, c, 4, 5) > 0.5).double()
    masks[..., 0, 0], masks[..., 0, 1] = 1, 0
    torch.testing.assert_close(losses.retention(masks, masks), torch.full((2,), c / 2, dtype=torch.float64))
    torch.testing.assert_close(losses.retention(1 - masks, masks), torch.full((2,), float(c), dtype=torch.float64))


def test_gradients_have_their_closed_forms() -> None:
    maps, mask = draw(0, 1, 2, 4, 5).requires_grad_(), (draw(1, 1, 2, 4, 5) > 0.5).double()
    a, b = maps.detach()[0]
    n, d = torch.minimum(a, b).sum(), (a + b).sum()
    (grad,) = torch.autograd.grad(losses.segregation(maps).sum(), maps)
    torch.testing.assert_close(grad[0, 0], (a < b) / d - n / d**2)
    (grad,) = torch.autograd.grad(losses.retention(maps, mask).sum(), maps)
    n, d = torch.minimum(a, mask[0, 0]).sum(), (a + mask[0, 0]).sum()
    torch.testing.assert_close(grad[0, 0], -((a < mask[0, 0]) / d - n / d**2))
    (grad,) = torch.autograd.grad(losses.attend_excite(maps).sum(), maps)
    peaks = maps.detach().amax((2, 3))[0]
    worst = int(peaks.argmin())
    want = torch.zeros_like(grad)
    want[0, worst][maps.detach()[0, worst] == peaks[worst]] = -1
    assert torch.equal(grad, want)


def test_one_concept_has_a_zero_gradient() -> None:
    maps = draw(0, 2, 1, 4, 4).requires_grad_()
    for loss in (losses.segregation, losses.divergence):
        value = loss(maps)
        assert torch.equal(value, torch.zeros(2, dtype=torch.float64))
        assert not torch.autograd.grad(value.sum(), maps)[0].any()


def test_zero_maps_have_finite_gradients() -> None:
    maps = torch.zeros(1, 2, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 2, 4, 4)
    for value in (
        losses.segregation(maps),
        losses.retention(maps, mask),
        losses.divergence(maps),
        losses.segregation(losses.normalise(maps, "max")),
        losses.segregation(losses.normalise(maps, "minmax")),
        losses.focus(maps, (0, 1)),
        losses.jedi(maps, (0, 1)),
    ):
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), maps)[0].isfinite().all()


def test_info_nce_equals_its_formula() -> None:
    maps, previous, groups = draw(0, 2, 4, 3, 3), draw(1, 2, 4, 3, 3), (0, 0, 1, 1)
    value = losses.info_nce(maps, groups, previous, temperature=0.5)
    rows = torch.cat([maps, previous], 1).flatten(2)
    labels = groups * 2
    for b in range(2):
        total = []
        sim = torch.nn.functional.cosine_similarity(rows[b][:, None], rows[b][None], dim=-1) / 0.5
        for i in range(8):
            negative = sum(sim[i, j].exp() for j in range(8) if labels[j] != labels[i])
            total += [-(sim[i, j].exp() / (sim[i, j].exp() + negative)).log() for j in range(8)
                      if j != i and labels[j] == labels[i]]  # fmt: skip
        torch.testing.assert_close(value[b], torch.stack(total).mean())
    assert losses.info_nce(maps[:, :1], (0,)).eq(0).all()


def test_total_variation_and_attendance() -> None:
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, 0, 1] = 1  # a bar across: every difference down is 1, none across
    assert losses.total_variation(maps)[0].tolist() == [1, 0]
    maps[0, 1, :, 0] = 1
    torch.testing.assert_close(losses.total_variation(maps)[0], torch.tensor([1, 1 / 3]))
    torch.testing.assert_close(losses.attendance(maps), torch.tensor([-1 / 3]))


def test_divergence_ends() -> None:
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, 0, 0], maps[0, 1, 1, 1] = 3, 5
    torch.testing.assert_close(losses.divergence(maps), torch.ones(1))
    assert losses.divergence(maps[:, :1].expand(-1, 2, -1, -1)).abs().item() < 1e-6


def test_focus_ends() -> None:
    maps = torch.zeros(1, 4, 2, 2)
    maps[0, :2, 0, 0], maps[0, 2:, 1, 1] = 1, 1
    assert losses.focus(maps, (0, 0, 1, 1)).abs().item() < 1e-6
    torch.testing.assert_close(losses.focus(maps, (0, 1, 0, 1)), torch.ones(1))


def test_jedi_ends_and_formula() -> None:
    maps = torch.zeros(1, 4, 2, 2)
    maps[0, :2, 0, 0], maps[0, 2:, 1, 1] = 1, 1
    torch.testing.assert_close(losses.jedi(maps, (0, 0, 1, 1)), torch.tensor([0.01]))  # sharp: no entropy at all
    torch.testing.assert_close(losses.jedi(maps, (0, 1, 0, 1), diversity=0.0), torch.tensor([2.0]))
    even = torch.ones(1, 4, 2, 2)  # alike everywhere: nothing within, nothing between, the greatest entropy
    torch.testing.assert_close(losses.jedi(even, (0, 0, 1, 1), diversity=0.5), torch.tensor([1.0]))
    maps, groups = draw(3, 1, 3, 3, 2), (0, 1, 0)
    p = [m.flatten() / m.sum() for m in maps[0]]

    def entropy(q: Tensor) -> Tensor:
        return -(q * q.log()).sum()

    def jsd(*q: Tensor) -> Tensor:
        return (entropy(sum(q) / len(q)) - sum(map(entropy, q)) / len(q)) / math.log(len(q))

    within, between = jsd(p[0], p[2]) / 2, jsd((p[0] + p[2]) / 2, p[1])  # the group of one map has none within
    want = within + 1 - between + 0.25 * (1 - sum(map(entropy, p)) / 3 / math.log(6))
    torch.testing.assert_close(losses.jedi(maps, groups, diversity=0.25)[0], want)


def test_self_cross_equals_its_formula() -> None:
    maps, masks, attention = draw(0, 1, 2, 2, 3), (draw(1, 1, 2, 2, 3) > 0.3).double(), draw(2, 1, 6, 6).softmax(-1)
    seen = [(maps[0, c] * masks[0, c]).flatten() @ attention[0] for c in range(2)]
    seen = [s / s.sum() for s in seen]
    maps_ = [maps[0, c].flatten() / maps[0, c].sum() for c in range(2)]
    want = (torch.minimum(seen[0], maps_[1]).sum() + torch.minimum(seen[1], maps_[0]).sum()) / 2
    torch.testing.assert_close(losses.self_cross(maps, masks, attention)[0], want)


@pytest.mark.parametrize("rule", [0.5, "mean", "otsu"])
def test_binarise_separates_two_levels(rule: Any) -> None:
    maps = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    maps[..., 1:3, :2] += 0.8
    want = torch.zeros_like(maps)
    want[..., 1:3, :2] = 1
    assert torch.equal(losses.binarise(maps.requires_grad_(), rule), want)


def test_a_bar_stays_in_its_row() -> None:
    maps = torch.zeros(1, 1, 7, 9)
    maps[..., 4, :] = 1
    for how in ("none", "max", "minmax"):
        kept = losses.binarise(losses.smooth(losses.normalise(maps, how)))  # type: ignore[arg-type]
        assert kept[0, 0].sum(1).tolist() == [0, 0, 0, 0, 9, 0, 0]


def test_inputs_are_not_changed() -> None:
    maps, mask = draw(0, 1, 3, 4, 4), draw(1, 1, 3, 4, 4)
    copies = maps.clone(), mask.clone()
    losses.smooth(losses.token_softmax(maps))
    losses.normalise(maps, "minmax")
    losses.retention(maps, mask)
    losses.segregation(maps)
    losses.focus(maps, (0, 0, 1))
    losses.jedi(maps, (0, 0, 1))
    assert torch.equal(maps, copies[0])
    assert torch.equal(mask, copies[1])


@pytest.mark.parametrize("loss", [losses.info_nce, losses.focus, losses.jedi])
def test_groups_must_fit(loss: Any) -> None:
    with pytest.raises(ConfigError, match="3 concepts"):
        loss(draw(0, 1, 3, 4, 4), (0, 1))
