"""BroadWay on whole models: the definition by FFT, every video family, windows of frames, composition, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
import zoo_pipelines as pipes
from contract import Replace, assert_clean, distance, snapshot
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl.core.intercept import AttnCall, Proceed
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import ConfigError, ConflictError, SiteError, UnsupportedModelError
from attnctl.kernels import temporal
from attnctl.processors import PAG, BroadWay, SoftPAG

UNETS = ("animatediff", "animatediff_xl", "svd", "unet3d", "i2vgenxl")
FACTORISED = (*UNETS, "latte")
FULL = ("cogvideox", "cogvideox_rope", "wan", "ltx", "hunyuanvideo", "mochi", "allegro", "cosmos")
FRAMES = 8


@pytest.fixture(autouse=True)
def _longer_videos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(zoo, "FRAMES", FRAMES)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attnctl: .* (mixes the frames|enhances only)")
        yield


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Build a video denoiser of 8 frames, those that the zoo does not hold included."""
    if name == "i2vgenxl":
        return _i2vgenxl(dtype)
    if name == "animatediff_xl":
        return _animatediff_xl(dtype)
    return zoo.build(name, dtype=dtype)


def _i2vgenxl(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    draw = zoo.Draw(2, 0)
    with torch.random.fork_rng(devices=[]):
        model = diffusers.I2VGenXLUNet(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=4,  # the host reads this as the number of heads
            norm_num_groups=8,
        )
    zoo.randomize(model, draw.generator)
    inputs = {
        "sample": draw.rows(4, FRAMES, 16, 12),
        "timestep": torch.tensor(500),
        "fps": torch.tensor([8, 8]),
        "image_latents": draw.rows(4, FRAMES, 16, 12),
        "image_embeddings": draw.rows(32),
        "encoder_hidden_states": draw.rows(zoo.TEXT, 32),
    }
    return model.to(dtype).eval(), zoo.cast(inputs, dtype)


def _animatediff_xl(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    draw = zoo.Draw(2, 0)
    with torch.random.fork_rng(devices=[]):
        unet, inputs = zoo._FAMILIES["sdxl"](draw)
        adapter = diffusers.MotionAdapter(
            block_out_channels=unet.config.block_out_channels,
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=4,
            use_motion_mid_block=False,
        )
        model = diffusers.UNetMotionModel.from_unet2d(unet, adapter)
    zoo.randomize(model, draw.generator)
    inputs["sample"] = draw.rows(4, FRAMES, 16, 12)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat_interleave(FRAMES, 0)
    return model.to(dtype).eval(), zoo.cast(inputs, dtype)


class Official:
    """BroadWay as published, written out: maps, interpolation, FFT, energies of the second half of the batch."""

    def __init__(self, stages: tuple[str, ...], grids: dict[str, tuple[int, int]], **setting: Any) -> None:
        self.stages, self.grids = stages, grids
        self.alpha, self.beta, self.tau = setting["alpha"], setting["beta"], setting.get("tau", FRAMES // 2 - 1)
        self.mode = setting.get("interpolation", "nearest")
        self.reference: dict[str, list[Tensor]] = {}
        self.calls: dict[str, int] = {}

    def __call__(self, call: AttnCall, proceed: Proceed) -> Tensor:
        stage = ".".join(call.site.name.split(".")[:2])
        place = call.site.name.removeprefix(stage)
        attn = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1)
        if stage == self.stages[0]:
            self.reference.setdefault(place, []).append(attn)
        window = self.calls.get(call.site.name, 0)
        self.calls[call.site.name] = window + 1
        kept = self.reference[place]
        ref = self._resized(kept[window % len(kept)], stage)
        guided = attn + self.alpha * (ref - attn)
        return self._enhanced(attn, guided) @ call.v

    def _resized(self, ref: Tensor, stage: str) -> Tensor:
        (h, w), big, (heads, frames) = self.grids[self.stages[0]], self.grids[stage], ref.shape[1:3]
        planes = ref.reshape(-1, h, w, heads * frames * frames).permute(0, 3, 1, 2)
        options = {} if self.mode == "nearest" else {"align_corners": False}
        planes = F.interpolate(planes, size=big, mode=self.mode, **options)
        return planes.permute(0, 2, 3, 1).reshape(-1, heads, frames, frames)

    def _energy(self, attn: Tensor) -> Tensor:
        return attn[len(attn) // 2 :].square().sum(-1).mean()

    def _enhanced(self, attn: Tensor, guided: Tensor) -> Tensor:
        frames = attn.shape[-1]
        spectrum = torch.fft.fft(guided, dim=-1)
        high = torch.zeros(frames, dtype=torch.bool)
        high[frames // 2 - self.tau : frames // 2 + self.tau + 1] = True
        bins = spectrum[len(spectrum) // 2 :].abs().square() / frames
        e_high, e_low = (bins[..., m].sum(-1).mean() for m in (high, ~high))
        assert torch.allclose(e_high + e_low, self._energy(guided))
        beta = max(self.beta, float(((self._energy(attn) - e_low) / e_high).sqrt()))
        out = torch.fft.ifft(torch.where(high, beta * spectrum, spectrum), dim=-1).real
        return out / out.sum(-1, keepdim=True)


GRIDS = {"up_blocks.0": (4, 3), "up_blocks.1": (8, 6), "up_blocks.2": (16, 12)}


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha": 0.6, "beta": 1.5},
        {"alpha": 0.6, "beta": 1.05, "tau": 1},
        {"alpha": 0.1, "beta": 10.0, "tau": 2},
        {"alpha": 0.6, "beta": 1.5, "interpolation": "bilinear"},
        {"alpha": 0.0, "beta": 1.5},
        {"alpha": 0.0, "beta": 1.5, "tau": 2},
    ],
    ids=str,
)
def test_animatediff_is_the_published_algorithm(setting: dict[str, Any]) -> None:
    model, inputs = build("animatediff", torch.float64)
    plain = zoo.call(model, inputs)
    control = BroadWay(stop=1.0, **setting)
    with attnctl.control(model, control, layout="uncond_first") as handle:
        ours = zoo.call(model, inputs)
        names = [s.name for s in handle.sites]
        assert len(names) == 3 * 2 * 2
    with attnctl.control(model, Replace(sites=names, function=Official(tuple(GRIDS), GRIDS, **setting))):
        theirs = zoo.call(model, inputs)
    assert distance(ours, theirs) < 1e-11
    assert distance(theirs, plain) > 1e-2


def test_non_integer_enlargement_and_odd_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 9)
    model, inputs = build("animatediff", torch.float64)
    inputs["sample"] = inputs["sample"][..., :15, :11]
    grids = {"up_blocks.0": (4, 3), "up_blocks.1": (8, 6), "up_blocks.2": (15, 11)}
    setting = {"alpha": 0.6, "beta": 1.2, "tau": 3}
    with attnctl.control(model, BroadWay(stop=1.0, **setting), layout="uncond_first") as handle:
        ours = zoo.call(model, inputs)
        names = [s.name for s in handle.sites]
    with attnctl.control(model, Replace(sites=names, function=Official(tuple(grids), grids, **setting))):
        assert distance(ours, zoo.call(model, inputs)) < 1e-11


def full_map_by_fft(beta: float, tau: int) -> Any:
    """Filter the rows of a whole map along the key frames, at every key position of the video."""

    def attend(call: AttnCall, proceed: Proceed) -> Tensor:
        attn = call.q @ call.k.mT * (call.scale or call.q.shape[-1] ** -0.5)
        if call.mask is not None:
            attn = attn + call.mask if call.mask.dtype != torch.bool else attn.masked_fill(~call.mask, -torch.inf)
        attn = attn.softmax(-1)
        part = call.image or slice(0, attn.shape[-1])
        video = attn[..., part].unflatten(-1, (FRAMES, -1))
        spectrum = torch.fft.fft(video, dim=-2)
        spectrum[..., FRAMES // 2 - tau : FRAMES // 2 + tau + 1, :] *= beta
        attn[..., part] = torch.fft.ifft(spectrum, dim=-2).real.flatten(-2)
        return attn @ call.v

    return attend


@pytest.mark.parametrize("name", ["cogvideox_rope", "wan", "hunyuanvideo"])
@pytest.mark.parametrize("tau", [3, 1])
def test_mixed_frames_equal_the_filtered_full_map(name: str, tau: int) -> None:
    model, inputs = build(name, torch.float64)
    with attnctl.control(model, BroadWay(alpha=0.0, beta=1.3, tau=tau, stop=1.0), layout="cond") as handle:
        ours = zoo.call(model, inputs)
        names = [s.name for s in handle.sites]
    with attnctl.control(model, Replace(sites=names, function=full_map_by_fft(1.3, tau)), layout="cond"):
        assert distance(ours, zoo.call(model, inputs)) < 1e-6  # hosts keep some tables in float32


# The contract, on every family


@pytest.mark.parametrize("name", [*FACTORISED, *FULL])
def test_contract(name: str) -> None:
    model, inputs = build(name)
    plain = zoo.call(model, inputs)
    before = snapshot(model)
    for off in (BroadWay(motion=0.0, stop=1.0), BroadWay(alpha=0.0, beta=1.0), BroadWay(alpha=0.0, beta=0.5)):
        with attnctl.control(model, off, layout="uncond_first") as handle:
            handle.set_step(0, 10)
            assert torch.equal(zoo.call(model, inputs), plain)
    with attnctl.control(model, BroadWay(), layout="uncond_first") as handle:
        handle.set_step(2, 10)
        assert torch.equal(zoo.call(model, inputs), plain), "0.2 is outside the window"
        handle.set_step(1, 10)
        moved = zoo.call(model, inputs)
        assert moved.isfinite().all()
        assert distance(moved, plain) > 1e-3
        assert torch.equal(zoo.call(model, inputs), moved)
        assert not handle._watched[0].state.scratch, "reference maps are freed after the call"
        assert "arXiv 2410.06241" in handle.report()
        handle.enabled = False
        assert torch.equal(zoo.call(model, inputs), plain)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("name", FACTORISED)
def test_the_right_modules_are_chosen(name: str) -> None:
    model, _ = build(name)
    sites = attnctl.find_sites(model)
    with attnctl.control(model, BroadWay(stop=1.0), layout="cond") as handle:
        chosen = {s.name for s in handle.sites}
        guides = handle._watched[0].attached[0][1].guides
    assert all(s.kind == "temporal" for s in sites if s.name in chosen)
    if name == "latte":
        assert len(chosen) == 3
        assert not guides
        return
    assert all(n.startswith("up_blocks.") for n in chosen)
    stages = sorted({n.split(".")[1] for n in chosen})
    assert {n.split(".")[1] for n in guides} == set(stages[1:])
    assert {n.split(".")[1] for n in guides.values()} <= {stages[0]}
    if name == "svd":
        assert all(n.endswith("attn1") for n in chosen), "attn2 is cross attention to the image"


def test_the_four_stages_of_sd15_give_18_of_40() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, attention_head_dim=8
        )
        adapter = diffusers.MotionAdapter(block_out_channels=(32, 64, 64, 64), use_motion_mid_block=False)
    with torch.device("cpu"):
        model = diffusers.UNetMotionModel.from_unet2d(unet.to_empty(device="cpu"), adapter.to_empty(device="cpu"))
    sites = attnctl.find_sites(model)
    assert sum(s.kind == "temporal" for s in sites) == 40
    with attnctl.control(model, BroadWay(stop=1.0), layout="cond") as handle:
        chosen = {s.name for s in handle.sites}
    assert len(chosen) == 18
    assert {n.split(".")[1] for n in chosen} == {"1", "2", "3"}


def test_gradients_and_checkpointing_agree() -> None:
    from contract import gradients

    model, inputs = build("animatediff", torch.float64)
    control = BroadWay(stop=1.0)
    with attnctl.control(model, control, layout="uncond_first"):
        plain = gradients(model, inputs)
        model.enable_gradient_checkpointing()
        model.train()
        again = gradients(model, inputs)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# Energies, pieces, maps


def test_large_batches_are_cut_with_the_same_energies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("animatediff", torch.float64)
    results = []
    for most, elements in ((temporal.MAX_POSITIONS, temporal._MAX_ELEMENTS), (7, 1)):
        monkeypatch.setattr(temporal, "MAX_POSITIONS", most)
        monkeypatch.setattr(temporal, "_MAX_ELEMENTS", elements)
        sites = ["up_blocks.*", "down_blocks.0"]
        with attnctl.control(model, BroadWay(sites=sites, stop=1.0), layout="uncond_first") as handle:
            out = zoo.call(model, inputs)
            results.append((out, handle._watched[0].attached[0][1].figures))
    assert distance(results[0][0], results[1][0]) < 1e-12
    for name, (energies, gain) in results[0][1].items():
        torch.testing.assert_close(energies, results[1][1][name][0], atol=0, rtol=1e-12)
        torch.testing.assert_close(gain, results[1][1][name][1], atol=0, rtol=1e-12)


def test_more_than_65535_positions_never_reach_a_kernel_at_once() -> None:
    from attnctl.processors.motion import _in_parts

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(66_000, 1, 4, 2, generator=g) for _ in range(3))
    sizes: list[int] = []

    class Call:
        def __init__(self, **tensors: Any) -> None:
            vars(self).update(tensors)

        def with_(self, **changes: Any) -> Call:
            return Call(**{**vars(self), **changes})

    def proceed(call: Any) -> Tensor:
        sizes.append(len(call.q))
        return F.scaled_dot_product_attention(call.q, call.k, call.v)

    out = _in_parts(Call(q=q, k=k, v=v, mask=None), proceed)  # type: ignore[arg-type]
    assert sizes == [65_535, 465]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


class Maps(TorchDispatchMode):
    """Count the tensors that are maps of frames by frames, one a position; building the band once makes 11 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes = self.maps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.shape[-2:] == (11, 11) and t.numel() > 11**3:
                self.maps += 1
                self.softmaxes += "softmax" in str(func)
        return out


@pytest.mark.parametrize("name", ["animatediff", "latte", "svd"])
def test_no_map_is_made_where_none_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 11)  # a length that nothing else has
    monkeypatch.setattr(temporal, "_MAX_ELEMENTS", 2**30)
    model, inputs = build(name)
    for control in (BroadWay(alpha=0.0, stop=1.0), BroadWay(alpha=0.0, tau=5, stop=1.0)):
        with attnctl.control(model, control, layout="uncond_first"), Maps() as counted:
            zoo.call(model, inputs)
        assert counted.softmaxes == 0
        assert counted.maps == 0, "one projector of the band is the only matrix of frames by frames"
    with attnctl.control(model, BroadWay(stop=1.0), layout="uncond_first") as handle, Maps() as counted:
        zoo.call(model, inputs)
        attached = handle._watched[0].attached[0][1]
    assert counted.softmaxes == 2 * len(set(attached.guides) | attached.keep), "one piece for each row of a guided site"


def test_the_sample_scope_keeps_prompts_apart() -> None:
    model, inputs = build("animatediff", torch.float64)
    apart = BroadWay(stop=1.0, beta=1.0, beta_scope="sample")
    with attnctl.control(model, apart, layout="cond"):
        both = zoo.call(model, inputs)
        alone = torch.cat([zoo.call(model, zoo.take(inputs, [i])) for i in (0, 1)])
    assert distance(both, alone) < 1e-12
    with attnctl.control(model, BroadWay(stop=1.0, beta=1.0), layout="cond"):
        assert distance(zoo.call(model, inputs), alone) > 1e-6


def test_masks_courses_and_blocks() -> None:
    model, inputs = build("animatediff", torch.float64)
    plain = zoo.call(model, inputs)

    def run(step: int = 0, **fields: Any) -> Tensor:
        with attnctl.control(model, BroadWay(**{"stop": 1.0} | fields), layout="uncond_first") as handle:
            handle.set_step(step, 4)
            return zoo.call(model, inputs)

    whole = run()
    assert distance(run(mask=np.ones((4, 4))), whole) < 1e-12
    assert distance(run(mask=torch.zeros(4, 4)), plain) < 1e-12
    assert distance(run(alpha=0.0, mask=Image.new("L", (5, 3), 255)), run(alpha=0.0)) < 1e-12
    half = np.zeros((16, 12))
    half[:, :6] = 1
    assert 1e-3 < distance(run(mask=half), plain) < distance(whole, plain)
    assert distance(run(beta=(1.5, 1.5, 1.5)), whole) < 1e-12
    assert distance(run(step=2, beta=(2.0, 1.0), alpha=0.0), run(beta=1.5, alpha=0.0)) < 1e-12
    assert distance(run(beta={"up": 1.5}), whole) < 1e-12
    assert distance(run(beta={"up.2": 2.0}, alpha=0.0), run(sites="up.2", beta=2.0, alpha=0.0)) < 1e-12
    assert distance(run(motion=1.0), whole) == 0
    assert distance(run(energy_floor=False, beta=0.5, alpha=0.0), plain) > 1e-3


def test_the_motion_knob_raises_the_change() -> None:
    model, inputs = build("animatediff")
    plain = zoo.call(model, inputs)
    changes = []
    for motion in (0.0, 0.5, 1.0, 2.0, 4.0):
        with attnctl.control(model, BroadWay(motion=motion, stop=1.0), layout="uncond_first"):
            changes.append(distance(zoo.call(model, inputs), plain))
    assert changes[0] == 0
    assert changes == sorted(changes)
    assert BroadWay(motion=1.0).strength() == (0.6, 1.5)
    assert BroadWay.preset("videocrafter2").strength() == (0.1, 10.0)


def test_half_precision_runs() -> None:
    model, inputs = build("animatediff")
    with attnctl.control(model, BroadWay(stop=1.0), layout="uncond_first"):
        single = zoo.call(model, inputs)
    model, inputs = build("animatediff", torch.bfloat16)
    with attnctl.control(model, BroadWay(stop=1.0), layout="uncond_first"):
        half = zoo.call(model, inputs)
    assert half.dtype == torch.bfloat16
    assert distance(half.float(), single) < 0.1


# Pipelines


def _controlled_calls(pipe: Any, kwargs: dict[str, Any], control: BroadWay, **options: Any) -> tuple[Tensor, list[int]]:
    """Run a pipeline and note on which step of the run a guided site was active."""
    steps: list[int] = []
    with attnctl.control(pipe, control) as handle:
        watched = handle._watched[0]
        own = watched.attached[0][1]
        wrap, first = own.wrap, next(iter(own.guides))
        for name, wrappers in watched.base.items():
            watched.base[name] = [(c, lambda call, proceed: note(call, proceed)) for c, _ in wrappers]

        def note(call: AttnCall, proceed: Proceed) -> Tensor:
            if call.site.name == first:
                steps.append(call.state.step)
            return wrap(call, proceed)

        out = pipes.run(pipe, kwargs, **options)
    return out, steps


def _siblings(name: str) -> tuple[Any, dict[str, Any]]:
    """Build the other AnimateDiff pipelines around the zoo's."""
    pipe, kwargs = pipes.build("animatediff")
    parts = pipe.components
    video = [Image.new("RGB", (24, 32), (20 * i, 100, 50)) for i in range(FRAMES)]
    if name == "text2video":
        return pipe, kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "video2video":
            made = diffusers.AnimateDiffVideoToVideoPipeline(**parts)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("num_frames",)} | {"video": video, "strength": 0.8}
        else:
            unet, _ = zoo.build("sd15", 1)
            if name == "controlnet":
                net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
                made = diffusers.AnimateDiffControlNetPipeline(**parts, controlnet=net.eval())
                kwargs |= {"conditioning_frames": video}
            else:
                net = diffusers.SparseControlNetModel(
                    in_channels=4,
                    conditioning_channels=4,
                    block_out_channels=(16, 32, 32),
                    layers_per_block=1,
                    down_block_types=(
                        "CrossAttnDownBlockMotion",
                        "CrossAttnDownBlockMotion",
                        "DownBlockMotion",
                    ),
                    cross_attention_dim=32,
                    attention_head_dim=4,
                    norm_num_groups=8,
                    motion_num_attention_heads=4,
                    conditioning_embedding_out_channels=(8, 16),
                    use_simplified_condition_embedding=True,
                )
                made = diffusers.AnimateDiffSparseControlNetPipeline(**parts, controlnet=net.eval())
                kwargs |= {"conditioning_frames": video[:1], "controlnet_frame_indices": [0]}
    return pipes.quiet(made), kwargs


