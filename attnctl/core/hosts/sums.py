"""How pipelines put the predictions of negative prompt and prompt together, and how another sum takes that place.

With s the pipeline's guidance scale, u and c its predictions, every pipeline computes F(u, c) = u + s (c - u), or
c + s' (c - u), which is the same with s = s' + 1. A sum p of one's own goes through F unchanged when the denoiser
returns other rows:

    one batch        p in both rows: F(p, p) = p, whatever s is
    the same, where  c in the prompt's rows and u' = c - (p - c) / (s - 1) in the others: F(u', c) = p, and what the
    the sum is       pipeline derives from c stays what it was
    rescaled to c
    two calls        the prompt's call comes first, and returns c; the other returns u'

Pipelines that scale their sum to the length of c, token by token, do so with p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.hosts.arguments import Rows
from attnctl.core.hosts.pipelines import guidance_rescale, guidance_scale, uses_guidance
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.combining import rescaled

__all__ = [
    "as_rows",
    "cfg_scale",
    "check_handed",
    "check_negative",
    "parts_of",
    "three_rows",
    "unguided",
    "used",
    "with_sum",
]


def cfg_scale(pipe: Any, state: CallState) -> float | None:
    """Return s of the call that is under way, counted as in u + s (c - u); None where nothing tells it."""
    if state.options.get("use_dynamic_cfg") or state.denoiser is None or state.family is None:
        return None  # it is set anew after the denoiser's call
    scale = guidance_scale(pipe, state.denoiser, state.options)
    return None if scale is None else float(scale + 1 if state.family.from_prompt else scale)


def unguided(what: str, pipe: Any) -> UnsupportedModelError:
    """Return the error for a run that predicts nothing for a negative prompt."""
    if pipe is None:
        return UnsupportedModelError(
            f"{what} needs the predictions for prompt and negative prompt, and nothing tells which rows of a bare "
            'model are which. Pass control(..., layout="uncond_first") if the first half is the negative prompt, or '
            "control the pipeline."
        )
    return UnsupportedModelError(
        f"{what} needs the predictions for prompt and negative prompt, but this {type(pipe).__name__} runs without "
        "classifier-free guidance: it predicts nothing for a negative prompt. Pass guidance_scale above 1 (FLUX, "
        "Qwen-Image and HunyuanVideo: true_cfg_scale above 1, and a negative_prompt), or leave the control out."
    )


def three_rows(what: str, pipe: Any) -> UnsupportedModelError:
    """Return the error for a run that is guided by its text and by a picture, with a scale for each."""
    return UnsupportedModelError(
        f"{what} needs one prediction for the prompt and one for the negative prompt, but {type(pipe).__name__} puts "
        "three together, with text and picture, with the picture alone and with neither, by two scales. Leave the "
        "control out."
    )


def check_negative(what: str, pipe: Any, rows: Rows) -> None:
    """Raise where a call makes sure that there is no prediction for a negative prompt.

    Raises:
        UnsupportedModelError: The rows of a bare model are not known, the pipeline's guidance is off, or it has two of
            them.
    """
    if rows.role == "thirds":
        raise three_rows(what, pipe)
    if rows.role == "all" and pipe is None:
        raise unguided(what, pipe)
    scale = getattr(pipe, "guidance_scale", None)
    off = not isinstance(scale, (int, float)) or scale <= 1
    if rows.role == "all" and uses_guidance(pipe) is False and off:
        raise unguided(what, pipe)


def as_rows(pred: Any) -> Tensor:
    """Return a prediction as one tensor [rows, ...]; some models return a list with a tensor for each row."""
    if isinstance(pred, Tensor):
        return pred
    shapes = {tuple(x.shape) for x in pred}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"The pictures of one call have {len(shapes)} sizes ({sorted(shapes)[:3]}): predictions are put together "
            "for pictures of one size. Generate them in calls of their own."
        )
    return torch.stack(tuple(pred))


def parts_of(pred: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cut a batch into u and c."""
    assert rows.uncond is not None
    return pred[rows.uncond], pred[rows.cond]


