"""Models by name: "shapes:text2image", a hub id, or a local folder. Safetensors only, no remote code."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnctl.data.model_folders import CONFIG, check_folder
from attnctl.data.provenance import fingerprint
from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.plans import hub
from attnctl.plans.reading import read_json

__all__ = ["SHIPPED", "Loaded", "device_and_dtype", "load", "load_denoiser"]

SHIPPED = "shapes:"
_DTYPES = ("float32", "float16", "bfloat16")
_LARGEST, _MOST_LAYERS = 1 << 22, 1000


@dataclass(frozen=True)
class Loaded:
    """Hold a pipeline with the name and the revision that a record keeps.

    Attributes:
        pipe: The pipeline.
        name: The model's name.
        revision: Its commit, or what stands for it.
        call: What a call is given besides, where the pipeline's own defaults do not fit the model.
    """

    pipe: Any
    name: str
    revision: str | None
    call: Mapping[str, Any] = field(default_factory=dict)


def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """Choose where and how precisely to compute: the accelerator in half precision if there is one.

    Raises:
        ConfigError: the device is not there, or the precision is unknown.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ConfigError(f"Unknown device {device!r}; expected auto, cpu, cuda, cuda:1, mps or xpu.")
    if device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"There is no device {device!r} here; torch sees {torch.cuda.device_count()} of them.")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "float16"
    if dtype not in _DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}; expected auto, {', '.join(_DTYPES)}.")
    return device, dtype


def load(
    name: str, *, revision: str | None = None, device: str = "cpu", dtype: str = "float32", recorded: bool = False
) -> Loaded:
    """Load a pipeline.

    Args:
        name: "shapes:text2image", a Hub id, or a local folder.
        revision: Commit or branch of a Hub model.
        device: Where it runs.
        dtype: How precisely.
        recorded: The name comes from a record, which somebody else may have written: it is never that of a local
            folder, and is looked up in the network only where `attnctl.plans.hub.fetching` allows it.

    Raises:
        AttnctlError: it cannot be had; the message says why.
    """
    import torch

    if name.startswith(SHIPPED):
        import attnctl
        from attnctl.shapes.load import CALLS

        world = name.removeprefix(SHIPPED)
        if revision is not None:
            raise ConfigError(f"{name} is part of attnctl and has no revision; got {revision!r}.")
        with _calm():
            pipe = attnctl.load_shapes(world, device=device, dtype=getattr(torch, dtype))
        return Loaded(pipe, name, _shipped_fingerprint(world), CALLS.get(world, {}))

    from diffusers import DiffusionPipeline

    local = not recorded and Path(name).is_dir()
    with _explained(name), _calm():
        if local and revision is not None:
            raise ConfigError(f"{name} is a local folder and has no revision; got {revision!r}.")
        folder = Path(name) if local else _downloaded(name, revision, fetch=not recorded or hub.may_fetch())
        check_folder(folder)
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
    return Loaded(pipe.to(device), *_identity(name, folder, local))


def _downloaded(name: str, revision: str | None, *, fetch: bool) -> Path:
    """Return the folder of a Hub model, fetched where that is allowed."""
    from diffusers import DiffusionPipeline

    if not hub.HUB_ID.fullmatch(name):
        raise ConfigError(
            f"Cannot load {name!r}: it is neither here nor a hub id. Expected 'shapes:text2image', a hub id such as "
            "'stabilityai/stable-diffusion-xl-base-1.0', or a local folder with a model_index.json."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if fetch and not constants.HF_HUB_OFFLINE:
        return Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        if fetch:
            raise ConfigError(_unreachable(name, "HF_HUB_OFFLINE is set")) from None
        raise ConfigError(
            f"The record names the Hub model {name!r}, which is not on this machine, and nothing is fetched unasked: "
            "give --fetch, or say with --model where it is."
        ) from None


def load_denoiser(name: str, *, revision: str | None = None) -> Any:
    """Build a model's denoiser without its weights, from its configuration alone.

    Raises:
        AttnctlError: it cannot be had; the message says why.
    """
    if name.startswith(SHIPPED):
        return load(name).pipe

    import diffusers
    import torch

    with _explained(name):
        parts = read_json(_config_file(name, "model_index.json", revision), CONFIG)
        part = next((p for p in ("unet", "transformer") if isinstance(parts.get(p), list)), None)
        if part is None:
            names = ", ".join(k for k in parts if not k.startswith("_"))
            raise UnsupportedModelError(f"{name} has no `unet` and no `transformer`; its parts are {names}.")
        library, class_name = parts[part]
        cls = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
            raise UnsupportedModelError(
                f"The {part} of {name} is {library}.{class_name}, which diffusers does not have."
            )
        config = read_json(_config_file(name, f"{part}/config.json", revision), CONFIG)
        _check_sizes(name, config)
        with torch.device("meta"):
            return cls.from_config(config)  # type: ignore[attr-defined]


def _check_sizes(name: str, config: Any) -> None:
    """Raise UnsupportedModelError for a configuration that would build for hours."""
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"The configuration of {name} is no JSON object.")
    for key, value in config.items():
        for n in value if isinstance(value, list) else (value,):
            if isinstance(n, int) and abs(n) > _LARGEST:
                raise UnsupportedModelError(f"The configuration of {name} has {key}={n}; expected at most {_LARGEST}.")
        if "layers" in key or "blocks" in key or "depth" in key:
            most = max((n for n in (value if isinstance(value, list) else [value]) if type(n) is int), default=0)
            if most > _MOST_LAYERS:
                raise UnsupportedModelError(
                    f"The configuration of {name} has {key}={most}; expected at most {_MOST_LAYERS}."
                )


def _config_file(name: str, path: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name) / path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, path, revision=revision))


def _identity(name: str, folder: Path, local: bool) -> tuple[str, str | None]:
    """Return the name and the revision that a record keeps: never where a folder lies on this machine."""
    if local:
        return Path(name).resolve().name, fingerprint(folder)
    return name, folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None


def _shipped_fingerprint(world: str) -> str | None:
    spec = importlib.util.find_spec("attnctl.shapes")
    folders = [Path(p) / "weights" / world for p in (spec.submodule_search_locations or ())] if spec else []
    return next((fingerprint(folder) for folder in folders if folder.is_dir()), None)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep loading quiet: no deprecation notices for the library's own calls, no bars where nobody watches."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    hushed = [] if sys.stderr.isatty() else [lib for lib in libraries if lib.is_progress_bar_enabled()]
    for library in hushed:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in hushed:
            library.enable_progress_bar()


_NO_NETWORK = ("outgoing traffic", "offline mode", "Internet connection", "Couldn't connect", "Cannot reach")


def _unreachable(name: str, why: str) -> str:
    return (
        f"Cannot load {name!r}: it is not on this machine, and the Hub cannot be asked for it ({why}). Fetch it where "
        f"it can, with `hf download {name}`, or give a local folder, or a shipped model such as 'shapes:text2image'."
    )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the many errors of loading into one that says what was asked for."""
    try:
        yield
    except AttnctlError:
        raise
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if any(sign in str(error) for sign in _NO_NETWORK):
            raise UnsupportedModelError(_unreachable(name, "there is no connection, or it is private")) from error
        reason = " ".join(str(error).split())[:600]
        raise UnsupportedModelError(
            f"Cannot load {name!r}: {reason or type(error).__name__} Expected 'shapes:text2image', a hub id "
            "such as 'stabilityai/stable-diffusion-xl-base-1.0', or a local folder with a model_index.json."
        ) from error
