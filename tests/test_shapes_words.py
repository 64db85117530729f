"""What the video model is taught before it sees videos: motion words, and what a caption lets expect."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from attnctl.shapes.data import encode_captions, to_tensor
from attnctl.shapes.motion import Motion, render_clip, sample_clip
from attnctl.shapes.training import clips as world
from attnctl.shapes.training.expected import Expected, make_expected
from attnctl.shapes.training.export import put_lineage
from attnctl.shapes.training.options import load_base
from attnctl.shapes.training.words import motion_code, teach_motion


@pytest.fixture(scope="module")
def base():
    return load_base(None)


def test_opposite_motions_have_opposite_codes() -> None:
    left, right = (motion_code(Motion(d, "fast")) for d in ("left", "right"))
    assert left == (-1, 0, 1, 0)
    assert right == (1, 0, 1, 0)
    assert motion_code(Motion("still")) == (0, 0, 0, 1)
    assert motion_code(Motion("up")) == (0, -1, 0, 0)


def test_taught_words_reach_every_later_token_and_leave_still_captions(base) -> None:
    taught = copy.deepcopy(base.text_encoder).requires_grad_(True)
    early = teach_motion(copy.deepcopy(taught), base.tokenizer, steps=1, batch=32)
    late = teach_motion(taught, base.tokenizer, steps=150, batch=32)
    assert late < early / 2
    assert all(p.grad is None for p in taught.parameters()), "no gradient is left for the training that follows"
    ids = encode_captions(
        base.tokenizer, [f"a red circle{m} on gray" for m in ("", " moving left fast", " moving right fast")]
    )
    with torch.no_grad():
        before, after = base.text_encoder(ids)[0], taught(ids)[0]
    apart = [(h[1] - h[2]).norm(dim=-1) for h in (before, after)]
    assert apart[1][6:].min() > 4 > 2 * apart[0][8:].max()  # from "fast" on; at "left" they differed before
    assert torch.equal(apart[1][:5], torch.zeros(5))  # a causal encoder has not heard it yet
    assert (after[0] - before[0]).norm(dim=-1).mean() < 2


@pytest.fixture(scope="module")
def expected(base) -> Expected:
    return make_expected(base.vae, frames=16, kinds=(("red", "circle", "black"), ("blue", "square", "brown")))


def test_places_follow_the_motion_and_add_up_to_one(expected: Expected) -> None:
    assert torch.allclose(expected.places.sum((-2, -1)), torch.ones(expected.places.shape[:2]), atol=1e-4)
    axis = torch.arange(13.0)
    across = (expected.places.sum(-2) * axis).sum(-1)  # mean x of each motion and frame
    for motion, x in zip(expected.motions, across, strict=True):
        way = motion_code(motion)[0]
        steps = x.diff()
        assert (steps * way > 0.1).all() if way else steps.abs().max() < 1e-3


def test_the_expected_clip_is_the_mean_of_real_ones(base, expected: Expected) -> None:
    means, captions = expected.draw(torch.Generator().manual_seed(0), 8, torch.tensor([0, 15]))
    assert means.shape == (8, 2, 4, 16, 16)
    i = next(i for i, c in enumerate(captions) if "moving" in c and c.split()[5] in ("slow", "fast"))
    color, shape, _, way, pace = captions[i].split()[1:6]
    rng, found = np.random.default_rng(0), []
    while len(found) < 48:
        clip = sample_clip(rng, Motion(way, pace))
        thing = clip.scene.things[0]
        scene = type(clip.scene)((type(thing)(shape, color, thing.x, thing.y, thing.size),), captions[i].split()[-1])
        found.append(render_clip(type(clip)(scene, clip.velocities))[[0, 15]])
    with torch.no_grad():
        z = base.vae.encode(to_tensor(np.concatenate(found))).latent_dist.mean.unflatten(0, (-1, 2))
    real = z.mean(0)
    assert (real - means[i]).square().mean() < 0.1 * z.var(0).mean()


def test_a_share_of_a_batch_learns_what_to_expect(base, expected: Expected) -> None:
    unet = world.with_motion(base.unet, world.build_adapter(base.unet))
    data = world.Clips(torch.zeros(2, 16, 4, 16, 16).half(), [["a red circle moving left fast on black"] * 3] * 2)
    seen: list[torch.Tensor] = []
    motions = world.Motions(
        unet,
        base.text_encoder,
        base.tokenizer,
        data,
        batch=4,
        frames=2,
        expected=expected,
        expect=[(0, 0.5)],
        bf16=False,
    )
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    assert motions(torch.Generator().manual_seed(0), 0).isfinite()
    assert (seen[0][:2] == 999).all()
    assert len(set(seen[0][2:].tolist())) == 2


def test_kept_knowledge_costs_nothing_until_the_model_moves(base) -> None:
    unet = world.with_motion(base.unet, world.build_adapter(base.unet))
    still = [["a red circle on black"] * 3]
    data = world.Clips(torch.randn(1, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), still)
    told = {"batch": 1, "bf16": False}
    kept = world.Motions(unet, base.text_encoder, base.tokenizer, data, keep=True, **told)
    plain = world.Motions(unet, base.text_encoder, base.tokenizer, data, **told)
    seed = next(s for s in range(20) if _told_in_full(s))
    assert kept(torch.Generator().manual_seed(seed), 0) < 1e-8  # its own prediction is the target
    assert plain(torch.Generator().manual_seed(seed), 0) > 1e-4
    with torch.no_grad():
        unet.conv_out.weight.add_(0.01)
    assert kept(torch.Generator().manual_seed(seed), 0) > 1e-6


def _told_in_full(seed: int) -> bool:
    """Tell whether the one caption of a batch drawn from this seed is not left out."""
    generator = torch.Generator().manual_seed(seed)
    world.Clips(torch.zeros(1), [["a"]]).draw(generator, 1)
    torch.rand(2, generator=generator)  # the frames
    return int(torch.multinomial(torch.tensor(world.TOLD), 1, replacement=True, generator=generator)) < 3


def test_a_run_remembers_the_runs_that_it_goes_back_to(tmp_path) -> None:
    for name, start in (("a", None), ("b", "a"), ("c", "b")):
        checkpoint = tmp_path / name / "checkpoint"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": ord(name), "history": [{"run": name}]}))
        put_lineage(tmp_path / name, start and tmp_path / start)
    assert not (tmp_path / "a" / "before.json").exists()
    before = json.loads((tmp_path / "c" / "before.json").read_text())
    assert [(run["step"], run["history"][0]["run"]) for run in before] == [(97, "a"), (98, "b")]
