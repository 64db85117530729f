"""Latent guidance by losses that also ask how image tokens attend to each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from latent_runs import PROMPT, SITE, WORDS, sd
from torch import Tensor

import attnctl
from attnctl.core.hosts.words import find_words
from attnctl.errors import SiteError, UnsupportedModelError
from attnctl.processors import LatentGuidance
from attnctl.processors.capture.refine import partners
from attnctl.processors.latent import engine as engine
from attnctl.processors.latent.losses import binarise, self_cross


class SelfCross(LatentGuidance, abstract=True):
    """Self-Cross guidance, arXiv 2411.18936."""

    needs_self_attention = True

    def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
        """Measure how far the tokens of one concept look where another is."""
        return self_cross(maps, binarise(maps, "otsu"), memory["self_attention"])


def control(**options: Any) -> SelfCross:
    """Make one whose maps are plain probabilities."""
    return SelfCross(
        **{"concepts": WORDS, "sites": "up.1", "step_size": 5.0, "map_norm": "none", "smoothing": 0} | options
    )


def heads(x: Tensor, module: Any) -> Tensor:
    """Part channels into heads: [B, N, C] -> [B, H, N, D]."""
    return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Write a map out and average its heads: [B, Nq, Nk]."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def cross_and_self(twin: Any, places: list[list[int]]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Watch attn1 and attn2 of up_blocks.1: lists that fill with maps [B, N, C] and looks [B, N, N], and the hooks."""
    maps: list[Tensor] = []
    looks: list[Tensor] = []
    hooks = []
    for name, module in twin.named_modules():
        if not name.startswith("up_blocks.1.") or not name.endswith(("attn1", "attn2")):
            continue

        def note(module: Any, args: Any, kwargs: Any, own: bool = name.endswith("attn1")) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = x if own else kwargs["encoder_hidden_states"]
            probs = probabilities(heads(module.to_q(x), module), heads(module.to_k(y), module))
            if own:
                looks.append(probs)
            else:
                maps.append(torch.stack([probs[..., at].mean(-1) for at in places], -1))

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    return maps, looks, hooks


def test_loss_and_gradient_equal_those_of_maps_written_out() -> None:
    pipe, kwargs = sd(torch.float64)
    twin = copy.deepcopy(pipe.unet)
    maps, looks, _ = cross_and_self(twin, [list(c.positions) for c in find_words(pipe, PROMPT, WORDS)])
    compute, checked = engine._Update.gradient, []

    def compare(self: Any, z: Tensor) -> Any:
        loss, grad, found = compute(self, z)
        maps.clear()
        looks.clear()
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()  # DDIM does not scale
            twin(**{**self.bound, "sample": leaf})
            assert len(maps) == len(looks) >= 2
            words = (sum(maps) / len(maps)).transpose(1, 2).unflatten(-1, found.shape[-2:])
            want = self_cross(words, binarise(words, "otsu"), sum(looks) / len(looks))
            (want_grad,) = torch.autograd.grad(want.sum(), leaf)
        torch.testing.assert_close(loss, want.detach())
        assert (grad - want_grad).norm() <= 1e-9 * want_grad.norm()
        assert "self_attention" not in self.memory
        checked.append(grad)
        return loss, grad, found

    before = snapshot(pipe.unet, pipe.scheduler)
    plain = pipes.run(pipe, kwargs, num_inference_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Update, "gradient", compare)
        with attnctl.control(pipe, control()):
            out = pipes.run(pipe, kwargs, num_inference_steps=2)
    assert len(checked) == 2
    assert not torch.equal(out, plain)
    assert_clean(before, pipe.unet, pipe.scheduler)


def test_early_exit_and_checkpointing_change_nothing() -> None:
    pipe, kwargs = sd()
    found = []
    for options in ({}, {"early_exit": False}, {"checkpoint": True}):
        with attnctl.control(pipe, control(**options)):
            found.append(pipes.run(pipe, kwargs, num_inference_steps=2))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_joint_attention_gives_the_images_part_with_rows_that_sum_to_one() -> None:
    pipe, kwargs = pipes.build("sd3", torch.float64)
    twin, seen, wanted = copy.deepcopy(pipe.transformer), [], []

    class Noting(SelfCross):
        def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
            seen.append(memory["self_attention"].detach())
            return super().loss(maps, memory)

    def note(module: Any, args: Any, call: Any) -> None:
        x = call["hidden_states"]
        wanted.append(probabilities(heads(module.to_q(x), module), heads(module.to_k(x), module)).detach())

    twin.transformer_blocks[1].attn.register_forward_pre_hook(note, with_kwargs=True)
    compute = engine._Update.gradient

    def compare(self: Any, z: Tensor) -> Any:
        with torch.no_grad():
            twin(**{**self.bound, "hidden_states": z})
        return compute(self, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Update, "gradient", compare)
        with attnctl.control(pipe, Noting(concepts=(1, 3), sites="transformer_blocks.1")):
            pipes.run(pipe, kwargs, num_inference_steps=2)
    assert len(seen) == len(wanted) == 2
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


def test_grids_and_blocks_that_do_not_fit_are_refused() -> None:
    pipe, kwargs = sd()
    with (
        attnctl.control(pipe, control(sites=["mid", SITE])),
        pytest.raises(UnsupportedModelError, match=r"layers of one grid.*these have 4 x 3, 8 x 6"),
    ):
        pipes.run(pipe, kwargs)
    cross = [s for s in attnctl.find_sites(pipe.unet) if s.kind == "cross"]
    with pytest.raises(SiteError, match=r"^SelfCross: .*no self-attention before it, which its loss asks for"):
        partners(cross, cross, "SelfCross")
