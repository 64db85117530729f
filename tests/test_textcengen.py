"""TextCenGen: the force and the moved map written out, the loss, and latents that leave a space free."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo_pipelines as pipes

import attnctl
from attnctl.errors import ConfigError
from attnctl.processors import TextCenGen
from attnctl.processors.latent.textcengen import displacement, shifted

TOP = (0.0, 0.0, 1.0, 0.5)


def bump(x: int, y: int, n: int = 8) -> torch.Tensor:
    out = torch.zeros(n, n, dtype=torch.float64)
    out[y, x] = 1.0
    return out


def test_the_force_is_the_sum_of_pushes() -> None:
    maps = torch.stack([bump(5, 1), bump(2, 6)])
    found = displacement(maps, TOP, 0.2, 0.002)
    for map_, move in zip(((5, 1), (2, 6)), found, strict=True):
        p = [(v + 0.5) / 8 for v in map_]
        d = math.dist(p, (0.5, 0.25))
        for axis, m in enumerate((0.5, 0.25)):
            push = 0.04 / d * (p[axis] - m) / d + 0.002 / p[axis] ** 2 - 0.002 / (1 - p[axis]) ** 2
            want = min(max(push, 1 / 16 - p[axis]), 1 - 1 / 16 - p[axis])
            assert abs(float(move[axis]) - want) < 1e-12
    assert displacement(bump(0, 0)[None] * 0, TOP, 0.2, 0.0).isfinite().all()
    strong = displacement(maps, TOP, 2.0, 0.0)  # the centroid stays in the picture
    assert all(0 < (v + 0.5) / 8 + float(s) < 1 for v, s in zip((5, 1), strong[0], strict=True))


def test_maps_move_by_whole_tokens_and_zeros_come_in() -> None:
    moved = shifted(torch.stack([bump(5, 1), bump(5, 1)]), torch.tensor([[-0.25, 0.5], [0.5, 0.0]]))
    assert torch.allclose(moved[0], bump(3, 5), atol=1e-12)
    assert not moved[1].any()


def test_only_concepts_in_the_space_have_a_loss_which_falls_as_they_leave() -> None:
    control = TextCenGen(concepts=("a", "b"), space=TOP, theta=0.01)
    inside, outside = (bump(4, y)[None] for y in (2, 7))
    both = torch.stack([torch.cat([inside, outside]), torch.cat([outside, outside])])
    loss = control.loss(both, {})
    assert loss[0] > 0.9
    assert loss[1] == 0
    wide = torch.ones(1, 1, 8, 8, dtype=torch.float64) * 0.1
    wide[0, 0, 2, 4] = 1.0
    wide.requires_grad_()
    (grad,) = torch.autograd.grad(control.loss(wide, {}).sum(), wide)
    assert grad[0, 0, :4].mean() > 0 > grad[0, 0, 4:].mean()


def test_latents_move_and_nothing_is_left_behind() -> None:
    pipe, call = pipes.build("sd")
    plain = pipes.run(pipe, call)
    control = TextCenGen(concepts=("cat",), space=TOP, theta=0.0, step_size=5.0)
    with attnctl.control(pipe, control) as handle:
        moved = pipes.run(pipe, call)
        assert "updates" in handle.report().__str__()
    assert not torch.equal(torch.as_tensor(moved), torch.as_tensor(plain))
    assert torch.equal(torch.as_tensor(pipes.run(pipe, call)), torch.as_tensor(plain))
    with attnctl.control(pipe, TextCenGen(concepts=("cat",), theta=1.0)):
        assert torch.equal(torch.as_tensor(pipes.run(pipe, call)), torch.as_tensor(plain))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"space": (0, 0, 1)}, "no box"),
        ({"space": (0, 0.5, 1, 0.5)}, "is empty"),
        ({"space": (0, 0, 1, 1)}, "less than a tenth"),
        ({"space": (0, 0, 2, 1)}, "0 to 1"),
    ],
)
def test_what_is_no_space_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TextCenGen(concepts=("cat",), **fields)