@pytest.mark.parametrize("name", ["text2video", "video2video", "controlnet", "sparsectrl"])
def test_every_animatediff_pipeline(name: str) -> None:
    pipe, kwargs = _siblings(name)
    before = snapshot(pipe.unet, pipe.scheduler)
    plain = pipes.run(pipe, kwargs, num_inference_steps=6)
    moved, steps = _controlled_calls(pipe, kwargs, BroadWay(stop=0.5), num_inference_steps=6)
    assert steps == ([0, 1, 2] if name != "video2video" else [0, 1])
    assert distance(moved, plain) > 1e-3
    assert_clean(before, pipe.unet, pipe.scheduler)
    assert torch.equal(pipes.run(pipe, kwargs, num_inference_steps=6), plain)


def free_noise(dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """Build AnimateDiff that denoises windows of 8 frames, 4 apart."""
    pipe, kwargs = pipes.build("animatediff", dtype)
    with torch.random.fork_rng(devices=[]):
        adapter = diffusers.MotionAdapter(
            block_out_channels=(8,), motion_num_attention_heads=1, motion_norm_num_groups=1
        )
    pipe.register_modules(motion_adapter=adapter)  # asked for its longest sequence only
    pipe.enable_free_noise(context_length=8, context_stride=4)
    pipe.unet.to(dtype)  # its new blocks are made in float32
    return pipe, kwargs


def test_free_init_begins_each_round_anew() -> None:
    pipe, kwargs = pipes.build("animatediff")
    pipe.enable_free_init(num_iters=2)
    _, steps = _controlled_calls(pipe, kwargs, BroadWay(stop=0.5), num_inference_steps=4)
    assert steps == [0, 1, 0, 1]


def test_windows_of_free_noise_take_references_of_their_own() -> None:
    pipe, kwargs = free_noise()
    kwargs |= {"num_frames": 16, "num_inference_steps": 2}
    setting = {"alpha": 0.6, "beta": 1.1}
    with attnctl.control(pipe, BroadWay(stop=0.5, **setting)) as handle:
        ours = pipes.run(pipe, kwargs)
        names = [s.name for s in handle.sites]
    oracle = Official(tuple(GRIDS), GRIDS, **setting)
    with attnctl.control(pipe, Replace(sites=names, function=oracle, stop=0.5)):
        theirs = pipes.run(pipe, kwargs)
    assert len(oracle.reference[".motion_modules.0.transformer_blocks.0.attn1"]) == 3
    assert distance(ours, theirs) < 1e-9


def test_with_pag_and_free_noise_in_one_run() -> None:
    pipe, kwargs = free_noise()
    kwargs |= {"num_frames": 12, "num_inference_steps": 3}
    controls = (BroadWay(stop=0.5), PAG(scale=2.0, sites="up_blocks.2.attentions.0"))
    results = []
    for replay in (True, False):
        with attnctl.control(pipe, *controls, replay=replay) as handle:
            results.append(pipes.run(pipe, kwargs))
            assert handle.passes == 3
    assert distance(results[0], results[1]) < 1e-10, "the perturbed pass may take the reference stage over"
    with attnctl.control(pipe, controls[0]):
        assert distance(pipes.run(pipe, kwargs), results[0]) > 1e-3
    with attnctl.control(pipe, controls[1]):
        assert distance(pipes.run(pipe, kwargs), results[0]) > 1e-3


def test_other_wrappers_behind_it_keep_their_say() -> None:
    model, inputs = build("animatediff", torch.float64)
    seen: list[str] = []

    def sharper(call: AttnCall, proceed: Proceed) -> Tensor:
        seen.append(call.site.name)
        return proceed(call.with_(q=1.5 * call.q))

    inner = Replace(sites="temporal", function=sharper)
    with attnctl.control(model, BroadWay(stop=1.0), inner, layout="uncond_first") as handle:
        nested = zoo.call(model, inputs)
        names = {s.name for s in handle.sites}
    assert set(seen) == names
    with attnctl.control(model, inner, BroadWay(stop=1.0), layout="uncond_first"):
        assert distance(zoo.call(model, inputs), nested) < 1e-11


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is out of range"),
        ({"beta": -1.0}, "beta=-1.0 is out of range"),
        ({"beta": ()}, "empty list"),
        ({"beta": {}}, "must map selectors"),
        ({"beta": {"up.1": "much"}}, "out of range"),
        ({"tau": -1}, "tau=-1"),
        ({"tau": 3.5}, "whole number of bins"),
        ({"tau": "all"}, "tau='all'"),
        ({"motion": 11.0}, "motion=11.0 is out of range"),
        ({"motion": 1.0, "beta": 2.0}, "Give the one knob"),
        ({"interpolation": "cubic"}, "nearest, bilinear"),
        ({"head_match": "some"}, "group_mean, strict"),
        ({"beta_scope": "all"}, "batch, sample"),
        ({"mask": np.full((4, 4), 2.0)}, "from 0 to 1"),
        ({"mask": np.zeros((2, 2, 2))}, "mask must be a picture"),
        ({"mask": "missing.png"}, "cannot be read"),
        ({"mask": object()}, "mask must be a picture"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BroadWay(**fields)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="animatediff, videocrafter2"):
        BroadWay.preset("sora")


@pytest.mark.parametrize(
    ("name", "frames", "fields", "error", "message"),
    [
        ("animatediff", 3, {}, ConfigError, "3 frames are too few"),
        ("animatediff", 8, {"tau": 7}, ConfigError, "tau=7 is too large for 8 frames"),
        ("wan", 8, {"tau": 4}, ConfigError, "too large"),
        ("svd", 8, {"sites": "up_blocks.1.*temporal_transformer_blocks.0.attn2"}, SiteError, "cross attention"),
        ("sd15", 8, {}, UnsupportedModelError, "neither temporal attention"),
        ("flux", 8, {}, UnsupportedModelError, "neither temporal attention"),
        ("animatediff", 8, {"sites": "up.2"}, SiteError, "needs the maps of up_blocks.0"),
        ("animatediff", 8, {"reference": "up_blocks.7"}, SiteError, "no temporal attention"),
        ("animatediff", 8, {"beta": {"mid": 2.0}}, SiteError, r"matches|selects only"),
    ],
)
def test_models_and_lengths_that_do_not_fit_are_refused(
    name: str, frames: int, fields: dict[str, Any], error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "FRAMES", frames)
    model, inputs = build(name)
    before = snapshot(model)
    plain = zoo.call(model, inputs)
    with (
        pytest.raises(error, match=message),
        attnctl.control(model, BroadWay(stop=1.0, **fields), layout="uncond_first"),
    ):
        zoo.call(model, inputs)
    assert_clean(before, model)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_split_inference_is_refused(when: str) -> None:
    pipe, kwargs = free_noise(torch.float32)
    kwargs |= {"num_frames": 8}
    if when == "before":
        pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=16)
    with attnctl.control(pipe, BroadWay(stop=0.5)):
        if when == "after":
            pipe.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=16)
        with pytest.raises(UnsupportedModelError, match="Split inference"):
            pipes.run(pipe, kwargs)