def used(pred: Tensor, latents: Any) -> int:
    """Count the channels (axis 1) of a prediction that update the latents; others are a variance that is cut off."""
    learned = isinstance(latents, Tensor) and latents.ndim == pred.ndim > 3 and pred.shape[1] == 2 * latents.shape[1]
    return int(latents.shape[1] if learned else pred.shape[1])


def with_sum(pred: Any, p: Tensor, c: Tensor, rows: Rows, pipe: Any, s: float | None) -> Any:
    """Return the rows of a call such that the pipeline's own formula gives p.

    Args:
        pred: What the denoiser returned for the call: both rows, or those of the negative prompt.
        p: The sum [B, C, ...]; `pred` may have further channels, which stay.
        c: The prompt's prediction.
        rows: The rows of the call.
        pipe: The pipeline.
        s: Its scale, counted as in u + s (c - u); None where nothing tells it.

    Raises:
        UnsupportedModelError: The scale is needed and nothing tells it, or it is 1.
    """
    both = rows.role == "both"
    if both and not guidance_rescale(pipe):
        new_u = new_c = p
    else:
        if s is None or s == 1:
            cause = "does not tell its guidance scale" if s is None else "has a guidance scale of 1"
            raise UnsupportedModelError(
                f"{type(pipe).__name__} {cause}, which is needed to put another sum of its predictions in the place of "
                "its own" + (". Call it without guidance_rescale." if both else ".")
            )
        new_u, new_c = c - (p - c) / (s - 1), c
    ordered = [new_u] if not both else [new_u, new_c] if rows.uncond == slice(0, rows.total // 2) else [new_c, new_u]
    whole = torch.cat(ordered).to(_dtype(pred))
    if isinstance(pred, (list, tuple)):
        return type(pred)(whole)
    return whole if whole.shape == pred.shape else torch.cat([whole, pred[:, whole.shape[1] :]], 1)


def _dtype(pred: Any) -> torch.dtype:
    dtype: torch.dtype = pred.dtype if isinstance(pred, Tensor) else pred[0].dtype
    return dtype


def check_handed(what: str, pipe: Any, handed: Any, p: Tensor, c: Tensor, *, signed: bool) -> bool:
    """Compare what a pipeline hands to its scheduler with the sum that was meant for it.

    Args:
        what: The control, for messages.
        pipe: The pipeline.
        handed: What the scheduler is given.
        p: The sum.
        c: The prompt's prediction.
        signed: Whether the sign of the prediction matters.

    Returns:
        Whether the pipeline has scaled the sum to the length of c, token by token.

    Raises:
        UnsupportedModelError: It is another: the pipeline puts its predictions together in a way of its own.
    """
    if not isinstance(handed, Tensor):
        return False
    wide = torch.promote_types(handed.dtype, torch.float32)
    loose = 5e-2 if handed.dtype in (torch.float16, torch.bfloat16) else 1e-3
    m, p, c = handed.to(wide), p.to(wide), c.to(wide)
    if phi := guidance_rescale(pipe):
        p = rescaled(p, c, phi)
    if m.numel() == p.numel() and not m.isnan().any():
        turned = signed and m.shape == p.shape and bool((m * p).sum() < 0)
        if not turned and abs(m.norm() - p.norm()) <= loose * torch.maximum(p.norm(), c.norm()):
            return False
        a, b = (x.reshape(-1, x.shape[-1]).norm(dim=-1) for x in (m, c))
        normed = a.shape == b.shape and bool((a - b).norm() <= loose * b.norm())
        if normed and p.norm() <= 1e-6 * c.norm():
            raise _undirected(what, pipe)
        if normed and not turned:
            return True  # the direction is that of p
    if m.isnan().any() and not p.any():
        raise _undirected(what, pipe)
    raise UnsupportedModelError(
        f"{what}: what {type(pipe).__name__} hands to its scheduler is not the sum that was put in the place of its "
        f"own (norm {float(m.norm()):.4g} of {m.numel()} numbers; expected {float(p.norm()):.4g} of {p.numel()}). It "
        "puts its predictions together, or changes them, in a way that attnctl does not know: leave the control out"
        + (', or use space="model".' if signed else ".")
    )


def _undirected(what: str, pipe: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}: {type(pipe).__name__} scales its sum to the length of the prompt's prediction, token by token, and "
        "cannot hand on a sum of 0. Use zero_init_steps=0."
    )
