"""Whole pipelines that insist on encoders of their own: of language models, of pictures, of sound.

Where a tiny encoder suffices, words go through it; where diffusers reads a language model of one kind layer by layer,
the pipeline is told its embeddings. What denoises is diffusers' own, unmodified.

Example:
    pipe, kwargs = encoded.build("longcat")
    latents = encoded.run(pipe, kwargs)
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import zoo
import zoo_host_pipelines as hosts
import zoo_pipelines as pipes
import zoo_variants as variants
from torch import Tensor, nn
from zoo_host_pipelines import IMAGE, PICTURE, VIDEO, bare, dynamic, flow, positive
from zoo_pipelines import Kwargs, Parts, Pipeline, Recipe, quiet
from zoo_variants import fresh

_RECIPES: dict[str, Recipe] = {}


def pipeline(host: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe under its function's name if the installed diffusers has the pipeline."""

    def register(function: Recipe) -> Recipe:
        if host in dir(diffusers):
            _RECIPES[function.__name__] = function
        return function

    return register


class Encoder(nn.Module):
    """The least language model: an embedding of tokens, and layers that scale it."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, width)
        self.layers = layers
        self.config = SimpleNamespace(model_type="tiny")

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights."""
        return self.table.weight.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.table.weight.device

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """Embed tokens [B, N]."""
        x = self.table(input_ids % 2000)
        states = tuple(x * (1 + i / 4) for i in range(self.layers))
        return _Encoded(last_hidden_state=states[-1], hidden_states=states)


class _Encoded(SimpleNamespace):
    """What an encoder returns, by name or by number."""

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state, self.hidden_states)[index]


class Processor:
    """Stand for what prepares words and pictures for a language model, in pipelines that are told its embeddings."""

    image_processor = SimpleNamespace(config=SimpleNamespace(merge_size=2), merge_size=2)
    tokenizer = SimpleNamespace(encode=lambda text: [9])

    def apply_chat_template(self, *messages: Any, **options: Any) -> list[list[int]]:
        """Return three tokens."""
        return [[1, 2, 3]]


def spoken(parts: Parts, width: int, **options: Any) -> Kwargs:
    """Build a tokenizer and the least encoder."""
    return {"tokenizer": parts.text()["tokenizer"], "text_encoder": fresh(parts, lambda: Encoder(width, **options))}


def told(pipe: Pipeline, **answers: Any) -> Pipeline:
    """Answer in place of some methods of one pipeline: an answer that can be called is."""
    for name, answer in answers.items():
        assert callable(getattr(pipe, name))
        object.__setattr__(pipe, name, answer)
    return pipe


