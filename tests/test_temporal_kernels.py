"""The linear form of BroadWay's filter: parity with the published functions, naive FFT references, energies, pieces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import attention, temporal
from attnctl.kernels.bands import Band, filter_frames, motion_beta
from attnctl.kernels.temporal import Layer, Reference, guided_maps, weigh

FIXTURES = Path(__file__).parent / "fixtures" / "broadway"
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "cases.json").read_text())["cases"]
IDS = [c["case"] for c in CASES]


def fft_reference(attn: Tensor, tau: int, beta: float) -> Tensor:
    """Filter rows by FFT in float64, as the paper writes it: gain, real part, re-normalisation."""
    frames = attn.shape[-1]
    spectrum = torch.fft.fft(attn.double(), dim=-1)
    spectrum[..., frames // 2 - tau : frames // 2 + tau + 1] *= beta
    filtered = torch.fft.ifft(spectrum, dim=-1).real
    return filtered / filtered.sum(-1, keepdim=True)


def load(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read a recorded case and make queries and keys whose map is the recorded one."""
    t = load_file(FIXTURES / case["file"])
    for name in ("attn", "attn_ref"):
        if name in t:
            t[name.replace("attn", "q")] = t[name].double().log().to(dtype)
    t["k"] = torch.eye(case["params"]["F"], dtype=dtype).expand_as(t["q"])
    t["value"] = t["value"].to(dtype)
    return t


