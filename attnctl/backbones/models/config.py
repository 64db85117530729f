"""timm's configuration records, checks of per-stage lists, and the report on weights that do not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnctl.backbones.modules.resize import fit_weight
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["cfg", "exactly", "load_filter", "register", "size_cfgs", "stage_types"]


def cfg(**kwargs: Any) -> dict[str, Any]:
    """Build timm's record for a model without published weights in its hub."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **kwargs,
    }


def size_cfgs(layouts: Mapping[str, Mapping[str, Any]], **common: Any) -> Any:
    """Build timm's records for the models of a family, from their arguments by name.

    Models take images of their `img_size`; where none is given, those named `_micro` of 32 px, others of 224.
    """
    records = {}
    for name, layout in layouts.items():
        size = layout.get("img_size") or (32 if name.endswith("_micro") else 224)
        shape: dict[str, Any] = {"input_size": (3, size, size)}
        if common.get("pool_size", True) is not None:
            shape["pool_size"] = (-(-size // 32),) * 2
        records[f"{name}.untrained"] = cfg(**(common | shape))
    return generate_default_cfgs(records)


def register(
    module: str,
    model: type[nn.Module],
    layouts: Mapping[str, Mapping[str, Any]],
    checkpoint_filter_fn: Callable[..., Any],
    **features: Any,
) -> None:
    """Register the models of a family with timm: for each name, a function of that name in the family's module.

    module: its `__name__`; it holds `default_cfgs`. layouts: arguments of the model by name, which the user's override.
    features: how timm takes features from it, the four stages if none are given.
    """
    wanted = features or {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}

    def entry(name: str, layout: Mapping[str, Any]) -> Callable[..., Any]:
        def create(pretrained: bool = False, **kwargs: Any) -> Any:
            return build_model_with_cfg(
                model, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=dict(wanted),
                **(dict(layout) | kwargs),
            )  # fmt: skip

        create.__name__ = create.__qualname__ = name
        create.__module__ = module
        create.__doc__ = f"Build `{name}`, a {model.__name__}."
        return create

    for name, layout in layouts.items():
        setattr(sys.modules[module], name, register_model(entry(name, layout)))


def exactly(count: int, **lists: Sized) -> None:
    """Check that every per-stage list has one entry a stage. Raises: ConfigError naming the list."""
    for name, values in lists.items():
        if len(values) != count:
            raise ConfigError(f"{name}={values} was given with {len(values)} entries; expected one a stage: {count}.")


def stage_types(attn_type: str, depths: tuple[int, ...]) -> list[list[str]]:
    """Spell out the kind of every block: "AAAB" names a kind a stage, "AAMB2" gives a stage M 2 blocks of A, then B.

    Raises: ConfigError for another number of letters, unknown letters, an M without its count.
    """
    letters, count = attn_type[: len(depths)], attn_type[len(depths) :]
    is_valid = len(letters) == len(depths) and set(letters) <= set("ABM")
    if not is_valid or bool(count) != ("M" in letters) or (count and not count.isdigit()):
        raise ConfigError(
            f"attn_type={attn_type!r} was given; expected {len(depths)} letters of A (agent), B (the host's own) "
            "or M (A first, then B), and after an M how many blocks are A, as in 'AAMB2'."
        )
    kinds = []
    for letter, depth in zip(letters, depths, strict=True):
        agents = {"A": depth, "B": 0, "M": min(depth, int(count or 0))}[letter]
        kinds.append(["A"] * agents + ["B"] * (depth - agents))
    return kinds


def load_filter(state: Mapping[str, Any], model: nn.Module, resize: bool = False) -> dict[str, Tensor]:
    """Refuse weights of another variant, naming what is missing, unexpected and of another shape.

    resize: fit axis biases, positions and relative position tables of another image size first.
    A classifier of another size is left to timm, which drops it. Raises: UnsupportedModelError.
    """
    want = model.state_dict()
    if resize:
        state = {k: fit_weight(k, v, want[k]) if k in want else v for k, v in state.items()}
    keys = {k for k in want if not k.startswith("head")}
    have = {k for k in state if not k.startswith("head")}
    missing, unexpected = sorted(keys - have), sorted(have - keys)
    shapes = [
        f"{k}: {tuple(state[k].shape)} instead of {tuple(want[k].shape)}"
        for k in sorted(keys & have)
        if torch.is_tensor(state[k]) and state[k].shape != want[k].shape
    ]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected or shapes:
        raise UnsupportedModelError(
            f"The weights are of another variant than this {type(model).__name__}: "
            f"{_some('missing', missing)}; {_some('unexpected', unexpected)}; {_some('of another shape', shapes)}. "
            "Create the model with the name and the options that the weights were trained with."
        )
    return dict(state)


def _some(what: str, names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
    return f"{len(listed)} {what}" + (f" ({shown})" if listed else "")
