"""What FateZero costs: bytes of the source store, and the time of an edit beside explicit maps.

    python benchmarks/fatezero.py                 # memory table, attention, whole edits (minutes)
    python benchmarks/fatezero.py --memory        # the tables alone
    python benchmarks/fatezero.py --small         # a smoke run

Times are medians of interleaved runs in one process. "explicit" is the method written plainly: every attention is a
softmax that is multiplied out, maps of the inversion are kept and mixed into those of the edit. The table goes to
stderr, the JSON to stdout. What it does to pictures: benchmarks/fatezero_effects.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.kernels import attention
from attnctl.pipelines import ddim_of, estimate_bytes, invert
from attnctl.pipelines.editing.inversion import inverse_of
from attnctl.processors import FateZero
from attnctl.processors.editing.fusion import Split, fold_values, frame_indices, gather_frames, self_fuse, take_queries

SOURCE, TARGET = "a red circle on gray", "a blue circle on gray"
EDIT = FateZero(source=SOURCE, target=TARGET, cross_replace=1.0, self_replace=1.0)
RELEASED = {"mid": 36.2, (-1, "first"): 69.4}  # GiB of the maps that the released code keeps, by its own layers


def stable_diffusion() -> torch.nn.Module:
    """Build Stable Diffusion 1.5's UNet without weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()


def small(size: int, seed: int = 0) -> Any:
    """Make the shipped pipeline's text part drive a random UNet whose finest attention has size x size tokens."""
    pipe = attnctl.load_shapes("text2image")
    torch.manual_seed(seed)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=size,
        in_channels=pipe.unet.config.in_channels,
        out_channels=pipe.unet.config.out_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=pipe.unet.config.cross_attention_dim,
        attention_head_dim=8,
        norm_num_groups=16,
    ).eval()
    return pipe


def memory(tiny: bool) -> dict[str, Any]:
    """Measure the store on a small model, and estimate it for Stable Diffusion 1.5."""
    pipe, rows = small(16), []
    for frames in (2, 4) if tiny else (8, 32):
        for steps in (2, 3) if tiny else (10, 50):
            x = torch.randn(frames, pipe.unet.config.in_channels, 16, 16)
            row: dict[str, Any] = {"frames": frames, "steps": steps}
            for store in ("recompute", "qk", "maps"):
                control = dataclasses.replace(EDIT, store=store)
                told = estimate_bytes(pipe.unet, control, frames, 16, 16, steps)[store]
                row[f"{store}_estimate"] = told
                if told > 2**30:
                    continue  # would only fill the memory of the machine that measures
                with invert(pipe, x, control=control, steps=steps) as inversion:
                    row[store] = inversion.nbytes
                    if store == "recompute":
                        row["within_a_step"] = _transient(pipe, inversion, control)
            rows.append(row)
            print(_memory_line(row), file=sys.stderr)
    unet, table = stable_diffusion(), []
    for keys in ("mid", (-1, "first")):
        told = estimate_bytes(unet, dataclasses.replace(EDIT, keys=keys), 8, 64, 64, 50)
        table.append({"keys": str(keys), "released_GiB": RELEASED[keys], **{n: b / 2**30 for n, b in told.items()}})
        sizes = ", ".join(f"{n} {b / 2**30:.3f} GiB" for n, b in told.items())
        print(f"SD 1.5, 8 frames, 50 steps, keys {keys}: {sizes}; released {RELEASED[keys]} GiB", file=sys.stderr)
    return {"measured": rows, "sd15": table}


def _transient(pipe: Any, inversion: Any, control: FateZero) -> int:
    """Return the most bytes of queries and keys that one step of a recomputing edit holds."""
    with attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)) as handle:
        run(pipe, inversion, stop=1)
        own: Any = handle._watched[0].live[0][1]
        return int(own.kept.peak)


