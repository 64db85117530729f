"""The models of recipes: of the Hub, with a motion adapter, shipped, or tiny with random weights."""

from __future__ import annotations

import tempfile
from typing import Any

from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.pipelines.models import Loaded, load
from attnctl.pipelines.reproduce.recipes import Experiment

__all__ = ["check_device", "load_model"]

_TINY_WAN = "toy:wan"


def check_device(experiment: Experiment, device: str, chosen: str, hours: float) -> None:
    """Raise ConfigError where an experiment needs a GPU, there is none, and the CPU was not asked for."""
    if experiment.gpu and device == "cpu" and chosen == "auto":
        raise ConfigError(
            f"{experiment.label} wants a GPU with about {experiment.memory_gb:g} GB, and torch sees none here. Run it "
            f"where there is one, or at toy size (--toy), or give --device cpu to run it all the same (about "
            f"{hours:.0f} hours)."
        )


def load_model(
    experiment: Experiment,
    model: str | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    offload: bool = False,
) -> Loaded:
    """Load the pipeline of an experiment.

    Args:
        experiment: The experiment.
        model: A Hub id or a local folder in place of the recipe's.
        revision: Commit or branch of a Hub model.
        device: Where it runs.
        dtype: How precisely.
        offload: Whether parts wait on the CPU until they are needed.

    Raises:
        AttnctlError: It cannot be had; the message says its id and its size.
    """
    name = model or experiment.model
    if name == _TINY_WAN:
        return Loaded(_tiny_wan().to(device), name, None)
    try:
        loaded = load(name, revision=revision, device="cpu" if offload else device, dtype=dtype)
        if experiment.adapter:
            loaded = Loaded(_animated(loaded.pipe, experiment.adapter, device, dtype), loaded.name, loaded.revision)
    except AttnctlError as error:
        if model is not None or not experiment.weights_gb:
            raise
        adapter = f" and {experiment.adapter}" if experiment.adapter else ""
        reason = " ".join(str(error.__cause__ or error).split()).partition(". ")[0][:200].rstrip(".")
        raise UnsupportedModelError(
            f"{experiment.label} needs {name}{adapter}, about {experiment.weights_gb:g} GB to fetch, and cannot have "
            f"it ({reason}). Accept its licence on the Hub if it has one, `hf auth login`, `hf download {name}`; or "
            "give --model FOLDER. What is finished is kept."
        ) from error
    if offload:
        loaded.pipe.enable_model_cpu_offload(device=device)
    return loaded


def _animated(pipe: Any, adapter: str, device: str, dtype: str) -> Any:
    """Put a motion adapter on a Stable Diffusion pipeline."""
    import torch
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    try:
        motion = MotionAdapter.from_pretrained(adapter, torch_dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The motion adapter {adapter} cannot be loaded: {' '.join(str(error).split())}") from error
    animated = AnimateDiffPipeline.from_pipe(pipe, motion_adapter=motion.to(pipe.device))
    animated.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace", steps_offset=1
    )
    return animated


def _tiny_wan() -> Any:
    """Build a WanPipeline of the shapes world's sizes with two layers of random weights."""
    import torch
    from torch import nn

    from attnctl.shapes.training import videodit

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = videodit.build_tokenizer(folder)
        transformer = videodit.build_transformer()
        transformer.blocks = transformer.blocks[:2]
        transformer.register_to_config(num_layers=2)
        for parameter in transformer.parameters():
            if parameter.ndim > 1 and not parameter.any():  # what starts as zero would hide every change
                nn.init.normal_(parameter, std=0.1)
        return videodit.assemble(videodit.build_vae(), videodit.build_text_encoder(tokenizer), tokenizer, transformer)