def test_heads_that_differ_are_averaged_or_refused() -> None:
    model, inputs = build("unet3d")
    with torch.random.fork_rng(devices=[]):
        model = diffusers.UNet3DConditionModel(
            **{**model.config, "block_out_channels": (8, 16, 16)}
            | {
                "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            }
        ).eval()
    zoo.randomize(model, torch.Generator().manual_seed(0))
    heads = {s.name.split(".")[1]: s.heads for s in attnctl.find_sites(model) if s.name.startswith("up_blocks")}
    assert heads == {"1": 4, "2": 2}
    plain = zoo.call(model, inputs)
    with attnctl.control(model, BroadWay(stop=1.0), layout="uncond_first"):
        assert distance(zoo.call(model, inputs), plain) > 1e-4
    with (
        pytest.raises(UnsupportedModelError, match="has 4 heads"),
        attnctl.control(model, BroadWay(stop=1.0, head_match="strict"), layout="uncond_first"),
    ):
        zoo.call(model, inputs)


def test_perturbing_some_heads_of_the_same_site_is_refused() -> None:
    model, inputs = build("animatediff")
    site = "up_blocks.2.motion_modules.0.transformer_blocks.0.attn1"
    controls = (BroadWay(stop=1.0), SoftPAG(u=1.0, scale=1.0, heads=[(site, 0)]))
    with attnctl.control(model, *controls, layout="uncond_first"), pytest.raises(ConflictError, match="3 of its 4"):
        zoo.call(model, inputs)


def test_what_does_not_act_is_said() -> None:
    model, _ = build("latte")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attnctl.control(model, BroadWay(stop=1.0), layout="cond").detach()
        attnctl.control(build("wan")[0], BroadWay(stop=1.0, alpha=0.0), layout="cond").detach()
    said = [str(w.message) for w in caught if "attnctl" in str(w.message)]
    assert "enhances only, and alpha=0.6 has no effect" in said[0]
    assert "experimental" in said[1]
    assert "no effect" not in said[1]


def test_it_can_be_written_down() -> None:
    control = BroadWay(beta={"up.2": (2.0, 1.0)}, mask=np.eye(4), tau=3)
    again = control_from_dict(control_to_dict(control))
    assert again == control
    assert "beta" in control.describe()