def _memory_line(row: dict[str, Any]) -> str:
    parts = [
        f"{n} {row[n] / 2**20:.2f} MiB" if n in row else f"{n} {row[f'{n}_estimate'] / 2**20:.0f} MiB (estimate)"
        for n in ("recompute", "qk", "maps")
    ]
    held = f"; within a step {row['within_a_step'] / 2**20:.2f} MiB" if "within_a_step" in row else ""
    return f"{row['frames']} frames, {row['steps']} steps: {', '.join(parts)}{held}"


class _Stop(Exception):
    pass


def run(pipe: Any, inversion: Any, stop: int | None = None) -> None:
    """Denoise from the inverted noise with the target prompt, for all steps or the first few."""
    n = inversion.frames

    def after(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop is not None and i + 1 >= stop:
            raise _Stop
        return tensors

    height, width = (int(s) * pipe.vae_scale_factor for s in inversion.noise.shape[-2:])
    pipe.set_progress_bar_config(disable=True)
    with contextlib.suppress(_Stop):
        pipe(
            prompt=[TARGET] * n,
            latents=inversion.noise,
            num_inference_steps=inversion.steps,
            guidance_scale=5.0,
            output_type="latent",
            height=height,
            width=width,
            callback_on_step_end=after,
        )


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time calls in turn; medians in seconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in found.items()}


def attention_cost(tiny: bool, repeats: int) -> dict[str, Any]:
    """Fuse self-attention at 1024 queries and 2 x 1024 keys: two fused kernels against explicit maps."""
    f, h, n, d = (2, 2, 256, 40) if tiny else (8, 8, 1024, 80)
    indices = frame_indices([-1, "first"], f)
    qe, qs, ke, ks, ve = (torch.randn(f, h, n, d) for _ in range(5))
    ke, ks, ve = (gather_frames(x, indices) for x in (ke, ks, ve))
    mask = torch.rand(f, n) > 0.5
    stored = (qs @ ks.transpose(-2, -1) * d**-0.5).softmax(-1)

    def explicit() -> Tensor:
        own = (qe @ ke.transpose(-2, -1) * d**-0.5).softmax(-1)
        return torch.where(mask[:, None, :, None], own, stored) @ ve

    def fused(m: Tensor | None) -> Tensor:
        def attend(own: bool, at: Tensor | None) -> Tensor:
            return attention(take_queries(qe if own else qs, at), ke if own else ks, ve)

        return self_fuse(attend, None if m is None else Split.of(m))

    torch.testing.assert_close(fused(mask), explicit(), atol=1e-4, rtol=1e-4)
    times = timed({"explicit": explicit, "fused": lambda: fused(mask), "fused, no mask": lambda: fused(None)}, repeats)
    times["ratio"] = times["explicit"] / times["fused"]
    print(f"self-attention {f}x{h}x{n}x{d}: {_shown(times)}", file=sys.stderr)
    return {"shape": [f, h, n, d], **times}


