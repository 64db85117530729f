"""Load the shipped models as real diffusers pipelines, from files inside the package and without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.data.model_folders import check_folder
from attnctl.errors import ConfigError, nearest, shown
from attnctl.shapes.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["MODELS", "WEIGHTS", "load_shapes"]

MODELS = ("text2image", "video", "video-still", "mmdit", "videodit")
# What a call is given where the host's own defaults are those of larger models.
CALLS: dict[str, dict[str, int]] = {
    "videodit": {"num_frames": 17, "height": 64, "width": 64, "max_sequence_length": MAX_LENGTH}
}
WEIGHTS = Path(__file__).resolve().parent / "weights"

_LATENT_VIDEO = (9, 16, 16)  # frames, height and width of videodit's latents
_TEXT = ("text_encoder/config.json", "text_encoder/model.safetensors")
_TOKENS = ("tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
_VAE = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
_ADAPTER = ("motion_adapter/config.json", "motion_adapter/diffusion_pytorch_model.safetensors")
_UNET = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors")
_TRANSFORMER = ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
_COMMON = ("model_index.json", "scheduler/scheduler_config.json", *_TEXT, *_TOKENS, *_VAE)
_FILES: dict[str, tuple[str, ...]] = {
    "text2image": (*_COMMON, *_UNET),
    "video": (*_COMMON, *_UNET, *_ADAPTER),
    "video-still": _ADAPTER,  # the rest is video's
    "mmdit": (*_COMMON, *(file.replace("/", "_2/") for file in (*_TEXT, *_TOKENS)), *_TRANSFORMER),
    "videodit": (
        "model_index.json",
        "scheduler/scheduler_config.json",
        *_TEXT,
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        *_VAE,
        *_TRANSFORMER,
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
        name: "text2image" (StableDiffusionPipeline), "video" (AnimateDiffPipeline, 16 frames), "video-still" (the same
            with an adapter tuned on captions that lie), "mmdit" (StableDiffusion3Pipeline) or "videodit"
            (WanPipeline; call it with num_frames=17, height=64, width=64).
        device: where to put it.
        dtype: float32 if not given; the files are float16.
        folder: another folder of the same layout, such as the result of a training.

    Raises:
        UnsupportedModelError: the folder brings code of its own.
        ConfigError: an unknown name, a missing or damaged weight file, a device that is not there. The video pipeline
            raises it too, where it is called for more frames than its adapter was trained for, and videodit's where
            its videos would be longer or larger than those that it was trained on.
    """
    if name not in _FILES:
        raise ConfigError(f"Unknown shapes model {name!r}; known: {', '.join(MODELS)}." + nearest(name, MODELS))
    root = Path(folder) if folder is not None else WEIGHTS / name
    for file in _FILES[name]:
        _check(root / file, name)

    import torch

    try:
        _check_device(torch.device(device))
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={shown(device)} was given; expected one of torch's, such as 'cpu'.") from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={shown(dtype)} was given; expected one of torch's, such as torch.float16, or None.")
    if folder is not None and "model_index.json" in _FILES[name]:
        check_folder(root)
    with _no_loading_bars():
        pipe = _CLASSES[name](str(root))
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # diffusers' own `to` warns about casts that do no harm here.
            torch.nn.Module.to(part, device=device, dtype=dtype or torch.float32)
    if name in ("video", "video-still"):
        _watch_frames(pipe.unet)
    elif name == "videodit":
        _watch_size(pipe.transformer)
    return pipe


def _text2image(root: str) -> DiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        root, local_files_only=True, low_cpu_mem_usage=False, safety_checker=None, feature_extractor=None
    )


def _video(root: str) -> DiffusionPipeline:
    from diffusers import AnimateDiffPipeline

    return AnimateDiffPipeline.from_pretrained(root, local_files_only=True, low_cpu_mem_usage=False)


def _video_still(root: str) -> DiffusionPipeline:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter.from_pretrained(f"{root}/motion_adapter", local_files_only=True, low_cpu_mem_usage=False)
    return AnimateDiffPipeline.from_pretrained(
        str(WEIGHTS / "video"), motion_adapter=adapter, local_files_only=True, low_cpu_mem_usage=False
    )


def _mmdit(root: str) -> DiffusionPipeline:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(
        root, local_files_only=True, low_cpu_mem_usage=False, text_encoder_3=None, tokenizer_3=None
    )


def _videodit(root: str) -> DiffusionPipeline:
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(root, local_files_only=True)


_CLASSES: dict[str, Callable[[str], DiffusionPipeline]] = {
    "text2image": _text2image,
    "video": _video,
    "video-still": _video_still,
    "mmdit": _mmdit,
    "videodit": _videodit,
}


def _watch_frames(unet: torch.nn.Module) -> None:
    """Let the motion modules refuse more frames than they know places for, in words instead of in shapes."""

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        places: Any = module.pe
        frames, most = args[0].shape[1], places.shape[1]
        if frames > most:
            raise ConfigError(
                f"The motion adapter was trained for {most} frames, but {frames} were asked for: pass "
                f"num_frames={most} or fewer, or let diffusers slide a window: pipe.enable_free_noise("
                f"context_length={most})."
            )

    for name, module in unet.named_modules():
        if name.endswith(".pos_embed") and ".motion_modules." in name:
            module.register_forward_pre_hook(refuse)


def _watch_size(transformer: torch.nn.Module) -> None:
    """Let the transformer refuse videos that are longer or larger than those that it was trained on."""

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        size = tuple(args[0].shape[2:])
        if any(length > most for length, most in zip(size, _LATENT_VIDEO, strict=True)):
            raise ConfigError(
                f"videodit was trained on 17 frames of 64x64, {_LATENT_VIDEO} as latents, but latents of {size} were "
                "asked for: pass num_frames=17, height=64 and width=64."
            )

    rope: Any = transformer.rope
    rope.register_forward_pre_hook(refuse)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Silence the libraries' bars, and a warning of nothing, for a load that takes a moment; leave all as it was."""
    import logging

    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    silenced = [lib for lib in (of_diffusers, of_transformers) if getattr(lib, "_tqdm_active", True)]
    models = logging.getLogger("diffusers.models.modeling_utils")
    models.addFilter(_casts_something)
    for lib in silenced:
        lib.disable_progress_bar()
    try:
        yield
    finally:
        models.removeFilter(_casts_something)
        for lib in silenced:
            lib.enable_progress_bar()


def _casts_something(record: Any) -> bool:
    """Drop diffusers' warning of modules that should stay in float32 where it names none."""
    return "kept in float32: []" not in record.getMessage()


def _check(path: Path, name: str) -> None:
    """Refuse a missing or damaged file by its name, before a library fails on it in its own words."""
    command = f"python -m attnctl.shapes.training.train {name} --out runs/{name}"
    cure = f"Reinstall attnctl, or train it anew: {command}."
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
