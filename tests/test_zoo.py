"""Check that the zoo's models and pipelines run and are sharp enough to show a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
import zoo_pipelines as pipes
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnctl.core.hosts.classes import denoiser_classes

pytestmark = pytest.mark.usefixtures("no_grad")


class Uniform(TorchFunctionMode):
    """Replace every attention map by the uniform one and keep the entropy of the true maps."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[int] = []
        self.entropies: list[float] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v = args if args else (kwargs["query"], kwargs["key"], kwargs["value"])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        w = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        self.heads.append(q.shape[1])
        if w.shape[-1] > 1:
            entropy = torch.special.entr(w).sum(dim=-1).mean() / torch.tensor(w.shape[-1]).log()
            self.entropies.append(entropy.item())
        return v.mean(dim=-2, keepdim=True).expand(*q.shape[:-1], -1).clone()


# Hosts whose attention cannot be seen from outside: it is flex_attention alone, compiled.
HIDDEN = frozenset({"anyflow_far", "kandinsky6_sr"})
# Hosts whose rows are not their inputs' first axis everywhere.
LAYERS_FIRST = frozenset({"hidream"})


@pytest.fixture(params=zoo.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Name one denoiser."""
    return request.param


def test_every_way_of_guidance_is_known() -> None:
    assert {*zoo.NAMES} >= zoo.COND_FIRST | zoo.SEQUENTIAL | zoo.DISTILLED
    assert {*pipes.NAMES} >= {*pipes.PAG_TWINS, *pipes.PAG_TWINS.values()}


def test_every_denoiser_class_has_a_model() -> None:
    built = {type(zoo.build(name)[0]).__name__ for name in zoo.NAMES} | {h.name for h in zoo.HOSTS.values()}
    assert built == {*denoiser_classes()}


@pytest.mark.parametrize("name", [n for n in zoo.HOSTS if n not in HIDDEN])
def test_host_repeats_itself_and_depends_on_attention(name: str) -> None:
    host = zoo.HOSTS[name]
    model, inputs = zoo.build(name)
    assert all(weight.any() for weight in model.parameters())
    out = zoo.call(model, inputs)
    assert out.isfinite().all()
    assert torch.equal(out, zoo.call(*zoo.build(name)))
    with Uniform() as uniform:
        flat = zoo.call(model, inputs)
    assert len(uniform.heads) >= 4
    assert min(uniform.heads) > 1
    assert 0.1 < min(uniform.entropies) < 0.97
    assert (out - flat).std() > 0.01 * out.std()
    if host.rows == 1 or name in LAYERS_FIRST:
        return
    assert (out[0] - out[1]).std() > 0.1 * out.std()
    for row in (0, 1):
        alone = zoo.call(model, zoo.take(inputs, [row], shared=host.shared))
        torch.testing.assert_close(alone, out[row : row + 1], rtol=0, atol=1e-4)


def test_denoiser_repeats_itself(name: str) -> None:
    state = torch.random.get_rng_state()
    model, inputs = zoo.build(name)
    assert torch.equal(state, torch.random.get_rng_state())
    again = zoo.build(name)[0].state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in model.state_dict().items())
    first = zoo.call(model, inputs)
    assert first.isfinite().all()
    assert torch.equal(first, zoo.call(model, inputs))
    assert not torch.equal(first, zoo.call(*zoo.build(name, seed=1)))


def test_denoiser_rows_differ_and_are_independent(name: str) -> None:
    for key, value in _leaves(zoo.build(name)[1]):
        if key not in zoo.SHARED_INPUTS | {"style"} and value.ndim:
            assert not torch.equal(value[0], value[-1]), key
    dtype, tolerance = (torch.float64, 1e-11) if name != "hunyuandit" else (torch.float32, 1e-4)
    model, inputs = zoo.build(name, dtype=dtype)  # HunyuanDiT has norms that always compute in float32
    out = zoo.call(model, inputs)
    assert (out[0] - out[1]).std() > 0.1 * out.std()
    for row in (0, 1):
        alone = zoo.call(model, zoo.take(inputs, [row]))
        torch.testing.assert_close(alone, out[row : row + 1], rtol=0, atol=tolerance)


def test_denoiser_depends_on_attention(name: str) -> None:
    model, inputs = zoo.build(name)
    assert all(weight.any() for weight in model.parameters())
    out = zoo.call(model, inputs)
    with Uniform() as uniform:
        flat = zoo.call(model, inputs)
    assert len(uniform.heads) >= 4
    assert min(uniform.heads) > 1
    assert 0.1 < min(uniform.entropies) < 0.95
    assert (out - flat).std() > 0.01 * out.std()


@pytest.mark.parametrize("batch", [1, 3])
def test_denoiser_takes_any_batch_and_type(name: str, batch: int) -> None:
    out = zoo.call(*zoo.build(name, batch=batch))
    assert out.shape[0] == batch
    double = zoo.call(*zoo.build(name, batch=batch, dtype=torch.float64))
    assert double.dtype == torch.float64
    torch.testing.assert_close(out, double.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", pipes.NAMES)
def test_pipeline_repeats_itself(recipe: str, dtype: torch.dtype) -> None:
    pipe, kwargs = pipes.build(recipe, dtype, batch=2)
    state = torch.random.get_rng_state()
    latents = pipes.run(pipe, kwargs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert latents.shape[0] == 2
    assert latents.isfinite().all()
    assert not torch.equal(latents[0], latents[1])
    assert torch.equal(latents, pipes.run(pipe, kwargs))


@pytest.mark.parametrize("recipe", pipes.NAMES)
def test_pipeline_takes_one_prompt_and_guidance_matters(recipe: str) -> None:
    pipe, kwargs = pipes.build(recipe)
    scale = "true_cfg_scale" if "true_cfg_scale" in kwargs else "guidance_scale"
    weak, strong = (pipes.run(pipe, kwargs | {scale: value}) for value in (2.0, 5.0))
    assert weak.shape[0] == 1
    assert not torch.equal(weak, strong)


@pytest.mark.parametrize("recipe", [name for name in pipes.NAMES if name.startswith("sd_") or name == "sd"])
def test_pictures_come_out(recipe: str) -> None:
    pipe, kwargs = pipes.build(recipe)
    images = pipes.run(pipe, kwargs, output_type="pil", num_images_per_prompt=2)
    assert [image.size for image in images] == [(24, 32)] * 2


@pytest.mark.parametrize(("plain", "twin"), pipes.PAG_TWINS.items())
def test_twin_without_scale_is_plain(plain: str, twin: str) -> None:
    pipe, kwargs = pipes.build(plain, torch.float64)
    other, pag_kwargs = pipes.build(twin, torch.float64)
    latents = pipes.run(pipe, kwargs)
    _assert_same(latents, pipes.run(other, pag_kwargs, pag_scale=0.0))
    guided = pipes.run(other, pag_kwargs)
    assert not torch.equal(latents, guided)
    _assert_same(guided, pipes.run(pipes.pag_twin(pipe), pag_kwargs))
    _assert_same(latents, pipes.run(pipe, kwargs))  # the twin gave the shared denoiser back as it was


@pytest.mark.parametrize("recipe", ["sd", "sd_controlnet", "sdxl", "animatediff"])
def test_ip_adapter_loads_and_unloads(recipe: str) -> None:
    pipe, kwargs = pipes.build(recipe)
    plain = pipes.run(pipe, kwargs)
    adapted = pipes.run(pipe, kwargs | pipes.load_ip_adapter(pipe))
    assert not torch.equal(plain, adapted)
    pipe.unload_ip_adapter()
    torch.testing.assert_close(pipes.run(pipe, kwargs), plain)


@pytest.mark.parametrize("recipe", ["sd", "sdxl", "sd3", "flux", "animatediff", "wan"])
def test_lora_loads_and_unloads(recipe: str) -> None:
    pytest.importorskip("peft")
    pipe, kwargs = pipes.build(recipe)
    plain = pipes.run(pipe, kwargs)
    pipe.load_lora_weights(pipes.lora_state(pipe))
    assert not torch.equal(plain, pipes.run(pipe, kwargs))
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipes.run(pipe, kwargs), plain)


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    # Equal weights at other addresses may round differently in the last bit.
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, name)
    elif isinstance(tree, list) and tree and isinstance(tree[0], Tensor):
        yield key, torch.stack(tree)
