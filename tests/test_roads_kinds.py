"""Kinds of attention as a call shows them: what no name tells."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import distance, perturbed
from torch import Tensor, nn

import attnctl
from attnctl.core.control import Control
from attnctl.core.hosts.kinds import image_lengths, shown_kind, text_lengths
from attnctl.core.sites import KINDS
from attnctl.errors import AttnctlError, NeverApplied, SiteError, UnsupportedModelError
from attnctl.processors import PAG, SEG, Capture, SoftPAG

R = torch.randn
Host = tuple[nn.Module, dict[str, Any]]


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def filled(model: nn.Module) -> nn.Module:
    """Give weights that begin at zero values, so that every layer acts."""
    zoo.randomize(model, torch.Generator().manual_seed(0))
    return model.eval()


def ids(h: int, w: int) -> Tensor:
    made = torch.zeros(h * w, 3)
    made[:, 1] = torch.arange(h).repeat_interleave(w)
    made[:, 2] = torch.arange(w).repeat(h)
    return made


def packed(name: str, **config: Any) -> Callable[[], Host]:
    def build() -> Host:
        shape = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
        model = getattr(diffusers, name)(**shape, joint_attention_dim=32, **config)
        inputs = {
            "hidden_states": R(2, 24, 4),
            "encoder_hidden_states": R(2, 7, 32),
            "img_ids": ids(4, 6),
            "txt_ids": torch.zeros(7, 3),
            "timestep": torch.full((2,), 0.5),
        }
        return filled(model), inputs

    return build


def longcat() -> Host:
    model, inputs = packed(
        "LongCatImageTransformer2DModel", attention_head_dim=16, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]
    )()
    return model, {**inputs, "guidance": torch.full((2,), 3.5)}


def cogview3() -> Host:
    model = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    sizes = {"original_size": torch.full((2, 2), 64.0), "target_size": torch.full((2, 2), 64.0)}
    inputs = {"hidden_states": R(2, 4, 8, 12), "encoder_hidden_states": R(2, 8, 8), "timestep": torch.full((2,), 500)}
    return filled(model), {**inputs, **sizes, "crop_coords": torch.zeros(2, 2)}


def hidream() -> Host:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return filled(model), {
        "hidden_states": R(2, 4, 8, 8),
        "encoder_hidden_states_t5": R(2, 8, 8),
        "encoder_hidden_states_llama3": R(2, 2, 8, 4),
        "pooled_embeds": R(2, 8),
        "timesteps": torch.full((2,), 500),
    }


def omnigen() -> Host:
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=1000,
        in_channels=4,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )
    n = 8 + 1 + 24
    return filled(model), {
        "hidden_states": R(2, 4, 8, 12),
        "timestep": torch.rand(2),
        "input_ids": torch.randint(0, 10, (2, 8)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(2, n, n),
        "position_ids": torch.arange(n)[None].expand(2, n),
    }


MIXED: dict[str, Callable[[], Host]] = {
    "bria": packed(
        "BriaTransformer2DModel", attention_head_dim=8, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4]
    ),
    "ovis": packed("OvisImageTransformer2DModel", out_channels=4, attention_head_dim=16, axes_dims_rope=(4, 4, 8)),
    "longcat": longcat,
    "cogview3plus": cogview3,
    "hidream": hidream,
}


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every class for one that nobody has listed."""
    monkeypatch.setattr("attnctl.core.hosts.families._BY_CLASS", {})


