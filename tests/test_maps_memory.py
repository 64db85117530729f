"""What word maps cost: the bytes of a formula, and no map of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from test_columns import Largest
from test_kernels import dense_map

import attnctl
from attnctl.core.hosts.families import family_of
from attnctl.processors import Capture


def test_memory_does_not_grow_with_the_steps_and_no_map_is_built() -> None:
    def kept(steps: int) -> int:
        pipe, kwargs = pipes.build("sd")
        with attnctl.control(pipe, Capture(words=("cat",))) as handle:
            pipes.run(pipe, kwargs, num_inference_steps=steps)
            (own,) = [own for w in handle._watched for _, own in w.live]
            return sum(p.numel() for layer in own.layers.values() for p in layer.parts)

    assert kept(1) == kept(6)


@pytest.mark.parametrize(
    ("options", "apart", "each"),
    [({}, 1, 4), ({"keep": ("heads",)}, 4, 4), ({"reduce": "none", "store": "float16"}, 3 * 4, 2)],
)
def test_the_bytes_are_those_of_the_formula(options: dict[str, Any], apart: int, each: int) -> None:
    pipe, kwargs = pipes.build("sd", batch=2)
    with attnctl.control(pipe, Capture(words=("a",), sites=("mid", "up.1"), **options)) as handle:
        pipes.run(pipe, kwargs | {"num_images_per_prompt": 2})
        ((_, own),) = handle._watched[0].live
        tokens = sum(grid[1] * grid[2] for grid in (layer.site.grid for layer in own.layers.values()))
        # images x words x steps and heads that are kept apart x tokens of all layers x bytes of a number
        assert own.bytes == 4 * 1 * apart * tokens * each
        assert own.bytes == sum(p.numel() * p.element_size() for layer in own.layers.values() for p in layer.parts)


def test_no_map_of_a_flux_sized_sequence_is_built() -> None:
    # FLUX at 1024 x 1024: 4096 image and 512 text tokens of 128 channels; one head of 24.
    n_image, n_text = 4096, 512
    model, _ = zoo.build("flux", 1)
    site = next(s for s in attnctl.find_sites(model) if s.kind == "joint")
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n_text + n_image, 128, generator=g) for _ in range(2))
    from attnctl.core.call import AttnCall, CallState, SiteHook
    from attnctl.core.hosts.tokens import parts_in
    from attnctl.core.hosts.words import Concept
    from attnctl.processors.capture.recorder import Recorder

    state = CallState(call=1, steps=1, denoiser=model, family=family_of(model))
    state.begin_call(model, replace(family_of(model), grid=lambda model, bound: (1, 64, 64), tokens=None), {"x": None})
    own = Recorder(Capture(words=(1,)), [site], None)
    own.labels, own.concepts = ("1",), [{"1": Concept("1", (1,))}]
    parts = parts_in(slice(n_text, n_text + n_image), slice(0, n_text))
    call = AttnCall(q, k, k, None, None, SiteHook(site, state), 0, parts, lambda *a, **k: q)
    with Largest() as seen:
        own.wrap(call, lambda call: call.q)
    assert seen.elements <= 2 * q.numel() < (n_text + n_image) * n_image // 8
    assert own.maps()["1"].shape == (1, 64, 64)
    some = dense_map(q[:, :, n_text : n_text + 64], k)[..., 1]
    assert (own.maps()["1"].reshape(-1)[:64] - some.reshape(-1)).abs().max() <= 1e-6
