"""A further row in a denoiser call: its arguments joined in front of the call's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.arguments import ROW_LISTS, SHARED, main_input, main_name, row_count
from attnctl.errors import UnsupportedModelError

__all__ = ["with_row_in_front"]

_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask", "attention_mask")
_TIMES = ("timestep", "t", "timesteps")


def with_row_in_front(
    bound: Mapping[str, Any], row: Mapping[str, Any], latents: Tensor, shared: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the arguments of a call with one more row in front.

    Args:
        bound: The arguments of the call.
        row: Those of a call of one row with the same model.
        latents: What the new row's latents are, [1, ...]; its time is the call's.
        shared: Arguments that all rows share in this family.

    Raises:
        UnsupportedModelError: The rows do not fit into one call.
    """
    total, main = row_count(bound), main_name(bound)
    if not isinstance(main_input(bound), Tensor):
        raise UnsupportedModelError("The denoiser takes its latents as a list: no row can be put beside them.")
    bound, row = _even_text(dict(bound), dict(row))
    joined: dict[str, Any] = {}
    for name, value in bound.items():
        if name == main:
            joined[name] = torch.cat([latents.to(value), value])
        elif name in SHARED or name in shared:
            joined[name] = value
        elif name in _TIMES and isinstance(value, Tensor):
            joined[name] = torch.cat([value[:1], value]) if value.ndim and value.shape[0] == total else value
        else:
            joined[name] = _joined(name, value, row.get(name), total)
    return joined


def _joined(name: str, value: Any, other: Any, total: int) -> Any:
    if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim and value.shape[0] == total:
        if other.shape[1:] != value.shape[1:]:
            raise UnsupportedModelError(
                f"The source's {name} is {tuple(other.shape)}, the edit's {tuple(value.shape)}: they do not fit into "
                "one call. Give both prompts the same max_sequence_length, and both runs the same size."
            )
        return torch.cat([other[:1].to(value), value])
    if isinstance(value, dict):
        mine = other if isinstance(other, dict) else {}
        return {k: v if k in SHARED else _joined(k, v, mine.get(k), total) for k, v in value.items()}
    if name in ROW_LISTS and isinstance(value, (list, tuple)) and len(value) == total:
        first = other[0] if isinstance(other, (list, tuple)) and other else value[0]
        return type(value)([first, *value])
    return value


def _even_text(bound: dict[str, Any], row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pad the shorter of two texts, with a mask that hides the padding (Qwen-Image cuts every text to its length)."""
    name = "encoder_hidden_states"
    texts = [t for x in (bound, row) if isinstance(t := x.get(name), Tensor) and t.ndim == 3]
    if len(texts) < 2 or texts[0].shape[1] == texts[1].shape[1]:
        return bound, row
    mask = next((n for n in _MASKS if n in bound), None)
    if mask is None:
        raise UnsupportedModelError(
            f"The source's prompt makes {texts[1].shape[1]} text tokens, the target's {texts[0].shape[1]}, and the "
            "denoiser takes no mask that could hide the difference. Give both the same max_sequence_length."
        )
    length = max(t.shape[1] for t in texts)
    for x, text in zip((bound, row), texts, strict=True):
        given = x.get(mask)
        valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if given is None else given
        gap = length - text.shape[1]
        x[name] = torch.nn.functional.pad(text, (0, 0, 0, gap))
        x[mask] = torch.nn.functional.pad(valid, (0, gap))
    return bound, row
