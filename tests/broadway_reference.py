"""BroadWay as published, written out, and the video models that it runs on."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import zoo
import zoo_pipelines as pipes
from torch import Tensor, nn

from attnctl.core.call import AttnCall, Proceed

FRAMES = 8


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