class Explicit:
    """An attention processor that makes every map, keeps the inversion's, and mixes them into the edit's rows."""

    def __init__(self, maps: dict[tuple[int, str], Tensor], name: str, told: dict[str, Any]) -> None:
        self.maps, self.name, self.told = maps, name, told

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            part(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        told, f = self.told, self.told["frames"]
        if encoder_hidden_states is None:
            k, v = gather_frames(k, told["indices"]), gather_frames(v, told["indices"])
        maps = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
        key = (told["step"], self.name)
        if told["phase"] == "invert":
            self.maps[key] = maps
        elif told["phase"] == "edit" and encoder_hidden_states is None:
            maps = torch.cat([maps[:f], self.maps[key]])
        out = maps @ v
        if told["phase"] == "edit" and encoder_hidden_states is not None:
            follow = told["follow"][told["steps"] - 1 - told["step"]]
            from_source, from_edit = fold_values(v[f:], told["how"], follow)
            out = torch.cat([out[:f], self.maps[key] @ from_source + maps[f:] @ from_edit])
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def whole_edits(tiny: bool, repeats: int) -> dict[str, Any]:
    """Invert and edit with recompute, with qk and with explicit maps; and run the same branches plainly."""
    size, frames, steps = (8, 2, 2) if tiny else (32, 4, 5)
    pipe = small(size)
    pipe.scheduler = ddim_of(pipe.scheduler)
    x = torch.randn(frames, pipe.unet.config.in_channels, size, size)
    base = dataclasses.replace(EDIT, factor=1)

    def edit(store: str) -> None:
        control = dataclasses.replace(base, store=store)
        with (
            invert(pipe, x, control=control, steps=steps) as inversion,
            attnctl.control(pipe, dataclasses.replace(control, inversion=inversion)),
        ):
            run(pipe, inversion)

    def plain() -> None:
        run(pipe, invert(pipe, x, SOURCE, steps=steps))

    def explicit() -> None:
        _explicit_edit(pipe, x, steps, base)

    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "recompute": lambda: edit("recompute"),
        "qk": lambda: edit("qk"),
        "explicit maps": explicit,
    }
    times = timed(calls, repeats)
    inversion = invert(pipe, x, control=base, steps=steps)
    held = dataclasses.replace(base, inversion=inversion)

    def editing() -> None:
        with attnctl.control(pipe, held):
            run(pipe, inversion)

    alone = timed({"plain edit": lambda: run(pipe, inversion), "recompute edit": editing}, repeats)
    ratios = {
        "recompute / plain, whole": times["recompute"] / times["plain"],
        "recompute / plain, edit alone": alone["recompute edit"] / alone["plain edit"],
        "explicit / recompute": times["explicit maps"] / times["recompute"],
        "explicit / qk": times["explicit maps"] / times["qk"],
    }
    print(
        f"whole edits, {frames} frames, {steps} steps, {size * size} tokens: {_shown(times | alone)}", file=sys.stderr
    )
    print("  " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items()), file=sys.stderr)
    return {"frames": frames, "steps": steps, "tokens": size * size, "seconds": times | alone, "ratios": ratios}


@torch.no_grad()
def _explicit_edit(pipe: Any, x: Tensor, steps: int, control: FateZero) -> None:
    unet, plan = pipe.unet, control.plan(pipe)
    told: dict[str, Any] = {"frames": len(x), "indices": frame_indices(control.keys, len(x)), "steps": steps}
    told |= {"how": plan.how.to(x), "follow": plan.follow(steps)}
    maps: dict[tuple[int, str], Tensor] = {}
    held = unet.attn_processors
    unet.set_attn_processor({name: Explicit(maps, name, told) for name in held})
    try:
        n = len(x)
        source = pipe.encode_prompt([SOURCE] * n, x.device, 1, False)[0]
        target, negative = pipe.encode_prompt([TARGET] * n, x.device, 1, True)
        inverse, ddim = inverse_of(pipe.scheduler), pipe.scheduler
        inverse.set_timesteps(steps)
        told["phase"] = "invert"
        for s, t in enumerate(inverse.timesteps):
            told["step"] = s
            x = inverse.step(unet(x, t, source).sample, t, x).prev_sample
        ddim.set_timesteps(steps)
        told["phase"] = "edit"
        for k, t in enumerate(ddim.timesteps):
            told["step"] = steps - 1 - k
            u, c = unet(torch.cat([x, x]), t, torch.cat([negative, target])).sample.chunk(2)
            x = ddim.step(u + 5.0 * (c - u), t, x).prev_sample
    finally:
        unet.set_attn_processor(held)


def _shown(times: dict[str, float]) -> str:
    return ", ".join(f"{n} {t:.3f} s" if n != "ratio" else f"ratio {t:.2f}" for n, t in times.items())


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="only the memory tables")
    parser.add_argument("--small", action="store_true", help="a smoke run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"memory": memory(options.small)}
    if not options.memory:
        repeats = 1 if options.small else options.repeats
        with torch.no_grad():
            result["attention"] = attention_cost(options.small, repeats)
            result["edits"] = whole_edits(options.small, repeats)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
