"""FateZero on tiny pipelines: one edit in three stores, exactness, windows, files, and bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, distance, snapshot
from fatezero_runs import BASE, SOURCE, STEPS, TARGET, edited, latents, run
from torch import Tensor

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.pipelines import estimate_bytes, invert
from attnctl.processors import PAG, FateZero
from attnctl.processors.editing import engine as editing


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipes.build("sd")[0]


# The same edit, however the source is had


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blend_words": None},
        {"keys": ["mid", -1]},
        {"keys": [-1, "first"], "equalizer": {"red": 4.0}, "cross_replace": {"default_": 0.6, "water": (0.0, 0.3)}},
        {"blend_words": [["bear"], ["red"]], "blend_latents": True, "blend_threshold": 0.9},
        {"blend_attention": False, "stop": 0.5},
    ],
    ids=lambda c: ",".join(c) or "plain",
)
def test_stores_agree(pipe: Any, changes: dict[str, Any]) -> None:
    control = dataclasses.replace(BASE, **changes)
    recompute = edited(pipe, control)
    assert distance(edited(pipe, dataclasses.replace(control, store="qk")), recompute) <= 1e-5
    assert distance(edited(pipe, dataclasses.replace(control, store="maps")), recompute) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_replace": 0.0},
        {"self_replace": 0.0},
        {"mode": "replace"},
        {"keys": "last"},
        {"blend_words": None},
        {"blend_words": [["bear"], ["red"]], "blend_latents": True, "blend_threshold": 0.95, "blend_window": (0, 1)},
        {"equalizer": {"red": 4.0}},
        {"sites": "up.1", "mask_factor": 2},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_field_matters(pipe: Any, changes: dict[str, Any], plain_edit: Tensor) -> None:
    assert distance(edited(pipe, dataclasses.replace(BASE, **changes)), plain_edit) > 1e-3


def test_options_of_the_official_code_matter(pipe: Any) -> None:
    blended = dataclasses.replace(BASE, blend_latents=True, blend_window=(0.0, 1.0), blend_threshold=0.95)
    official = dataclasses.replace(blended, latent_align="official")
    assert distance(edited(pipe, official), edited(pipe, blended)) > 1e-3
    words = {"source": "a cat in the water", "target": "a crocodile in the water", "mode": "replace"}
    tails = [FateZero(**words, replace_tail=tail).plan(pipe).how for tail in ("aligned", "official")]
    assert not torch.equal(tails[0].take, tails[1].take)
    sites, family = attnctl.find_sites(pipe), family_of(pipe.unet)
    near, far = ({s.name for s in FateZero(**words, keys_factor=f).keyed(sites, family)} for f in (1, 4))
    assert far < near == {s.name for s in sites if s.kind == "self"}


@pytest.fixture(scope="module")
def plain_edit(pipe: Any) -> Tensor:
    return edited(pipe, BASE)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload(pipe: Any, offload: Any, tmp_path: Path) -> None:
    control = dataclasses.replace(BASE, store="qk")
    assert distance(edited(pipe, control, offload=offload, folder=tmp_path), edited(pipe, control)) <= 1e-6
    assert not list(tmp_path.iterdir())


def test_neighbouring_latent_fails(pipe: Any) -> None:
    with invert(pipe, latents(), control=BASE, steps=STEPS) as inversion:
        with attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion)):
            right = run(pipe, inversion)
        shifted = dataclasses.replace(inversion, latents=[*inversion.latents[1:], inversion.noise])
        with attnctl.control(pipe, dataclasses.replace(BASE, inversion=shifted)):
            wrong = run(pipe, inversion)
    assert distance(wrong, right) > 1e-3


def test_inversion_equals_a_loop(pipe: Any) -> None:
    x = latents()
    inversion = invert(pipe, x, SOURCE, steps=STEPS)
    inverse = diffusers.DDIMInverseScheduler(
        **{k: pipe.scheduler.config[k] for k in ("beta_start", "beta_end", "beta_schedule")},
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    inverse.set_timesteps(STEPS)
    embeds = pipe.encode_prompt([SOURCE] * 2, "cpu", 1, False)[0]
    with torch.no_grad():
        for i, t in enumerate(inverse.timesteps):
            assert torch.equal(inversion.latents[i], x)
            x = inverse.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample
    assert torch.equal(inversion.noise, x)
    assert inversion.timesteps == tuple(inverse.timesteps.tolist())
    assert len(inversion.latents) == STEPS + 1


def test_mask_of_one_is_a_plain_run(pipe: Any) -> None:
    control = dataclasses.replace(BASE, blend_threshold=0.0, cross_replace=0.0, keys="self", self_replace=1.0)
    with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
        plain = run(pipe, inversion)
        with attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)):
            assert torch.equal(run(pipe, inversion), plain)
        idle = dataclasses.replace(BASE, keys="self", stop=0.0, inversion=inversion)
        with attnctl.control(pipe, idle):
            assert torch.equal(run(pipe, inversion), plain)


@pytest.mark.parametrize("store", ["recompute", "maps"])
def test_mask_parts_the_queries(pipe: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone at its sites, an edit attends with each query once; that changes nothing but rounding."""
    control, parted = dataclasses.replace(BASE, store=store, self_replace=1.0), []
    fuse = editing.self_fuse
    monkeypatch.setattr(editing, "self_fuse", lambda *given: parted.append(given) or fuse(*given))
    once = edited(pipe, control)
    count = len(parted)
    monkeypatch.setattr(editing, "is_last", lambda proceed: False)
    twice = edited(pipe, control)
    assert count
    assert len(parted) == count
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("store", ["recompute", "maps"])
@pytest.mark.parametrize("words", [None, ["bear"]])
def test_negative_rows_are_unchanged(pipe: Any, store: Any, words: Any) -> None:
    control = dataclasses.replace(BASE, store=store, blend_words=words)
    plain = dataclasses.replace(control, cross_replace=0.0, self_replace=0.0, store="recompute")
    seen: list[Tensor] = []
    hook = None
    try:
        for c in (plain, control):
            with (
                invert(pipe, latents(), control=c, steps=STEPS) as inversion,
                attnctl.control(pipe, dataclasses.replace(c, inversion=inversion)),
            ):
                hook = pipe.unet.register_forward_hook(lambda m, a, out: seen.append(out[0]))
                run(pipe, inversion)
                hook.remove()
    finally:
        if hook is not None:
            hook.remove()
    first, second = seen[0], seen[STEPS]  # step 0: the latents are the same
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2:], second[2:])


