"""PAG for joint attention: image and text tokens in one sequence, image perturbed, text left alone.

    image_block  image row i sees {i} and the text: softmax([q_i k_i, q_i K_text^T] scale) [v_i, V_text].
                 The definition of diffusers' StableDiffusion3PAGPipeline ("Self-Rectifying Diffusion Sampling
                 with Perturbed-Attention Guidance", arXiv 2403.17377, carried over to joint attention), where
                 the image-image block of the logits is -inf off its diagonal.
    image_rows   image rows take the identity map.
In both, text rows attend to everything as before. No (N+T) x (N+T) mask or map is built: an image row costs
1 + T logits, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.checks import (
    as_bias,
    check_call,
    chunk_rows,
    masked_softmax,
    repeat_heads,
    rows_of,
    token_slice,
    wide_dtype,
)
from attnctl.kernels.dispatch import Plain, plain
from attnctl.kernels.perturbation.targets import identity

__all__ = ["block_rows", "check_text", "image_block", "image_rows", "stitch"]


def image_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    image: slice,
    text: slice | None = None,
    plain: Plain = plain,
) -> Tensor:
    """Let image row i attend to {i} and the text, renormalised; text rows attend to everything as before.

    This is what PAG means for joint attention in diffusers' StableDiffusion3PAGPipeline: the image-image
    block of the logits is -inf off its diagonal. Every token outside `image` counts as text; without any, the
    result is v. The mask is respected for the text keys and for the token itself.
    Shapes: q [B, H, N+T, D]; k, v [B, Hk, N+T, D] -> [B, H, N+T, D].
    Raises: ConfigError where queries and keys differ in number or the slices do not cover the tokens.
    """
    mask, image = _joint_call(q, k, v, mask, image, text)
    return stitch(block_rows(q, k, v, mask, scale, image), q, k, v, mask, scale, image, plain)


def image_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    image: slice,
    text: slice | None = None,
    plain: Plain = plain,
) -> Tensor:
    """Give image rows the identity map and leave text rows as they are.

    Shapes and errors as in `image_block`.
    """
    mask, image = _joint_call(q, k, v, mask, image, text)
    goal = repeat_heads(v, q.shape[1])[..., image, :]
    return stitch(goal, q, k, v, mask, scale, image, plain)


def block_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, image: slice) -> Tensor:
    """Compute the image rows of `image_block`: 1 + T logits a row instead of N + T.

    Shapes: q [B, H, N+T, D]; k, v [B, Hk, N+T, D]; mask four-dimensional -> [B, H, N, D].
    """
    heads, wide = q.shape[1], wide_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    k_text, v_text = (_outside(x, image).to(wide) for x in (k, v))
    # Beside the logits, a row of queries, keys and values is made wide.
    step = chunk_rows(q.shape[0], heads, 1 + k_text.shape[2] + 3 * q.shape[3], q.device)
    blocks = []
    for start in range(image.start, image.stop, step):
        rows = slice(start, min(start + step, image.stop))
        q_row, k_row, v_row = (x[..., rows, :].to(wide) for x in (q, k, v))
        q_row = q_row * scale
        self_logits = (q_row * k_row).sum(dim=-1, keepdim=True)
        logits = torch.cat([self_logits, q_row @ k_text.transpose(-2, -1)], dim=-1)
        if mask is None:
            w = logits.softmax(dim=-1)
        else:
            w = masked_softmax(logits + _block_bias(mask, rows, image, wide))
        blocks.append(w[..., :1] * v_row + w[..., 1:] @ v_text)
    return torch.cat(blocks, dim=2).to(v.dtype)


def stitch(
    goal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    image: slice,
    plain: Plain,
) -> Tensor:
    """Put image rows between the other rows, which attend to everything as before.

    Shapes: goal [B, H, N, D] for the image rows of q [B, H, N+T, D] -> [B, H, N+T, D].
    """
    if goal.shape[2] == q.shape[2]:
        return goal
    cut = mask if mask is None or mask.shape[2] == 1 else _outside(mask, image)
    other = plain(_outside(q, image), k, v, cut, scale)
    return torch.cat([other[..., : image.start, :], goal, other[..., image.start :, :]], dim=2)


def check_text(image: slice, text: slice | None, n: int) -> None:
    """Raise ConfigError unless image and text tokens together are the whole sequence."""
    if text is None or text.start == text.stop:
        return
    text = token_slice(text, n, "text")
    if (text.start, text.stop) not in ((0, image.start), (image.stop, n)) or (
        text.stop - text.start + image.stop - image.start != n
    ):
        raise ConfigError(
            f"image={image} and text={text} were given for {n} tokens; expected two ranges that touch and "
            "cover all of them. Leave text out to count every token outside image as text."
        )


def _joint_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, image: slice, text: slice | None
) -> tuple[Tensor | None, slice]:
    mask4 = check_call(q, k, v, mask)
    n = q.shape[2]
    identity(v, n)
    image = token_slice(image, n, "image")
    check_text(image, text, n)
    return mask4, image


def _outside(x: Tensor, part: slice) -> Tensor:
    """Drop a range of tokens: [B, H, N, D] without x[:, :, part]."""
    if part.start == 0:
        return x[..., part.stop :, :]
    return torch.cat([x[..., : part.start, :], x[..., part.stop :, :]], dim=2)


def _block_bias(mask: Tensor, rows: slice, image: slice, dtype: torch.dtype) -> Tensor:
    """Pick the mask entries for [self, text keys] of a range of image rows."""
    cut = rows_of(mask, rows)
    assert cut is not None
    if mask.shape[-1] == 1:
        return as_bias(cut, dtype)
    if mask.shape[-2] == 1:
        diagonal = cut[..., rows].transpose(-2, -1)
    else:
        diagonal = cut[..., rows].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    text = torch.cat([cut[..., : image.start], cut[..., image.stop :]], dim=-1)
    return as_bias(torch.cat([diagonal, text.expand(*diagonal.shape[:-1], text.shape[-1])], dim=-1), dtype)
