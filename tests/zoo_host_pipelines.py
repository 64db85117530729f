"""Whole, unmodified diffusers pipelines around the tiny denoisers of `zoo_hosts`, one for each class that has one.

Most take prompt embeddings and return latents, so that no text encoder and no autoencoder is built; those that read
pictures or words have tiny ones of their own. `zoo_pipelines` has the pipelines that the contract is tested on.

Example:
    pipe, kwargs = hosts.build("wan_vace")
    latents = hosts.run(pipe, kwargs)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import torch
import zoo
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from zoo_pipelines import Kwargs, Parts, Pipeline, quiet

Recipe = Callable[[Parts], tuple[Pipeline, Kwargs]]

IMAGE = {"height": 128, "width": 96}  # 16 x 12 latents, 8 x 6 tokens
VIDEO = {"height": 96, "width": 64, "num_frames": 4 * (zoo.FRAMES - 1) + 1}

_RECIPES: dict[str, Recipe] = {}


def pipeline(host: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe under its function's name if the installed diffusers has the pipeline."""

    def register(function: Recipe) -> Recipe:
        if host in dir(diffusers):
            _RECIPES[function.__name__] = function
        return function

    return register


def bare(host: str, **components: Any) -> Pipeline:
    """Build a pipeline of some components; None stands for each other one that must be named."""
    cls = getattr(diffusers, host)
    needed = [p.name for p in inspect.signature(cls.__init__).parameters.values() if p.default is p.empty]
    return cls(**dict.fromkeys(n for n in needed if n not in ("self", "args", "kwargs")) | components)


def flow(**config: Any) -> Any:
    """Build the scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def dynamic() -> Any:
    """Build the scheduler of flow matching whose shift depends on the size."""
    return flow(use_dynamic_shifting=True)


def positive(kwargs: Kwargs) -> Kwargs:
    """Leave out what belongs to a negative prompt."""
    return {k: v for k, v in kwargs.items() if not k.startswith("negative_")}


def masked(parts: Parts, dim: int, name: str = "prompt_attention_mask", **kwargs: Any) -> Kwargs:
    """Ask with embeddings and a mask of them, positive and negative."""
    return parts.embeds(dim, mask=name, **kwargs)


def several(parts: Parts, *kinds: tuple[str, str, int], **kwargs: Any) -> Kwargs:
    """Ask with several embeddings: pairs (name of the embeddings, name of their mask or "", channels)."""
    made: Kwargs = {}
    for name, mask, dim in kinds:
        draw = zoo.Draw(parts.batch, parts.seed + 1 + len(made))
        for sign in ("", "negative_"):
            made[f"{sign}{name}"] = draw.rows(zoo.TEXT, dim)
            if mask:
                made[f"{sign}{mask}"] = torch.ones(parts.batch, zoo.TEXT, dtype=torch.long)
    return zoo.cast(made, parts.dtype) | kwargs


# Images


@pipeline("BriaPipeline")
def bria(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Bria 3."""
    pipe = bare("BriaPipeline", transformer=parts.denoiser("bria"), scheduler=flow(), vae=parts.vae())
    return pipe, parts.embeds(32, **IMAGE)


