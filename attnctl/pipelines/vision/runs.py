"""What training on a user's pictures leaves behind: a folder with the model, how it was made, and where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.errors import ConfigError, nearest
from attnctl.plans.reading import Expected, check_schema, open_tensors, read_json

__all__ = ["Run", "build_model", "check_name", "load_run", "read_checkpoint", "resumption", "save_checkpoint"]

_RUN = Expected("a run of attnctl classify or segment", ConfigError)
_SCHEMA = 1
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Describe a model and what it was trained on.

    Attributes:
        task: "classify" or "segment". model: A timm name. decoder: Of segmentation-models-pytorch, for "segment".
        classes: Names, in the order of the model's outputs.
        swap, swap_options, model_options: As for `attnctl.swap` and timm.
        size: (height, width) in pixels. mean, std, interpolation, crop: Of timm's data configuration.
        scores: What the test pictures gave, 0 to 1.
    """

    task: str
    model: str
    classes: tuple[str, ...]
    decoder: str | None = None
    swap: str | None = None
    swap_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 1.0
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps({"kind": "vision run", "schema": _SCHEMA, **asdict(self)}, indent=2) + "\n"


def build_model(run: Run, pretrained: bool = False) -> nn.Module:
    """Build the model of a run, swapped as it says, with random weights or timm's pretrained ones.

    Raises: ConfigError for a name that timm does not know or a size that the model does not take; as `attnctl.swap`.
    """
    import timm

    from attnctl.backbones.swap import swap

    options = dict(run.model_options)
    try:
        if run.task == "segment":
            import segmentation_models_pytorch as smp

            decoders = list(smp.MODEL_ARCHITECTURES_MAPPING)
            if run.decoder not in decoders:
                close = nearest(str(run.decoder), decoders)
                raise ConfigError(f"decoder={run.decoder!r} was given; expected one of {', '.join(decoders)}.{close}")
            model: nn.Module = smp.create_model(
                run.decoder, f"tu-{run.model}", encoder_weights="imagenet" if pretrained else None,
                classes=len(run.classes), **options,
            )  # fmt: skip
            backbone = model.get_submodule("encoder.model")
        else:
            model = timm.create_model(run.model, pretrained=pretrained, num_classes=len(run.classes), **options)
            backbone = model
            resize = getattr(model, "set_input_size", None)
            if resize is not None and tuple(_own_size(model)) != run.size:
                resize(run.size)
    except ConfigError:
        raise
    except (AssertionError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{run.model} cannot be built for pictures of {run.size[0]} x {run.size[1]}: "
            f"{' '.join(str(error).split()).rstrip('.')}. Choose another size, other options of the model, or another "
            "model."
        ) from error
    if run.swap is not None:
        swap(backbone, run.swap, **run.swap_options)
    return model


def check_name(model: str) -> None:
    """Raise ConfigError for a model that timm does not know."""
    import timm

    import attnctl.backbones  # registers the names with timm

    del attnctl
    if not timm.is_model(model.partition(".")[0]) and "/" not in model:
        raise ConfigError(f"model={model!r} is no name of timm.{nearest(model, timm.list_models())}")


def load_run(folder: Path) -> tuple[Run, nn.Module]:
    """Read a run's model, in evaluation mode.

    Raises: ConfigError for a folder without a run, damaged files, and weights of another model or other classes.
    """
    data = read_json(folder / "run.json", _RUN)
    check_schema(data, "run.json", _RUN, kind="vision run", schema=_SCHEMA)
    values = {k: v for k, v in data.items() if k not in ("kind", "schema")}
    try:
        for name in ("classes", "size", "mean", "std"):
            values[name] = tuple(values[name])
        run = Run(**values)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'run.json'} is no run of this version: {error}") from None
    model = build_model(run)
    load_weights(model, folder / _WEIGHTS)
    return run, model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into a model. Raises: ConfigError for missing, damaged and other weights; it says what differs."""
    expected = Expected("the weights of a run", ConfigError)
    with open_tensors(path, expected, cure="Train again, or choose another run.") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    weights = model.state_dict()
    other = [n for n in state if n in weights and weights[n].shape != state[n].shape]
    if other:
        raise ConfigError(
            f"{path} is for other classes or another model: {other[0]} is {tuple(state[other[0]].shape)}, expected "
            f"{tuple(weights[other[0]].shape)}."
        )
    missing = sorted(set(weights) ^ set(state))
    if missing:
        raise ConfigError(f"{path} is of another model: {missing[0]} is in one of them only.")
    model.load_state_dict(state)


def save_checkpoint(
    out: Path, model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write where training stands, beside the last checkpoint and then in its place: a kill leaves one whole.

    Raises: WriteError where the disk is full.
    """
    from attnctl.plans.writing import WriteError, save_tensors

    fresh, old, final = out / "checkpoint.new", out / "checkpoint.old", out / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        save_tensors(_plain(model.state_dict()), fresh / "weights.safetensors")
        if average is not None:
            save_tensors(_plain(average.state_dict()), fresh / "average.safetensors")
        moments: dict[str, Tensor] = {}
        n = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                moments |= {f"{n}:{k}": torch.as_tensor(v) for k, v in optimizer.state[p].items()}
                n += 1
        save_tensors(_plain(moments), fresh / "optimizer.safetensors")
        (fresh / "state.json").write_text(json.dumps(state), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise WriteError(f"The checkpoint cannot be written to {fresh}: {error}. The last one is kept.") from error
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(
    out: Path, model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Read the last checkpoint into what is trained, and return its state; empty where there is none.

    Raises: ConfigError for one of another model or other classes, and damaged files.
    """
    folder, fresh, old = out / "checkpoint", out / "checkpoint.new", out / "checkpoint.old"
    if old.exists() and not folder.exists():
        os.replace(fresh if (fresh / "state.json").exists() else old, folder)
    if not folder.exists():
        return {}
    state = read_json(folder / "state.json", _RUN)
    averaged = (folder / "average.safetensors").exists()
    if averaged != (average is not None):
        raise ConfigError(
            f"{out} was trained {'with' if averaged else 'without'} a running average of the weights (--ema): resume "
            "it so, or choose another folder."
        )
    load_weights(model, folder / "weights.safetensors")
    if average is not None:
        load_weights(average, folder / "average.safetensors")
    with open_tensors(folder / "optimizer.safetensors", _RUN, cure="Train anew.") as tensors:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for name in tensors.keys():  # noqa: SIM118
            index, _, key = name.partition(":")
            value = tensors.get_tensor(name)
            p = params[int(index)] if int(index) < len(params) else None
            if p is None or value.shape not in (p.shape, ()):
                raise ConfigError(
                    f"{out} trained other weights than are trained now: resume it as it was begun, with or without "
                    "--head, or choose another folder."
                )
            optimizer.state[p][key] = value if key == "step" else value.to(p.device)
    return dict(state)


def resumption(state: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Say where a resumed training goes on, and which settings are others than those that it was begun with."""
    if not state:
        return "No checkpoint is there: training begins anew."
    before = state.get("recipe")
    text = f"Training goes on after epoch {int(state.get('epoch', 0))}"
    if not isinstance(before, Mapping):
        return f"{text}; the checkpoint does not say with which settings it was trained."
    given = json.loads(json.dumps(recipe))
    changes = [f"{name} {before[name]} becomes {given[name]}" for name in given if before.get(name) != given[name]]
    return f"{text}; {', '.join(changes)}." if changes else f"{text}, with the same settings."


def _own_size(model: nn.Module) -> tuple[int, ...]:
    from attnctl.backbones.find_grids import image_size

    return image_size(model)[1:]


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