def enhanced(case: dict[str, Any], t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """Run one case through guidance, energy rule and enhancement; return map, output, energies and beta."""
    p, s = case["params"], case["sizes"]
    rows = p["B"]
    layer = Layer(rows, (s["H"], s["W"]), slice(rows // 2, rows))
    band = Band.of(p["F"], p["tau"])
    reference = None
    if "q_ref" in t:
        maps = temporal.centred_map(t["q_ref"], torch.eye(p["F"]).to(t["q_ref"]).expand_as(t["q_ref"]), 1.0)
        reference = Reference(maps, rows, (p["h"], p["w"]))
    pieces, energies = guided_maps(
        t["q"],
        t["k"],
        layer,
        reference,
        scale=1.0,
        alpha=p["alpha"],
        interpolation="bilinear" if p["mode"] == "bilinear" else "nearest",
        band=band,
    )
    beta: float | Tensor = p["beta"]
    if reference is not None and energies is not None:
        beta = motion_beta(*energies.sum(1), p["beta"])
    eye = torch.eye(p["F"], dtype=t["value"].dtype).expand_as(t["q"])
    attn = weigh(list(pieces), eye, band, beta)
    return attn, weigh(list(pieces), t["value"], band, beta), energies, beta


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parity_with_the_published_functions(case: dict[str, Any]) -> None:
    t, p = load(case), case["params"]
    attn, hidden, _, _ = enhanced(case, t)
    if p["F"] == 15:  # every bin is high: the published re-normalisation undoes the gain
        torch.testing.assert_close(attn, t["attn"], atol=4e-6, rtol=0)
    loose = p["beta"] >= 10
    torch.testing.assert_close(attn, t["attn_out"], atol=4e-5 if loose else 4e-6, rtol=0)
    torch.testing.assert_close(hidden, t["hidden_out"], atol=2e-4 if loose else 2e-5, rtol=0)
    torch.testing.assert_close(attn.sum(-1), torch.ones(attn.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c["case"].startswith("full")], ids=lambda c: c["case"])
def test_energies_and_beta_are_the_published_ones(case: dict[str, Any]) -> None:
    p, recorded = case["params"], case["scalars"]
    _, _, energies, beta = enhanced(case, load(case))
    assert energies is not None
    rows = case["sizes"]["positions"] // p["B"] * p["heads"] * p["F"]
    e1, e2, e2_low = energies.double().mean(1) / rows
    mean = 1 / p["F"]
    assert float(e1) + mean == pytest.approx(recorded["E1"], rel=1e-5)
    assert float(e2) + mean == pytest.approx(recorded["E2"], rel=1e-5)
    assert float(beta) == pytest.approx(recorded["beta_used"], rel=1e-5)
    if recorded["beta_c"] == "nan":
        return
    assert float(e2_low) + mean == pytest.approx(recorded["E2_l"], rel=1e-5)
    assert float(motion_beta(e1, e2, e2_low, 0.0)) == pytest.approx(recorded["beta_c"], rel=1e-5)
    e3 = e2_low + beta**2 * (e2 - e2_low)
    assert float(e3) + mean == pytest.approx(recorded["E3"], rel=1e-5)
    assert float(e3) >= float(e1) * (1 - 1e-6)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parity_in_bfloat16_where_the_fft_cannot_run(case: dict[str, Any]) -> None:
    if case["case"] == CASES[0]["case"]:
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.fft.fft(torch.ones(2, 16, dtype=torch.bfloat16))
    t, p = load(case, torch.bfloat16), case["params"]
    _, hidden, _, _ = enhanced(case, t)
    assert hidden.dtype == torch.bfloat16
    # Logits and values carry 8 bits: the plain product of the same map is off as much; the gain multiplies it.
    off = (hidden.double() - t["hidden_out"].double()).abs().max()
    assert off <= 0.05 * max(2.0, p["beta"])
    v_form = attention(t["q"], t["k"], filter_frames(t["value"], Band.of(p["F"], p["tau"]), p["beta"]), scale=1.0)
    if p["alpha"] == 0:
        assert (v_form.double() - t["hidden_out"].double()).abs().max() <= 0.05 * max(2.0, p["beta"])


@pytest.mark.parametrize("frames", [4, 5, 8, 12, 15, 16, 17, 20, 24, 25, 32])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 10.0])
def test_matrix_and_both_forms_equal_the_fft(frames: int, beta: float) -> None:
    g = torch.Generator().manual_seed(frames)
    q, k, v = (torch.randn(3, 2, frames, 5, generator=g, dtype=torch.float64) for _ in range(3))
    attn = (q @ k.mT / math.sqrt(5)).softmax(-1)
    for tau in range((frames - 1) // 2 + 1):
        band = Band.of(frames, tau)
        want = fft_reference(attn, tau, beta)
        torch.testing.assert_close(attn @ band.matrix(attn, beta), want, atol=1e-12, rtol=0)
        torch.testing.assert_close(attention(q, k, filter_frames(v, band, beta)), want @ v, atol=1e-12, rtol=0)
        layer = Layer(1, (1, 3), slice(0, 1))
        out = weigh(guided_maps(q, k, layer)[0], v, band, beta)
        torch.testing.assert_close(out, want @ v, atol=1e-12, rtol=0)
        if band.mean_only:
            mu, plain = v.mean(-2, keepdim=True), attention(q, k, v)
            torch.testing.assert_close(mu + beta * (plain - mu), want @ v, atol=1e-12, rtol=0)
    assert Band.of(frames).tau == frames // 2 - 1


def test_filter_works_along_any_axis_and_per_position() -> None:
    g = torch.Generator().manual_seed(1)
    v = torch.randn(2, 6, 3, 4, generator=g, dtype=torch.float64)
    band = Band.of(6, 1)
    want = filter_frames(v.movedim(1, -2), band, 2.0).movedim(-2, 1)
    torch.testing.assert_close(filter_frames(v, band, 2.0, dim=1), want)
    beta = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    out = filter_frames(v, band, beta, dim=1)
    assert torch.equal(out[0], v[0])
    torch.testing.assert_close(out[1], filter_frames(v[1], band, 3.0, dim=0))


def inputs(rows: int, grid: tuple[int, int], frames: int, heads: int = 2, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (rows * grid[0] * grid[1], heads, frames, 6)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("small", "big"), [((2, 3), (4, 6)), ((2, 3), (8, 6)), ((2, 3), (3, 5)), ((3, 2), (3, 2))])
def test_the_reference_is_broadcast_as_interpolation_would_copy_it(
    mode: temporal.Interpolation, small: tuple[int, int], big: tuple[int, int]
) -> None:
    q, k, v = inputs(2, big, 8)
    rq, rk, _ = inputs(2, small, 8, seed=1)
    maps = temporal.centred_map(rq, rk)
    planes = maps.reshape(2, *small, -1).permute(0, 3, 1, 2)
    options = {} if mode == "nearest" else {"align_corners": False}
    grown = torch.nn.functional.interpolate(planes, size=big, mode=mode, **options)
    grown = grown.permute(0, 2, 3, 1).reshape(-1, 2, 8, 8)
    attn = temporal.centred_map(q, k)
    want = torch.lerp(attn, grown, 0.6)
    layer = Layer(2, big, slice(1, 2))
    pieces, energies = guided_maps(
        q, k, layer, Reference(maps, 2, small), alpha=0.6, interpolation=mode, band=Band.of(8, 1)
    )
    torch.testing.assert_close(torch.cat(pieces), want, atol=1e-12, rtol=0)
    assert energies is not None
    half = want.shape[0] // 2
    low = Band.of(8, 1).low(want)
    expected = [attn[half:].square().sum(), want[half:].square().sum(), (want[half:] * (want[half:] @ low)).sum()]
    torch.testing.assert_close(energies[:, 0], torch.stack(expected), atol=0, rtol=1e-12)
    weight = torch.rand(len(q), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pieces, _ = guided_maps(q, k, layer, Reference(maps, 2, small), alpha=weight, interpolation=mode)
    torch.testing.assert_close(torch.cat(pieces), torch.lerp(attn, grown, weight.view(-1, 1, 1, 1)))
    out = weigh(pieces, v, Band.of(8, 1), weight)
    assert out.shape == v.shape


@pytest.mark.parametrize("tau", [3, 1])
def test_pieces_change_neither_energies_nor_output(tau: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, (8, 6), 8)
    maps = temporal.centred_map(*inputs(2, (4, 3), 8, seed=1)[:2])
    results = []
    for limit in (10**9, 1):
        monkeypatch.setattr(temporal, "_MAX_ELEMENTS", limit)
        layer, band = Layer(2, (8, 6), slice(1, 2)), Band.of(8, tau)
        pieces, energies = guided_maps(q, k, layer, Reference(maps, 2, (4, 3)), alpha=0.6, band=band)
        assert len(pieces) == (2 if limit > 1 else 8)
        assert energies is not None
        beta = motion_beta(*energies.sum(1), 1.0)
        results.append((energies, beta, weigh(pieces, v, band, beta)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tau", [3, 1])
@pytest.mark.parametrize(
    ("channels", "dtype", "inside"),
    [(8, torch.float64, True), (6, torch.float64, False), (80, torch.float32, True), (16, torch.bfloat16, False)],
)
def test_maps_may_wait_in_the_memory_of_the_output(tau: int, channels: int, dtype: torch.dtype, inside: bool) -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2 * 48, 2, 8, channels, generator=g).to(dtype) for _ in range(3))
    maps = temporal.centred_map(*inputs(2, (4, 3), 8, seed=1)[:2])
    layer, band = Layer(2, (8, 6), slice(1, 2)), Band.of(8, tau)
    results = []
    for out in (None, temporal.output_like(v)):
        pieces, energies = guided_maps(q, k, layer, Reference(maps, 2, (4, 3)), alpha=0.6, band=band, out=out)
        if out is not None:
            assert (pieces[0].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()) is inside
        assert energies is not None
        results.append(weigh(pieces, v, band, motion_beta(*energies.sum(1), 1.0), out))
        assert out is None or results[-1] is out
    assert torch.equal(*results)


def test_gradients_pass_through() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(2, (2, 2), 4))
    maps = temporal.centred_map(*inputs(2, (1, 1), 4, seed=1)[:2])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, band = Layer(2, (2, 2), slice(1, 2)), Band.of(4)
        pieces, energies = guided_maps(q, k, layer, Reference(maps, 2, (1, 1)), alpha=0.6, band=band)
        assert energies is not None
        return weigh(pieces, v, band, motion_beta(*energies.sum(1), 0.1))

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_heads_are_averaged_in_groups() -> None:
    maps = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    reference = Reference(maps, 2, (1, 2))
    assert reference.with_heads(6) is reference
    torch.testing.assert_close(reference.with_heads(3).maps, maps.unflatten(1, (3, 2)).mean(2))
    torch.testing.assert_close(reference.with_heads(4).maps, maps.mean(1, keepdim=True))
    assert torch.equal(reference.take(slice(1, 2)).maps, maps[2:])


@pytest.mark.parametrize(("frames", "tau"), [(16, 8), (8, 7), (15, 8), (16, -1)])
def test_tau_outside_the_spectrum_is_refused(frames: int, tau: int) -> None:
    with pytest.raises(ConfigError, match="leaves 0 to"):
        Band.of(frames, tau)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 or more"):
        Band.of(3)
