"""Maps that are moved in attention, against maps written out in float64, on every host; rows, words and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dense_maps
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import Precise, assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall
from attnctl.core.hosts.arguments import row_alone
from attnctl.errors import AttnctlError, ConfigError, ConflictError
from attnctl.processors import NAG, Control, Proceed, TextCenGenMaps, Wrapper
from attnctl.processors.latent.textcengen import displacement
from attnctl.processors.regions.textcengen_maps import moved_columns

pytestmark = pytest.mark.usefixtures("no_grad")

TOP = (0.0, 0.0, 1.0, 0.5)
FIELDS: dict[str, Any] = {"space": TOP, "theta": 0.1, "force": 0.35, "margin": 0.002, "exclusion": 0.6}


def moved(column: Tensor, level: Tensor) -> Tensor:
    """Move one head's column [h, w] by the level that all heads share, pixel by pixel."""
    h, w = column.shape
    low, high = float(level.min()), float(level.max())
    level = (level - low) / (high - low) if high > low else level * 0
    cover = [min(1.0, max(0.0, TOP[3] * h - y)) for y in range(h)]  # how much of each row of tokens lies in the space
    inside = sum(cover[y] * float(level[y].sum()) for y in range(h)) / (sum(cover) * w)
    if not inside > FIELDS["theta"]:
        return column
    dx, dy = displacement(level[None], TOP, FIELDS["force"], FIELDS["margin"])[0].tolist()
    out = torch.zeros_like(column)
    for y in range(h):
        for x in range(w):
            sx, sy = x - dx * w, y - dy * h  # where the value comes from
            for iy in (math.floor(sy), math.floor(sy) + 1):
                for ix in (math.floor(sx), math.floor(sx) + 1):
                    if 0 <= iy < h and 0 <= ix < w:
                        out[y, x] += (1 - abs(sy - iy)) * (1 - abs(sx - ix)) * column[iy, ix]
        out[y] *= 1 - FIELDS["exclusion"] * cover[y]
    return out


@dataclass(frozen=True, kw_only=True)
class _Written(Control, abstract=True):
    """The same, with the whole map written out."""

    places: tuple[int, ...]
    kinds = ("cross", "joint")

    def default_sites(self, sites: Sequence[Any], family: Any) -> tuple[Any, ...]:
        return TextCenGenMaps().default_sites(sites, family)

    def wrapper(self, sites: Any) -> Wrapper:
        return self._write

    def _write(self, call: AttnCall, proceed: Proceed) -> Tensor:
        out = proceed(call)
        if call.index and row_alone(call.q, call.state.rows, call.index) is None:
            return out
        image, (frames, h, w) = call.on_image()
        text = call.text_keys()
        whole = dense_maps.map_of(call)
        new = whole.clone()
        mass = whole[:, :, image, text].sum(-1)
        for b in range(whole.shape[0]):
            for place in self.places:
                p = whole[b, :, image, text.start + place] / mass[b]
                for f in range(frames):
                    part = slice(f * h * w, (f + 1) * h * w)
                    level = p[:, part].mean(0).unflatten(0, (h, w))
                    for head in range(whole.shape[1]):
                        goal = moved(p[head, part].unflatten(0, (h, w)), level).flatten()
                        rows = slice(image.start + part.start, image.start + part.stop)
                        new[b, head, rows, text.start + place] = goal * mass[b, head, part]
        change = (new - whole)[:, :, image] @ dense_maps.values_of(call).double()
        out = out.clone()
        out[:, :, image] += change.to(out.dtype)
        return out


REFUSED = {  # in words
    "svd": "attends to 1 text tokens",
    "sana_wm_refiner": "nothing tells how its 72 image tokens lie",
    "anyflow_far": "flex_attention alone",
    "kandinsky6_sr": "flex_attention alone",
    "prior": "no image",
    "dit": "no attention site matches 'joint'",
    "unet2d": "no attention site matches 'joint'",
    "minimax_music3": "no attention site matches 'joint'",
}


@pytest.mark.parametrize("name", [n for n in zoo.EVERY if n not in REFUSED])
def test_moved_maps_are_those_written_out_on_every_host(name: str, precise: Precise) -> None:
    model, inputs = precise(name)
    plain = zoo.call(model, inputs)
    with attnctl.control(model, TextCenGenMaps(concepts=(1, 2), **FIELDS), layout="cond"):
        out = zoo.call(model, inputs)
    with attnctl.control(model, _Written(places=(1, 2)), layout="cond"):
        expected = zoo.call(model, inputs)
    assert (out - expected).norm() / expected.norm() < 1e-12
    assert not torch.equal(out, plain)
    assert torch.equal(zoo.call(model, inputs), plain)


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_other_hosts_are_refused_in_words(name: str, words: str) -> None:
    model, inputs = zoo.build(name)
    with (
        pytest.raises(AttnctlError, match=words),
        attnctl.control(model, TextCenGenMaps(concepts=(1, 2)), layout="cond"),
    ):
        zoo.call(model, inputs)


