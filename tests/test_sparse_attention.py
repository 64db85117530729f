"""SparseAttention: how blocks are chosen, that what is computed is the masked map, and that a run is left clean."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines
from contract import Replace, Through
from safetensors.torch import load_file
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.data.specs import control_from_dict, control_to_dict, parse_control
from attnctl.errors import ConfigError, PlanError
from attnctl.kernels.sparse import select as choices
from attnctl.kernels.sparse.block_mass import block_mass
from attnctl.kernels.sparse.dispatch import block_sparse
from attnctl.kernels.sparse.radial import radial_blocks
from attnctl.plans import BlockPlan, Neighborhood, Online, Radial, SlidingTile
from attnctl.plans.blocks import Blocks
from attnctl.processors import PAG, PARO, SparseAttention
from attnctl.processors.sparse.live import axes_for

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures" / "sparse_masks"
CASES = {c["name"]: c for c in json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Choosing


def test_recorded_masks() -> None:
    t = load_file(FIXTURES / "cases.safetensors")
    for name, c in CASES.items():
        if c["kind"] == "radial":
            blocks = radial_blocks(c["frames"], c["tokens_per_frame"], c["block"], c["decay"], c["model"] == "wan")
            assert torch.equal(blocks, t[name].bool()[: len(blocks), : len(blocks)]), name
            continue
        q, k, b, s = t["xattention.q"], t["xattention.k"], c["block"], c["stride"]
        scores = choices.antidiagonal_scores(q, k, b, b, q.shape[-1] ** -0.5, s)
        assert (scores * (b // s) - t[f"{name}.sums"]).abs().max() <= 1e-5, name
        kept = choices.keep_mass(scores, c["threshold"])
        assert torch.equal(kept[..., 1:], t[f"{name}.mask"].bool()[..., 1:]), name


def test_scores_of_the_map_are_its_mass() -> None:
    q, k = rand(1, 4, 66, 8), rand(1, 2, 66, 8, seed=1)
    want = block_mass(q, k, (3, 4, 5), 16, 8, image=slice(6, 66), orders=[[0]] * 4).mass[:, 0]
    scores = choices.map_scores(q[:, :, 6:], k[:, :, 6:], k[:, :, :6], 16, 8, 8**-0.5)
    assert (scores[0, :, :-1] - want[:, :-1]).abs().max() <= 1e-6
    some = choices.map_scores(q[:, :, 6:], k[:, :, 6:], k[:, :, :6], 16, 8, 8**-0.5, rows=4)
    assert some.shape == scores.shape
    assert (some - scores).abs().mean() < 0.2 * scores.mean()


def test_pooled_scores_are_attention_of_means() -> None:
    q, k = rand(2, 4, 40, 8), rand(2, 2, 40, 8, seed=1)
    sizes = torch.tensor([16.0, 16.0, 8.0])
    means = [torch.stack([part.mean(2) for part in x.split(16, 2)], 2) for x in (q, k.repeat_interleave(2, 1))]
    want = (means[0] @ means[1].mT * 8**-0.5 + sizes.log()).softmax(-1)
    assert (choices.pooled_scores(q, k, 16, 16, 8**-0.5) - want).abs().max() <= 1e-6


def test_budgets() -> None:
    scores = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    by_row = choices.keep_density(scores, 0.3, by_row=True)
    assert (by_row.sum(-1) == 3).all()
    assert choices.keep_density(scores, 0.001, by_row=True).sum(-1).eq(1).all()
    by_head = choices.keep_density(scores, 0.3, by_row=False)
    assert by_head.any(-1).all()
    assert ((by_head.sum((-2, -1)) >= 24) & (by_head.sum((-2, -1)) <= 32)).all()
    kept = choices.keep_mass(scores, 0.5)
    share = (scores * kept).sum(-1) / scores.sum(-1)
    assert (share >= 0.5).all()
    fewer = kept.scatter(-1, scores.masked_fill(~kept, 2).argmin(-1, keepdim=True), value=False)
    assert ((scores * fewer).sum(-1) / scores.sum(-1) < 0.5).all()
    assert choices.keep_mass(scores, 1e-9).sum(-1).eq(1).all()
    least = choices.least_kept([scores[0], scores[1]], 0.25)
    assert int((scores >= least).sum()) == 120
    assert choices.keep_above(torch.zeros(1, 2, 3), torch.tensor(1.0)).sum(-1).eq(1).all()


# Computing


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(
    ("n", "bq", "bk", "text", "first"), [(96, 16, 16, 0, True), (90, 32, 16, 5, False), (33, 8, 16, 3, True)]
)
def test_samples_have_blocks_of_their_own(n: int, bq: int, bk: int, text: int, first: bool, rest: bool) -> None:
    q, k, v = rand(2, 4, n + text, 16), rand(2, 2, n + text, 16, seed=1), rand(2, 2, n + text, 24, seed=2)
    nq, nk = -(-n // bq), -(-n // bk)
    scores = torch.rand(2, 4, nq, nk, generator=torch.Generator().manual_seed(3))
    keep = choices.keep_density(scores, 0.4, by_row=False)
    blocks = Blocks(
        keep=keep.view(1, 8, nq, nk), block_q=bq, block_k=bk, order=(0,) * 8, grid=None, n_image=n, n_text=text,
        text_first=first, rest=rest,
    )  # fmt: skip
    image = blocks.span(n + text)
    words = torch.rand(2, text, generator=torch.Generator().manual_seed(4)) < 0.6 if text else None
    for shown in (None, words):
        want = written_out(q, k, v, keep, bq, bk, image, rest, shown)
        for backend in ("gather", "masked", "reference"):
            out = block_sparse(q, k, v, dataclasses.replace(blocks), words=shown, backend=backend)
            assert (out - want).abs().max() <= 1e-5, backend
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        theirs = [x.clone().requires_grad_() for x in (q, k, v)]
        block_sparse(*inputs, blocks, words=shown).square().sum().backward()
        written_out(*theirs, keep, bq, bk, image, rest, shown).square().sum().backward()
        assert max(float((a.grad - b.grad).abs().max()) for a, b in zip(inputs, theirs, strict=True)) <= 1e-4  # type: ignore[operator]


def test_tokens_on_both_sides_of_the_image_are_dense() -> None:
    """Pictures that are given stand behind the image and text before it (FLUX Kontext): one softmax over all."""
    n, image = 48, slice(5, 53)
    q, k, v = rand(2, 4, 60, 16), rand(2, 2, 60, 16, seed=1), rand(2, 2, 60, 24, seed=2)
    keep = choices.keep_density(torch.rand(2, 4, 6, 3, generator=torch.Generator().manual_seed(3)), 0.4, by_row=True)
    words = torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) < 0.6
    for shown in (None, words):
        for rest in (False, True):
            blocks = Blocks(
                keep=keep.view(1, 8, 6, 3), block_q=8, block_k=16, order=(0,) * 8, grid=None, n_image=n, n_text=12,
                rest=rest,
            )  # fmt: skip
            want = written_out(q, k, v, keep, 8, 16, image, rest, shown)
            for backend in ("gather", "masked", "reference"):
                out = block_sparse(q, k, v, blocks, image=image, words=shown, backend=backend)
                assert (out - want).abs().max() <= 1e-5, backend


def written_out(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bq: int, bk: int, image: slice, rest: bool, words: Tensor | None
) -> Tensor:
    """Attend in float64 under the mask written out; blocks left out count as their means, if `rest`."""
    n, total = image.stop - image.start, q.shape[2]
    k, v = (x.repeat_interleave(2, 1).double() for x in (k, v))
    seen = torch.ones(*q.shape[:2], total, total, dtype=torch.bool)
    tokens = keep.repeat_interleave(bq, -2)[..., :n, :].repeat_interleave(bk, -1)[..., :n]
    seen[:, :, image, image] = tokens
    if words is not None:
        text = torch.cat([words[:, : image.start], words.new_ones(len(words), n), words[:, image.start :]], 1)
        seen &= text[:, None, None]
    logits = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    if not rest:
        return logits.softmax(-1) @ v
    means = [torch.stack([p.mean(2) for p in x[:, :, image].split(bk, 2)], 2) for x in (k, v)]
    sizes = torch.tensor([float(len(p)) for p in torch.arange(n).split(bk)])
    more = q.double() @ means[0].mT * q.shape[-1] ** -0.5 + sizes.log()
    left = torch.zeros(*q.shape[:3], len(sizes), dtype=torch.bool)
    left[:, :, image] = ~keep.repeat_interleave(bq, -2)[..., :n, :]
    weights = torch.cat([logits, more.masked_fill(~left, -torch.inf)], -1).softmax(-1)
    return weights @ torch.cat([v, means[1]], 2)


SELECTORS: tuple[Any, ...] = (
    Online(density=0.5, block=4, by="pooled", every=2),
    Online(density=0.4, block=4, by="antidiagonal", order="TILE", rest="drop"),
    Online(mass=0.8, block=4, block_q=8, by="pooled", rest="drop"),
    Online(density=0.5, block=4, every=3, rows=2),
    Neighborhood(window=3),
    Neighborhood(window=(2, 3), stride=(1, 2)),
    SlidingTile(tile=(2, 2), window=1),
)


@pytest.fixture(scope="module")
def sd3() -> tuple[Any, dict[str, Any], Tensor]:
    pipe, kwargs = zoo_pipelines.build("sd3", dtype=torch.float64)
    return pipe, kwargs, zoo_pipelines.run(pipe, kwargs)


@pytest.mark.parametrize("select", SELECTORS, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'by', '')}")
def test_a_run_repeats_and_leaves_nothing(sd3: tuple[Any, dict[str, Any], Tensor], select: Any) -> None:
    pipe, kwargs, plain = sd3
    with attnctl.control(pipe, SparseAttention(select)) as handle:
        out = zoo_pipelines.run(pipe, kwargs)
        assert torch.equal(zoo_pipelines.run(pipe, kwargs), out)
        assert "% of the maps between image tokens computed" in str(handle.report())
    assert out.isfinite().all()
    assert not torch.equal(out, plain)
    assert torch.equal(zoo_pipelines.run(pipe, kwargs), plain)


@pytest.mark.parametrize(
    "select",
    [
        Online(density=1.0, block=4),
        Online(block=4, every=1),
        Online(block=4, dense_steps=10**6),
        Neighborhood(window=(4, 6)),
        SlidingTile(tile=(4, 4), window=99),
    ],
)
def test_everything_is_the_host_s_own_kernel(sd3: tuple[Any, dict[str, Any], Tensor], select: Any) -> None:
    pipe, kwargs, plain = sd3
    call = grids(pipe, kwargs)
    if isinstance(select, Neighborhood):
        select = Neighborhood(window=call)
    with attnctl.control(pipe, SparseAttention(select)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "acted at no step", of the one that stays dense for a million
        assert torch.equal(zoo_pipelines.run(pipe, kwargs), plain)


def grids(pipe: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return the rows and columns of the image tokens."""
    through = Through()
    with attnctl.control(pipe, through):
        zoo_pipelines.run(pipe, kwargs)
    grid = next(c.grid for c in through.seen if c.site.kind == "joint")
    assert grid is not None
    return grid[1:]


