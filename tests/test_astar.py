"""A-STAR and Attend-and-Excite as controls: retention, layouts, refinement, other losses, records, bad input."""

from __future__ import annotations

import itertools
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo_pipelines as pipes
from latent_runs import PROMPT, SITE, WORDS, controlled, sd
from torch import Tensor

import attnctl
from attnctl.core.hosts.words import find_words
from attnctl.data.specs import control_from_dict, control_to_dict, parse_control
from attnctl.errors import ConfigError
from attnctl.processors import AStar, AttendExcite, LatentGuidance
from attnctl.processors.latent import engine as engine
from attnctl.processors.latent.astar import layout_masks
from attnctl.processors.latent.losses import binarise, focus, retention, segregation, total_variation


def spied(control: LatentGuidance, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Run under a control; return loss and maps of every guidance forward."""
    seen: list[tuple[Tensor, Tensor]] = []
    compute = engine._Update.gradient

    def spy(self: Any, z: Tensor) -> Any:
        loss, grad, maps = compute(self, z)
        seen.append((loss, maps))
        return loss, grad, maps

    pipe, kwargs = sd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Update, "gradient", spy)
        controlled(pipe, kwargs, control, **options)
    return seen


def test_retention_compares_with_the_step_before() -> None:
    seen = spied(AStar(concepts=WORDS, sites=SITE, step_size=5.0, seg=2.0, ret=3.0))
    assert len(seen) == 4
    torch.testing.assert_close(seen[0][0], 2 * segregation(seen[0][1]))
    for (_, before), (loss, maps) in itertools.pairwise(seen):
        torch.testing.assert_close(loss, 2 * segregation(maps) + 3 * retention(maps, binarise(before)))


def test_a_layout_takes_the_place_of_the_step_before() -> None:
    left = np.zeros((32, 24), bool)
    left[:, :12] = True
    seen = spied(AStar(concepts=WORDS, sites=SITE, step_size=5.0, seg=0.0, masks=(left, ~left)))
    want = torch.zeros(1, 2, 8, 6)
    want[:, 0, :, :3], want[:, 1, :, 3:] = 1, 1
    for loss, maps in seen:
        torch.testing.assert_close(loss, retention(maps, want))
    seen = spied(AStar(concepts=WORDS, sites=SITE, step_size=5.0, seg=0.0, masks=(left, None)))
    torch.testing.assert_close(seen[0][0], retention(seen[0][1][:, :1], want[:, :1]))
    free = retention(seen[1][1][:, 1:], binarise(seen[0][1])[:, 1:])
    torch.testing.assert_close(seen[1][0], retention(seen[1][1][:, :1], want[:, :1]) + free)


def test_a_small_step_lowers_the_loss() -> None:
    before, after = spied(
        AStar(concepts=WORDS, sites=SITE, ret=0.0, step_size=0.05, grad_transform="l2", iterations=2, stop=0.1)
    )
    assert after[0] < before[0]
    worst, better = spied(
        AttendExcite(concepts=WORDS, sites=SITE, step_size=0.1, thresholds=(), iterations=2, stop=0.1)
    )
    assert better[0] < worst[0]


@pytest.mark.parametrize(
    "options", [{"map_norm": "minmax"}, {"map_norm": "ae"}, {"binarise": "otsu"}, {"smoothing": 0}]
)
def test_variants_run_and_differ(options: dict[str, Any]) -> None:
    pipe, kwargs = sd()
    base = {"concepts": WORDS, "sites": SITE}
    out = controlled(pipe, kwargs, AStar(**base | options))
    assert out.isfinite().all()
    assert not torch.equal(out, controlled(pipe, kwargs, AStar(**base)))


def test_steps_have_their_length() -> None:
    pipe, kwargs = sd()
    moves: list[Tensor] = []
    before = engine._Update.run

    def spy(self: Any, z: Tensor) -> Tensor:
        out = before(self, z)
        moves.append(out - z)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Update, "run", spy)
        base = {"concepts": WORDS, "sites": SITE, "step_size": 2.0}
        controlled(pipe, kwargs, AStar(**base, grad_transform="l2", schedule="constant"))
        assert [m.norm().item() for m in moves] == pytest.approx([2.0] * 4, rel=1e-4)
        moves.clear()
        controlled(pipe, kwargs, AStar(**base, grad_transform="sign"))
        assert [m.abs().max().item() for m in moves] == pytest.approx(
            [2 * (1 - i / 6) ** 0.5 for i in range(4)], rel=1e-3
        )


def test_one_concept_is_said_and_runs() -> None:
    with pytest.warns(UserWarning, match="nothing to segregate; only retention"):
        control = AStar(concepts=("bear",), sites=SITE)
    pipe, kwargs = sd()
    assert not torch.equal(controlled(pipe, kwargs, control), pipes.run(pipe, kwargs, num_inference_steps=4))
    with pytest.warns(UserWarning, match="does nothing"):
        control = AStar(concepts=("bear",), sites=SITE, ret=0.0)
    assert torch.equal(controlled(pipe, kwargs, control), pipes.run(pipe, kwargs, num_inference_steps=4))


def test_refinement_stops_at_its_level_and_at_its_most() -> None:
    options = {"concepts": WORDS, "sites": SITE, "stop": 0.2}
    # A level that the first maps reach already: one forward. One that nothing reaches: all updates.
    assert len(spied(AttendExcite(**options, thresholds=((0.0, 0.0),)))) == 1
    seen = spied(AttendExcite(**options, thresholds=((0.0, 1.0),), refine_steps=3))
    assert len(seen) == 4
    assert not any(s[0].le(0) for s in seen)


def test_thresholds_fall_on_the_published_steps() -> None:
    from attnctl.core.call import CallState

    control = AttendExcite(concepts=WORDS)
    levels = {i: control.level(CallState(step=i, steps=50)) for i in range(50)}
    assert {i: level for i, level in levels.items() if level is not None} == pytest.approx({0: 0.95, 10: 0.5, 20: 0.2})
    assert [i for i in range(50) if control.acts(CallState(step=i, steps=50))] == list(range(25))


def test_other_losses_plug_in() -> None:
    class Focus(LatentGuidance, abstract=True):
        """Guide by two losses that have no control of their own."""

        def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
            """Add them."""
            return focus(maps, (0, 1)) - total_variation(maps).amin(1)

    seen = spied(Focus(concepts=WORDS, sites=SITE, step_size=1.0))
    assert len(seen) == 4
    assert seen[0][0].isfinite().all()


def test_two_guidances_act_in_order() -> None:
    pipe, kwargs = sd()
    a = AStar(concepts=WORDS, sites=SITE)
    b = AttendExcite(concepts=WORDS, sites="mid", refine_steps=0)
    with attnctl.control(pipe, a, b) as handle:
        both = pipes.run(pipe, kwargs, num_inference_steps=4)
        assert handle.guidance_forwards == 6
    assert not torch.equal(both, controlled(pipe, kwargs, a))


def test_each_prompt_may_have_concepts_of_its_own() -> None:
    pipe, kwargs = sd(torch.float64, batch=2)
    prompts, words = [PROMPT, "two birds and a cat"], (WORDS, ("birds", "cat"))
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = controlled(pipe, kwargs | {"prompt": prompts}, AStar(concepts=words, sites=SITE), latents=noise)
    for i, prompt in enumerate(prompts):
        single = kwargs | {"prompt": prompt, "negative_prompt": "ugly"}
        one = controlled(pipe, single, AStar(concepts=words[i], sites=SITE), latents=noise[i : i + 1])
        assert (both[i] - one[0]).norm() <= 1e-10 * one.norm()
    with attnctl.control(pipe, AStar(concepts=(*words, WORDS))), pytest.raises(ConfigError, match="there are 2"):
        pipes.run(pipe, kwargs | {"prompt": prompts})


@pytest.mark.parametrize("refined", [False, True])
@torch.no_grad()
def test_attend_excite_equals_the_pipeline_of_diffusers(refined: bool) -> None:
    pipe, kwargs = sd()
    kwargs |= {"height": 32, "width": 32}
    thresholds = {0: 0.4, 2: 0.5} if refined else {}
    size = 0.5 if refined else 20.0  # twenty steps of the published size would amplify rounding errors
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs = diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    places = [c.positions[0] for c in find_words(pipe, PROMPT, WORDS)]
    processors = dict(pipe.unet.attn_processors)
    want = pipes.run(
        theirs,
        kwargs,
        num_inference_steps=4,
        token_indices=places,
        attn_res=(4, 4),
        max_iter_to_alter=3,
        thresholds=thresholds,
        scale_factor=size,
    )
    pipe.unet.set_attn_processor(processors)
    fractions = tuple((i / 4, least) for i, least in thresholds.items())
    control = AttendExcite(concepts=tuple(places), stop=0.75, thresholds=fractions, step_size=size)
    with attnctl.control(pipe, control) as handle:
        out = pipes.run(pipe, kwargs, num_inference_steps=4)
        assert (handle.guidance_forwards > 3) == refined
    assert (out - want).norm() <= 1e-5 * want.norm()
    assert (out - pipes.run(pipe, kwargs, num_inference_steps=4)).norm() > 1e-3 * want.norm()


def test_masks_are_resampled_by_area() -> None:
    fine = torch.zeros(8, 12)
    fine[2, :] = 1  # a bar of one row: half of row 1 at half the size
    assert layout_masks([tuple(map(tuple, fine.tolist()))], 4, 6)[0].sum(1).tolist() == [0, 6, 0, 0]
    dot = torch.zeros(16, 16)
    dot[5, 9] = 1  # smaller than half a token: it keeps the one that it lies in
    mask = layout_masks([tuple(map(tuple, dot.tolist()))], 4, 4)[0]
    assert mask.sum() == 1
    assert mask[1, 2] == 1


def test_controls_survive_records_and_the_command_line() -> None:
    controls = (
        AStar(concepts=("cat", 5), masks=(np.eye(3), None), binarise="otsu"),
        AttendExcite(concepts=("cat", "dog"), thresholds=((0.0, 0.1),)),
    )
    for control in controls:
        again = control_from_dict(json.loads(json.dumps(control_to_dict(control))))
        assert again == control
        assert hash(again) == hash(control)
    assert "masks=(3x3, None)" in controls[0].describe()
    assert parse_control('AStar(concepts=("cat", "dog"), seg=2.0)') == AStar(concepts=("cat", "dog"), seg=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ()}, "give words of the prompt"),
        ({"concepts": "cat"}, "give words of the prompt"),
        ({"concepts": ("cat", "cat")}, "given twice"),
        ({"concepts": ("cat", 1.5)}, "neither a word"),
        ({"concepts": (("cat", "dog"), ("cat",))}, "equally many"),
        ({"concepts": ((("cat",),),)}, "equally many"),
        ({"step_size": -1.0}, "step_size=-1.0 is out of range"),
        ({"step_size": float("nan")}, "out of range"),
        ({"seg": -1}, "seg=-1 is out of range"),
        ({"map_norm": "softmax"}, "map_norm='softmax' is unknown"),
        ({"grad_transform": "adam"}, "unknown"),
        ({"iterations": 0}, "iterations=0"),
        ({"binarise": 1.5}, "binarise=1.5 is out of range"),
        ({"binarise": "median"}, "unknown"),
        ({"masks": (np.ones((2, 2)),)}, "1 masks were given for 2 concepts"),
        ({"masks": (np.zeros((2, 2)), None)}, "mask 0 is empty"),
        ({"masks": (None, np.ones(4))}, "mask 1 has shape"),
        ({"masks": (None, np.ones((0, 4)))}, "mask 1 has shape"),
        ({"masks": (None, 2 * np.ones((2, 2)))}, "values from 0 to 1"),
        ({"masks": (None, [[float("nan"), 1]])}, "values from 0 to 1"),
        ({"masks": (None, [[1, 0], [1]])}, "not an array"),
        ({"masks": 3}, "give one mask a concept"),
    ],
)
def test_bad_fields(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AStar(**{"concepts": ("cat", "dog")} | options)


@pytest.mark.parametrize("thresholds", [((0.0, 2.0),), (0.5,), "high", ((0.0, 0.1, 0.2),)])
def test_bad_thresholds(thresholds: Any) -> None:
    with pytest.raises(ConfigError, match="thresholds"):
        AttendExcite(concepts=("cat", "dog"), thresholds=thresholds)


def test_a_word_missing_from_one_prompt_of_a_batch_is_named() -> None:
    pipe, kwargs = sd(batch=2)
    prompts = {"prompt": [PROMPT, "the water"]}
    with attnctl.control(pipe, AStar(concepts=WORDS)), pytest.raises(ConfigError, match="'bear' is not in the prompt"):
        pipes.run(pipe, kwargs | prompts)
