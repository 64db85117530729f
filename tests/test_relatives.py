"""SEG, SLG, TPG and NAG against their formulas, written out by hand on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes

import attnctl
from attnctl.errors import AttnctlError, ConfigError, NeverApplied, SiteError, UnsupportedModelError
from attnctl.processors import NAG, PAG, SEG, SLG, TPG, SoftPAG
from attnctl.processors.nag import normalized_guidance


def middle(model: Any) -> str:
    """Name the self or joint site in the middle of a model."""
    found = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    return found[len(found) // 2]


def run(model: Any, inputs: dict[str, Any], *controls: Any, layout: Any = "cond") -> torch.Tensor:
    """Call a model under controls."""
    with torch.no_grad(), attnctl.control(model, *controls, layout=layout):
        return zoo.call(model, inputs)


@pytest.mark.parametrize("name", ["sd15", "pixart", "latte"])
def test_seg_infinite_equals_query_mean(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    site = middle(model)
    seg = run(model, inputs, SEG(scale=2.0, sites=site))
    mean = run(model, inputs, SoftPAG(scale=2.0, u=1.0, sites=site, target="query_mean"))
    assert (seg - mean).norm() <= 1e-10 * mean.norm()


def test_seg_grows_from_plain_to_the_mean() -> None:
    model, inputs = zoo.build("sd15")
    site = middle(model)
    with torch.no_grad():
        plain = zoo.call(model, inputs)
    effects = [float((run(model, inputs, SEG(sites=site, sigma=s)) - plain).norm()) for s in (0.0, 0.3, 1.0, math.inf)]
    assert effects[0] == 0.0
    assert 0 < effects[1] < effects[2]


def test_seg_refuses_linear_attention_and_frames() -> None:
    sana, _ = zoo.build("sana")
    with pytest.raises(UnsupportedModelError, match="linear"):
        attnctl.control(sana, SEG(sites=middle(sana)))
    wan, inputs = zoo.build("wan")
    with pytest.raises(UnsupportedModelError, match="inf"):
        run(wan, inputs, SEG(sites=middle(wan), sigma=1.0))


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
        lambda: SEG(sigma=-1.0),
        lambda: SEG(sigma=math.nan),
        lambda: TPG(seed=-1),
        lambda: TPG(seed=1.5),  # type: ignore[arg-type]
        lambda: TPG(seed=10**30),
        lambda: NAG(tau=0.5),
        lambda: NAG(alpha=1.5),
        lambda: SLG(scale=math.inf),
    ],
)
def test_bad_fields(make: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert isinstance(error.value, AttnctlError)


def test_a_block_that_never_runs_is_an_error() -> None:
    model, inputs = zoo.build("latte")
    with (
        attnctl.control(model, SLG(sites="temporal_transformer_blocks.1", start=0.0, stop=1.0), layout="cond"),
        pytest.raises(NeverApplied, match=r"temporal_transformer_blocks\.1"),
        torch.no_grad(),
    ):
        zoo.call(model, inputs | {"enable_temporal_attentions": False})