def test_blocks_are_kept_between_choices_and_what_is_computed_is_counted(
    sd3: tuple[Any, dict[str, Any], Tensor],
) -> None:
    """The same as by hand: chosen by the map's mass on every second step, dense there, sparse between."""
    pipe, kwargs, _ = sd3
    kept: dict[str, Blocks] = {}

    def by_hand(call: AttnCall, proceed: Proceed) -> Tensor:
        if call.image is None:
            return proceed(call)
        if call.state.step % 2 == 0:
            n = call.image.stop - call.image.start
            q, k, text = call.q[:, :, call.image], call.k[:, :, call.image], call.k[:, :, n:]
            scores = choices.map_scores(q, k, text, 4, 4, call.q.shape[-1] ** -0.5)
            keep = choices.keep_density(scores, 0.5, by_row=True)
            kept[call.site.name] = Blocks(
                keep=keep.view(1, -1, *keep.shape[2:]), block_q=4, block_k=4, order=(0,) * len(keep.flatten(0, 1)),
                grid=None, n_image=n, n_text=text.shape[2], text_first=False, rest=True,
            )  # fmt: skip
            return proceed(call)
        return block_sparse(call.q, call.k, call.v, kept[call.site.name], image=call.image, backend="reference")

    with attnctl.control(pipe, Replace(function=by_hand, sites="joint")):
        want = zoo_pipelines.run(pipe, kwargs)
    with attnctl.control(pipe, SparseAttention(Online(density=0.5, block=4, every=2), sites="joint")):
        out = zoo_pipelines.run(pipe, kwargs)
    assert (out - want).abs().max() <= 1e-8


