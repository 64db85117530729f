"""Perturbed attention in closed form: A' = (1-u) A + u T, computed as lerp(A v, T v, u) on selected heads.

"Fine-Grained Perturbation Guidance via Attention Head Selection" (HeadHunter, SoftPAG), arXiv 2506.10978,
builds A' as a map. The output is linear in the map, so both give the same numbers, with masks, rotary
embeddings and joint attention alike, and no N x N tensor is needed. u = 1 with the identity target is PAG,
"Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv 2403.17377. The targets T stand
in `targets` and `joint`, blurred queries in `blur`; their names are re-exported here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.errors import ConfigError, nearest, unboxed
from attnctl.kernels.checks import check_call, repeat_heads, token_slice
from attnctl.kernels.dispatch import Plain
from attnctl.kernels.dispatch import plain as _plain
from attnctl.kernels.perturbation.blur import blur_queries
from attnctl.kernels.perturbation.joint import block_rows, check_text, image_block, image_rows, stitch
from attnctl.kernels.perturbation.targets import argmax, identity, query_mean, temperature, uniform

__all__ = [
    "SCOPES",
    "TARGETS",
    "argmax",
    "blur_queries",
    "check_heads",
    "check_strength",
    "identity",
    "image_block",
    "image_rows",
    "perturb",
    "query_mean",
    "temperature",
    "uniform",
]

TARGETS = ("identity", "uniform", "query_mean", "argmax")
SCOPES = ("all", "image", "image_rows", "text", "image_block")

# (selected?, first head, last head + 1): slices cost no index tensors, hence no copies to the device.
_Runs = list[tuple[bool, int, int]]


def perturb(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    target: str | Plain = "identity",
    u: float | Sequence[float] | Tensor = 1.0,
    heads: Sequence[int] | Tensor | None = None,
    scope: str = "all",
    image: slice | None = None,
    text: slice | None = None,
    keys: slice | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    plain: Plain = _plain,
    skip: bool = True,
) -> Tensor:
    """Compute lerp(attention, target, u) on the selected heads, ordinary attention on the others.

    Shapes: q [B, H, Nq, D]; k, v [B, Hk, Nk, D] -> [B, H, Nq, D], possibly v itself or a broadcast view.
    target: one of TARGETS, or a function (q, k, v, mask, scale) -> [B, h, Nq, D], for instance
        functools.partial(temperature, x=0.5). "query_mean" averages the queries of the rows that take it.
    u: 0 leaves attention as it is (bit-equal to `plain`), 1 replaces it; a number, or one per selected head.
    heads: 0-based indices, None for all. A tensor is read back to the host; a tuple costs nothing.
    scope: "all" = every row takes the target; "image" (or "image_rows") = image rows take it, the others stay
        ordinary; "text" = the other way round; "image_block" = image rows attend to themselves and the text.
    image, text: ranges of the joint sequence; every token outside `image` counts as text.
    keys: where the queries are the image's tokens alone, the range of the same tokens among the keys. Every row is then
        an image row, and every key outside the range counts as text.
    plain: the next kernel, called as plain(q, k, v, mask, scale).
    skip: let heads that u = 1 replaces skip their ordinary attention; `plain` then sees the other heads only
        (and other rows only, under an image scope). Set it to False if `plain` relies on seeing every head.
    Raises: ConfigError for u outside [0, 1], heads out of range or given twice, an unknown target or scope,
        a missing image range, the identity target where queries and keys are not the same tokens.
    """
    mask = check_call(q, k, v, mask)
    if keys is None:
        rows = _rows(scope, target, q.shape[2], k.shape[2], image, text)
    else:
        rows, keys = None, _image_keys(scope, target, keys, q.shape[2], k.shape[2])
    chosen = check_heads(heads, q.shape[1])
    strength = check_strength(u, len(chosen))
    if isinstance(strength, Tensor) and strength.dim():
        # Runs of heads are ascending; per-head strengths follow their heads.
        by_head = sorted(range(len(chosen)), key=lambda i: chosen[i])
        strength = torch.stack([strength[i] for i in by_head]).view(-1, 1, 1)
    if isinstance(strength, float) and strength == 0.0:
        return plain(q, k, v, mask, scale)
    runs = _runs(chosen, q.shape[1])
    goal = _goal(q, k, v, mask, scale, target, scope, rows, runs, keys)

    if isinstance(strength, float) and strength == 1.0 and skip:
        if rows is not None:
            goal = stitch(goal, *_take_call(q, k, v, mask, runs, True), scale, rows, plain)
        if len(chosen) == q.shape[1]:
            return goal
        out = plain(*_take_call(q, k, v, mask, runs, False), scale)
        left = iter(out.split([stop - start for selected, start, stop in runs if not selected], dim=1))
    else:
        out = plain(q, k, v, mask, scale)
        base = _take(out, runs, True, q.shape[1])
        weight = strength.to(base) if isinstance(strength, Tensor) else strength
        if rows is None:
            goal = torch.lerp(base, goal.to(base.dtype), weight)
        else:
            mixed = torch.lerp(base[..., rows, :], goal.to(base.dtype), weight)
            goal = torch.cat([base[..., : rows.start, :], mixed, base[..., rows.stop :, :]], dim=2)
        left = iter([out[:, start:stop] for selected, start, stop in runs if not selected])
    if len(runs) == 1:
        return goal
    right = iter(goal.split([stop - start for selected, start, stop in runs if selected], dim=1))
    return torch.cat([next(right) if selected else next(left) for selected, _, _ in runs], dim=1)


def check_heads(heads: Sequence[int] | Tensor | None, total: int) -> tuple[int, ...]:
    """Return head indices as a tuple of ints, all of them for None; raise ConfigError if one is not valid."""
    if heads is None:
        return tuple(range(total))
    chosen = tuple(heads.tolist() if isinstance(heads, Tensor) else map(unboxed, heads))
    wrong = [h for h in chosen if not isinstance(h, int) or isinstance(h, bool) or not 0 <= h < total]
    if wrong or not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(
            f"heads={chosen} was given; expected different whole numbers from 0 to {total - 1} (this site "
            f"has {total} heads), at least one. heads=None selects all."
        )
    return chosen


def check_strength(u: float | Sequence[float] | Tensor, n_heads: int) -> float | Tensor:
    """Return u as a float, or as a tensor of one strength per head; raise ConfigError outside [0, 1].

    The values of a tensor are checked on the CPU only: reading them back would stall a GPU at every call.
    """
    if isinstance(u, Tensor):
        if u.dim() > 1 or (u.dim() == 1 and u.shape[0] != n_heads):
            raise ConfigError(
                f"u has the shape {tuple(u.shape)}; expected one number, or {n_heads}, one per selected head."
            )
        if u.device.type == "cpu" and not torch.compiler.is_compiling():
            check_strength(u.detach().reshape(-1).tolist(), u.numel())
        return u
    values = list(u) if isinstance(u, Sequence) else [u]
    # Written so that NaN fails too.
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ConfigError(
            f"u={u} was given; expected strengths from 0 (attention as it is) to 1 (replaced). For a "
            "stronger effect raise the guidance scale instead."
        )
    if not isinstance(u, Sequence):
        return float(u)
    if len(values) != n_heads:
        raise ConfigError(f"{len(values)} strengths u were given for {n_heads} selected heads; expected one each.")
    return float(values[0]) if len(set(values)) == 1 else torch.tensor(values)


def _rows(
    scope: str, target: str | Plain, n_query: int, n_key: int, image: slice | None, text: slice | None
) -> slice | None:
    """Check target and scope, and return the range of image rows, or None where every row is meant."""
    if isinstance(target, str) and target not in TARGETS:
        raise ConfigError(
            f"target={target!r} was given; expected a function or one of {', '.join(map(repr, TARGETS))}."
            + nearest(target, TARGETS)
        )
    if scope not in SCOPES:
        raise ConfigError(
            f"scope={scope!r} was given; expected one of {', '.join(map(repr, SCOPES))}." + nearest(scope, SCOPES)
        )
    if scope == "all":
        return None
    needed, part = ("text", text) if scope == "text" else ("image", image)
    if part is None:
        raise ConfigError(
            f"scope={scope!r} was given without {needed}=; expected the range of the {needed} tokens, "
            f"{needed}=slice(first, end). Pass it, or use scope='all'."
        )
    if n_query != n_key:
        raise ConfigError(
            f"scope={scope!r} was given for {n_query} queries and {n_key} keys; image scopes exist only "
            "where queries and keys are the same tokens. Select self-attention or joint-attention sites."
        )
    if scope == "image_block" and target != "identity":
        raise ConfigError(
            "scope='image_block' is a target of its own; expected target='identity' with it. "
            "Use scope='image' to give another target to the image rows."
        )
    if image is not None:
        check_text(token_slice(image, n_query, "image"), text, n_query)
    return token_slice(part, n_query, needed)


def _image_keys(scope: str, target: str | Plain, keys: slice, n_query: int, n_key: int) -> slice:
    """Check target, scope and the image's range among the keys, where the queries are the image's tokens alone."""
    keys = token_slice(keys, n_key, "keys")
    if keys.stop - keys.start != n_query:
        raise ConfigError(f"keys={keys} was given for {n_query} queries; expected as many image keys.")
    _rows(scope, target, n_query, n_query, slice(0, n_query), None)
    return keys


def _goal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    target: str | Plain,
    scope: str,
    rows: slice | None,
    runs: _Runs,
    keys: slice | None,
) -> Tensor:
    """Compute the target for the selected heads and for the rows that take it."""
    heads, n_query = q.shape[1], q.shape[2]
    if keys is not None and scope == "image_block":  # each query's own key comes to the query's place
        k, v, rows = _first(k, keys, 2), _first(v, keys, 2), slice(0, n_query)
        mask = mask if mask is None or mask.shape[3] == 1 else _first(mask, keys, 3)
    elif keys is not None and target == "identity":
        v = v[..., keys, :]
    m_sel = _take_mask(mask, runs, True, heads)
    if target in ("identity", "uniform") and scope != "image_block":
        own_v = _take(repeat_heads(v, heads), runs, True, heads)
        goal = identity(own_v, n_query) if target == "identity" else uniform(own_v, n_query, m_sel)
        return goal if rows is None else goal[..., rows, :]
    q_sel, k_sel, v_sel, _ = _take_call(q, k, v, None, runs, True)
    if scope == "image_block" and rows is not None:
        return block_rows(q_sel, k_sel, v_sel, m_sel, scale, rows)
    if target == "query_mean":
        goal = query_mean(q_sel, k_sel, v_sel, m_sel, scale, rows=rows)
    else:
        function = argmax if isinstance(target, str) else target
        goal = function(q_sel, k_sel, v_sel, m_sel, scale)
    return goal if rows is None else goal[..., rows, :]


def _first(x: Tensor, part: slice, dim: int) -> Tensor:
    """Move a range of an axis to its front."""
    n = x.shape[dim]
    pieces = ((part.start, part.stop), (0, part.start), (part.stop, n))
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in pieces], dim)


def _runs(chosen: tuple[int, ...], total: int) -> _Runs:
    runs: _Runs = []
    for head in range(total):
        selected = head in chosen
        if runs and runs[-1][0] == selected:
            runs[-1] = (selected, runs[-1][1], head + 1)
        else:
            runs.append((selected, head, head + 1))
    return runs


def _take(x: Tensor, runs: _Runs, wanted: bool, heads: int) -> Tensor:
    """Keep the selected (or the other) heads; grouped heads are repeated only if some are dropped."""
    if len(runs) == 1:
        return x
    x = repeat_heads(x, heads)
    parts = [x[:, start:stop] for selected, start, stop in runs if selected == wanted]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _take_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, runs: _Runs, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    heads = q.shape[1]
    qkv = _take(q, runs, wanted, heads), _take(k, runs, wanted, heads), _take(v, runs, wanted, heads)
    return *qkv, _take_mask(mask, runs, wanted, heads)


def _take_mask(mask: Tensor | None, runs: _Runs, wanted: bool, heads: int) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else _take(mask, runs, wanted, heads)