@pipeline("OvisImagePipeline")
def ovis(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Ovis-Image."""
    pipe = bare("OvisImagePipeline", transformer=parts.denoiser("ovis"), scheduler=dynamic())
    return pipe, parts.embeds(32, **IMAGE) | {"negative_prompt": None}


@pipeline("ChromaPipeline")
def chroma(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Chroma."""
    pipe = bare("ChromaPipeline", transformer=parts.denoiser("chroma"), scheduler=flow())
    kwargs = masked(parts, 32, **IMAGE)
    return pipe, kwargs | {n: m.bool() for n, m in kwargs.items() if n.endswith("attention_mask")}


@pipeline("Flux2KleinPipeline")
def flux2_klein(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.2 Klein: guidance with a negative prompt in a call of its own."""
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    pipe = bare("Flux2KleinPipeline", transformer=parts.denoiser("flux2"), scheduler=dynamic(), vae=parts.finish(vae))
    return pipe, parts.embeds(32, height=32, width=24)


@pipeline("HunyuanImagePipeline")
def hunyuan_image(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanImage 2.1, guided by a guider object."""
    guider = diffusers.AdaptiveProjectedMixGuidance()
    pipe = bare("HunyuanImagePipeline", transformer=parts.denoiser("hunyuan_image"), scheduler=flow(), guider=guider)
    kinds = (("prompt_embeds", "prompt_embeds_mask", 16), ("prompt_embeds_2", "prompt_embeds_mask_2", 12))
    return pipe, several(parts, *kinds, height=256, width=192)


@pipeline("CogView3PlusPipeline")
def cogview3plus(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogView 3+."""
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = bare("CogView3PlusPipeline", transformer=parts.denoiser("cogview3plus"), scheduler=scheduler)
    return pipe, parts.embeds(16, **IMAGE)


@pipeline("CogView4Pipeline")
def cogview4(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogView 4."""
    pipe = bare("CogView4Pipeline", transformer=parts.denoiser("cogview4"), scheduler=dynamic())
    return pipe, parts.embeds(16, **IMAGE)


@pipeline("ErnieImagePipeline")
def ernie_image(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build ERNIE-Image: texts as a list, each of its own length."""
    pipe = bare("ErnieImagePipeline", transformer=parts.denoiser("ernie_image"), scheduler=flow(), vae=parts.vae())
    draw = zoo.Draw(1, parts.seed)
    texts = {n: [draw.normal(zoo.TEXT - i, 16).to(parts.dtype)] for i, n in enumerate(_SIGNED)}
    return pipe, texts | {"height": 128, "width": 96, "use_pe": False}


_SIGNED = ("prompt_embeds", "negative_prompt_embeds")


@pipeline("HiDreamImagePipeline")
def hidream(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HiDream: embeddings of T5, and of several layers of Llama."""
    pipe = bare("HiDreamImagePipeline", transformer=parts.denoiser("hidream"), scheduler=flow())
    draw = zoo.Draw(parts.batch, parts.seed + 1)
    made: Kwargs = {}
    for sign in ("", "negative_"):
        made[f"{sign}prompt_embeds_t5"] = draw.rows(8, 8)
        made[f"{sign}prompt_embeds_llama3"] = draw.normal(4, parts.batch, zoo.TEXT, 4)
        made[f"{sign}pooled_prompt_embeds"] = draw.rows(8)
    pipe.default_sample_size = 16  # latents are brought to the area of this many
    return pipe, zoo.cast(made, parts.dtype) | IMAGE


@pipeline("Krea2Pipeline")
def krea2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Krea 2: embeddings of several layers of the encoder."""
    pipe = bare("Krea2Pipeline", transformer=parts.denoiser("krea2"), scheduler=dynamic())
    draw = zoo.Draw(parts.batch, parts.seed + 1)
    made = {n: draw.rows(zoo.TEXT, 3, 16).to(parts.dtype) for n in _SIGNED}
    masks = {f"{n}_mask": torch.ones(parts.batch, zoo.TEXT, dtype=torch.bool) for n in _SIGNED}
    return pipe, made | masks | IMAGE


@pipeline("NucleusMoEImagePipeline")
def nucleus(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Nucleus-Image."""
    pipe = bare("NucleusMoEImagePipeline", transformer=parts.denoiser("nucleus"), scheduler=dynamic())
    return pipe, masked(parts, 16, "prompt_embeds_mask", **IMAGE)


@pipeline("PRXPipeline")
def prx(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build PRX."""
    pipe = bare("PRXPipeline", transformer=parts.denoiser("prx"), scheduler=flow())
    kwargs = masked(parts, 16, use_resolution_binning=False, **IMAGE)
    kwargs |= {n: m.bool() for n, m in kwargs.items() if n.endswith("attention_mask")}
    return pipe, kwargs | {"negative_prompt": None}


@pipeline("LuminaPipeline")
def lumina_next(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Lumina-Next."""
    pipe = bare("LuminaPipeline", transformer=parts.denoiser("lumina_next", learn_sigma=True), scheduler=flow())
    return pipe, masked(parts, 32, **IMAGE)


@pipeline("Lumina2Pipeline")
def lumina2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Lumina 2."""
    pipe = bare("Lumina2Pipeline", transformer=parts.denoiser("lumina2"), scheduler=dynamic())
    return pipe, masked(parts, 8, **IMAGE)


@pipeline("AuraFlowPipeline")
def auraflow(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build AuraFlow."""
    pipe = bare("AuraFlowPipeline", transformer=parts.denoiser("auraflow"), scheduler=flow(), vae=parts.vae())
    return pipe, masked(parts, 32, height=32, width=24)


@pipeline("ZImagePipeline")
def zimage(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Z-Image: the prompt before the negative prompt."""
    pipe = bare("ZImagePipeline", transformer=parts.denoiser("zimage"), scheduler=dynamic())
    draw = zoo.Draw(1, parts.seed)
    return pipe, {n: [draw.normal(zoo.TEXT, 16).to(parts.dtype)] for n in _SIGNED} | IMAGE


@pipeline("BriaFibo2Pipeline")
def bria_fibo2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FIBO 2: embeddings of two layers."""
    pipe = bare("BriaFibo2Pipeline", transformer=parts.denoiser("bria_fibo2"), scheduler=dynamic())
    draw = zoo.Draw(parts.batch, parts.seed + 1)
    made = {n: draw.rows(2, zoo.TEXT, 16).to(parts.dtype) for n in _SIGNED}
    masks = {f"{n}_mask": torch.ones(parts.batch, zoo.TEXT, dtype=torch.bool) for n in _SIGNED}
    return pipe, made | masks | {"height": 256, "width": 192}


@pipeline("KolorsPipeline")
def kolors(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kolors: SDXL with the encoder of a language model."""
    unet = parts.denoiser("sdxl", encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    pipe = bare("KolorsPipeline", unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), vae=parts.vae())
    return pipe, parts.embeds(24, pooled=32, height=32, width=24)


@pipeline("IFPipeline")
def deepfloyd(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DeepFloyd IF: pixels, and a UNet that predicts variances too."""
    unet = parts.denoiser("sd15", in_channels=3, out_channels=6)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True)
    pipe = bare("IFPipeline", unet=unet, scheduler=scheduler, requires_safety_checker=False)
    return pipe, parts.embeds(32, height=16, width=12) | {"output_type": "pt"}


@pipeline("KandinskyV22Pipeline")
def kandinsky22(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build the decoder of Kandinsky 2.2: an image embedding instead of a prompt."""
    config = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    unet = parts.denoiser("sd15", out_channels=8, **config)
    with torch.random.fork_rng(devices=[]):
        movq = diffusers.VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                 up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
                                 num_vq_embeddings=12, vq_embed_dim=4)  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    pipe = bare("KandinskyV22Pipeline", unet=unet, scheduler=scheduler, movq=parts.finish(movq))
    draw = zoo.Draw(parts.batch, parts.seed + 1)
    embeds = {n: draw.rows(16).to(parts.dtype) for n in ("image_embeds", "negative_image_embeds")}
    return pipe, embeds | {"height": 64, "width": 48}


@pipeline("Kandinsky3Pipeline")
def kandinsky3(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 3."""
    pipe = bare("Kandinsky3Pipeline", unet=parts.denoiser("kandinsky3"), scheduler=diffusers.DDPMScheduler())
    kwargs = parts.embeds(16, height=128, width=96)
    masks = {
        n: torch.ones(parts.batch, zoo.TEXT, dtype=torch.long) for n in ("attention_mask", "negative_attention_mask")
    }
    return pipe, kwargs | masks


@pipeline("StableCascadePriorPipeline")
def stable_cascade_prior(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Cascade's first stage: its denoiser is named `prior`."""
    prior = parts.denoiser("stable_cascade")
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipe = bare(
        "StableCascadePriorPipeline", prior=prior, scheduler=scheduler, resolution_multiple=16.0, **parts.text()
    )
    kwargs = parts.embeds(16)
    draw = zoo.Draw(parts.batch, parts.seed + 2)
    pooled = {n: draw.rows(1, 12).to(parts.dtype) for n in ("prompt_embeds_pooled", "negative_prompt_embeds_pooled")}
    return pipe, kwargs | pooled | {"height": 128, "width": 96, "output_type": "pt"}


@pipeline("StableCascadeDecoderPipeline")
def stable_cascade_decoder(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Cascade's second stage: its denoiser is named `decoder`."""
    decoder = parts.denoiser(
        "stable_cascade", effnet_in_channels=4, clip_text_in_channels=None, clip_image_in_channels=None
    )
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipe = bare("StableCascadeDecoderPipeline", decoder=decoder, scheduler=scheduler, latent_dim_scale=1.0)
    draw = zoo.Draw(parts.batch, parts.seed + 2)
    kwargs = {"image_embeddings": draw.rows(4, 8, 6), "guidance_scale": 2.0}
    kwargs |= {n: draw.rows(zoo.TEXT, 16) for n in _SIGNED}
    kwargs |= {f"{n}_pooled": draw.rows(1, 12) for n in _SIGNED}
    return pipe, zoo.cast(kwargs, parts.dtype)


@pipeline("DiTPipeline")
def dit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DiT: classes instead of prompts."""
    transformer = parts.denoiser("dit", num_embeds_ada_norm=1000)  # class 1000 stands for none
    pipe = bare("DiTPipeline", transformer=transformer, scheduler=diffusers.DDIMScheduler(), vae=parts.vae())
    return pipe, {"class_labels": [1] * parts.batch, "output_type": "pt"}


@pipeline("DDPMPipeline")
def ddpm(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DDPM: no prompt at all."""
    pipe = bare("DDPMPipeline", unet=parts.denoiser("unet2d"), scheduler=diffusers.DDPMScheduler())
    return pipe, {"batch_size": parts.batch, "output_type": "pt"}


@pipeline("DDIMPipeline")
def ddim(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DDIM: no prompt at all."""
    pipe = bare("DDIMPipeline", unet=parts.denoiser("unet2d"), scheduler=diffusers.DDIMScheduler())
    return pipe, {"batch_size": parts.batch, "output_type": "pt"}


# Images made of images


def _flux_image(parts: Parts, host: str, in_channels: int = 16, **components: Any) -> Pipeline:
    transformer = parts.denoiser("flux", in_channels=in_channels, out_channels=16)
    vae = parts.vae()
    vae.register_to_config(shift_factor=0.1)
    return bare(host, transformer=transformer, scheduler=dynamic(), vae=vae, **components)


@pipeline("FluxKontextPipeline")
def flux_kontext(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 Kontext: tokens of the picture to change lie behind the image's."""
    kwargs = parts.embeds(32, pooled=32, height=32, width=24, true_cfg_scale=4.0)
    picture = parts.picture(1, 3, 32, 24)
    return _flux_image(parts, "FluxKontextPipeline"), kwargs | {
        "image": picture, "max_area": 32 * 24, "_auto_resize": False,
    }  # fmt: skip


@pipeline("FluxFillPipeline")
def flux_fill(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 Fill: the mask and the picture as channels."""
    kwargs = positive(parts.embeds(32, pooled=32, height=32, width=24))
    mask = torch.zeros(1, 1, 32, 24, dtype=parts.dtype)
    mask[..., :12] = 1
    pipe = _flux_image(parts, "FluxFillPipeline", 16 + 16 + 16)
    return pipe, kwargs | {"image": parts.picture(1, 3, 32, 24), "mask_image": mask}


@pipeline("FluxControlPipeline")
def flux_control(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 Control: the control picture as channels."""
    kwargs = positive(parts.embeds(32, pooled=32, height=32, width=24))
    return _flux_image(parts, "FluxControlPipeline", 32), kwargs | {"control_image": parts.picture(1, 3, 32, 24)}


@pipeline("FluxControlNetPipeline")
def flux_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 under a ControlNet."""
    pipe = _flux_image(parts, "FluxControlNetPipeline", controlnet=None)
    with torch.random.fork_rng(devices=[]):
        config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_") and k != "out_channels"}
        net = diffusers.FluxControlNetModel(**config | {"num_layers": 1, "num_single_layers": 1})
    pipe.register_modules(controlnet=parts.finish(net))
    kwargs = parts.embeds(32, pooled=32, height=32, width=24, true_cfg_scale=4.0)
    return pipe, kwargs | {"control_image": parts.picture(1, 3, 32, 24)}


# Videos


@pipeline("SkyReelsV2Pipeline")
def skyreels2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SkyReels V2."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = bare("SkyReelsV2Pipeline", transformer=parts.denoiser("skyreels2"), scheduler=scheduler)
    return pipe, parts.embeds(16, **VIDEO)


@pipeline("SkyReelsV2DiffusionForcingPipeline")
def skyreels2_forcing(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SkyReels V2 by diffusion forcing: every frame has a time of its own."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = bare("SkyReelsV2DiffusionForcingPipeline", transformer=parts.denoiser("skyreels2"), scheduler=scheduler)
    return pipe, parts.embeds(16, prompt=None, base_num_frames=9, ar_step=0, **VIDEO)


@pipeline("WanVACEPipeline")
def wan_vace(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Wan VACE: a video and a mask beside the latents."""
    vae = _wan_vae(parts, 4)
    transformer = parts.denoiser("wan_vace", vace_in_channels=2 * 4 + 64)
    pipe = bare("WanVACEPipeline", transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, parts.embeds(16, **VIDEO)


def _wan_vae(parts: Parts, channels: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
        )  # fmt: skip
    return parts.finish(vae)


@pipeline("AnyFlowPipeline")
def anyflow(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build AnyFlow."""
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipe = bare("AnyFlowPipeline", transformer=parts.denoiser("anyflow"), scheduler=scheduler)
    return pipe, parts.embeds(16, guidance_scale=4.0, **VIDEO)


@pipeline("SanaVideoPipeline")
def sana_video(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Sana-Video."""
    pipe = bare("SanaVideoPipeline", transformer=parts.denoiser("sana_video"), scheduler=flow())
    kwargs = masked(parts, 16, frames=9, height=96, width=64, use_resolution_binning=False)
    return pipe, kwargs | {"negative_prompt": None}


@pipeline("Kandinsky5T2VPipeline")
def kandinsky5(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 5."""
    pipe = bare(
        "Kandinsky5T2VPipeline", transformer=parts.denoiser("kandinsky5"), scheduler=flow(), vae=_hunyuan_vae(parts)
    )
    kwargs: Kwargs = {}
    draw = zoo.Draw(parts.batch, parts.seed + 1)
    for sign in ("", "negative_"):
        kwargs[f"{sign}prompt_embeds_qwen"] = draw.rows(zoo.TEXT, 16)
        kwargs[f"{sign}prompt_embeds_clip"] = draw.rows(8)
        kwargs[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, zoo.TEXT], dtype=torch.int32)
    return pipe, zoo.cast(kwargs, parts.dtype) | VIDEO


def _hunyuan_vae(parts: Parts) -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLHunyuanVideo(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        )  # fmt: skip
    return parts.finish(vae)


@pipeline("HunyuanVideoPipeline")
def hunyuanvideo(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanVideo with true guidance: a call for the prompt, then one for the negative prompt."""
    pipe = bare("HunyuanVideoPipeline", transformer=parts.denoiser("hunyuanvideo"), scheduler=flow())
    return pipe, masked(parts, 16, pooled=8, true_cfg_scale=4.0, height=48, width=32, num_frames=9)


@pipeline("HunyuanVideo15Pipeline")
def hunyuan15(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanVideo 1.5, guided by a guider object."""
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    transformer = parts.denoiser("hunyuan15", in_channels=9)
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1,
            spatial_compression_ratio=4, temporal_compression_ratio=4,
        )  # fmt: skip
    pipe = bare(
        "HunyuanVideo15Pipeline", transformer=transformer, scheduler=flow(), guider=guider, vae=parts.finish(vae)
    )
    kinds = (("prompt_embeds", "prompt_embeds_mask", 16), ("prompt_embeds_2", "prompt_embeds_mask_2", 8))
    return pipe, several(parts, *kinds, height=24, width=16, num_frames=9)


@pipeline("MotifVideoPipeline")
def motif_video(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Motif-Video, guided by a guider object."""
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    transformer = parts.denoiser("motif_video", in_channels=9)
    pipe = bare(
        "MotifVideoPipeline", transformer=transformer, scheduler=dynamic(), guider=guider, vae=_wan_vae(parts, 4)
    )
    return pipe, masked(parts, 32, height=48, width=32, num_frames=9)


@pipeline("EasyAnimatePipeline")
def easyanimate(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build EasyAnimate."""
    pipe = bare("EasyAnimatePipeline", transformer=parts.denoiser("easyanimate"), scheduler=flow(), vae=_magvit(parts))
    return pipe, masked(parts, 16, **VIDEO)


def _magvit(parts: Parts) -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLMagvit(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4,
        )  # fmt: skip
    return parts.finish(vae)


@pipeline("MochiPipeline")
def mochi(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Mochi."""
    pipe = bare("MochiPipeline", transformer=parts.denoiser("mochi"), scheduler=flow())
    kwargs = masked(parts, 16, height=96, width=64, num_frames=13)
    return pipe, kwargs | {n: m.bool() for n, m in kwargs.items() if n.endswith("attention_mask")}


@pipeline("LattePipeline")
def latte(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Latte."""
    pipe = bare(
        "LattePipeline", transformer=parts.denoiser("latte"), scheduler=diffusers.DDIMScheduler(), vae=parts.vae()
    )
    kwargs = parts.embeds(32, height=24, width=16, video_length=zoo.FRAMES, mask_feature=False)
    return pipe, kwargs | {"negative_prompt": None}


@pipeline("AllegroPipeline")
def allegro(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Allegro."""
    pipe = bare("AllegroPipeline", transformer=parts.denoiser("allegro"), scheduler=diffusers.EulerDiscreteScheduler())
    return pipe, masked(parts, 24, height=96, width=64, num_frames=12) | {"negative_prompt": None}


@pipeline("Cosmos2TextToImagePipeline")
def cosmos2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Cosmos 2, text to image: guidance counted from the prompt."""
    scheduler = flow(use_karras_sigmas=True)
    pipe = bare(
        "Cosmos2TextToImagePipeline",
        transformer=parts.denoiser("cosmos"),
        scheduler=scheduler,
        safety_checker=Unchecked(),
    )
    return pipe, parts.embeds(32, height=96, width=64)


class Unchecked(nn.Module):
    """Let every prompt and picture pass, where a pipeline insists on a checker."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, text: str) -> bool:
        """Say that a prompt is all right."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """Return a video as it is."""
        return video


@pipeline("HeliosPipeline")
def helios(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Helios: chunk after chunk, each with tokens of the past."""
    pipe = bare(
        "HeliosPipeline",
        transformer=parts.denoiser("helios"),
        scheduler=diffusers.HeliosScheduler(stages=1),
        vae=_wan_vae(parts, 4),
    )
    sizes = {"history_sizes": [4, 1, 1], "num_latent_frames_per_chunk": 3}
    return pipe, parts.embeds(16, height=64, width=128, num_frames=9, **sizes)


class Statistics(nn.Module):
    """Stand for an autoencoder in a pipeline that returns latents: their statistics and its compression."""

    def __init__(self, channels: int, **facts: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, latent_channels=channels, **facts)
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        for name, value in facts.items():
            setattr(self, name, value)


@pipeline("LTX2Pipeline")
def ltx2(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LTX-2 with audio: guidance by a negative prompt, by a changed block and by the other modality."""
    with torch.random.fork_rng(devices=[]):
        connectors = diffusers.pipelines.ltx2.connectors.LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_double_precision=False,
        )  # fmt: skip
    pipe = bare(
        "LTX2Pipeline",
        transformer=parts.denoiser("ltx2", audio_in_channels=128, audio_out_channels=128),
        scheduler=dynamic(),
        connectors=parts.finish(connectors),
        vae=Statistics(4, spatial_compression_ratio=32, temporal_compression_ratio=8),
        audio_vae=Statistics(128, mel_compression_ratio=4, temporal_compression_ratio=4, sample_rate=16000,
                             mel_hop_length=160, mel_bins=64),
    )  # fmt: skip
    pipe.audio_vae.config.latent_channels = 8
    kwargs = masked(parts, 16, height=192, width=128, num_frames=17, frame_rate=24.0)
    return pipe, kwargs | {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}


def _sees(parts: Parts, dim: int) -> Kwargs:
    """Build an image encoder with 5 tokens, and its processor."""
    config = CLIPVisionConfig(
        hidden_size=dim, projection_dim=dim, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        encoder = CLIPVisionModel(config)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(crop_size=size, size={"shortest_edge": 16})
    return {"image_encoder": parts.finish(encoder), "image_processor": processor}


PICTURE = PIL.Image.new("RGB", (64, 96), "gray")


@pipeline("WanAnimatePipeline")
def wan_animate(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Wan Animate: a picture that moves as a video does, segment after segment."""
    transformer = parts.denoiser("wan_animate", in_channels=2 * 4 + 4, motion_encoder_size=16)
    scheduler, seen = flow(), _sees(parts, 16)
    pipe = bare("WanAnimatePipeline", transformer=transformer, scheduler=scheduler, vae=_wan_vae(parts, 4), **seen)
    kwargs = parts.embeds(16, height=96, width=64, segment_frame_length=9, guidance_scale=4.0)
    face = PICTURE.resize((16, 16))
    return pipe, kwargs | {"image": PICTURE, "pose_video": [PICTURE] * 9, "face_video": [face] * 9}


def _from_picture(parts: Parts, host: str, name: str, **config: Any) -> tuple[Pipeline, Kwargs]:
    """Build a pipeline of Wan's kind that starts from a picture, with 512 text tokens behind the picture's."""
    transformer = parts.denoiser(name, in_channels=2 * 4 + 4, **config)
    pipe = bare(host, transformer=transformer, scheduler=flow(), vae=_wan_vae(parts, 4), **_sees(parts, 8))
    draw = zoo.Draw(1, parts.seed + 3)
    return pipe, zoo.cast({n: draw.normal(1, 512, 16) for n in _SIGNED}, parts.dtype) | {"image": PICTURE, **VIDEO}


@pipeline("ChronoEditPipeline")
def chronoedit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build ChronoEdit: an edit as a video from a picture."""
    return _from_picture(parts, "ChronoEditPipeline", "chronoedit", image_dim=8, added_kv_proj_dim=24)


@pipeline("WanImageToVideoPipeline")
def wan_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Wan, image to video: attention to the image prompt, then to the text."""
    return _from_picture(parts, "WanImageToVideoPipeline", "wan_i2v")


@pipeline("Kandinsky6TI2VAPipeline")
def kandinsky6(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 6, with audio."""
    vae = _hunyuan_vae(parts)
    pipe = bare("Kandinsky6TI2VAPipeline", transformer=parts.denoiser("kandinsky6"), scheduler=flow(), vae=vae)
    return pipe, parts.embeds(16, sample_audio=False, **VIDEO) | _pooled(parts, 8)


def _pooled(parts: Parts, dim: int) -> Kwargs:
    draw = zoo.Draw(parts.batch, parts.seed + 4)
    return {n: draw.rows(dim).to(parts.dtype) for n in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}


@pipeline("TextToVideoSDPipeline")
def unet3d(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build ModelScope's text to video with prompt strings."""
    unet = parts.denoiser("unet3d", cross_attention_dim=32)
    pipe = bare(
        "TextToVideoSDPipeline", unet=unet, scheduler=diffusers.DDIMScheduler(), vae=parts.vae(), **parts.text()
    )
    return pipe, parts.prompts(height=32, width=24, num_frames=zoo.FRAMES)


@pipeline("AmusedPipeline")
def amused(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build aMUSEd: codes of a picture instead of latents."""
    with torch.random.fork_rng(devices=[]):
        vqvae = diffusers.VQModel(
            act_fn="silu", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], latent_channels=32,
            layers_per_block=1, norm_num_groups=4, num_vq_embeddings=32, sample_size=32,
            up_block_types=["UpDecoderBlock2D"], mid_block_add_attention=False, lookup_from_codebook=True,
        )  # fmt: skip
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    pipe = bare("AmusedPipeline", transformer=parts.denoiser("uvit"), scheduler=scheduler, vqvae=parts.finish(vqvae))
    draw = zoo.Draw(1, parts.seed + 3)
    kwargs = {"prompt_embeds": draw.normal(1, 16), "encoder_hidden_states": draw.normal(1, zoo.TEXT, 16)}
    kwargs |= {f"negative_{n}": torch.zeros_like(x) for n, x in kwargs.items()}
    return pipe, zoo.cast(kwargs, parts.dtype) | {"height": 16, "width": 16}


class Pooling(Statistics):
    """Stand for the autoencoder of Qwen-Image where a pipeline brings every picture to a million pixels."""

    def __init__(self) -> None:
        super().__init__(4, z_dim=4, temperal_downsample=[False, True, True])
        self.config.latents_mean, self.config.latents_std = [0.0] * 4, [1.0] * 4

    def encode(self, pixels: Tensor) -> Any:
        """Average 8 x 8 pixels [B, 3, F, H, W]; the fourth channel is their mean."""
        latents = nn.functional.avg_pool3d(pixels, (1, 8, 8))
        return SimpleNamespace(latents=torch.cat([latents, latents.mean(1, keepdim=True)], dim=1))


def _qwen_image(parts: Parts, host: str, image: Any, **kwargs: Any) -> tuple[Pipeline, Kwargs]:
    pipe = bare(host, transformer=parts.denoiser("qwen"), scheduler=dynamic(), vae=Pooling())
    asked = parts.embeds(16, mask="prompt_embeds_mask", true_cfg_scale=4.0)
    return pipe, asked | {"image": image} | kwargs


@pipeline("QwenImageEditPipeline")
def qwen_edit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image-Edit: tokens of the picture to change lie behind the image's."""
    return _qwen_image(parts, "QwenImageEditPipeline", PICTURE, height=128, width=96)


@pipeline("QwenImageEditPlusPipeline")
def qwen_edit_plus(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image-Edit Plus: several pictures."""
    pictures = [PICTURE, PIL.Image.new("RGB", (64, 96), "red")]
    return _qwen_image(parts, "QwenImageEditPlusPipeline", pictures, height=128, width=96)


# Audio


@pipeline("StableAudioPipeline")
def stable_audio(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Audio."""
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=4, decoder_input_channels=4,
            audio_channels=2, channel_multiples=[2, 4], sampling_rate=8,
        )  # fmt: skip
        projection = diffusers.StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
        )
    pipe = bare(
        "StableAudioPipeline",
        transformer=parts.denoiser("stable_audio", global_states_input_dim=32),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
        vae=parts.finish(vae),
        projection_model=parts.finish(projection),
    )
    kwargs = parts.embeds(16, audio_end_in_s=3.0)
    masks = {
        n: torch.ones(parts.batch, zoo.TEXT, dtype=torch.long) for n in ("attention_mask", "negative_attention_mask")
    }
    return pipe, kwargs | masks


NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Pipeline, Kwargs]:
    """Build one pipeline for one prompt, with the keyword arguments of one call.

    Args:
        name: One of NAMES.
        dtype: Type of all weights and inputs.
        seed: Seeds weights and inputs.
    """
    pipe, kwargs = _RECIPES[name](Parts(batch=1, dtype=dtype, seed=seed))
    return quiet(pipe), kwargs


def run(pipe: Pipeline, kwargs: Kwargs, steps: int = 3) -> Tensor:
    """Run a pipeline from a fixed seed and return what it makes, latents where it can."""
    accepted = inspect.signature(pipe.__call__).parameters
    fixed = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = pipe(**{k: v for k, v in fixed.items() if k in accepted} | kwargs, return_dict=False)
    made = out if isinstance(out, Tensor) else out[0]
    made = torch.stack(list(made)) if isinstance(made, list) else made
    return made if isinstance(made, Tensor) else torch.as_tensor(made)
