"""Whole pipelines of diffusers' other denoisers under control: a cheap sample of what benchmarks/pipelines.py runs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_encoded as encoded
import zoo_host_pipelines as hosts
import zoo_variants as variants
from contract import Replace, distance
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

import attnctl
from attnctl.core.hosts.arguments import Rows, take_rows
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors import APG, PAG, SLG, Capture, ShareAttention

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "pipelines.py"

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not BENCHMARK.is_file(), reason="the package is installed without its clone"),
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """Load benchmarks/pipelines.py."""
    spec = importlib.util.spec_from_file_location("pipelines_of_hosts", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "bria",
        "deepfloyd",
        "ddpm",
        "kandinsky5",
        "ltx2",
        "stable_cascade_prior",
        "anyflow",
        "pix2pix",
        "sdxl_inpaint",
        "longcat",
        "ideogram4",
        "qwen21",
    ],
)
def test_pipelines_are_guided_and_captured_and_left_clean(name: str, benchmark: Any) -> None:
    found = benchmark.measured(name)
    assert found["controls"]
    assert all(cell["clean"] for cell in found["controls"].values())
    recorded = json.loads(benchmark.RESULT.read_text())["found"][name]
    states = {control: cell["state"] for control, cell in found["controls"].items()}
    assert states == {control: cell["state"] for control, cell in recorded["controls"].items()}
    assert "fault" not in states.values()


def test_the_result_is_of_all_pipelines(benchmark: Any) -> None:
    recorded = json.loads(benchmark.RESULT.read_text())
    assert recorded["found"].keys() == {*hosts.NAMES, *variants.NAMES, *encoded.NAMES}
    assert recorded["fault"] == 0


@pytest.mark.parametrize("name", ["cosmos1", "ltx_i2v", "ltx_condition"])
def test_steps_are_counted_whatever_a_pipeline_hands_to_its_scheduler(name: str) -> None:
    """Cosmos steps both predictions first; LTX steps all frames but those that are given."""
    pipe, kwargs = variants.build(name)
    guidance, maps = PAG(scale=2.0, start=0.4, sites="self"), Capture(words=(1,))
    with attnctl.control(pipe, guidance, maps) as handle:
        variants.run(pipe, kwargs, steps=4)
        assert handle.passes == 2
        steps = handle.result(maps).steps
    assert len(steps) == 4


def test_the_grid_is_read_off_the_places_of_tokens() -> None:
    pipe, kwargs = variants.build("ltx_condition")
    late = {"image": None, "conditions": [LTXVideoCondition(image=variants.PICTURE, frame_index=8)]}
    control = Capture(words=(1,))
    with attnctl.control(pipe, control) as handle:
        variants.run(pipe, kwargs | late)
        maps = handle.result(control)
    assert next(iter(maps.values())).shape == (1, 3, 6, 4)


def test_what_was_recorded_outlasts_timesteps_that_nothing_runs_at() -> None:
    """Wan Animate sets them again after its last segment."""
    pipe, kwargs = hosts.build("wan_animate")
    control = Capture(words=(1,))
    with attnctl.control(pipe, control) as handle:
        hosts.run(pipe, kwargs)
        assert len(handle.result(control).steps) == 3


def by_hand(model: Any, guidance: PAG, groups: int, prompt: int) -> Any:
    """Guide a denoiser by a hook: a second one, perturbed, sees all rows of every call; the prompt's are told."""
    twin = copy.deepcopy(model)
    sites = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    wrap = guidance.branch(sites, twin).perturb
    assert wrap is not None
    attnctl.control(twin, Replace(sites=[s.name for s in sites], function=wrap), layout="cond")

    def guide(module: Any, args: Any, given: Any, output: Any) -> Any:
        c, p = main_output(output), main_output(twin(*args, **copy.deepcopy(given)))
        size = len(c) // groups
        deltas = [guidance.scale * (c[i] - p[i]) for i in range(prompt * size, (prompt + 1) * size)] * groups
        guided = [x + d for x, d in zip(c, deltas, strict=True)]
        return with_main_output(output, guided if isinstance(c, list) else torch.stack(guided))

    return model.register_forward_hook(guide, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "groups", "prompt"),
    [("pix2pix", 3, 0), ("dreamlite_edit", 3, 2), ("omnigen_edit", 3, 0), ("zimage_omni", 2, 0),
     ("zimage_omni_edit", 2, 0)],
)  # fmt: skip
def test_rows_of_pictures_and_lists_of_lists_are_guided_by_the_definition(name: str, groups: int, prompt: int) -> None:
    module = variants if name in variants.NAMES else encoded
    (pipe, kwargs), (other, same) = module.build(name), module.build(name)
    sites = [s.name for s in attnctl.find_sites(pipe) if s.kind in ("self", "joint")]
    guidance = PAG(scale=2.0, sites=sites[len(sites) // 2])
    plain = module.run(pipe, kwargs)
    with attnctl.control(pipe, guidance):
        guided = module.run(pipe, kwargs)
    assert torch.equal(module.run(pipe, kwargs), plain)
    by_hand(next(iter(denoisers_of(other).values())), guidance, groups, prompt)
    assert distance(guided, module.run(other, same)) < 1e-5 < distance(guided, plain)


@pytest.mark.parametrize("schedule", [None, (2.0, 5.0, 3.0)])
def test_two_denoisers_are_guided_as_one(schedule: Any) -> None:
    """Ideogram 4 has one for the prompt and one for no prompt; its scale may change with the step."""
    call = {} if schedule is None else {"guidance_scale": None, "guidance_schedule": schedule}
    (pipe, kwargs), (other, same) = encoded.build("ideogram4"), encoded.build("ideogram4")
    sites = [s.name for s in attnctl.find_sites(pipe.transformer) if s.kind == "joint"]
    guidance = PAG(scale=2.0, sites=sites[len(sites) // 2])
    twin, delta = copy.deepcopy(other.transformer), []
    chosen = guidance.resolve(attnctl.find_sites(twin), family_of(twin))
    wrap = guidance.branch(chosen, twin).perturb
    assert wrap is not None
    attnctl.control(twin, Replace(sites=[s.name for s in chosen], function=wrap), layout="cond")

    def prompt(module: Any, args: Any, given: Any, output: Any) -> Any:
        delta.append(2.0 * (output[0] - twin(*args, **copy.deepcopy(given))[0]))
        return (output[0] + delta[-1],)

    other.transformer.register_forward_hook(prompt, with_kwargs=True)
    without = other.unconditional_transformer
    without.register_forward_hook(lambda module, args, output: (output[0] + delta[-1][:, -output[0].shape[1] :],))
    plain, by_hand_ = encoded.run(pipe, kwargs | call), encoded.run(other, same | call)
    for combine in ("add", "rescale_safe"):
        with attnctl.control(pipe, dataclasses.replace(guidance, combine=combine)):
            assert distance(encoded.run(pipe, kwargs | call), by_hand_) < 1e-5 < distance(plain, by_hand_)
    with attnctl.control(pipe, APG(eta=1.0, norm=0.0, momentum=0.0)):  # the sum that the pipeline makes by itself
        assert distance(encoded.run(pipe, kwargs | call), plain) < 1e-5
    assert torch.equal(encoded.run(pipe, kwargs | call), plain)


def test_three_rows_whose_texts_are_equal_are_refused() -> None:
    pipe, kwargs = variants.build("pix2pix")
    with (
        attnctl.control(pipe, PAG(sites="self")),
        pytest.raises(UnsupportedModelError, match="Give a negative_prompt other than the prompt"),
    ):
        variants.run(pipe, kwargs | {"negative_prompt": kwargs["prompt"]})


@pytest.mark.parametrize("control", [APG(), SLG(sites="mid*", skip_in="negative", start=0.0, stop=1.0)])
def test_sums_of_two_predictions_are_refused_where_there_are_three(control: Any) -> None:
    pipe, kwargs = variants.build("pix2pix")
    with attnctl.control(pipe, control), pytest.raises(UnsupportedModelError, match="by two scales"):
        variants.run(pipe, kwargs)


def test_a_rescaled_sum_of_three_is_refused() -> None:
    pipe, kwargs = variants.build("pix2pix")
    with (
        attnctl.control(pipe, PAG(sites="self", combine="rescale_safe")),
        pytest.raises(ConfigError, match="one guidance scale"),
    ):
        variants.run(pipe, kwargs)


def test_pictures_share_within_each_of_three_rows() -> None:
    assert Rows.thirds(6, 0).groups == (slice(0, 2), slice(2, 4), slice(4, 6))
    pipe, kwargs = variants.build("pix2pix")
    two = kwargs | {"num_images_per_prompt": 2}
    plain = variants.run(pipe, two)
    with attnctl.control(pipe, ShareAttention(start=0.0)):
        shared = variants.run(pipe, two)
    assert distance(shared[0], plain[0]) < 1e-5 < distance(shared[1], plain[1])  # the first gives, the second takes


def test_arguments_are_cut_by_rows_where_rows_are_lists() -> None:
    """A tensor in a list may be as long as there are rows: 2 x 2 tokens of a picture."""
    pictures: list[list[Any]] = [[torch.zeros(2, 2, 3), None], [torch.ones(2, 2, 3), None]]
    bound = {"x": [[torch.zeros(1)], [torch.ones(1)]], "siglip_feats": pictures, "image_noise_mask": [[0, 1], [0, 1]]}
    taken = take_rows(bound, slice(1, 2), 2)
    assert len(taken["siglip_feats"]) == len(taken["image_noise_mask"]) == 1
    assert torch.equal(taken["siglip_feats"][0][0], pictures[1][0])


def test_words_of_several_captions_are_refused() -> None:
    pipe, kwargs = encoded.build("zimage_omni_edit")
    with (
        attnctl.control(pipe, Capture(words=(1,))),
        pytest.raises(UnsupportedModelError, match="nothing tells image from text"),
    ):
        encoded.run(pipe, kwargs)


def test_words_are_recorded_where_attention_runs_row_by_row() -> None:
    """Mochi attends with one row after the other, each with its own text."""
    model, inputs = zoo.build("mochi", 2)
    control = Capture(words=(1, 3))

    def maps(rows: list[int]) -> torch.Tensor:
        with attnctl.control(model, control, layout="cond") as handle:
            handle.set_step(0, 1, 500.0)
            zoo.call(model, zoo.take(inputs, rows))
            return torch.cat([layer.flatten(1) for layer in handle.result(control).layers.values()], dim=1)

    together = maps([0, 1])
    assert distance(together, torch.cat([maps([0]), maps([1])])) < 1e-5
    assert distance(together[0], together[1]) > 1e-3
    pipe, kwargs = hosts.build("mochi")
    found, first = [], Capture(words=(1, 3), stop=0.3)
    for scale in (1.0, 4.0):  # at the first step the prompt's row is the same, alone and beside the negative prompt's
        with attnctl.control(pipe, first) as handle:
            hosts.run(pipe, kwargs | {"guidance_scale": scale})
            found.append(next(iter(handle.result(first).values())))
    assert distance(*found) < 1e-5


def test_a_pipeline_that_steps_with_copies_of_its_scheduler_is_refused_by_name() -> None:
    pipe, kwargs = hosts.build("skyreels2_forcing")
    with (
        attnctl.control(pipe, PAG(sites="self")),
        pytest.raises(UnsupportedModelError, match=r"copies of pipe\.scheduler.*SkyReelsV2Pipeline"),
    ):
        hosts.run(pipe, kwargs)