def test_what_is_carried_on_makes_steps_with_equal_inputs_dense() -> None:
    model, inputs = zoo.build("sd3", dtype=torch.float64)
    plain = zoo.call(model, inputs)
    control = SparseAttention(Online(density=0.3, block=4, every=4, carry=True), sites="joint")
    with attnctl.control(model, control, layout="cond") as handle:
        for step in range(3):
            handle.set_step(step, 8)
            assert (zoo.call(model, inputs) - plain).abs().max() <= 1e-9
    with pytest.raises(ConfigError, match='only by="map" computes'):
        Online(by="pooled", carry=True)


@pytest.mark.parametrize("host", ["wan", "hunyuanvideo", "cogvideox", "sd15"])
def test_families(host: str) -> None:
    model, inputs = zoo.build(host, dtype=torch.float64)
    plain = zoo.call(model, inputs)
    for select in (Online(density=0.4, block=4, by="pooled"), Radial(block=4), Neighborhood(window=(1, 2))):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with attnctl.control(model, SparseAttention(select), layout="cond"):
                out = zoo.call(model, inputs)
        told = [str(w.message) for w in seen if "leaves attention dense" in str(w.message)]
        lone = host == "sd15" and isinstance(select, Radial)
        assert len(told) == lone, told
        assert torch.equal(out, plain) == lone
    assert torch.equal(zoo.call(model, inputs), plain)


