"""Kinds of attention, rows and noise as a run shows them: what no name tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl.core.control import Control
from attnctl.core.hosts.kinds import image_lengths, shown_kind, text_lengths
from attnctl.core.live import LiveControl
from attnctl.errors import AttnctlError, ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels import columns, sdpa
from attnctl.kernels.maps import key_columns
from attnctl.processors import PAG, SEG, AStar, Capture, EnhanceAVideo, PromptToPrompt, SoftPAG

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
    assert shown_kind(model, bound, 7, 7, 7, None) == "joint"  # the text's own refiner
    bound["encoder_hidden_states"] = R(2, 24, 32)  # text as long as the image: nothing is certain
    assert shown_kind(model, bound, 24, 24, 24, None) == "joint"
    assert shown_kind(model, {"hidden_states": R(2, 24, 4)}, 25, 25, 25, None) == "self"  # no text came in at all


def test_gligen_grounding_is_left_alone() -> None:
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
    sites = attnctl.find_sites(unet)
    assert {s.kind for s in sites if "fuser" in s.name} == {"aux"}
    chosen = PAG().resolve(sites, attnctl.core.hosts.families.family_of(unet))
    assert [s.name.rpartition(".")[2] for s in chosen] == ["attn1"] * len(chosen)
    with pytest.raises(SiteError, match="aux"):
        PAG(sites=next(s.name for s in sites if "fuser" in s.name)).resolve(
            sites, attnctl.core.hosts.families.family_of(unet)
        )


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


# Rows ---------------------------------------------------------------------------------------------------------


def test_free_noise_says_one_prompt_for_several_frames() -> None:
    pipe, kwargs = pipes.build("animatediff")
    vars(pipe)["motion_adapter"] = SimpleNamespace(config=SimpleNamespace(motion_max_seq_length=32))
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with attnctl.control(pipe, Capture(words=("cat",))) as handle:
        pipes.run(pipe, kwargs, num_inference_steps=1)
        assert handle.maps.prompts == ("a cat",)
        assert handle.maps["cat"].isfinite().all()


@pytest.mark.parametrize("control", [Capture(words=(1, 2)), AStar(concepts=(1, 2), sites="blocks.1.attn2")])
def test_one_prompts_embeddings_serve_several_videos(control: Any) -> None:
    pipe, kwargs = pipes.build("wan")
    call = {**kwargs, "num_videos_per_prompt": 2}
    plain = pipes.run(pipe, call, num_inference_steps=2)
    with attnctl.control(pipe, control) as handle:
        out = pipes.run(pipe, call, num_inference_steps=2)
        assert out.isfinite().all()
        if isinstance(control, Capture):
            assert torch.equal(out, plain)
            assert handle.maps.images == 2
        else:
            assert not torch.equal(out, plain)


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_a_video_in_a_batch_is_enhanced_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 4)
    model, inputs = zoo.build(name, 2, torch.float64)
    with attnctl.control(model, EnhanceAVideo(weight=20.0), layout="cond"):
        both = zoo.call(model, inputs)
        alone = torch.cat([zoo.call(model, zoo.take(inputs, [n])) for n in range(2)])
    assert (both - alone).abs().max() < 1e-10


def test_enhancement_beside_guidance_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "FRAMES", 4)
    pipe, kwargs = pipes.build("cogvideox", dtype=torch.float64)
    enhance = EnhanceAVideo(weight=20.0)
    outs = []
    for controls in ((enhance,), (enhance, SoftPAG(u=1e-12, sites="transformer_blocks.1"))):
        with attnctl.control(pipe, *controls):
            outs.append(pipes.run(pipe, kwargs, num_inference_steps=2))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


# Noise --------------------------------------------------------------------------------------------------------


def pair(scheduler: Any, **changes: Any) -> Tensor:
    pipe, kwargs = pipes.build("sd")
    pipe.scheduler = scheduler
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    prompts = {"prompt": ["a cat", "a cat"], "negative_prompt": ["ugly", "ugly"]}
    control = PromptToPrompt(
        source="a cat", target="a cat", equalizer={"cat": 1.0}, cross_replace=0.0, self_replace=0.0
    )
    with attnctl.control(pipe, control):
        return pipes.run(pipe, {**kwargs, **prompts, "latents": noise, **changes}, num_inference_steps=3)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.KDPM2AncestralDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.DDPMScheduler(),
        diffusers.LCMScheduler(),
        diffusers.TCDScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_scheduler_that_adds_noise_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=f"{type(scheduler).__name__} adds noise at its steps"):
        pair(scheduler)


@pytest.mark.parametrize("generator", [False, True])
def test_noise_that_only_the_call_asks_for_is_refused(generator: bool) -> None:
    drawn = {"generator": torch.Generator().manual_seed(1)} if generator else {}
    with pytest.raises(ConfigError, match="DDIMScheduler adds noise"):
        pair(diffusers.DDIMScheduler(), eta=1.0, **drawn)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler(), diffusers.DPMSolverMultistepScheduler()],
    ids=lambda s: type(s).__name__,
)
def test_the_same_prompt_twice_gives_the_same_picture(scheduler: Any) -> None:
    out = pair(scheduler)
    assert (out[0] - out[1]).abs().max() < 1e-5


# Maps from the kernel's own sums ------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts the products of attention: those of the fused kernel and those between batches of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.flops += 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
        elif name in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def wide_flux(dtype: torch.dtype = torch.float32) -> Host:
    """Build FLUX with its own proportions of image and text: eight image tokens to one of text."""
    model, inputs = zoo.build("flux", 1, dtype)
    h, w, text = 32, 32, 128
    width = inputs["hidden_states"].shape[-1]
    grid = torch.zeros(h * w, 3)
    grid[:, 1], grid[:, 2] = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    return model, {
        **inputs,
        "hidden_states": R(1, h * w, width, dtype=torch.float64).to(dtype),
        "encoder_hidden_states": R(1, text, inputs["encoder_hidden_states"].shape[-1], dtype=torch.float64).to(dtype),
        "img_ids": grid.to(inputs["img_ids"].dtype),
        "txt_ids": torch.zeros(text, 3, dtype=inputs["txt_ids"].dtype),
    }


def test_words_of_joint_attention_cost_little_more_than_none() -> None:
    model, inputs = wide_flux()
    with Count() as plain:
        want = zoo.call(model, inputs)
    capture = Capture(words=(3, 17, 40, 90))
    with attnctl.control(model, capture, layout="cond") as handle, Count() as counted:
        out = zoo.call(model, inputs)
    assert torch.equal(out, want)
    assert counted.flops <= 1.15 * plain.flops, counted.flops / plain.flops
    assert handle.maps.words == ("3", "17", "40", "90")
    # Every column made anew, in float64, gives the same maps.
    for site in (s for s in attnctl.find_sites(model) if s.kind == "joint"):
        with attnctl.control(model, _Reference(name=site.name), layout="cond") as reference:
            zoo.call(model, inputs)
        (live,) = [live for _, live in reference._watched[0].live]
        got = handle.maps.layers[site.name].reshape(4, -1)
        assert (got.double() - live.map).abs().max() <= 1e-5


@dataclass(frozen=True, kw_only=True)
class _Reference(Control):
    """Compute four columns of one site's map in float64, heads averaged."""

    name: str = ""

    def resolve(self, sites: Any, family: Any) -> Any:
        return tuple(s for s in sites if s.name == self.name)

    def attached(self, sites: Any, denoiser: Any, pipe: Any) -> LiveControl:
        return _Columns()