def test_a_column_in_the_way_moves_and_another_stays() -> None:
    columns = torch.zeros(1, 2, 2, 8, 8)
    columns[:, :, 0, 3, 4] = 0.5
    columns[:, :, 1, 6, 2] = 0.5
    out = moved_columns(columns, TOP, 0.01, 0.5, 0.0, 0.75)
    assert torch.equal(out[:, :, 1], columns[:, :, 1])
    assert float(out[0, 0, 0, :4].sum()) < 0.1 * float(out[0, 0, 0].sum())
    assert torch.equal(moved_columns(columns, TOP, 1.0, 0.5, 0.0, 0.75), columns)


def test_in_a_pipeline_only_the_prompt_s_rows_move_and_nothing_stays_behind() -> None:
    pipe, call = pipes.build("sd")
    pipe(**call, num_inference_steps=1, output_type="latent")
    before = snapshot(pipe.unet, pipe.scheduler)
    plain = pipes.run(pipe, call)
    seen: list[bool] = []
    out_of = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2

    def first_row(module: Any, args: Any, output: Tensor) -> None:
        seen.append(torch.equal(output[0], kept[len(seen)]) if len(seen) < len(kept) else False)

    kept: list[Tensor] = []
    hook = out_of.register_forward_hook(lambda m, a, o: kept.append(o[0].clone()))
    pipes.run(pipe, call)
    hook.remove()
    hook = out_of.register_forward_hook(first_row)
    only = TextCenGenMaps(concepts=("cat",), sites="mid", **FIELDS | {"theta": 0.0}, stop=0.3)
    with attnctl.control(pipe, only):
        moved_once = pipes.run(pipe, call)
    hook.remove()
    assert seen[0]  # the negative row of the first step, whose input is the same
    assert not torch.equal(moved_once, plain)
    assert_clean(before, pipe.unet, pipe.scheduler)
    with attnctl.control(pipe, TextCenGenMaps(concepts=("cat",), theta=1.0)):
        assert torch.equal(pipes.run(pipe, call), plain)


def test_pictures_of_a_batch_move_their_own_words() -> None:
    pipe, call = pipes.build("sd")
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(2))
    call |= {"latents": noise.repeat(2, 1, 1, 1)}
    prompts = {"prompt": ["a cat and a dog", "a dog"], "negative_prompt": ["", ""]}
    fields = FIELDS | {"theta": 0.0}
    with attnctl.control(pipe, TextCenGenMaps(concepts=(("cat", "dog"), ("dog", "a")), **fields)):
        both = pipes.run(pipe, call | prompts)
    for n, concepts in enumerate((("cat", "dog"), ("dog", "a"))):
        one = {name: value[n] for name, value in prompts.items()} | {"latents": noise}
        with attnctl.control(pipe, TextCenGenMaps(concepts=concepts, **fields)):
            assert (pipes.run(pipe, call | one)[0] - both[n]).abs().max() < 1e-4
    with attnctl.control(pipe, TextCenGenMaps(**fields)):  # every word
        every = pipes.run(pipe, call | {"prompt": "a dog", "negative_prompt": "", "latents": noise})
    assert (every[0] - both[1]).abs().max() < 1e-4


def test_compiled_blocks_move_them_too() -> None:
    model, inputs = zoo.build("sd3")
    control = TextCenGenMaps(concepts=(1, 2), **FIELDS)
    with attnctl.control(model, control, layout="cond"):
        eager = zoo.call(model, inputs)
    for module in model.modules():
        if type(module).__name__ == "JointTransformerBlock":
            module.compile(backend="eager")
    with attnctl.control(model, control, layout="cond"):
        assert (zoo.call(model, inputs) - eager).abs().max() < 1e-5
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    pipe, call = pipes.build("sd")
    with attnctl.control(pipe, TextCenGenMaps(concepts=("zebra",))), pytest.raises(ConfigError, match="zebra"):
        pipes.run(pipe, call)
    with pytest.raises(ConfigError, match="less than a tenth"):
        TextCenGenMaps(space=(0, 0, 1, 1))
    with pytest.raises(ConfigError, match="given twice"):
        TextCenGenMaps(concepts=("cat", "cat"))
    with pytest.raises(ConflictError, match="moved maps are none"):
        attnctl.control(pipe, TextCenGenMaps(), NAG(negative_prompt="dog"))
    model, inputs = zoo.build("sd15")
    with attnctl.control(model, TextCenGenMaps(), layout="cond"), pytest.raises(ConfigError, match="no word"):
        zoo.call(model, inputs)