@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize("name", MIXED)
def test_a_site_that_shows_text_is_no_self_attention(name: str) -> None:
    model, inputs = MIXED[name]()
    sites = [s for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    for site in sites:
        with (
            attnctl.control(model, PAG(sites=site.name), layout="cond"),
            pytest.raises(UnsupportedModelError, match=r"(?s)scope='image_block'.*image from text.*scope=\"all\""),
        ):
            model(**inputs)
        with attnctl.control(model, SoftPAG(u=0.5, sites=site.name), layout="cond") as handle:  # scope="all"
            plain_or_guided = model(**inputs)
            assert zoo.unpack(plain_or_guided).isfinite().all()
            assert [s.kind for s in handle.sites] == ["joint"]


@pytest.mark.usefixtures("unlisted")
def test_true_self_attention_of_an_unlisted_model_takes_every_scope() -> None:
    model = filled(
        diffusers.SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )
    inputs = {
        "hidden_states": R(2, 4, 2, 8, 12),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": R(2, 7, 16),
    }
    with attnctl.control(model, PAG(sites="blocks.1.attn1"), layout="cond") as handle:
        assert zoo.unpack(model(**inputs)).isfinite().all()
        assert [s.kind for s in handle.sites] == ["self"]


def test_kinds_by_counting() -> None:
    model = nn.Module()
    bound = {"hidden_states": R(2, 24, 4), "encoder_hidden_states": R(2, 7, 32), "txt_ids": torch.zeros(7, 3)}
    assert text_lengths(bound) == {7}
    assert image_lengths(model, bound) == {24, 4}
    assert shown_kind(model, bound, 24, 24, 24, None) == "self"
    assert shown_kind(model, bound, 31, 31, 24, 7) == "joint"
    assert shown_kind(model, bound, 31, 31, 31, None) == "joint"
    assert shown_kind(model, bound, 24, 31, 24, None) == "joint"  # keys of the text beside the image's own
    assert shown_kind(model, bound, 7, 7, 7, None) == "text"  # the text's own refiner
    assert shown_kind(model, bound, 24, 7, 24, 7) == "cross"
    assert shown_kind(model, bound, 24, 9, 24, None) == "aux"  # an image prompt
    assert shown_kind(model, bound, 37, 37, 37, None) is None  # image, text, and something else
    bound["encoder_hidden_states"] = R(2, 24, 32)  # text as long as the image: nothing is certain
    assert shown_kind(model, bound, 24, 24, 24, None) is None
    assert shown_kind(model, {"hidden_states": R(2, 24, 4)}, 25, 25, 25, None) == "self"  # no text came in at all


@dataclass(frozen=True, kw_only=True)
class _Through(Control):
    """Change nothing, everywhere."""

    kinds = KINDS

    def wrapper(self, sites: Any) -> Any:
        return lambda call, proceed: proceed(call)


def test_counts_give_no_unlisted_model_a_wrong_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = 0, []
    for name in zoo.HOSTS:
        model, inputs = zoo.build(name, zoo.HOSTS[name].rows or 2)
        with contextlib.suppress(UnsupportedModelError):
            listed = {s.name: s.kind for s in attnctl.find_sites(model)}
            with monkeypatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patch.setattr("attnctl.core.hosts.families._BY_CLASS", {})
                with attnctl.control(model, _Through(sites=list(listed)), layout="cond") as handle:
                    with contextlib.suppress(NeverApplied):  # a site that this call does not reach
                        model(**inputs)
                    shown = {s.name: s.kind for s in handle.sites if s.name in listed}
        for site, kind in shown.items():
            right += kind == listed[site]
            # A branch that the call does not reach keeps the kind of its name.
            if kind in ("self", "cross") and kind != listed[site] and "image_cond" not in site:
                wrong.append((name, site, kind, listed[site]))
    assert not wrong
    assert right >= 290


def gated() -> nn.Module:
    """Build a small UNet with grounding."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_type="gated",
        norm_num_groups=8,
    )
    filled(unet)
    return unet


def test_gligen_grounding_is_left_alone() -> None:
    unet = gated()
    sites = attnctl.find_sites(unet)
    assert {s.kind for s in sites if "fuser" in s.name} == {"aux"}
    chosen = PAG().resolve(sites, attnctl.core.hosts.families.family_of(unet))
    assert [s.name.rpartition(".")[2] for s in chosen] == ["attn1"] * len(chosen)
    with pytest.raises(SiteError, match="aux"):
        PAG(sites=next(s.name for s in sites if "fuser" in s.name)).resolve(
            sites, attnctl.core.hosts.families.family_of(unet)
        )


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("control", [PAG(scale=2.0), SEG(scale=2.0, sigma=2.0), SoftPAG(scale=2.0, u=0.6)])
def test_grounding_that_ends_within_a_run_changes_no_guidance(beta: float, control: Any) -> None:
    """As in GLIGEN's pipelines: from a share `beta` of the steps on the grounding layers do not run."""
    unet = gated().double()
    fusers = [m for name, m in unet.named_modules() if name.endswith(".fuser")]
    x, text = R(1, 4, 8, 8, dtype=torch.float64), R(1, 5, 32, dtype=torch.float64)
    grounding = {
        "boxes": torch.rand(1, 3, 4, dtype=torch.float64),
        "positive_embeddings": text[:, :3],
        "masks": torch.ones(1, 3, dtype=torch.float64),
    }

    def inputs(step: int) -> dict[str, Any]:
        for fuser in fusers:
            fuser.enabled = step < 4 * beta
        given = {"gligen": dict(grounding)}  # which the model takes apart
        return {
            "sample": x,
            "timestep": 900 - 200 * step,
            "encoder_hidden_states": text,
            "cross_attention_kwargs": given,
        }

    plain = [zoo.call(unet, inputs(i)) for i in range(4)]
    wanted = [c + 2.0 * (c - perturbed(unet, control, inputs(i))) for i, c in enumerate(plain)]
    with warnings.catch_warnings(), attnctl.control(unet, control, layout="cond") as handle:
        warnings.simplefilter("error")
        for i, want in enumerate(wanted):
            handle.set_step(i, 4)
            assert distance(zoo.call(unet, inputs(i)), want) <= 1e-12
    assert handle.passes == 4
    assert (wanted[0] - plain[0]).abs().max() > 1e-3


# Merged tokens ------------------------------------------------------------------------------------------------


def merged(unet: nn.Module) -> list[Any]:
    """Let the finest self-attention see every fourth token, as tomesd does with ratio 0.75."""
    undo = []
    for name, block in unet.named_modules():
        if type(block).__name__ == "BasicTransformerBlock" and name.startswith(("down_blocks.0", "up_blocks.1")):
            inner = block.attn1.forward

            def forward(x: Tensor, *args: Any, _inner: Any = inner, **kwargs: Any) -> Tensor:
                few = x[:, ::4]
                return _inner(few, *args, **kwargs).repeat_interleave(4, 1)[:, : x.shape[1]]

            block.attn1.forward = forward
            undo.append(block.attn1)
    assert undo
    return undo


@pytest.mark.parametrize(
    "control",
    [SEG(sites="down.0", sigma=2.0), Capture(points=((0.5, 0.5),), sites="down.0"), Capture(words=("cat",), refine=1)],
)
def test_merged_tokens_are_not_taken_for_a_coarser_grid(control: Any) -> None:
    pipe, kwargs = pipes.build("sd")
    merged(pipe.unet)
    try:
        with attnctl.control(pipe, control), pytest.raises(AttnctlError, match=r"lie on the image|grid"):
            pipes.run(pipe, kwargs, num_inference_steps=1)
        with attnctl.control(pipe, PAG(sites="down.0")):  # needs no grid
            pipes.run(pipe, kwargs, num_inference_steps=1)
    finally:
        for module in pipe.unet.modules():
            vars(module).pop("forward", None)