def test_nothing_is_left(pipe: Any) -> None:
    before = snapshot(pipe.unet, pipe.scheduler)
    scheduler = pipe.scheduler
    edited(pipe, BASE)
    assert_clean(before, pipe.unet, scheduler)

    def boom(*args: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        invert(pipe, latents(), SOURCE, steps=STEPS, step=boom)
    assert pipe.scheduler is scheduler
    assert_clean(before, pipe.unet, scheduler)
    with (
        invert(pipe, latents(), control=BASE, steps=STEPS) as inversion,
        pytest.raises(RuntimeError, match="boom"),
        attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion)),
    ):
        run(pipe, inversion, callback_on_step_end=boom)
    assert_clean(before, pipe.unet, scheduler)


def test_with_another_control_and_without_guidance(pipe: Any) -> None:
    with invert(pipe, latents(), control=BASE, steps=STEPS) as inversion:
        control = dataclasses.replace(BASE, inversion=inversion)
        with attnctl.control(pipe, control):
            alone, bare = run(pipe, inversion), run(pipe, inversion, guidance=1.0)
        with attnctl.control(pipe, control, PAG(scale=1.0, sites="mid")) as handle:
            assert distance(run(pipe, inversion), alone) > 1e-4
            assert handle.passes == STEPS
        with attnctl.control(pipe, control, PAG(scale=0.0, sites="mid")):
            assert torch.equal(run(pipe, inversion), alone)
    assert bare.isfinite().all()


@pytest.mark.parametrize(("n", "h", "w"), [(1, 12, 8), (2, 8, 20), (3, 16, 16), (1, 96, 16)])
def test_any_number_of_frames_and_any_size(pipe: Any, n: int, h: int, w: int) -> None:
    out = edited(pipe, dataclasses.replace(BASE, keys=["previous", "last"]), latents(n, h, w))
    assert out.shape == (n, 4, h, w)
    assert out.isfinite().all()


def test_source_runs_no_further_than_needed(pipe: Any) -> None:
    control = dataclasses.replace(BASE, sites="mid", blend_words=None)
    calls: list[int] = []
    with (
        invert(pipe, latents(), control=control, steps=STEPS) as inversion,
        attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
    ):
        hooks = [m.register_forward_hook(lambda m, a, o: calls.append(0)) for m in pipe.unet.up_blocks]
        run(pipe, inversion)
        for hook in hooks:
            hook.remove()
    assert len(calls) == STEPS * len(pipe.unet.up_blocks)


def test_fused_projections(pipe: Any) -> None:
    """Queries and keys that are parts of one projection are kept without the rest of it."""
    control, plain = dataclasses.replace(BASE, store="qk"), edited(pipe, BASE)
    pipe.unet.fuse_qkv_projections()
    try:
        with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
            assert inversion.store is not None
            kept = [t for site in inversion.store._kept.values() for t in site.values()]  # type: ignore[union-attr]
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
        assert distance(edited(pipe, BASE), plain) <= 1e-4
    finally:
        pipe.unet.unfuse_qkv_projections()


def test_store_sizes(pipe: Any) -> None:
    for store in ("recompute", "qk", "maps"):
        control = dataclasses.replace(BASE, store=store)
        with invert(pipe, latents(), control=control, steps=STEPS) as inversion:
            assert inversion.nbytes == estimate_bytes(pipe.unet, control, 2, 12, 8, STEPS)[store]
            assert (inversion.store is None) == (store == "recompute")


def test_estimate_for_stable_diffusion() -> None:
    """Eight frames of 512 x 512 in 50 steps: the method's own maps take 36 and 69 GiB, latents 13 MiB."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()
    edit = {"source": SOURCE, "target": TARGET, "cross_replace": 1.0, "self_replace": 1.0}
    one = estimate_bytes(unet, FateZero(**edit), 8, 64, 64, 50)
    two = estimate_bytes(unet, FateZero(**edit, keys=[-1, "first"]), 8, 64, 64, 50)
    assert one["recompute"] == 51 * 8 * 4 * 64 * 64 * 2 <= 32 * 2**20
    assert one["maps"] / 2**30 == pytest.approx(36.2, abs=0.1)
    assert two["maps"] / 2**30 == pytest.approx(69.4, abs=0.1)
    assert two["qk"] == one["qk"] < 14 * 2**30
