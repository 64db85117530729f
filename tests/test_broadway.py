"""BroadWay on whole models: the definition by FFT, every video family, energies and pieces."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from broadway_reference import FRAMES, GRIDS, Official, build
from contract import Replace, assert_clean, distance, snapshot
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.kernels import temporal
from attnctl.processors import BroadWay

pytestmark = pytest.mark.usefixtures("eight_frames")


UNETS = ("animatediff", "animatediff_xl", "svd", "unet3d", "i2vgenxl")
FACTORISED = (*UNETS, "latte")
FULL = ("cogvideox", "cogvideox_rope", "wan", "ltx", "hunyuanvideo", "mochi", "allegro", "cosmos")


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
        guides = handle._watched[0].live[0][1].guides
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
            results.append((out, handle._watched[0].live[0][1].figures))
    assert distance(results[0][0], results[1][0]) < 1e-12
    for name, (energies, gain) in results[0][1].items():
        torch.testing.assert_close(energies, results[1][1][name][0], atol=0, rtol=1e-12)
        torch.testing.assert_close(gain, results[1][1][name][1], atol=0, rtol=1e-12)


def test_more_than_65535_positions_never_reach_a_kernel_at_once() -> None:
    from attnctl.processors.broadway.motion import _in_parts

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
        attached = handle._watched[0].live[0][1]
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
