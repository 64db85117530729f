"""Head sets as published: the labels of a paper address the heads that the paper counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from contract import perturbed

from attnctl import HeadSet
from attnctl.errors import SiteError
from attnctl.processors import SoftPAG

# Published lists: layer and head as the paper counts them ------------------------------------------------------

SD3_LISTS = ("L1H10", "L11H15", "L13H17", "L0H23", "L1H2,L1H10", "L0H15 L1H19", "L18H11 L0H17 L2H3", "L14H7 L14H17")
FLUX_LISTS = ("L51H23 L52H22", "L38H18 L43H17", "L34H0 L52H6")


@pytest.fixture(scope="module")
def sd3() -> Any:
    return zoo.build("sd3", num_layers=24, num_attention_heads=24, attention_head_dim=4, caption_projection_dim=96)


@pytest.fixture(scope="module")
def flux() -> Any:
    config = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 4}
    return zoo.build("flux", **config, axes_dims_rope=(0, 2, 2))


@pytest.mark.parametrize(("name", "labels"), [*(("sd3", t) for t in SD3_LISTS), *(("flux", t) for t in FLUX_LISTS)])
def test_published_lists_address_the_right_heads(
    name: str, labels: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, inputs = request.getfixturevalue(name)
    layers = {"sd3": 24, "flux": 57}[name]
    HeadSet.from_labels(labels, layers=layers, u=1.0, scale=3.0).save_pretrained(tmp_path)
    heads = HeadSet.from_pretrained(tmp_path)
    got = perturbed(model, SoftPAG(heads=heads, u=1.0), inputs)

    wanted: dict[str, list[int]] = {}
    for layer, head in heads.pairs:
        assert isinstance(layer, int)
        block = f"transformer_blocks.{layer}.attn"
        if name == "flux" and layer >= 19:
            block = f"single_transformer_blocks.{layer - 19}.attn"
        wanted.setdefault(block, []).append(head)
    # By hand: SDPA is replaced by v in these heads, in the calls of these modules alone.
    expected = _by_hand(model, inputs, wanted)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((got - zoo.call(model, inputs)).abs().max()) > 1e-6


def _by_hand(model: Any, inputs: dict[str, Any], wanted: dict[str, list[int]]) -> torch.Tensor:
    real, current = torch.nn.functional.scaled_dot_product_attention, []

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        out = real(query, key, value, *args, **more)
        heads = current[-1] if current else []
        return torch.stack([value[:, h] if h in heads else out[:, h] for h in range(out.shape[1])], 1)

    handles = []
    for module_name, heads in wanted.items():
        module = model.get_submodule(module_name)
        handles.append(module.register_forward_pre_hook(lambda m, a, heads=heads: current.append(heads)))
        handles.append(module.register_forward_hook(lambda m, a, out: current.clear()))
    torch.nn.functional.scaled_dot_product_attention = sdpa
    try:
        return zoo.call(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("text", ["", "L1", "1H2", "L1H10;L-1H2", "L1H10 L1H10", "layer 1"])
def test_bad_labels(text: str) -> None:
    with pytest.raises(SiteError):
        HeadSet.from_labels(text)
