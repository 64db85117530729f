"""NAG against its formula, written out by hand, and beside a guidance whose pass it must reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from contract import run

import attnctl
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.processors import NAG, PAG
from attnctl.processors.nag import normalized_guidance


def test_nag_formula() -> None:
    g = torch.Generator().manual_seed(0)
    p, n = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    out = normalized_guidance(p.float(), n.float(), 2.0, 1.5, 0.5)
    for b in range(2):
        for t in range(5):
            zp, zn = p[b, :, t].flatten(), n[b, :, t].flatten()
            z = zp + 2.0 * (zp - zn)
            r = z.abs().sum() / zp.abs().sum()
            z = z * min(float(r), 1.5) / r
            expected = 0.5 * z + 0.5 * zp
            assert (out[b, :, t].flatten().double() - expected).abs().max() < 1e-5


def test_nag_needs_negative_rows() -> None:
    model, inputs = zoo.build("pixart")
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    guided = run(model, inputs, NAG(), layout="uncond_first")
    assert torch.equal(guided[:1], plain[:1])  # negative rows stay
    assert not torch.allclose(guided[1:], plain[1:])
    assert torch.equal(run(model, inputs, NAG(scale=0.0), layout="uncond_first"), plain)
    with pytest.raises(UnsupportedModelError, match="negative rows"):
        run(model, inputs, NAG())
    joint, _ = zoo.build("flux")
    with pytest.raises(SiteError):
        attnctl.control(joint, NAG())


def test_nag_and_pag_together() -> None:
    # p must carry NAG too: with PAG at weight w the prompt row moves by w (c_nag - p_nag).
    model, inputs = zoo.build("pixart", dtype=torch.float64)
    site = "transformer_blocks.2.attn1"
    nag = run(model, inputs, NAG(), layout="uncond_first")
    both = run(model, inputs, PAG(scale=1.0, sites=site), NAG(), layout="uncond_first")
    original = model.get_submodule("transformer_blocks.2").attn1.processor
    model.get_submodule("transformer_blocks.2").attn1.processor = attnctl.attn_processors(model, PAG(sites=site))[
        f"{site}.processor"
    ]
    replaced = run(model, inputs, NAG(), layout="uncond_first")
    model.get_submodule("transformer_blocks.2").attn1.processor = original
    expected = nag + (nag[1:] - replaced[1:])
    assert (both - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: NAG(tau=0.5),
        lambda: NAG(alpha=1.5),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
