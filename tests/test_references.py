"""A reference picture, and a bank of identity pictures: against the formulas written out, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
import zoo_pipelines as pipes
from contract import Replace
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.autoencoders import Coder
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.processors import PAG, Consistent, IdentityBank, ReferenceOnly, ShareAttention
from attnctl.processors.editing.source import MemoryBudgetError

pytestmark = pytest.mark.usefixtures("no_grad")


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def calls_of(pipe: Any, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a pipeline plain, and return the arguments of each call of its denoiser."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, given: dict[str, Any]) -> None:
        named = dict(zip(("sample", "timestep"), args, strict=False))
        calls.append(named | given)

    handle = pipes.denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipes.run(pipe, kwargs)
    finally:
        handle.remove()
    return calls


def with_noise(pipe: Any, clean: Tensor, step: int, seed: int) -> Tensor:
    """Bring a reference to the noise level of a step, by the scheduler's own rule."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    scheduler = pipe.scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        return scheduler.add_noise(clean.double(), noise.double(), scheduler.timesteps[step : step + 1])
    sigma = float(scheduler.sigmas[step])
    return (1 - sigma) * clean + sigma * noise


def _written_out(pipe: Any, kwargs: dict[str, Any], clean: Tensor, fidelity: float, bias: float, calls: int) -> Tensor:
    """Run a pipeline with the formula in place of its self- and joint attention; `calls` calls of a step."""
    model = pipes.denoiser(pipe)
    name = "sample" if hasattr(pipe, "unet") else "hidden_states"
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    for i, given in enumerate(calls_of(pipe, kwargs)):
        x = given[name]
        # The scheduler computes in the type that the pipeline keeps its latents in.
        level = with_noise(pipe, clean, i // calls, 3).to(x.dtype)
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def note(c: AttnCall, proceed: Proceed, kept: Any = kept) -> Tensor:
            image = c.image or slice(0, c.k.shape[2])
            kept[c.site.name] = c.k[:, :, image], c.v[:, :, image]
            return proceed(c)

        sites = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
        with attnctl.control(model, Replace(sites=sites, function=note), layout="cond") as handle:
            handle.set_step(0, 1)
            model(**(given | {name: level.expand(x.shape)}))
        seen.append(kept)
    count = [0]

    def attend(c: AttnCall, proceed: Proceed) -> Tensor:
        k, v = seen[count[0] // len(seen[0])][c.site.name]
        count[0] += 1
        logits = c.q @ torch.cat([c.k, k], 2).mT * (c.scale or c.q.shape[-1] ** -0.5)
        logits[..., c.k.shape[2] :] += bias
        assert c.mask is None
        out = logits.softmax(-1) @ torch.cat([c.v, v], 2)
        rows = c.state.rows
        negative = slice(0, rows.total) if rows.role == "uncond" else rows.uncond
        if negative is not None:
            plain = F.scaled_dot_product_attention(c.q[negative], c.k[negative], c.v[negative], scale=c.scale)
            out[negative] = fidelity * plain + (1 - fidelity) * out[negative]
        return out

    with attnctl.control(pipe, Replace(sites=sites, function=attend)):
        return pipes.run(pipe, kwargs)


@pytest.mark.parametrize(("name", "calls"), [("sd", 1), ("sd3", 1), ("flux", 1), ("wan", 2)])
def test_a_reference_is_seen_at_the_noise_level_of_each_step(name: str, calls: int) -> None:
    pipe, kwargs = pipes.build(name, torch.float64)
    kwargs |= {"num_inference_steps": 2}
    main = calls_of(pipe, kwargs)[0]["sample" if name == "sd" else "hidden_states"]
    clean = torch.randn(main[:1].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    control = ReferenceOnly(reference=clean[0], fidelity=0.3, bias=0.2, seed=3)
    with attnctl.control(pipe, control):
        out = pipes.run(pipe, kwargs)
    expected = _written_out(pipe, kwargs, clean, 0.3, 0.2, calls)
    assert (out - expected).abs().max() < (1e-12 if name == "sd" else 1e-6)  # float32 latents between steps
    assert (out - pipes.run(pipe, kwargs)).abs().max() > 1e-4


def test_pictures_and_files_become_latents_of_the_run(tmp_path: Path) -> None:
    pipe, kwargs = pipes.build("sd")
    picture().save(tmp_path / "one.png")
    height, width = (n * 2 for n in pipes.run(pipe, kwargs).shape[-2:])
    whole = Image.open(tmp_path / "one.png").resize((width, height))
    latents = Coder(pipe).encode(np.array(whole)[None]).latents[0]
    outs = []
    for given in (whole, np.asarray(whole), latents):
        with attnctl.control(pipe, ReferenceOnly(reference=given)):
            outs.append(pipes.run(pipe, kwargs))
    assert torch.equal(outs[0], outs[1])
    assert (outs[2] - outs[0]).norm() < 1e-5 * outs[0].norm()
    with attnctl.control(pipe, ReferenceOnly(reference=tmp_path / "one.png")) as handle:  # cut, and brought to the size
        assert pipes.run(pipe, kwargs).isfinite().all()
        assert torch.equal(pipes.run(pipe, kwargs), pipes.run(pipe, kwargs))
        handle.enabled = False
        plain = pipes.run(pipe, kwargs)
    assert torch.equal(plain, pipes.run(pipe, kwargs))
    control = ReferenceOnly(reference=str(tmp_path / "one.png"))
    assert control_from_dict(control_to_dict(control)) == control


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "animatediff", "sdxl"])
def test_a_picture_serves_every_kind_of_pipeline(name: str) -> None:
    pipe, kwargs = pipes.build(name)
    if getattr(pipe, "vae", None) is None:
        with pytest.raises(UnsupportedModelError, match="no autoencoder"):
            attnctl.control(pipe, ReferenceOnly(reference=picture()))
        return
    plain = pipes.run(pipe, kwargs)
    with attnctl.control(pipe, ReferenceOnly(reference=picture())):
        out = pipes.run(pipe, kwargs)
    assert out.isfinite().all()
    assert (out - plain).abs().max() > 1e-5


def test_batch_neighbours_do_not_matter_and_each_may_have_its_reference() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64, batch=2)
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    refs = tuple(torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    one = {k: v[:1] if isinstance(v, list) else v for k, v in kwargs.items()}

    def run(call: dict[str, Any], reference: Any, latents: Tensor) -> Tensor:
        with attnctl.control(pipe, ReferenceOnly(reference=reference, chance=0.8, share=0.6)):
            return pipes.run(pipe, call, latents=latents)

    both = run(kwargs, refs[0], noise)
    assert (both[:1] - run(one, refs[0], noise[:1])).abs().max() < 1e-12
    each = run(kwargs, refs, noise)
    assert (each[:1] - both[:1]).abs().max() < 1e-12
    assert (each[1:] - both[1:]).abs().max() > 1e-6
    with pytest.raises(ConfigError, match="2 references were given for a batch of 1"):
        run(one, refs, noise[:1])


def test_guidance_sees_the_reference_too() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    reference = ReferenceOnly(reference=torch.randn(4, 16, 12))
    outs = []
    for controls in ((reference,), (reference, PAG(scale=2.0, sites="mid"))):
        with attnctl.control(pipe, *controls):
            outs.append(pipes.run(pipe, kwargs))
    assert (outs[0] - outs[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "is no picture"),
        ((), "holds no picture"),
        (3, "is no picture"),
        (torch.full((4, 8, 8), math.nan), "not finite"),
        (torch.ones(4, 8, 8, dtype=torch.long), "is no picture"),
        (np.zeros((4, 4, 7), np.uint8), "is no picture"),
    ],
)
def test_what_is_no_reference_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ReferenceOnly(reference=given)


