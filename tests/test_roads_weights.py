"""Weights that are stored in 8 bits or elsewhere, and models compiled as a whole: right, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, distance, own, snapshot

import attnctl
from attnctl.core.hosts.caches import saved_weights
from attnctl.errors import BackendError
from attnctl.kernels import dispatch
from attnctl.processors import SEG, SLG, AStar, AttendExcite, SoftPAG

EIGHT = torch.float8_e4m3fn


def fits_eight_bits(model: torch.nn.Module) -> None:
    """Give weights values that storage in 8 bits does not change."""
    for p in model.parameters():
        p.data = p.data.to(EIGHT).to(p.dtype)


# Gradients through weights that change their type as soon as their layer has run


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("sd", AStar(concepts=(1, 2), step_size=5.0)),
        ("sd", AttendExcite(concepts=(1, 2), checkpoint=True)),
        ("sd3", AStar(concepts=(1, 2), step_size=5.0)),
    ],
)
def test_latents_move_alike_with_weights_in_eight_bits(name: str, control: Any) -> None:
    pipe, kwargs = pipes.build(name)
    model = pipes.denoiser(pipe)
    fits_eight_bits(model)
    with attnctl.control(pipe, control):
        want = pipes.run(pipe, kwargs)
    model.enable_layerwise_casting(storage_dtype=EIGHT, compute_dtype=torch.float32, skip_modules_pattern=None)
    plain, before = pipes.run(pipe, kwargs), snapshot(model)
    stored = [p.dtype for p in model.parameters()]
    assert EIGHT in stored
    with attnctl.control(pipe, control):
        assert torch.equal(pipes.run(pipe, kwargs), want)
    assert_clean(before, model)
    assert [p.dtype for p in model.parameters()] == stored
    assert torch.equal(pipes.run(pipe, kwargs), plain)


def test_a_weight_that_another_hook_moves_away_is_saved_as_it_was_used() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Away(ModelHook):
        """Stands for group offloading: the weight is in its place while its layer runs only."""

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            module.weight.data = module.weight.data.to(torch.float32)
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            module.weight.data = module.weight.data.to(torch.float64)
            return output

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.SiLU()).requires_grad_(False)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    HookRegistry.check_if_exists_or_initialize(layer[0]).register_hook(Away(), "group_offloading")
    with pytest.raises(RuntimeError):
        torch.autograd.grad(layer(x).sum(), x)
    with saved_weights(layer):
        (got,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(got, want)


# A kernel asked for by name


@pytest.mark.parametrize("control", [SoftPAG(u=0.5), SEG(sigma=2.0)])
@pytest.mark.parametrize("stored", ["in 8 bits", "elsewhere"])
@pytest.mark.usefixtures("no_grad")
def test_the_first_call_refuses_a_kernel_that_cannot_run(control: Any, stored: str) -> None:
    """Weights in 8 bits or on the meta device do not show what q will be; the first call does."""
    pipe, kwargs = pipes.build("sd")
    if stored == "in 8 bits":
        pipe.unet.enable_layerwise_casting(storage_dtype=EIGHT, compute_dtype=torch.float32)
    else:
        from accelerate import cpu_offload

        cpu_offload(pipe.unet, torch.device("cpu"))
        assert any(p.is_meta for p in pipe.unet.parameters())
    reason = dispatch._KERNELS["xformers"].declines(*[torch.zeros(1, 1, 4, 8)] * 3, None)
    assert reason or dispatch.probe("xformers", "cpu", torch.float32, 8, False)
    words = r"'xformers' was given.*Backends that can: 'sdpa', 'math'\. Or leave"
    with attnctl.control(pipe, control, backend="xformers"), pytest.raises(BackendError, match=words):
        pipes.run(pipe, kwargs)
    assert not any("Controlled" in type(p).__name__ for p in pipe.unet.attn_processors.values())
    for able in ("sdpa", "math"):
        with attnctl.control(pipe, control, backend=able) as handle:
            pipes.run(pipe, kwargs)
            assert handle.passes


# A bare model that was compiled as a whole, and called by the name of what `torch.compile` returned


@pytest.mark.compile
@pytest.mark.usefixtures("no_grad")
def test_a_whole_model_compiled_before_or_under_control() -> None:
    model, inputs = zoo.build("sd3", num_layers=2)
    plain = zoo.call(model, inputs)
    control = SLG(sites=own(attnctl.find_sites(model))[0].name, start=0.3, stop=0.7)

    def steps(call: Any, handle: Any) -> list[torch.Tensor]:
        outputs = []
        for i in range(4):
            handle.set_step(i, 4)
            outputs.append(zoo.unpack(call(**inputs)))
        return outputs

    with attnctl.control(model, control, layout="cond") as handle:
        want = steps(model, handle)
    whole = torch.compile(model, backend="eager")
    whole(**inputs)
    with attnctl.control(model, control, layout="cond") as handle:
        for got, right in zip(steps(whole, handle), want, strict=True):
            assert distance(got, right) <= 1e-6
        assert handle.passes == 1
        # One graph without a break has no place for hooks; the error gives the remedy.
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile_repeated_blocks\(fullgraph=True\)"):
            torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    torch._dynamo.reset()
    assert distance(zoo.unpack(whole(**inputs)), plain) <= 1e-6