def test_padding_of_the_text_is_left_out() -> None:
    """A host that masks padded words: with every block kept on its own account, nothing changes."""
    model, inputs = zoo.build("hunyuanvideo", dtype=torch.float64)
    plain = zoo.call(model, inputs)
    select = Online(mass=1.0, schedule=(0.999999999,), by="pooled", block=4)
    with attnctl.control(model, SparseAttention(select), layout="cond") as handle:
        handle.set_step(0, 1)
        assert (zoo.call(model, inputs) - plain).abs().max() <= 1e-6


def test_a_plan_is_what_paro_takes(tmp_path: Path) -> None:
    model, inputs = zoo.build("wan")
    through = Through()
    with attnctl.control(model, through, layout="cond"):
        zoo.call(model, inputs)
    call = next(c for c in through.seen if c.site.kind == "self")
    n = call.q.shape[2]
    keep = torch.rand(call.q.shape[1], -(-n // 4), -(-n // 4), generator=torch.Generator().manual_seed(0)) < 0.5
    keep[..., 0] = True
    plan = BlockPlan.from_mask(keep, 4, n_image=n)
    folder = str(plan.save_pretrained(tmp_path))
    outs = []
    for control in (PARO(plan, sites="self"), SparseAttention(plan, sites="self")):
        with attnctl.control(model, control, layout="cond"):
            outs.append(zoo.call(model, inputs))
    assert torch.equal(*outs)
    with pytest.raises(PlanError, match="does not exist"):
        SparseAttention(folder + "/none")


def test_tiles_that_slide_are_those_of_the_paper() -> None:
    """Tile t sees the tiles |t' - clamp(t, k//2, T - 1 - k//2)| <= k//2 on every axis (arXiv 2502.04507)."""
    from attnctl.kernels.neighborhood.axes import neighborhood_mask

    grid, tile, window = (4, 6, 8), (2, 2, 4), (1, 3, 1)
    axes = axes_for(SlidingTile(tile=tile, window=window), grid, "here")
    want = torch.ones(1, 1, dtype=torch.bool)
    for n, t, k in zip(grid, tile, window, strict=True):
        place, count, half = torch.arange(n) // t, n // t, k // 2
        centre = place.clamp(half, count - 1 - half)
        want = torch.kron(want.int(), ((place[None] - centre[:, None]).abs() <= half).int()).bool()
    assert torch.equal(neighborhood_mask(axes), want)
    image = axes_for(SlidingTile(window=3), (1, 64, 64), "here")
    assert [(a.length, a.window, a.stride) for a in image] == [(64, 24, 8)] * 2


def test_windows_of_fewer_numbers_are_for_the_last_axes() -> None:
    axes = axes_for(Neighborhood(window=(2, 3)), (3, 4, 5), "here")
    assert [a.window for a in axes] == [3, 2, 3]
    assert [a.window for a in axes_for(Neighborhood(window=(2, 3), frames="own"), (3, 4, 5), "here")] == [1, 2, 3]


def test_the_first_frame_is_seen_from_everywhere_unless_it_is_no_sink() -> None:
    made = []
    for sink in (True, False):
        control = SparseAttention(Radial(block=4, sink=sink, decay=0.5))
        model, inputs = zoo.build("wan")
        with torch.no_grad(), attnctl.control(model, control, layout="cond"):
            made.append(zoo.call(model, inputs))
    assert not torch.equal(*made)


def test_records_and_short_forms() -> None:
    control = SparseAttention(Online(density=0.3, schedule=(0.6, 0.3), block=32), dense_steps=2)
    assert control_from_dict(json.loads(json.dumps(control_to_dict(control)))) == control
    text = "SparseAttention(select=Online(density=0.3, schedule=(0.6, 0.3), block=32), dense_steps=2)"
    assert parse_control(text) == control
    assert parse_control("SparseAttention(select=Neighborhood(window=(3, 5)))").select == Neighborhood(window=(3, 5))
    with pytest.raises(ConfigError, match="unknown type 'Onlin'"):
        parse_control("SparseAttention(select=Onlin())")
    with pytest.raises(ConfigError, match="has no field 'densty'"):
        parse_control("SparseAttention(select=Online(densty=0.2))")


def test_beside_guidance_it_is_guidance(sd3: tuple[Any, dict[str, Any], Tensor]) -> None:
    pipe, kwargs, _ = sd3
    with attnctl.control(pipe, PAG(sites="joint")):
        want = zoo_pipelines.run(pipe, kwargs)
    everything = SparseAttention(Online(mass=1.0, schedule=(0.9999999999,), by="pooled", block=4), sites="joint")
    with attnctl.control(pipe, everything, PAG(sites="joint")):
        assert (zoo_pipelines.run(pipe, kwargs) - want).abs().max() <= 1e-6