def test_references_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe, kwargs = pipes.build("sd")
    with pytest.raises(ConfigError, match="leave out sources, take"):
        ReferenceOnly(reference=picture(), sources="others", take="replace")
    with pytest.raises(ConfigError, match=r"none\.png"):
        attnctl.control(pipe, ReferenceOnly(reference=tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"text\.png"):
        attnctl.control(pipe, ReferenceOnly(reference=tmp_path / "text.png"))
    for shape in ((16, 16, 12), (4, 8, 8)):  # of another model, and of another size
        with (
            attnctl.control(pipe, ReferenceOnly(reference=torch.zeros(shape))),
            pytest.raises(ConfigError, match="latents of this model and size"),
        ):
            pipes.run(pipe, kwargs)
    model, _ = zoo.build("sd15")
    with pytest.raises(UnsupportedModelError, match="control the pipeline"):
        attnctl.control(model, ReferenceOnly(reference=picture()))
    assert "picture 40x30" in repr(ReferenceOnly(reference=picture()))
    assert ReferenceOnly(reference=picture()) == ReferenceOnly(reference=picture())
    assert ReferenceOnly(reference=picture()) != ReferenceOnly(reference=picture(seed=1))


# The bank


def story(pipe: Any, kwargs: dict[str, Any], prompts: list[str], noise: Tensor, *controls: Any, **more: Any) -> Tensor:
    call = kwargs | {"prompt": prompts, "negative_prompt": [""] * len(prompts), "latents": noise} | more
    if not controls:
        return pipes.run(pipe, call)
    with attnctl.control(pipe, *controls):
        return pipes.run(pipe, call)


IDS, LATER = ["a cat", "two birds"], "a black bear in the water"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_later_pictures_see_what_the_first_run_drew(scale: float) -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    kwargs |= {"num_inference_steps": 3, "guidance_scale": scale}
    noise = torch.randn(3, 4, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings: dict[str, Any] = {"share": 0.4, "chance": 0.6, "late_chance": 0.8, "bias": 0.1, "seed": 2}
    bank = IdentityBank()
    control = Consistent(bank=bank, **settings)
    first = story(pipe, kwargs, IDS, noise[:2], control)
    assert torch.equal(first, story(pipe, kwargs, IDS, noise[:2], Consistent(**settings)))
    assert bank.complete
    assert bank.pictures == 2
    assert 0 < bank.nbytes == bank.expected
    later = story(pipe, kwargs, [LATER], noise[2:], control)

    plain = Consistent(**settings)

    def attend(c: AttnCall, proceed: Proceed) -> Tensor:
        """Let pictures 0 and 1 see each other, and picture 2 both of them."""
        tokens = plain.drawn_tokens(c, slice(0, c.k.shape[2]))
        if tokens is None:
            return proceed(c)
        out = torch.empty_like(c.q)
        for half in range(c.q.shape[0] // 3):
            for i, others in enumerate(([1], [0], [0, 1])):
                row = 3 * half + i
                k, v = (torch.cat([x[row], *(x[3 * half + j][:, tokens] for j in others)], 1) for x in (c.k, c.v))
                logits = c.q[row] @ k.mT * c.q.shape[-1] ** -0.5
                logits[..., c.k.shape[2] :] += 0.1
                out[row] = logits.softmax(-1) @ v
        return out

    sites = [s.name for s in attnctl.find_sites(pipe) if s.kind == "self" and s.name.startswith("up_blocks")]
    together = story(pipe, kwargs, [*IDS, LATER], noise, Replace(sites=sites, function=attend))
    assert (together[:2] - first).abs().max() < 1e-12
    assert (together[2:] - later).abs().max() < 1e-12
    assert (story(pipe, kwargs, [LATER], noise[2:]) - later).abs().max() > 1e-6
    pair = story(pipe, kwargs, ["a cat", LATER], noise[1:], control)  # whoever is made beside it
    assert (pair[1:] - later).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["sd3", "wan", "animatediff"])
def test_a_bank_of_every_kind_of_model(name: str) -> None:
    pipe, kwargs = pipes.build(name, batch=2)
    one = {k: v[:1] if isinstance(v, (list, Tensor)) else v for k, v in kwargs.items()}
    bank = IdentityBank(ids=(1,), where="model")
    with attnctl.control(pipe, Consistent(bank=bank, chance=1.0)) as handle:
        pipes.run(pipe, kwargs)
        assert "1 pictures" in handle.report()
        out = pipes.run(pipe, one)
    assert bank.nbytes == bank.expected > 0
    assert out.isfinite().all()
    assert (out - pipes.run(pipe, one)).abs().max() > 1e-5


def test_a_bank_is_refused_before_it_is_full_and_where_it_does_not_fit() -> None:
    pipe, kwargs = pipes.build("sd")
    kwargs |= {"guidance_scale": 4.0}
    noise = torch.randn(3, 4, 16, 12)
    small = IdentityBank(budget=1000)
    with pytest.raises(MemoryBudgetError, match="bank of 2 pictures would take"):
        story(pipe, kwargs, IDS, noise[:2], Consistent(bank=small))
    assert small.nbytes == 0
    assert not small.complete
    with pytest.raises(ConfigError, match="from 0 to 1"):
        story(pipe, kwargs, IDS, noise[:2], Consistent(bank=IdentityBank(ids=(2,))))
    with pytest.raises(ConfigError, match="one: pass several prompts"):
        story(pipe, kwargs, IDS[:1], noise[:1], Consistent(bank=IdentityBank(), chance=1.0))
    bank = IdentityBank()
    story(pipe, kwargs, IDS, noise[:2], Consistent(bank=bank))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Consistent(bank=bank), {"num_inference_steps": 5}, "written in 3 steps"),
        (Consistent(bank=bank, sites="self"), {}, "attentions that the bank lacks, such as"),
    ]
    for control, more, words in cases:
        with pytest.raises(ConfigError, match=words):
            story(pipe, kwargs, [LATER], noise[2:], control, **more)
    story(pipe, kwargs, [LATER], noise[2:], Consistent(bank=bank), guidance_scale=1.0)  # its own half is there
    bank.clear()
    story(pipe, kwargs, IDS, noise[:2], Consistent(bank=bank), guidance_scale=1.0)
    with pytest.raises(ConfigError, match="without negative rows"):
        story(pipe, kwargs, [LATER], noise[2:], Consistent(bank=bank))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IdentityBank(where="disk"), "cpu, model"),  # type: ignore[arg-type]
        (lambda: IdentityBank(ids=()), "one picture or more"),
        (lambda: IdentityBank(ids=(0, 0)), "twice"),
        (lambda: IdentityBank(ids=(-1,)), "ids"),
        (lambda: IdentityBank(budget=-1), "budget"),
        (lambda: Consistent(bank=3), "is no bank"),  # type: ignore[arg-type]
        (lambda: Consistent(bank=IdentityBank(), sources="first"), "leave out sources"),
        (lambda: control_to_dict(Consistent(bank=IdentityBank())), "cannot be kept in a record"),
        (lambda: ShareAttention(share=0.0), "share"),
    ],
)
def test_what_is_no_bank_is_refused(make: Any, words: str) -> None:
    with pytest.raises(AttnctlError, match=words):
        make()
