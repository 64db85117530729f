"""Neighbourhood attention against NATTEN's recorded results and masked float64 maps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels import sdpa
from attnctl.kernels.neighborhood.attend import neighborhood
from attnctl.kernels.neighborhood.axes import Axis, axes_of, neighborhood_density, neighborhood_mask
from attnctl.kernels.neighborhood.tiles import tiles

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures" / "natten"
CASES = json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))


def masked(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], text: int = 0, bias: Tensor | None = None
) -> Tensor:
    """Attend with the whole map in float64; `text` tokens stand before the grid's."""
    keep = torch.nn.functional.pad(neighborhood_mask(axes), (text, 0, text, 0), value=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
    logits = q.double() @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits + (0 if bias is None else bias)).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def test_recorded_cases() -> None:
    t = load_file(FIXTURES / "cases.safetensors")
    assert len(CASES) == 20
    for name, given_ in CASES.items():
        q, k, v, out = (t[f"{name}.{x}"].flatten(1, -3).transpose(1, 2) for x in ("q", "k", "v", "out"))
        causal = [bool(flag) for flag in given_["is_causal"]]
        axes = axes_of(t[f"{name}.q"].shape[1:-2], given_["kernel_size"], given_["stride"], given_["dilation"], causal)
        assert torch.equal(neighborhood_mask(axes), t[f"{name}.mask"].bool()), name
        assert (neighborhood(q, k, v, axes) - out).abs().max() <= 2e-6, name
        assert neighborhood_density(axes) == pytest.approx(float(t[f"{name}.mask"].float().mean())), name
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]  # the road that is differentiable
        assert (neighborhood(*inputs, axes) - out).abs().max() <= 2e-6, name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_neighbourhood_is_the_masked_map(data: st.DataObject) -> None:
    grid, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(data.draw(st.integers(1, 3), label="axes")):
        grid.append(data.draw(st.integers(1, 9), label="length"))
        dilation.append(data.draw(st.integers(1, min(3, grid[-1])), label="dilation"))
        window.append(data.draw(st.integers(1, grid[-1] // dilation[-1]), label="window"))
        stride.append(data.draw(st.integers(1, window[-1]), label="stride"))
        causal.append(data.draw(st.booleans(), label="causal"))
    axes, text = axes_of(grid, window, stride, dilation, causal), data.draw(st.integers(0, 3), label="text")
    n = math.prod(grid) + text
    g = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(2, 4, n, 8, generator=g), *torch.randn(2, 2, 2, n, 8, generator=g)
    want = masked(q, k, v, axes, text)
    for inputs in ((q, k, v), (q.clone().requires_grad_(), k, v)):
        assert (neighborhood(*inputs, axes, image=slice(text, n)) - want).abs().max() <= 2e-6


def test_gradients_are_those_of_the_masked_map() -> None:
    axes, g = axes_of((5, 6), (3, 2), (1, 2), (1, 3)), torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, 2, 32, 8, generator=g).double()
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    neighborhood(*ours, axes, image=slice(2, 32)).square().sum().backward()  # type: ignore[arg-type]
    masked(*theirs, axes, 2).square().sum().backward()  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-12  # type: ignore[operator]


def test_everything_is_torch_s_attention_bit_for_bit() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    for axes in (axes_of((5, 6), (5, 6)), axes_of((5, 6), 9, shrink=True)):
        assert torch.equal(neighborhood(q, k, v, axes), sdpa.run(q, k, v))


@pytest.mark.parametrize("first", [True, False])
def test_padding_of_each_prompt_is_left_out(first: bool) -> None:
    axes, g = axes_of((4, 5), (3, 3)), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 26, 8, generator=g)
    words = torch.ones(2, 6, dtype=torch.bool)
    words[0, 4:] = words[1, 2:] = False
    image = slice(6, 26) if first else slice(0, 20)
    out = neighborhood(q, k, v, axes, image=image, words=words)
    for b in range(2):
        at = words[b].nonzero()[:, 0] + (0 if first else 20)
        tokens = torch.cat([at, torch.arange(6, 26)] if first else [torch.arange(20), at])
        seen = torch.nn.functional.pad(neighborhood_mask(axes), (len(at), 0, len(at), 0), value=True)
        if not first:
            seen = torch.nn.functional.pad(neighborhood_mask(axes), (0, len(at), 0, len(at)), value=True)
        x = [y[b : b + 1, :, tokens].double() for y in (q, k, v)]
        want = (x[0] @ x[1].mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ x[2]
        assert (out[b : b + 1, :, tokens] - want).abs().max() <= 2e-6


def test_bias_by_relative_places() -> None:
    """The table of "Neighborhood Attention Transformer": entry [h, key - query + w - 1] for each axis."""
    axes, g = axes_of((6, 7), (3, 5), 1, (2, 1)), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 42, 8, generator=g)
    table = torch.randn(2, 5, 9, generator=g).requires_grad_()
    row, column = torch.arange(42) // 7, torch.arange(42) % 7
    apart = (row[None] - row[:, None]) // 2 + 2, column[None] - column[:, None] + 4
    whole = table[:, apart[0].clamp(0, 4), apart[1].clamp(0, 8)].double()
    out = neighborhood(q, k, v, axes, bias=table)
    assert (out - masked(q, k, v, axes, bias=whole)).abs().max() <= 2e-6
    with torch.no_grad():
        assert (neighborhood(q, k, v, axes, bias=table) - out).abs().max() <= 2e-6


def test_what_no_tile_reads_cannot_spoil_it() -> None:
    axes = axes_of((16,), 4, 4)
    q, k, v = torch.randn(3, 1, 1, 16, 8)
    k[:, :, 4:8] = v[:, :, 4:8] = torch.nan
    for inputs in ((q, k, v), (q.clone().requires_grad_(), k, v)):
        out = neighborhood(*inputs, axes)
        assert out[:, :, [0, 3, 8, 15]].isfinite().all()


def test_lists_made_while_tracing_do_not_stay() -> None:
    axes = axes_of((4, 6), 3)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood(q, k, v, axes)

    x = torch.randn(3, 2, 2, 24, 8).unbind(0)
    program = torch.export.export(Model(), tuple(x), dynamic_shapes=[{0: torch.export.Dim("b", min=1, max=64)}] * 3)
    one: Any = [y[:1].repeat(5, 1, 1, 1) for y in x]
    assert (program.module()(*one) - neighborhood(*one, axes)).abs().max() <= 1e-6
    work, back = tiles(axes, torch.device("cpu"))
    assert type(back) is Tensor
    assert sum(w.queries.numel() for w in work) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 9}, "9 tokens, 1 apart, do not fit into an axis of 8"),
        ({"window": 3, "dilation": 3}, "do not fit into an axis of 8"),
        ({"window": 3, "stride": 4}, "Take a stride up to the window"),
        ({"window": (3, 3, 3)}, "one for each of 2 axes"),
        ({"window": 0}, "window"),
        ({"window": 3, "causal": (True,)}, "one for each axis"),
        ({"window": 3, "grid": (2, 2, 2, 8)}, "one to three axes"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        axes_of(**({"grid": (8, 10)} | arguments))


def test_a_grid_of_other_tokens_is_refused() -> None:
    q, k, v = torch.randn(3, 1, 1, 16, 8)
    with pytest.raises(ConfigError, match="a grid of 4 x 5 was given with 16 of 16 queries"):
        neighborhood(q, k, v, axes_of((4, 5), 3))
