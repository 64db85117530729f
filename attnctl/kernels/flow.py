"""Rules that walk along the path between an image and noise, for models of the velocity v = dx/dt.

t is the share of noise: x_t = (1 - t) x_0 + t eps, 0 clean and 1 noise. A rule is a generator, so that whoever has a
velocity can drive it: it yields where it wants one (a point and its level), is sent the velocity, and returns the end
of the path. With a and b the levels of one step:

    euler      x + (b - a) v(x, a)
    midpoint   m = x + (b - a)/2 v(x, a);  x + (b - a) v(m, (a + b)/2)             RF-Solver, arXiv 2411.04746
    fireflow   the same with the last step's midpoint velocity in place of v(x, a)          FireFlow, arXiv 2412.07517
    uniinv     p = v(x + (b - a) p, b);  x + (b - a) p, p the last step's velocity           UniInv, arXiv 2504.13109

`uniinv` inverts what Euler's rule denoises. `toward` bends the velocity as RF-Inversion does (arXiv 2410.10792), and
`flow_edit` is the walk of FlowEdit (arXiv 2412.08629), which needs no inversion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from attnctl.errors import ConfigError

__all__ = ["Rule", "Walk", "evaluations", "flow_edit", "integrate", "toward", "walk"]

Rule = Literal["euler", "midpoint", "fireflow", "uniinv"]
Walk: TypeAlias = Generator[tuple[Tensor, float], tuple[Tensor, "Tensor | None"], Tensor]
"""Yields (point, level); is sent (velocity, what was added to the point meanwhile or None); returns the end."""
Note: TypeAlias = Callable[[int, Tensor], None]


def walk(rule: Rule, x: Tensor, levels: Sequence[float], note: Note = lambda i, x: None) -> Walk:
    """Begin a walk from the first level to the last.

    Args:
        rule: The rule of its steps.
        x: Where it begins.
        levels: The levels of the path, rising (towards noise) or falling.
        note: Called with the number and the point of each level that is reached, the first included.

    Raises:
        ConfigError: The rule is unknown.
    """
    rules = {"euler": _euler, "midpoint": _midpoint, "fireflow": _fireflow, "uniinv": _uniinv}
    if rule not in rules:
        raise ConfigError(f"rule={rule!r} is unknown. Choose one of {', '.join(get_args(Rule))}.")
    return rules[rule](x, levels, note)


def evaluations(rule: Rule, levels: Sequence[float]) -> list[float]:
    """List the levels at which a walk asks for a velocity, in order."""
    pairs = list(itertools.pairwise(levels))
    if rule == "midpoint":
        return [level for a, b in pairs for level in (a, (a + b) / 2)]
    if rule == "fireflow":
        return [levels[0], *((a + b) / 2 for a, b in pairs)]
    return [levels[0], *(b for _, b in pairs)] if rule == "uniinv" else [a for a, _ in pairs]


def integrate(velocity: Callable[[Tensor, float], Tensor], going: Walk) -> Tensor:
    """Drive a walk with a velocity field to its end."""
    try:
        point, level = next(going)
        while True:
            point, level = going.send((velocity(point, level), None))
    except StopIteration as end:
        result: Tensor = end.value
        return result


def _moved(x: Tensor, added: Tensor | None) -> Tensor:
    return x if added is None else x + added


def _euler(x: Tensor, levels: Sequence[float], note: Note) -> Walk:
    note(0, x)
    for i, (a, b) in enumerate(itertools.pairwise(levels), 1):
        v, added = yield x, a
        x = _moved(x, added) + (b - a) * v
        note(i, x)
    return x


def _midpoint(x: Tensor, levels: Sequence[float], note: Note) -> Walk:
    note(0, x)
    for i, (a, b) in enumerate(itertools.pairwise(levels), 1):
        v, added = yield x, a
        x = _moved(x, added)
        v, added = yield x + (b - a) / 2 * v, (a + b) / 2
        x = _moved(x, added) + (b - a) * v
        note(i, x)
    return x


def _fireflow(x: Tensor, levels: Sequence[float], note: Note) -> Walk:
    note(0, x)
    v, added = yield x, levels[0]
    x = _moved(x, added)
    for i, (a, b) in enumerate(itertools.pairwise(levels), 1):
        v, added = yield x + (b - a) / 2 * v, (a + b) / 2
        x = _moved(x, added) + (b - a) * v
        note(i, x)
    return x


def _uniinv(x: Tensor, levels: Sequence[float], note: Note) -> Walk:
    note(0, x)
    v, added = yield x, levels[0]
    x = _moved(x, added)
    for i, (a, b) in enumerate(itertools.pairwise(levels), 1):
        v, added = yield x + (b - a) * v, b
        x = _moved(x, added) + (b - a) * v
        note(i, x)
    return x


def toward(v: Tensor, x: Tensor, end: Tensor, level: float, strength: float, *, noise: bool) -> Tensor:
    """Bend a velocity towards a known end of the path: v + strength (straight - v) (arXiv 2410.10792, eq. 8 and 15).

    Args:
        v: The model's velocity at x.
        x: The point.
        end: Noise, or the clean latents.
        level: The level of x.
        strength: gamma on the way to noise, eta on the way back; 0 changes nothing, 1 leads straight to the end.
        noise: Whether `end` is noise.
    """
    straight = (end - x) / max(1 - level, 1e-6) if noise else (x - end) / max(level, 1e-6)
    return v + strength * (straight - v)


def flow_edit(
    x0: Tensor, levels: Sequence[float], noise: Callable[[], Tensor], average: int = 1, plain: int = 0
) -> Walk:
    """Walk from a source to its edit without inverting (arXiv 2412.08629, algorithm 1).

    It asks for velocities of pairs: the point is [z_source; z_edit] [2B, ...], and so is the velocity, of the source's
    prompt and of the target's.

    Args:
        x0: The source's clean latents [B, ...].
        levels: Falling levels; the first is where the edit begins (n_max steps from the end).
        noise: Draws noise like x0, anew at every evaluation.
        average: Noises to average over per step (n_avg).
        plain: How many of the last steps are ordinary denoising with the target's prompt (n_min).

    Returns:
        [x_0; edit], [2B, ...].
    """
    edit, pairs = x0, list(itertools.pairwise(levels))
    for a, b in pairs[: len(pairs) - plain]:
        difference = torch.zeros_like(x0)
        for _ in range(average):
            z = (1 - a) * x0 + a * noise()
            v, _added = yield torch.cat([z, edit + z - x0]), a
            of_source, of_edit = v.chunk(2)
            difference = difference + (of_edit - of_source) / average
        edit = edit + (b - a) * difference
    if plain:
        a = pairs[len(pairs) - plain][0]
        z = (1 - a) * x0 + a * noise()
        x = torch.cat([z, edit + z - x0])
        for a, b in pairs[len(pairs) - plain :]:
            v, added = yield x, a
            x = _moved(x, added) + (b - a) * v
        edit = x.chunk(2)[1]
    return torch.cat([x0, edit])
