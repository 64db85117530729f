"""IR-Diffusion: isolation and reposition against the formula written out, and on real denoisers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from contract import run
from test_share_attention import attend, inputs
from torch import Tensor

from attnctl.core.call import AttnCall, Rows
from attnctl.core.sites import Grid
from attnctl.errors import ConfigError
from attnctl.processors import IRDiffusion, ShareAttention
from attnctl.processors.sharing.ir_diffusion import resampled

pytestmark = pytest.mark.usefixtures("no_grad")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
MIDDLE = (0.25, 0.25, 0.75, 0.75)
# Two references with one subject each, and a picture with both.
THREE = ((MIDDLE, None), (None, MIDDLE), (LEFT, RIGHT))


@pytest.fixture
def square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay 16 image tokens on a grid of 4 x 4, behind the text of a joint attention."""

    def on_image(call: AttnCall) -> tuple[slice, Grid]:
        return (slice(0, 16) if call.image is None else call.image), (1, 4, 4)

    monkeypatch.setattr(AttnCall, "on_image", on_image)


def tokens(box: tuple[float, ...] | None) -> list[int]:
    """List the tokens of a 4 x 4 grid whose middles lie in a box."""
    if box is None:
        return []
    middle = [((x + 0.5) / 4, (y + 0.5) / 4) for y in range(4) for x in range(4)]
    return [i for i, (x, y) in enumerate(middle) if box[0] < x < box[2] and box[1] < y < box[3]]


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: float, text: int, mask: Tensor | None) -> Tensor:
    """Attend query by query for one half of three pictures, [3, H, N, D]."""
    out = torch.empty_like(q)
    for p, boxes in enumerate(THREE):
        for n in range(q.shape[2]):
            mine = [s for s, box in enumerate(boxes) if n - text in tokens(box)]
            hidden = [text + t for s, box in enumerate(boxes) if mine and s not in mine for t in tokens(box)]
            keys = [(p, m, 0.0) for m in range(k.shape[2]) if m not in hidden]
            keys += [(s, text + t, bias) for s in mine if s != p for t in tokens(THREE[s][s])]
            logits = torch.stack([q[p, :, n] @ k[r, :, m].mT / 2 for r, m, _ in keys], -1).diagonal(dim1=0, dim2=1).T
            added = [b + (0.0 if mask is None else float(mask[r, 0, 0, m])) for r, m, b in keys]
            logits = logits + torch.tensor(added, dtype=q.dtype)
            values = torch.stack([v[r, :, m] for r, m, _ in keys], 1)
            out[p, :, n] = (logits.softmax(-1)[..., None] * values).sum(1)
    return out


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.usefixtures("square")
def test_subjects_see_themselves_and_their_references_alone(text: int) -> None:
    q, k, v = inputs(6, n=16 + text)
    mask = None
    if text:
        mask = torch.zeros(6, 1, 1, 19, dtype=torch.float64)
        mask[1, ..., 2] = mask[5, ..., 1] = -math.inf  # pads of the texts
    control = IRDiffusion(boxes=THREE, references=(0, 1), isolate_until=1.0, reposition=False, bias=0.4)
    more: dict[str, Any] = {"kind": "joint", "image": slice(3, 19)} if text else {}
    out = attend(control, q, k, v, mask=mask, **more)
    for half in (slice(0, 3), slice(3, 6)):
        expected = written_out(q[half], k[half], v[half], 0.4, text, None if mask is None else mask[half])
        assert (out[half] - expected).abs().max() < 1e-12
    behind = attend(IRDiffusion(boxes=THREE, isolate_until=0.5), q, k, v, mask=mask, step=5, **more)
    assert (behind - attend(ShareAttention(chance=0.0), q, k, v, mask=mask, **more)).abs().max() == 0


@pytest.mark.usefixtures("square")
def test_isolated_subjects_do_not_see_each_other() -> None:
    q, k, v = inputs(2, n=16)
    control = IRDiffusion(boxes=((LEFT, RIGHT),), isolate_until=1.0)
    out = attend(control, q, k, v, rows=Rows.all(2))
    changed = v.clone()
    changed[:, :, tokens(RIGHT)] += 1
    moved = (attend(control, q, k, changed, rows=Rows.all(2)) - out).abs().amax((0, 1, 3))
    assert moved[tokens(LEFT)].max() == 0
    assert moved[tokens(RIGHT)].min() > 0.1


def test_a_part_of_the_picture_is_brought_to_another_size() -> None:
    x = torch.randn(2, 3, 16, 4, dtype=torch.float64)
    box = torch.tensor([[5, 6], [9, 10]])
    assert torch.equal(resampled(x, box, (2, 2)), x[:, :, [5, 6, 9, 10]])
    larger = resampled(x, box, (4, 2)).unflatten(2, (4, 2))
    want = F.interpolate(x[:, :, box.flatten()].unflatten(2, (2, 2)).permute(0, 1, 4, 2, 3).flatten(0, 1), (4, 2),
                         mode="bilinear")  # fmt: skip
    assert (larger.permute(0, 1, 4, 2, 3).flatten(0, 1) - want).abs().max() < 1e-12
    assert torch.allclose(resampled(torch.ones_like(x), box, (3, 5)), torch.ones(2, 3, 15, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sd15", "flux", "animatediff"])
def test_only_pictures_with_subjects_change(name: str) -> None:
    model, given = zoo.build(name, dtype=torch.float64)
    plain = zoo.call(model, given)
    boxes = ((MIDDLE, MIDDLE), (LEFT, RIGHT))
    out = run(model, given, IRDiffusion(boxes=((None, None), (LEFT, RIGHT)), isolate_until=1.0))
    assert (out[0] - plain[0]).abs().max() < 1e-12
    assert (out[1] - plain[1]).abs().max() > 1e-9
    with_reference = run(model, given, IRDiffusion(boxes=boxes, references=(0, 0), isolate_until=1.0))
    assert (with_reference[1] - out[1]).abs().max() > 1e-9
    assert torch.equal(run(model, given, IRDiffusion(boxes=boxes, isolate_until=0.0)), plain)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "one entry per picture"),
        ({"boxes": ((LEFT, (0, 0)),)}, "no box"),
        ({"boxes": (((0.5, 0, 0.5, 1),),)}, "is empty"),
        ({"boxes": (((0, 0, 1.5, 1),),)}, "0 to 1"),
        ({"boxes": ((LEFT,), (LEFT, RIGHT))}, "an entry per subject"),
        ({"boxes": ((LEFT, LEFT), (RIGHT, None))}, "nothing to keep apart"),
        ({"boxes": ((LEFT,),)}, "nothing to keep apart"),
        ({"boxes": THREE, "references": (0,)}, "1 references were given for 2"),
        ({"boxes": THREE, "references": (1, 0)}, "of which boxes says no place"),
        ({"boxes": ((LEFT, RIGHT),), "references": (0, 0)}, "says no place"),
        ({"boxes": THREE, "share": 0.5, "adain": ("q",)}, "leave out adain, share"),
    ],
)
def test_what_cannot_be_placed_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        IRDiffusion(**fields)


@pytest.mark.usefixtures("square")
def test_boxes_of_another_batch_are_refused() -> None:
    q, k, v = inputs(2, n=16)
    with pytest.raises(ConfigError, match="batch of 2"):
        attend(IRDiffusion(boxes=THREE), q, k, v, rows=Rows.all(2))
