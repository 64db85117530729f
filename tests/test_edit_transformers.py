"""Editing on transformers: whole pipelines with random weights, from pixels to pixels; and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import editing_hosts as hosts
import numpy as np
import pytest
import torch
from contract import Replace, assert_clean, distance, snapshot
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.autoencoders import Coded, Coder
from attnctl.core.hosts.families import family_of
from attnctl.data.clips import FileClip, mp4_bytes
from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.pipelines import edit_video, invert
from attnctl.pipelines.editing.flow_inversion import call_of, reconstruct
from attnctl.pipelines.editing.running import running_on
from attnctl.processors import FateZero, FlowEdit, Inject, PromptToPrompt
from attnctl.processors.editing.source import Inversion

SOURCE, TARGET = hosts.SOURCE, hosts.TARGET
BASE = FateZero(source=SOURCE, target=TARGET, cross_replace=0.6, self_replace=0.6)
STEPS = 3
FACTORS = {"PixArtSigmaPipeline": 8, "HunyuanVideoPipeline": 16, "LTXPipeline": 32}  # which they ask for by number
_PIPES: dict[str, Any] = {}


def pipe_of(name: str) -> Any:
    if name not in _PIPES:
        _PIPES[name] = hosts.build(name)
    return _PIPES[name]


def coded_of(pipe: Any) -> Coded:
    coder = Coder(pipe)
    factor = FACTORS.get(type(pipe).__name__, 1)
    height, width = (-(-n * coder.multiple // factor) * factor for n in (2, 3))
    return coder.encode(hosts.clip(coder.frames(5) if coder.video else 1, height, width))


def run(pipe: Any, coded: Coded, inversion: Inversion, text: str = TARGET, guidance: float = 3.0) -> Tensor:
    start = Coder(pipe).again(inversion.noise, coded)
    with running_on(pipe, inversion.way_back()) as options:
        out: Tensor = pipe(**call_of(pipe, text, coded, start, inversion.steps, guidance) | options)[0]
    return out


def edited(pipe: Any, coded: Coded, control: Any, guidance: float = 3.0, **options: Any) -> Tensor:
    with (
        invert(pipe, coded, control=control, steps=STEPS, **options) as inversion,
        attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
    ):
        return run(pipe, coded, inversion, guidance=guidance)


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_stores_agree(name: str) -> None:
    pipe = pipe_of(name)
    coded = coded_of(pipe)
    control = dataclasses.replace(BASE, blend_words=["bear"], blend_threshold=0.5)
    recompute = edited(pipe, coded, control)
    before = snapshot(pipe.transformer, pipe.scheduler)
    qk, maps = (edited(pipe, coded, dataclasses.replace(control, store=s)) for s in ("qk", "maps"))
    assert distance(qk, recompute) <= 1e-5
    assert distance(maps, recompute) <= 1e-4
    assert_clean(before, pipe.transformer, pipe.scheduler)
    with invert(pipe, coded, SOURCE, steps=STEPS) as inversion:
        plain = run(pipe, coded, inversion)
        assert distance(plain, recompute) > 1e-3
        off = dataclasses.replace(BASE, cross_replace=0.0, self_replace=0.0, inversion=inversion)
        with attnctl.control(pipe, off):
            assert torch.equal(run(pipe, coded, inversion), plain)  # windows of 0 change no bit
    assert attnctl.handle_of(pipe) is None


@pytest.mark.parametrize("solver", ["fireflow", "euler", "rf_solver", "uniinv"])
def test_equal_prompts_give_the_source_to_the_inversions_own_error(solver: str) -> None:
    pipe = pipe_of("sd3")
    coded = coded_of(pipe)
    control = dataclasses.replace(BASE, target=SOURCE, cross_replace=1.0, self_replace=1.0, mode="replace")
    with invert(pipe, coded, control=control, steps=8, solver=solver) as inversion:
        own = run(pipe, coded, inversion, SOURCE, guidance=1.0)
        psnr = reconstruct(pipe, inversion, coded)
        assert psnr == inversion.psnr
        with pytest.warns(UserWarning, match="reconstructs its source"):
            handle = attnctl.control(pipe, dataclasses.replace(control, inversion=inversion))
        with handle:
            fused = run(pipe, coded, inversion, SOURCE, guidance=1.0)
            assert f"{psnr:.1f} dB" in handle.report()
        # The source's row stands on the stored path, the edit's on its own: they part by the solver's error alone.
        assert distance(fused, coded.latents) <= 2 * distance(own, coded.latents) + 1e-5


def test_the_negative_prompts_call_is_left_alone() -> None:
    """Qwen-Image calls its transformer once per prompt: the second call of a step gets no row."""
    pipe = pipe_of("qwen")
    coded, rows = coded_of(pipe), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["hidden_states"])), with_kwargs=True
    )
    try:
        with invert(pipe, coded, control=BASE, steps=STEPS) as inversion:
            rows.clear()
            handle = attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion))
            with handle:
                run(pipe, coded, inversion)
    finally:
        hook.remove()
    assert rows[1::2] == [1] * (STEPS + 1)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_prompt_to_prompt(name: str) -> None:
    pipe = pipe_of(name)
    coded = coded_of(pipe)
    noise = torch.randn(coded.latents.shape, generator=torch.Generator().manual_seed(0))
    call = call_of(pipe, [SOURCE, TARGET], coded, torch.cat([noise, noise]), STEPS, 3.0)
    plain = pipe(**call)[0]
    with attnctl.control(pipe, PromptToPrompt(source=SOURCE, target=TARGET)):
        out = pipe(**call)[0]
    assert distance(out[0], plain[0]) <= 1e-5  # the source's own picture
    assert distance(out[1], plain[1]) > 1e-3
    words = PromptToPrompt(
        source=SOURCE, target=TARGET, blend_words=[["bear"], ["bear"]], blend_window=(0.0, 1.0), blend_threshold=2.0
    )
    with attnctl.control(pipe, words):
        out = pipe(**call)[0]
    assert torch.equal(out[1], out[0])  # nothing is inside


def test_flow_edit_guides_both_prompts_by_their_own_scales() -> None:
    """With one prompt and one scale nothing moves, however the host guides: in one batch, in two calls, embedded."""
    for name in ("sd3", "qwen", "flux"):
        pipe, base = pipe_of(name), {"steps": 4, "guidance_scale": 3.0, "progress": False, "method": "flowedit"}
        clip = hosts.clip(1, 32, 48)
        same = edit_video(pipe, clip, source=SOURCE, target=SOURCE, source_scale=3.0, **base)
        again = edit_video(pipe, clip, source=SOURCE, target=SOURCE, source_scale=3.0, strength=0.3, **base)
        assert np.abs(same.frames.astype(int) - again.frames).max() <= 1, name
        other = edit_video(pipe, clip, source=SOURCE, target=SOURCE, source_scale=1.5, **base)
        assert np.abs(other.frames.astype(int) - same.frames).max() > 1, name


def test_injection() -> None:
    pipe = pipe_of("sd3")
    coded = coded_of(pipe)
    control = Inject(source=SOURCE, target=TARGET, stop=1.0)
    with invert(pipe, coded, SOURCE, steps=STEPS) as inversion:
        plain = run(pipe, coded, inversion)
    values = edited(pipe, coded, control)
    assert distance(values, plain) > 1e-3
    everything = dataclasses.replace(control, parts=("q", "k", "v"), sites="*", tokens="image")
    assert distance(edited(pipe, coded, everything), values) > 1e-3


def test_injection_puts_the_source_s_values_in_the_place_of_the_edit_s() -> None:
    pipe = pipe_of("sd3")
    coded = coded_of(pipe)
    control = Inject(source=SOURCE, target=TARGET, stop=1.0)
    sites = {site.name for site in control.resolve(attnctl.find_sites(pipe), family_of(pipe.transformer))}
    seen: list[tuple[bool, bool, bool]] = []

    def note(call: AttnCall, proceed: Proceed) -> torch.Tensor:
        same = [any(torch.equal(x[0], row) for row in x[1:]) for x in (call.v, call.k)]
        seen.append((call.site.name in sites, *same))
        return proceed(call)

    with invert(pipe, coded, SOURCE, steps=STEPS) as inversion:
        inside = dataclasses.replace(control, inversion=inversion)
        with attnctl.control(pipe, inside, Replace(sites="joint", function=note)):
            run(pipe, coded, inversion)
    assert {taken for chosen, taken, _ in seen if chosen} == {True}
    assert False in {taken for chosen, taken, _ in seen if not chosen}, seen
    assert False in {keys for chosen, _, keys in seen if chosen}


def test_a_mask_keeps_what_is_outside() -> None:
    for name in ("sd3", "wan"):
        pipe = pipe_of(name)
        coded = coded_of(pipe)
        frames = coded.frames or 1
        region = torch.zeros(frames, coded.height, coded.width, dtype=torch.bool)
        region[:, :, : coded.width // 3] = True
        with invert(pipe, coded, control=BASE, steps=STEPS) as inversion:
            inversion.region = region
            with attnctl.control(pipe, dataclasses.replace(BASE, inversion=inversion)):
                out = run(pipe, coded, inversion)
        third = coded.latents.shape[-1] // 3
        assert distance(out[..., third:], coded.latents[..., third:]) <= 1e-6
        assert distance(out[..., :third], coded.latents[..., :third]) > 1e-2


# Whole jobs ---------------------------------------------------------------------------------------------------------


def test_video_job_resumes(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pipe, out, ticks, said = pipe_of("wan"), tmp_path / "edit.mp4", [], []
    (tmp_path / "in.mp4").write_bytes(mp4_bytes(hosts.clip(6, 32, 48), 12.0))
    job = {"source": SOURCE, "target": TARGET, "steps": 2, "window": 5, "out": out, "guidance_scale": 3.0}

    def stop() -> None:
        ticks.append(0)
        if len(ticks) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_video(pipe, tmp_path / "in.mp4", progress=stop, announce=said.append, **job)
    assert "denoiser calls: 3 to invert, 3 to edit" in said[0]
    assert "MiB of latents" in said[0]
    assert len(list(tmp_path.glob(".edit.mp4.*.parts/*.safetensors"))) == 1
    done = edit_video(pipe, tmp_path / "in.mp4", progress=False, **job)
    assert FileClip(out).count == 6
    assert done.record["solver"] == "fireflow"
    assert done.record["costs"]["kept_bytes"] == 0
    assert done.record["control"]["cross_replace"] == 0.5  # the family's
    assert done.record == json.loads(out.with_suffix(".json").read_text())


def test_picture_and_animation_jobs(tmp_path: Path) -> None:
    pipe = pipe_of("sd3")
    pictures = [Image.fromarray(f) for f in hosts.clip(2, 32, 48)]
    pictures[0].save(tmp_path / "in.gif", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "in.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    job = {"source": SOURCE, "target": TARGET, "steps": 2, "progress": False}
    one = edit_video(pipe, tmp_path / "in.png", mask=tmp_path / "mask.png", out=tmp_path / "out.png", **job)
    assert Image.open(tmp_path / "out.png").size == (48, 32)
    assert len(one.record["mask_sha256"]) == 64
    two = edit_video(pipe, tmp_path / "in.gif", out=tmp_path / "frames", method="inject", **job)
    assert two.frames.shape == (2, 32, 48, 3)
    assert FileClip(tmp_path / "frames").count == 2


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(match: str, pipe: Any, error: type[AttnctlError] = ConfigError, **options: Any) -> None:
    calls: list[int] = []
    hook = pipe.transformer.register_forward_hook(lambda *a: calls.append(0))
    given = {"source": SOURCE, "target": TARGET, "steps": 2, "progress": False}
    clip = options.pop("clip", hosts.clip(5 if "Wan" in type(pipe).__name__ else 1, 32, 48))
    try:
        with pytest.raises(error, match=match):
            edit_video(pipe, clip, **given | options)
    finally:
        hook.remove()
    assert not calls  # before the work


def test_bad_input() -> None:
    pipe = pipe_of("sd3")
    refused("'tree' is not in the prompt", pipe, blend_words=["tree"])
    refused("'tree' is not in the prompt", pipe, equalizer={"tree": 2.0})
    refused("equally many words", pipe, mode="replace", target="a bear")
    refused("one resolution", pipe, factor=2)
    refused("20x10, the frames are 48x32", pipe, mask=np.ones((10, 20), bool))
    refused("black: nothing", pipe, mask=np.zeros((32, 48), bool))
    refused("takes none", pipe, mask=np.ones((32, 48), bool), method="inject")
    refused("method='paint' is unknown", pipe, method="paint")
    refused("solver='heun' is unknown", pipe, solver="heun")
    refused("give a list of some of q, k, v", pipe, method="inject", parts="x")
    refused("leave less than one cell", pipe, clip=hosts.clip(1, 2, 2))
    refused("model has places. Bring their shorter side", pipe, clip=hosts.clip(1, 32, 4096), size=32)


def test_runs_that_do_not_fit() -> None:
    pipe = pipe_of("sd3")
    coded = coded_of(pipe)
    with invert(pipe, coded, control=BASE, steps=2) as inversion:
        call = call_of(pipe, TARGET, coded, inversion.noise, 2, 3.0)
        control = dataclasses.replace(BASE, inversion=inversion)
        with attnctl.control(pipe, control), pytest.raises(ConfigError, match=r"inversion\.way_back"):
            pipe(**call)
        changes: dict[str, Any]
        for changes, match in (
            ({"num_inference_steps": 4}, "inverted in 2 steps"),
            ({"prompt": SOURCE}, "would not correspond"),
            ({"prompt": [TARGET] * 2, "latents": torch.cat([inversion.noise] * 2)}, "one picture or clip"),
        ):
            with (
                running_on(pipe, inversion.way_back()) as options,
                attnctl.control(pipe, control),
                pytest.raises(ConfigError, match=match),
            ):
                pipe(**call | options | {"negative_prompt": None} | changes)
    with pytest.raises(ConfigError, match="Invert again"):
        attnctl.control(pipe, dataclasses.replace(control, source="a bear"))
    with pytest.raises(ConfigError, match="kept latents only"):
        attnctl.control(pipe, dataclasses.replace(control, store="qk"))
    with pytest.raises(ConfigError, match="has no inversion"):
        attnctl.control(pipe, BASE)
    with pytest.raises(ConfigError, match="leads pairs of latents"):
        attnctl.control(pipe, FlowEdit(source=SOURCE, target=TARGET))
    with pytest.raises(ConfigError, match="made on SD3Transformer2DModel"):
        attnctl.control(pipe_of("wan"), control)
    both = PromptToPrompt(source=SOURCE, target=TARGET)
    with attnctl.control(pipe, both), pytest.raises(ConfigError, match="beside"):
        pipe(**call)


def test_models_that_cannot_be_edited() -> None:
    pipe = pipe_of("sd3")
    scheduler = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    try:
        refused("adds fresh noise", pipe, UnsupportedModelError)
    finally:
        pipe.scheduler = scheduler
    distilled = hosts.build("flux")
    distilled.transformer.register_to_config(guidance_embeds=False)
    refused("distilled without guidance", distilled, UnsupportedModelError)
    wan = pipe_of("wan")
    wan.transformer.register_to_config(sample_frames=5, use_learned_positional_embeddings=True)
    try:
        refused("knows places for 5 frames, and 9", wan, clip=hosts.clip(9, 32, 48))
    finally:
        wan.transformer.register_to_config(sample_frames=None, use_learned_positional_embeddings=None)
