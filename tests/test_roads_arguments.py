"""What a host does with the arguments that it is handed, and in which wrapper it stands: results as by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, distance, perturbed, snapshot
from torch import Tensor

import attnctl
from attnctl.errors import ConfigError, SiteError
from attnctl.processors import PAG, AStar, Guidance

SITES = {"sd15": "mid", "hunyuandit": "blocks.1.attn1", "sdxl": "mid"}


def residuals(model: torch.nn.Module, inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    """Add the lists of residuals that adapters and ControlNets bring, which the host pops."""
    seeds = torch.Generator().manual_seed(5)

    def like(shape: Any) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=seeds, dtype=torch.float64)

    if kind == "t2i":  # one for each level, at the output of its last attention block
        shapes: list[Any] = []
        hooks = [b.register_forward_hook(lambda m, a, o: shapes.append(_added_at(m, o))) for b in model.down_blocks]
        zoo.call(model, inputs)
        for hook in hooks:
            hook.remove()
        return {**inputs, "down_intrablock_additional_residuals": [like(s) for s in shapes]}
    size = []
    hook = model.blocks[0].register_forward_hook(lambda m, a, o: size.append(o.shape))
    zoo.call(model, inputs)
    hook.remove()
    return {**inputs, "controlnet_block_samples": [like(size[0]) for _ in range(len(model.blocks) // 2 - 1)]}


def _added_at(block: torch.nn.Module, output: Any) -> Any:
    """Return the shape at which a down block takes its residual: ahead of its downsampling, where it attends."""
    attends = getattr(block, "has_cross_attention", False) and block.downsamplers is not None
    return output[1][-2].shape if attends else output[0].shape


def by_hand(model: torch.nn.Module, guidance: PAG, inputs: dict[str, Any]) -> Tensor:
    """Guide with two separate calls of the denoiser, each with containers of its own."""
    c = zoo.call(model, copy.deepcopy(inputs))
    p = perturbed(model, guidance, copy.deepcopy(inputs))
    return c + guidance.scale * (c - p)


@pytest.mark.parametrize(("family", "kind"), [("sd15", "t2i"), ("sdxl", "t2i"), ("hunyuandit", "controlnet")])
@pytest.mark.parametrize("replay", [True, False])
def test_lists_that_the_host_pops_are_whole_in_every_pass(family: str, kind: str, replay: bool) -> None:
    model, inputs = zoo.build(family)
    model = model.double()
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    if isinstance(inputs.get("added_cond_kwargs"), dict):
        inputs["added_cond_kwargs"] = {k: v.double() for k, v in inputs["added_cond_kwargs"].items()}
    inputs = residuals(model, inputs, kind)
    plain = zoo.call(model, copy.deepcopy(inputs))
    # Two branches: the second pass, too, needs lists that the first has not emptied.
    first, second = PAG(scale=2.0, sites=SITES[family]), PAG(scale=1.0, sites="self")
    expected = by_hand(model, first, inputs) + by_hand(model, second, inputs) - plain
    assert distance(expected, plain) > 1e-3
    for grad in (torch.no_grad, torch.inference_mode):
        with grad(), attnctl.control(model, first, second, layout="cond", replay=replay):
            out = zoo.call(model, copy.deepcopy(inputs))
        assert distance(out, expected) <= (1e-12 if family == "sd15" else 1e-6)


def test_moved_latents_leave_the_caller_s_lists_to_the_base_pass() -> None:
    pipe, kwargs = pipes.build("sd", torch.float64)
    forward = type(pipe.unet).forward
    lengths: list[int] = []

    class Popping(type(pipe.unet)):  # type: ignore[misc]
        """A host that takes its arguments apart."""

        def forward(
            self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, extras: Any = None, **rest: Any
        ) -> Any:
            lengths.append(len(extras["weights"]))
            scale = extras["weights"].pop()
            return forward(self, sample * scale, timestep, encoder_hidden_states, **rest)

    call = pipe.unet.forward
    del call
    pipe.unet.__class__ = Popping
    hook = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "extras": {"weights": [0.5, 1.0]}}),
        with_kwargs=True,
    )
    try:
        with attnctl.control(pipe, AStar(concepts=(1, 2), sites="mid"), PAG(scale=2.0, sites="mid")) as handle:
            pipes.run(pipe, kwargs)
            assert handle.guidance_forwards == handle.passes == 3
    finally:
        hook.remove()
    assert set(lengths) == {2}
    assert len(lengths) == 9  # base, guidance and perturbed pass of each step


@pytest.mark.parametrize("control", [PAG(scale=2.0, sites="mid"), AStar(concepts=(1, 2), sites="mid")])
def test_arguments_reach_a_wrapped_forward_as_they_were_given(control: Any) -> None:
    pipe, kwargs = pipes.build("sd")
    with attnctl.control(pipe, control):
        expected = pipes.run(pipe, kwargs)
    forward, seen = pipe.unet.forward, []

    def wrapped(*args: Any, **rest: Any) -> Any:  # as DeepCache does
        seen.append(list(pipe.scheduler.timesteps).index(args[1].item()))
        return forward(*args, **rest)

    pipe.unet.forward = wrapped
    try:
        with attnctl.control(pipe, control):
            assert torch.equal(pipes.run(pipe, kwargs), expected)
    finally:
        del pipe.unet.forward
    assert seen == [0, 0, 1, 1, 2, 2]


# Wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["distributed", "data"])
def test_wrappers_for_data_parallelism_do_not_count(group: None, kind: str) -> None:
    inner, inputs = zoo.build("sd15")
    control = PAG(scale=2.0, sites=4)
    with attnctl.control(inner, control, layout="cond") as handle:
        expected, names = zoo.call(inner, inputs), [s.name for s in handle.sites]
    parallel = torch.nn.parallel.DistributedDataParallel if kind == "distributed" else torch.nn.DataParallel
    wrapped: Any = parallel(inner)
    before = snapshot(inner)
    assert [s.name for s in attnctl.find_sites(wrapped)] == [s.name for s in attnctl.find_sites(inner)]
    with attnctl.control(wrapped, control, layout="cond") as handle:
        assert attnctl.handle_of(inner) is attnctl.handle_of(wrapped) is handle
        assert [s.name for s in handle.sites] == names
        assert torch.equal(zoo.call(wrapped, inputs), expected)
    assert_clean(before, inner)


# Numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [np.float32, np.float64, lambda x: torch.tensor(x), lambda x: torch.tensor([x])[0]])
def test_scalars_of_arrays_are_numbers(box: Any) -> None:
    control = PAG(scale=box(3.0), start=box(0.0), stop=box(0.5))
    assert control == PAG(scale=3.0, stop=0.5)
    assert all(type(v) is float for v in (control.scale, control.start, control.stop))
    assert isinstance(control, Guidance)


@pytest.mark.parametrize("box", [np.int64, np.uint8, lambda x: torch.tensor(x)])
def test_whole_scalars_of_arrays_are_depths_counts_and_steps(box: Any) -> None:
    model, _ = zoo.build("sd15")
    with attnctl.control(model, PAG(scale=2.0, sites=box(4), every=box(2)), layout="cond") as handle:
        (site,) = handle.sites
        assert site.depth == 4
        handle.set_step(box(1), box(3), np.float32(500.0))
        state = handle._watched[0].state
        assert (state.step, state.steps, state.timestep) == (1, 3, 500.0)
        with pytest.raises(ConfigError, match="set_step"):
            handle.set_step(box(3), box(3))


@pytest.mark.parametrize("row", [np.array([1, 2]), torch.tensor([1, 2]), np.array(["transformer_blocks.1.attn"])])
def test_rows_of_arrays_are_lists_of_sites(row: Any) -> None:
    model, _ = zoo.build("flux")
    control = PAG(sites=row, scope="all")
    assert isinstance(control.sites, list)
    assert "sites=[" in control.describe()
    assert control == PAG(sites=row.tolist(), scope="all")
    with attnctl.control(model, control, layout="cond"):
        pass
    with pytest.raises(SiteError, match="a name, glob, depth or range"), attnctl.control(model, PAG(sites=b"mid")):
        pass
