"""Attention shared over a batch: against recorded outputs, against the formula written out, and on real denoisers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from contract import Precise, Replace, run
from dense_maps import attended
from safetensors.torch import load_file
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.arguments import Rows
from attnctl.core.hosts.tokens import image_keys, parts_in
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, ConflictError
from attnctl.kernels import attention
from attnctl.kernels.sharing import match_statistics
from attnctl.processors import PAG, Consistent, MasaCtrl, ShareAttention, StyleAligned
from attnctl.processors.sharing.share_attention import source_table

pytestmark = pytest.mark.usefixtures("no_grad")
FIXTURES = Path(__file__).parent / "fixtures" / "shared_attention"
CASES: dict[str, ShareAttention] = {
    "sa_default": StyleAligned(),
    "sa_no_adain": StyleAligned(adain=()),
    "sa_shift": StyleAligned(bias=math.log(2)),
    "sa_scale": StyleAligned(factor=1.3),
    "sa_values": StyleAligned(adain=("q", "k", "v")),
    "masactrl": MasaCtrl(),
}


def attend(control: ShareAttention, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """Run one attention under a control; `more`: kind, image, text, keys, rows, mask."""
    site = Site("site", more.get("kind", "self"), q.shape[1], q.shape[3], 0)
    state = CallState(step=more.get("step", 0), steps=10, rows=more.get("rows", Rows.halves(q.shape[0])))
    link: Any = SimpleNamespace(site=site, state=state, kernel=attention)
    tokens = parts_in(image=more.get("image"), text=more.get("text"), keys=more.get("keys"))
    call = AttnCall(q, k, v, more.get("mask"), None, link, 0, tokens, attention)
    wrap = control.wrapper((site,))
    assert wrap is not None
    return wrap(call, AttnCall.plain)


def inputs(rows: int, n: int = 6, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    shapes = ((rows, 2, n, 4), (rows, 2, keys or n, 4), (rows, 2, keys or n, 4))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("case", [c["name"] for c in json.loads((FIXTURES / "cases.json").read_text())])
def test_recorded_outputs(case: str) -> None:
    data = load_file(FIXTURES / "cases.safetensors")
    q, k, v, expected = (data[f"{case}.{name}"] for name in "qkvo")
    assert (attend(CASES[case], q, k, v) - expected).abs().max() < 1e-6


def test_each_picture_sees_the_sources_that_are_named() -> None:
    q, k, v = inputs(6)
    out = attend(ShareAttention(sources=(1, 0, 2)), q, k, v)
    for half in (0, 3):
        for i, j in enumerate((1, 0, 2)):
            keys = torch.cat([k[half + i], k[half + j]], 1)
            values = torch.cat([v[half + i], v[half + j]], 1)
            expected = F.scaled_dot_product_attention(q[half + i], keys, values)
            assert (out[half + i] - expected).abs().max() < 1e-12


def test_joint_attention_shares_the_image_alone_under_its_mask() -> None:
    q, k, v = inputs(2, n=9)
    image = slice(3, 9)  # three tokens of text come first
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.float64)
    mask[0, ..., 2] = mask[1, ..., 8] = -math.inf  # a pad of the text, and one behind the second picture
    more: dict[str, Any] = {"kind": "joint", "image": image, "rows": Rows.all(2), "mask": mask}
    out = attend(ShareAttention(sources="others", bias=-0.5), q, k, v, **more)
    for i, j in ((0, 1), (1, 0)):
        logits = q[i] @ torch.cat([k[i], k[j][:, image]], 1).mT / 2
        logits = logits + torch.cat([mask[i, 0, 0], mask[j, 0, 0, image] - 0.5])
        expected = logits.softmax(-1) @ torch.cat([v[i], v[j][:, image]], 1)
        assert (out[i] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("start", [0, 3, 5])
@pytest.mark.parametrize("way", ["append", "replace", "statistics"])
def test_keys_of_the_text_are_not_shared_where_the_image_asks_alone(start: int, way: str) -> None:
    """Among the keys the image stands behind the text, in front of it, or between (PRX, Nucleus-Image, ...)."""
    q, k, v = inputs(2, n=6, keys=11)
    at = slice(start, start + 6)
    text = slice(0, start) if start else slice(6, 11)
    more: dict[str, Any] = {"kind": "joint", "image": slice(0, 6), "text": text, "keys": at, "rows": Rows.all(2)}
    ways = {"append": ShareAttention(), "replace": ShareAttention(take="replace"), "statistics": StyleAligned()}
    out = attend(ways[way], q, k, v, **more)
    own, first = (q[1:], k[1:].clone(), v[1:].clone()), (q[:1], k[:1], v[:1])
    if way == "statistics":
        own = match_statistics(own[0], first[0]), own[1], own[2]
        own[1][:, :, at] = match_statistics(own[1][:, :, at], first[1][:, :, at])
    if way == "replace":
        own[1][:, :, at], own[2][:, :, at] = first[1][:, :, at], first[2][:, :, at]
        want = F.scaled_dot_product_attention(*own)
    else:
        keys, values = (torch.cat([x, y[:, :, at]], 2) for x, y in zip(own[1:], first[1:], strict=True))
        want = F.scaled_dot_product_attention(own[0], keys, values)
    assert (out[1:] - want).abs().max() < 1e-12


def test_boolean_masks_stay_boolean_or_take_the_bias() -> None:
    q, k, v = inputs(2)
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    additive = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    for bias in (0.0, 0.7):
        control = ShareAttention(bias=bias)
        pair = [attend(control, q, k, v, rows=Rows.all(2), mask=m) for m in (mask, additive)]
        assert (pair[0] - pair[1]).abs().max() < 1e-12


def test_replacing_takes_the_parts_that_are_named() -> None:
    q, k, v = inputs(2)
    rows = Rows.all(2)
    out = attend(ShareAttention(take="replace", parts=("v",)), q, k, v, rows=rows)
    assert (out[1] - F.scaled_dot_product_attention(q[1], k[1], v[0])).abs().max() < 1e-12
    out = attend(ShareAttention(take="replace", parts=("q", "k")), q, k, v, rows=rows)
    assert (out[1] - F.scaled_dot_product_attention(q[0], k[0], v[1])).abs().max() < 1e-12


def test_a_random_share_is_drawn_from_the_step_and_the_seed() -> None:
    q, k, v = inputs(4, n=40)
    draw = lambda seed, step: attend(ShareAttention(share=0.25, seed=seed), q, k, v, step=step)  # noqa: E731
    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))
    story = Consistent()
    assert torch.equal(attend(story, q, k, v, step=0), F.scaled_dot_product_attention(q, k, v))
    acted = [not torch.equal(attend(story, q, k, v, step=s), draw(0, 0)) for s in range(1, 10)]
    assert any(acted)


def test_a_source_that_is_the_picture_itself_changes_no_self_attention() -> None:
    q, k, v = inputs(2)
    plain = F.scaled_dot_product_attention(q, k, v)
    out = attend(ShareAttention(sources=(0, 1)), q, k, v, rows=Rows.all(2))
    assert (out - plain).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3", "wan", "animatediff", "zimage"])
def test_only_the_pictures_that_take_from_others_change(name: str) -> None:
    model, given = zoo.build(name, dtype=torch.float64)
    plain = zoo.call(model, given)
    sites = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")][-2:]
    out = run(model, given, MasaCtrl(sites=sites, start=0.0))
    assert len(out) == 2
    assert (out[0] - plain[0]).abs().max() < 1e-12
    assert (out[1] - plain[1]).abs().max() > 1e-9
    assert torch.equal(run(model, given, ShareAttention(chance=0.0)), plain)


# Tiny models that the next test leaves out.
ONE_PICTURE = ("framepack", "qwen21", "helios", "wan_animate2", "cosmos3", "prior")  # a call makes one
FRAMES = ("animatediff", "svd", "unet3d", "latte", "i2vgenxl")  # in the batch: rows are not pictures
LINEAR = ("sana", "sana_video", "sana_wm")
REFUSED = ("lumina2", "mochi", "anyflow_far", "kandinsky6_sr")
OTHERS = (*ONE_PICTURE, *FRAMES, *LINEAR, *REFUSED)


def appended(call: AttnCall, proceed: Proceed) -> Tensor:
    """Attend to a picture's own keys and to the first picture's image, written out."""
    at = image_keys(call) if call.image is not None else slice(None)
    first = [x[:1, :, at].expand(2, -1, -1, -1) for x in (call.k, call.v)]
    k, v = (torch.cat([x, y], 2) for x, y in zip((call.k, call.v), first, strict=True))
    mask = call.mask
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        mask = mask.expand(2, *mask.shape[1:3], call.k.shape[2])
        mask = torch.cat([mask, mask[:1, :, :, at].expand(2, -1, -1, -1)], 3)
    return attended(call.with_(k=k, v=v, mask=mask)) if call.index == 0 else proceed(call)


@pytest.mark.parametrize("name", [n for n in zoo.EVERY if n not in OTHERS])
def test_every_host_against_the_formula(name: str, precise: Precise) -> None:
    model, given = precise(name)
    sites = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    out = run(model, given, ShareAttention(sites=sites))
    expected = run(model, given, Replace(sites=sites, function=appended))
    assert (out - expected).norm() / expected.norm() < 1e-12
    assert (out - zoo.call(model, given)).norm() / expected.norm() > 1e-3


def test_negative_rows_may_be_left_alone() -> None:
    q, k, v = inputs(4)
    plain = F.scaled_dot_product_attention(q, k, v)
    out = attend(ShareAttention(halves="cond"), q, k, v)
    both = attend(ShareAttention(), q, k, v)
    assert torch.equal(out[:2], plain[:2])
    assert (out[2:] - both[2:]).abs().max() < 1e-12


def test_one_token_alone_takes_the_sources_features() -> None:
    q, k, v = inputs(4, 1)
    out = attend(StyleAligned(), q, k, v)
    assert out.isfinite().all()
    assert (match_statistics(q, k) - k).abs().max() < 1e-12


def test_any_seed_draws() -> None:
    q, k, v = inputs(4)
    outs = [attend(ShareAttention(share=0.5, seed=seed), q, k, v) for seed in (1, 2**62, 2**80)]
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ShareAttention(sources="last"), "first, previous, others"),
        (lambda: ShareAttention(sources=-1), "sources"),
        (lambda: ShareAttention(parts=("q", "w")), "q, k, v"),
        (lambda: ShareAttention(take="replace", parts=()), "takes nothing"),
        (lambda: ShareAttention(sources="others", adain=("q",)), "one source per picture"),
        (lambda: source_table("first", 1), "makes one"),
        (lambda: source_table(3, 3), "0 to 2"),
        (lambda: source_table((0, 1), 3), "tuple of 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_two_of_them_at_one_site_are_refused() -> None:
    model, _ = zoo.build("sd15")
    with pytest.raises(ConflictError):
        attnctl.control(model, StyleAligned(), MasaCtrl())


def test_guidance_adds_to_it() -> None:
    model, given = zoo.build("sd15", dtype=torch.float64)
    assert not torch.equal(run(model, given, StyleAligned(), PAG(scale=2.0)), run(model, given, StyleAligned()))