class _Columns(LiveControl):
    observes = True

    def wrap(self, call: Any, proceed: Any) -> Tensor:
        q, k = call.q.double(), call.k.double()
        whole = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        text = whole[0, :, call.image, call.text][..., [3, 17, 40, 90]]
        self.map = text.mean(0).T
        return proceed(call)


@pytest.mark.parametrize("mask", [None, "keys", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_from_the_kernels_sums(mask: str | None, dtype: torch.dtype) -> None:
    q, k, v = (R(2, 3, n, 24, dtype=torch.float64).to(dtype) for n in (150, 200, 200))
    given = None if mask is None else torch.rand(2, 1, 1 if mask == "keys" else 150, 200) > 0.3
    if mask == "rows":
        given[0, :, 7] = False  # a query that may look nowhere
    out, sums = sdpa.with_sums(q, k, v, mask=given)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given))
    assert sums is not None
    at = torch.tensor([5, 120, 199])
    weights = torch.eye(3)
    want = columns(
        q.double(),
        k.double(),
        torch.zeros(200, 3).index_fill_(0, at, 0).index_put_((at, torch.arange(3)), torch.ones(3)),
        mask=given,
    )
    cut = None if given is None else given[..., at]
    got = key_columns(q, k[:, :, at], weights, sums, mask=cut)
    assert (got.double() - want).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-3)
