"""Weights as users load them: LoRA under control, single files, 8 bits, GGUF, bitsandbytes, torchao, offloading.

Each is guided by the definition and left as it was. GGUF, bitsandbytes and torchao run where they are installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, distance, guidances, perturbed, snapshot
from safetensors.torch import save_file

import attnctl
from attnctl.processors import PAG

pytestmark = pytest.mark.usefixtures("no_grad")

NAME = "sd3"  # 32 channels: what blocks of quantization need


def check(model: Any, inputs: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Guide a model: it is what the definition says, and nothing stays behind."""
    guidance = guidances(model)["PAG"]
    plain = zoo.call(model, inputs)
    again = zoo.call(model, inputs)
    before = snapshot(model)
    with attnctl.control(model, guidance, layout="cond"):
        guided = zoo.call(model, inputs)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain if torch.equal(plain, again) else again)
    p = perturbed(model, guidance, inputs)
    assert distance(p, plain) > 1e-3
    assert distance(guided, plain + guidance.scale * (plain - p)) <= tolerance


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a tiny denoiser as a folder of diffusers."""
    zoo.build(NAME)[0].save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("recipe", ["sd", "sd3", "wan"])
def test_lora_is_loaded_fused_and_unloaded_under_control(recipe: str) -> None:
    pytest.importorskip("peft")
    pipe, kwargs = pipes.build(recipe)
    model = pipes.denoiser(pipe)
    guidance = guidances(model)["PAG"]
    with attnctl.control(pipe, guidance):
        plain = pipes.run(pipe, kwargs)
        pipe.load_lora_weights(pipes.lora_state(pipe), adapter_name="one")
        loaded = pipes.run(pipe, kwargs)
        assert distance(loaded, plain) > 1e-3
        pipe.fuse_lora()
        assert distance(pipes.run(pipe, kwargs), loaded) <= 1e-4
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert distance(pipes.run(pipe, kwargs), plain) <= 1e-4
    pipe.load_lora_weights(pipes.lora_state(pipe), adapter_name="one")
    with attnctl.control(pipe, guidance):  # the same, attached to what is loaded already
        assert distance(pipes.run(pipe, kwargs), loaded) <= 1e-4
    assert attnctl.handle_of(model) is None


def test_a_single_file(saved: Path) -> None:
    model, inputs = zoo.build(NAME)
    file = saved.parent / "one.safetensors"
    save_file(model.state_dict(), str(file))
    loaded = type(model).from_single_file(
        str(file), config=str(saved), torch_dtype=torch.float32, local_files_only=True
    )
    assert torch.equal(zoo.call(loaded, inputs), zoo.call(model, inputs))
    check(loaded, inputs)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_layerwise_casting(name: str) -> None:
    model, inputs = zoo.build(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    check(model, inputs)


def test_sequential_offloading() -> None:
    from accelerate import cpu_offload

    model, inputs = zoo.build(NAME)
    cpu_offload(model, torch.device("cpu"))
    guidance = PAG(scale=2.5, sites=attnctl.find_sites(model)[1].name)
    plain = zoo.call(model, inputs)
    with attnctl.control(model, guidance, layout="cond"):
        guided = zoo.call(model, inputs)
    model, inputs = zoo.build(NAME)
    with attnctl.control(model, guidance, layout="cond"):
        assert distance(guided, zoo.call(model, inputs)) <= 1e-6
    assert distance(guided, plain) > 1e-3


def test_gguf(saved: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model, inputs = zoo.build(NAME)
    file = saved.parent / "one.gguf"
    writer = gguf.GGUFWriter(str(file), "sd3")
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        fits = weight.ndim == 2 and weight.shape[-1] % 32 == 0 and ".attn." in name
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = type(model).from_single_file(
        str(file), config=str(saved), quantization_config=config, torch_dtype=torch.float32, local_files_only=True
    )
    assert 0 < distance(zoo.call(loaded, inputs), zoo.call(model, inputs)) < 0.1
    check(loaded, inputs)


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = zoo.build(NAME)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert any("Int8" in type(p).__name__ or "Affine" in type(p).__name__ for p in model.parameters())
    check(model, inputs)


def test_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, inputs = zoo.build(NAME)  # diffusers' own loading insists on a GPU; the layers run on a CPU
    for name, linear in list(model.named_modules()):
        if name.endswith((".to_q", ".to_k", ".to_v")):
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            layer.bias = linear.bias
            model.set_submodule(name, layer.to("cpu"))
    assert any(getattr(m.weight, "quant_state", None) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    check(model, inputs, 1e-4)
