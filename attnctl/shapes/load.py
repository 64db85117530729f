"""Load the shipped models as real diffusers pipelines, from files inside the package and without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnctl.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["MODELS", "WEIGHTS", "load_shapes"]

MODELS = ("text2image", "video", "mmdit")
WEIGHTS = Path(__file__).resolve().parent / "weights"

_SHIPPED = ("text2image",)
_FILES: dict[str, tuple[str, ...]] = {
    "text2image": (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ),
}


def load_shapes(
    name: str = "text2image",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    folder: str | Path | None = None,
) -> DiffusionPipeline:
    """Load a shipped model; call it as `pipe("a red circle on gray", num_inference_steps=20, guidance_scale=4)`.

    Args:
        name: "text2image" (StableDiffusionPipeline).
        device: where to put it.
        dtype: float32 if not given; the files are float16.
        folder: another folder of the same layout, such as the result of a training.

    Raises:
        ConfigError: an unknown or unshipped name, a missing or damaged weight file, a device that is not there.
    """
    if name not in MODELS:
        raise ConfigError(f"Unknown shapes model {name!r}; known: {', '.join(MODELS)}." + nearest(name, MODELS))
    if name not in _SHIPPED:
        raise ConfigError(f"The shapes model {name!r} is not shipped in this version; shipped: {', '.join(_SHIPPED)}.")
    root = Path(folder) if folder is not None else WEIGHTS / name
    for file in _FILES[name]:
        _check(root / file, name)

    import torch
    from diffusers import StableDiffusionPipeline

    _check_device(torch.device(device))
    with _no_loading_bars():
        pipe = StableDiffusionPipeline.from_pretrained(
            str(root), local_files_only=True, low_cpu_mem_usage=False, safety_checker=None, feature_extractor=None
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        # diffusers' own `to` warns about casts that do no harm here.
        torch.nn.Module.to(part, device=device, dtype=dtype or torch.float32)
    return pipe


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Silence the libraries' bars for a load that takes a moment, and leave them as they were."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    silenced = [lib for lib in (of_diffusers, of_transformers) if getattr(lib, "_tqdm_active", True)]
    for lib in silenced:
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib in silenced:
            lib.enable_progress_bar()


def _check(path: Path, name: str) -> None:
    """Refuse a missing or damaged file by its name, before a library fails on it in its own words."""
    cure = f"Reinstall attnctl, or train it anew: python -m attnctl.shapes.train {name} --out runs/{name}."
    if not path.is_file():
        raise ConfigError(f"The shapes model {name!r} lacks the file {path}. {cure}")
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            with path.open("rb") as f:
                head = int.from_bytes(f.read(8), "little")
                if head > size:
                    raise ValueError("its header is cut off")
                end = max(t["data_offsets"][1] for k, t in json.loads(f.read(head)).items() if k != "__metadata__")
            if size != 8 + head + end:
                raise ValueError(f"it has {size} bytes instead of {8 + head + end}")
        elif path.stat().st_size == 0:
            raise ValueError("it is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"The file {path} of the shapes model {name!r} is damaged: {error}. {cure}") from None


def _check_device(device: torch.device) -> None:
    import torch

    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Device {str(device)!r} was asked for, but this torch sees no CUDA GPU: use device='cpu'.")