def twice(first: Any, second: Any) -> Callable[..., Any]:
    """Answer the prompt, then the negative prompt, over and over."""
    calls = [0]

    def answer(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return first if calls[0] % 2 else second

    return answer


def said(parts: Parts, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw embeddings and their mask."""
    draw = zoo.Draw(1, parts.seed + 11 + seed)
    return draw.rows(zoo.TEXT, width).to(parts.dtype), torch.ones(1, zoo.TEXT, dtype=torch.long)


# Images


@pipeline("LongCatImagePipeline")
def longcat(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LongCat-Image: words between a template's, the result brought back to the prompt's length."""
    transformer = parts.denoiser("longcat_image", in_channels=64)
    pipe = bare("LongCatImagePipeline", transformer=transformer, scheduler=dynamic(), **spoken(parts, 32))
    pipe.tokenizer_max_length = 12
    return pipe, parts.prompts(enable_prompt_rewrite=False, **IMAGE)


@pipeline("LongCatImageEditPipeline")
def longcat_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LongCat-Image-Edit: tokens of the picture to change lie behind the image's."""
    transformer = parts.denoiser("longcat_image", in_channels=64)
    made = {"transformer": transformer, "scheduler": dynamic(), "text_processor": Processor()}
    pipe = bare("LongCatImageEditPipeline", vae=Shrinking(), **made)
    ids = torch.zeros(zoo.TEXT, 3)
    answer = twice((said(parts, 32)[0], ids), (said(parts, 32, 1)[0], ids))
    return told(pipe, encode_prompt=answer), {"image": PICTURE, "prompt": "a cat", "negative_prompt": "ugly"}


class Shrinking(hosts.Statistics):
    """Stand for an autoencoder where a pipeline brings every picture to a million pixels: 128 x 128 make a latent."""

    def __init__(self) -> None:
        super().__init__(16, block_out_channels=(8,) * 8, shift_factor=0.1)

    def encode(self, pixels: Tensor) -> Any:
        """Average pixels [B, 3, H, W]; all channels are means of the three."""
        latents = nn.functional.avg_pool2d(pixels, 128)
        return SimpleNamespace(latents=latents.repeat(1, 6, 1, 1)[:, :16])


@pipeline("BriaFiboPipeline")
def bria_fibo(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FIBO: every block has the text of one layer of the language model."""
    transformer: Any = parts.denoiser("bria_fibo")
    width = int(transformer.config.joint_attention_dim) // 2
    pipe = bare("BriaFiboPipeline", transformer=transformer, scheduler=flow(), **spoken(parts, width, layers=4))
    return pipe, parts.prompts(height=128, width=96)


@pipeline("Ideogram4Pipeline")
def ideogram4(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Ideogram 4: a denoiser for the prompt, and one without words."""
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    second = zoo.build("ideogram4", 1, parts.dtype, parts.seed + 1)[0]
    pipe = bare(
        "Ideogram4Pipeline", transformer=parts.denoiser("ideogram4"), unconditional_transformer=second,
        scheduler=flow(), vae=parts.finish(vae),
    )  # fmt: skip

    def encoded(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        places = pipe._prepare_ids([zoo.TEXT - 1], grid_h, grid_w, max_sequence_length, device)
        text = zoo.Draw(1, parts.seed).rows(max_sequence_length, 24)
        return torch.cat([text, torch.zeros(1, grid_h * grid_w, 24)], dim=1).to(parts.dtype), *places

    kwargs = {"guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": zoo.TEXT}
    return told(pipe, encode_prompt=encoded), kwargs | {"prompt": "a cat", "height": 32, "width": 24}


@pipeline("GlmImagePipeline")
def glm_image(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build GLM-Image: codes of another model as a prior."""
    pipe = bare(
        "GlmImagePipeline", transformer=parts.denoiser("glm_image"), scheduler=dynamic(), vae=parts.vae(),
        **spoken(parts, 16),
    )  # fmt: skip
    draw = zoo.Draw(1, parts.seed)
    kwargs = parts.embeds(16, prior_token_ids=draw.whole(64, 16 * 12 // 4), height=32, width=24)
    return pipe, kwargs | {"guidance_scale": 3.0}


@pipeline("GlmImagePipeline")
def glm_image_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build GLM-Image with a reference, whose keys are kept and read at every step."""
    pipe: Any
    pipe, kwargs = glm_image(parts)
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    draw = zoo.Draw(1, parts.seed + 4)
    ids, grids = [draw.whole(64, 16 * 12 // 4)[0]], [torch.tensor([[1, 8, 6]])]
    picture = PICTURE.resize((24, 32))
    return pipe, kwargs | {"image": [picture], "prior_token_image_ids": ids, "source_image_grid_thw": grids}


@pipeline("JoyImageEditPipeline")
def joyimage(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build JoyImage-Edit: the picture to change as an item in front of the image."""
    pipe = bare("JoyImageEditPipeline", transformer=parts.denoiser("joyimage"), scheduler=flow(),
                vae=_wan_vae(parts))  # fmt: skip
    (text, mask), (other, rest) = said(parts, 16), said(parts, 16, 1)
    kwargs = {"prompt_embeds": text, "prompt_embeds_mask": mask}
    kwargs |= {"negative_prompt_embeds": other, "negative_prompt_embeds_mask": rest}
    processor = SimpleNamespace(get_default_height_width=lambda *_: (128, 96),
                                resize_center_crop=lambda image, size: image.resize((size[1], size[0])))  # fmt: skip
    pipe.vae_image_processor = processor  # diffusers' own brings every picture to a million pixels
    return pipe, kwargs | {"image": PICTURE, "height": 128, "width": 96}


@pipeline("JoyImageEditPlusPipeline")
def joyimage_plus(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build JoyImage-Edit Plus: pictures as patches behind those of the image."""
    pipe = bare("JoyImageEditPlusPipeline", transformer=parts.denoiser("joyimage_plus"), scheduler=flow(),
                vae=_wan_vae(parts))  # fmt: skip
    pipe.image_processor = SimpleNamespace(
        get_default_height_width=lambda *_: (128, 96),
        preprocess=diffusers.image_processor.VaeImageProcessor().preprocess,
        resize_center_crop=lambda image, size: image.resize((size[1], size[0])),
    )  # fmt: skip
    answer = twice(said(parts, 16), said(parts, 16, 1))
    kwargs = {"images": [PICTURE], "prompt": "a cat", "height": 128, "width": 96}
    return told(pipe, encode_prompt_multiple_images=answer), kwargs


def _wan_vae(parts: Parts) -> Any:
    return hosts._wan_vae(parts, 4)


@pipeline("DreamLitePipeline")
def dreamlite(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DreamLite: an empty picture beside the image."""
    pipe = _dreamlite(parts, "DreamLitePipeline")
    texts = torch.cat([said(parts, 32, 1)[0], said(parts, 32)[0]])
    masks = torch.ones(2, zoo.TEXT, dtype=torch.long)
    return told(pipe, encode_prompt=lambda **_: (texts, masks)), {"prompt": "a cat", "height": 32, "width": 24}


@pipeline("DreamLitePipeline")
def dreamlite_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DreamLite's edit: three rows, with neither, with the picture, with picture and text."""
    pipe = _dreamlite(parts, "DreamLitePipeline")
    texts = torch.cat([said(parts, 32, 1)[0]] * 2 + [said(parts, 32)[0]])
    masks = torch.ones(3, zoo.TEXT, dtype=torch.long)
    kwargs = {"prompt": "a cat", "image": PICTURE, "height": 32, "width": 24}
    return told(pipe, encode_prompt=lambda **_: (texts, masks)), kwargs


@pipeline("DreamLiteMobilePipeline")
def dreamlite_mobile(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DreamLite's distilled form: one row."""
    pipe = _dreamlite(parts, "DreamLiteMobilePipeline")
    return told(pipe, encode_prompt=lambda **_: said(parts, 32)), {"prompt": "a cat", "height": 32, "width": 24}


def _dreamlite(parts: Parts, host: str) -> Pipeline:
    vae = fresh(
        parts,
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    )  # fmt: skip
    return bare(host, unet=parts.denoiser("dreamlite"), scheduler=dynamic(), vae=vae, **spoken(parts, 32))


class Coarse(hosts.Statistics):
    """Stand for the autoencoder of Qwen-Image where a pipeline insists on 640 x 640 pixels: 32 x 32 make a latent."""

    def __init__(self) -> None:
        super().__init__(4, z_dim=4, temperal_downsample=[False] * 5)
        self.config.latents_mean, self.config.latents_std = [0.0] * 4, [1.0] * 4

    def encode(self, pixels: Tensor) -> Any:
        """Average pixels [B, C, F, H, W]."""
        latents = nn.functional.avg_pool3d(pixels[:, :3], (1, 32, 32))
        return SimpleNamespace(latents=torch.cat([latents, latents.mean(1, keepdim=True)], dim=1))

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Return three channels of latents [B, C, F, H, W]."""
        return (latents[:, :3],)


@pipeline("QwenImageLayeredPipeline")
def qwen_layered(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image Layered: a picture is cut into layers, which are generated together."""
    transformer = parts.denoiser("qwen", use_additional_t_cond=True, use_layer3d_rope=True)
    pipe = bare(
        "QwenImageLayeredPipeline", transformer=transformer, scheduler=dynamic(), vae=Coarse(),
        **spoken(parts, 16),
    )  # fmt: skip
    kwargs = parts.embeds(16, mask="prompt_embeds_mask", true_cfg_scale=4.0)
    return pipe, kwargs | {"image": PICTURE, "prompt": "a cat", "layers": 2, "output_type": "pt"}


@pipeline("QwenImage21Pipeline")
def qwen21(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image 2.1: keys of the text are kept at the first step, and read at the others."""
    pipe, kwargs = qwen21_uncached(parts)
    return pipe, kwargs | {"use_kv_cache": True}


@pipeline("QwenImage21Pipeline")
def qwen21_uncached(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image 2.1, every step with the text's own attention."""
    made = {"transformer": parts.denoiser("qwen21"), "scheduler": dynamic(), "processor": Processor()}
    pipe = bare("QwenImage21Pipeline", **made)
    kwargs = parts.embeds(16, mask="prompt_embeds_mask", true_cfg_scale=4.0, use_kv_cache=False)
    return pipe, kwargs | {"height": 128, "width": 96}


@pipeline("ZImageOmniPipeline")
def zimage_omni(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Z-Image Omni without a picture: the prompt as one part of a list."""
    pipe = _zimage_omni(parts)
    return pipe, parts.prompts(height=32, width=32, max_sequence_length=60)


@pipeline("ZImageOmniPipeline")
def zimage_omni_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Z-Image Omni with a picture: its latents and its tokens of a second encoder in the sequence."""
    pipe = _zimage_omni(parts)
    seen = zoo.Draw(1, parts.seed + 6).normal(2, 2, 12).to(parts.dtype)
    latents = zoo.Draw(1, parts.seed + 7).normal(4, 1, 16, 16).to(parts.dtype)
    told(
        pipe,
        prepare_siglip_embeds=lambda images, batch_size, device, dtype: [[seen for _ in images]] * batch_size,
        prepare_image_latents=lambda images, batch_size, device, dtype: [[latents for _ in images]] * batch_size,
    )
    kwargs = parts.prompts(height=32, width=32, max_sequence_length=60)
    return pipe, kwargs | {"image": [PICTURE.resize((64, 64))]}


def _zimage_omni(parts: Parts) -> Pipeline:
    transformer = parts.denoiser("zimage", siglip_feat_dim=12)
    vae = parts.vae()
    vae.register_to_config(shift_factor=0.1)
    return bare("ZImageOmniPipeline", transformer=transformer, scheduler=dynamic(), vae=vae, **spoken(parts, 16))


@pipeline("FluxPriorReduxPipeline")
def flux_redux(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 under Redux: tokens of a picture behind those of an empty prompt."""
    pipe, kwargs = pipes.flux(parts)
    draw = zoo.Draw(1, parts.seed + 5)
    empty, seen = torch.zeros(1, zoo.TEXT, 32), draw.rows(5, 32)
    return pipe, kwargs | {"prompt_embeds": torch.cat([empty, seen], dim=1).to(parts.dtype)}


@pipeline("OmniGenPipeline")
def omnigen_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build OmniGen with a picture: three rows, with text and picture, with neither, with the picture alone."""
    pipe, kwargs = variants.omnigen(parts)
    return pipe, kwargs | {"prompt": "<img><|image_1|></img> a cat", "input_images": [PICTURE]}


# Videos


@pipeline("ConsisIDPipeline")
def consisid(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build ConsisID: the picture as channels, the face in attention of its own."""
    transformer = parts.denoiser("consisid", in_channels=8)
    pipe = bare(
        "ConsisIDPipeline", transformer=transformer, scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=variants._cog_vae(parts),
    )  # fmt: skip
    draw = zoo.Draw(2, parts.seed + 3)
    face = {"id_vit_hidden": [draw.rows(2, 2).to(parts.dtype)], "id_cond": draw.rows(2).to(parts.dtype)}
    return pipe, parts.embeds(32, image=PICTURE) | VIDEO | face


@pipeline("HunyuanVideoFramepackPipeline")
def framepack(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FramePack: window after window, each with tokens of the past, from a picture."""
    with torch.random.fork_rng(devices=[]):
        vae = hosts._hunyuan_vae(parts)
    pipe = bare("HunyuanVideoFramepackPipeline", transformer=parts.denoiser("framepack"), scheduler=dynamic(), vae=vae)
    seen = zoo.Draw(1, parts.seed + 3).rows(5, 16).to(parts.dtype)
    kwargs = hosts.masked(parts, 16, pooled=8, true_cfg_scale=4.0, height=32, width=64, num_frames=9)
    kwargs |= {"image": PICTURE.resize((64, 32)), "latent_window_size": 3}
    return told(pipe, encode_image=lambda *_, **__: seen), kwargs


@pipeline("Cosmos3OmniPipeline")
def cosmos3(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Cosmos 3: words and video in one sequence without a batch, of unequal length for the negative prompt."""
    tokenizer = parts.text()["tokenizer"]
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=parts.denoiser("cosmos3"), text_tokenizer=tokenizer, vae=hosts._wan_vae(parts, 2),
        scheduler=scheduler, enable_safety_checker=False,
    )  # fmt: skip
    ids = [i % 32 for i in range(3, 3 + zoo.TEXT)], [i % 32 for i in range(9, 8 + zoo.TEXT)]
    return told(pipe, tokenize_prompt=lambda *_, **__: ids), {"prompt": "a cat", **VIDEO}


@pipeline("SanaWMPipeline")
def sana_wm(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Sana's world model: a camera's path, a first frame that stays."""
    transformer = parts.denoiser("sana_wm", chunk_plucker_channels=48)
    draw = zoo.Draw(1, parts.seed + 3)
    vae = hosts.Statistics(4, spatial_compression_ratio=8, temporal_compression_ratio=8)
    pipe = bare("SanaWMPipeline", transformer=transformer, scheduler=flow(), vae=vae)
    first = draw.normal(1, 4, 1, 6, 4).to(parts.dtype)
    told(pipe, _encode_first_frame=lambda *_: first)
    kwargs = hosts.masked(parts, 16)
    kwargs |= {n: x[:, None] for n, x in kwargs.items() if n.endswith("embeds")}
    camera = {"c2w": np.eye(4, dtype=np.float32)[None].repeat(17, 0), "intrinsics": [50.0, 50.0, 16.0, 24.0]}
    return pipe, kwargs | camera | {"image": PICTURE, "prompt": "", "height": 48, "width": 32, "num_frames": 17}


# Sound


@pipeline("LongCatAudioDiTPipeline")
def longcat_audio(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LongCat's speech."""
    vae = hosts.Statistics(8, sample_rate=16, downsampling_ratio=2)
    pipe = bare("LongCatAudioDiTPipeline", transformer=parts.denoiser("longcat_audio"), vae=vae, **spoken(parts, 32))
    return pipe, parts.prompts(audio_duration_s=2.0)


@pipeline("StableAudio3Pipeline")
def stable_audio3(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Audio 3."""
    vae = hosts.Statistics(8, sampling_rate=8, downsampling_ratio=2, latent_dim=8)
    transformer = parts.denoiser("stable_audio3", global_cond_dim=16)
    length = zoo.Draw(1, parts.seed + 3).rows(16).to(parts.dtype)
    pipe = bare("StableAudio3Pipeline", transformer=transformer, vae=vae, scheduler=flow(), **spoken(parts, 16))
    kwargs = positive(parts.embeds(16)) | {"negative_prompt_embeds": said(parts, 16, 1)[0]}
    return told(pipe, encode_duration=lambda *_: length), kwargs | {"duration": 4.0, "guidance_scale": 4.0}


@pipeline("AceStepPipeline")
def ace_step(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build ACE-Step: music, guided by momentum and projection."""
    vae = hosts.Statistics(8, sampling_rate=8, downsampling_ratios=(2,))
    conditions = Conditions(zoo.Draw(1, parts.seed + 3).rows(zoo.TEXT, 32).to(parts.dtype))
    pipe = bare(
        "AceStepPipeline", transformer=parts.denoiser("ace_step"), vae=vae, scheduler=flow(num_train_timesteps=1),
        condition_encoder=conditions, **spoken(parts, 32),
    )  # fmt: skip
    return told(pipe, encode_prompt=lambda *_, **__: (None,) * 4), {"prompt": "a cat", "audio_duration": 8.0}


class Conditions(nn.Module):
    """Stand for the encoder of ACE-Step's conditions: one text, whatever is asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        self.text = text
        self.silence_latent = torch.zeros(1, 256, 8)
        self.null_condition_emb = torch.zeros(1, 1, 32)

    def forward(self, **conditions: Any) -> tuple[Tensor, None]:
        """Return the text."""
        return self.text, None


NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Pipeline, Kwargs]:
    """Build one pipeline for one prompt, with the keyword arguments of one call."""
    pipe, kwargs = _RECIPES[name](Parts(batch=1, dtype=dtype, seed=seed))
    return quiet(pipe), kwargs


def run(pipe: Pipeline, kwargs: Kwargs, steps: int = 3) -> Tensor:
    """Run a pipeline from a fixed seed and return what it makes, latents where it can."""
    return hosts.run(pipe, kwargs, steps)
