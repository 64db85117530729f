"""What people run beside text to image and text to video: pictures changed, masks filled, control pictures, clips.

Each recipe takes the tiny components of a pipeline that `zoo_pipelines` or `zoo_host_pipelines` builds and gives them
to another class of diffusers, with what that class needs besides.

Example:
    pipe, kwargs = variants.build("sdxl_inpaint")
    latents = variants.run(pipe, kwargs)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import zoo
import zoo_host_pipelines as hosts
import zoo_pipelines as pipes
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo_host_pipelines import PICTURE, VIDEO, bare, positive
from zoo_pipelines import Kwargs, Parts, Pipeline, Recipe, quiet

_RECIPES: dict[str, Recipe] = {}


def pipeline(host: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe under its function's name if the installed diffusers has the pipeline."""

    def register(function: Recipe) -> Recipe:
        if host in dir(diffusers):
            _RECIPES[function.__name__] = function
        return function

    return register


def twin(pipe: Pipeline, host: str, **components: Any) -> Pipeline:
    """Give a pipeline's components, and others in their place, to another class."""
    accepted = inspect.signature(getattr(diffusers, host).__init__).parameters
    made = {k: v for k, v in (pipe.components | components).items() if k in accepted}
    return bare(host, **made, **{k: False for k in ("requires_safety_checker", "add_watermarker") if k in accepted})


def without(kwargs: Kwargs, *names: str) -> Kwargs:
    """Leave arguments out."""
    return {k: v for k, v in kwargs.items() if k not in names}


def changed(parts: Parts, height: int = 32, width: int = 24, **kwargs: Any) -> Kwargs:
    """Ask for a picture to be changed, all of it."""
    return {"image": parts.picture(1, 3, height, width), "strength": 0.8, **kwargs}


def filled(parts: Parts, height: int = 32, width: int = 24, **kwargs: Any) -> Kwargs:
    """Ask for the left half of a picture to be filled."""
    mask = torch.zeros(1, 1, height, width, dtype=parts.dtype)
    mask[..., : width // 2] = 1
    return changed(parts, height, width, mask_image=mask, **kwargs)


def seen(parts: Parts, dim: int, size: int = 16) -> Kwargs:
    """Build an image encoder that gives one embedding, and its processor."""
    config = CLIPVisionConfig(
        hidden_size=16, projection_dim=dim, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=size, patch_size=size // 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        encoder = CLIPVisionModelWithProjection(config)
    processor = CLIPImageProcessor(crop_size={"height": size, "width": size}, size={"shortest_edge": size})
    return {"image_encoder": parts.finish(encoder), "feature_extractor": processor}


def fresh(parts: Parts, make: Callable[[], Any]) -> Any:
    """Make a component with random weights, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        return parts.finish(make())


# Stable Diffusion


@pipeline("StableDiffusionInstructPix2PixPipeline")
def pix2pix(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build InstructPix2Pix: three rows, with text and picture, with the picture alone, with neither."""
    pipe = twin(
        pipes.sd(parts)[0], "StableDiffusionInstructPix2PixPipeline", unet=parts.denoiser("sd15", in_channels=8)
    )
    return pipe, parts.prompts(image=parts.picture(1, 3, 32, 24))


@pipeline("StableDiffusionXLInstructPix2PixPipeline")
def sdxl_pix2pix(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build InstructPix2Pix on SDXL."""
    pipe, kwargs = pipes.sdxl(parts)
    pipe = twin(pipe, "StableDiffusionXLInstructPix2PixPipeline", unet=parts.denoiser("sdxl", in_channels=8))
    return pipe, kwargs | {"image": parts.picture(1, 3, 32, 24)}


@pipeline("LatentConsistencyModelPipeline")
def lcm(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build a latent consistency model: the guidance scale is an input of the UNet, one row each prompt."""
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    unet = parts.denoiser("sd15", time_cond_proj_dim=16)
    pipe = twin(pipes.sd(parts)[0], "LatentConsistencyModelPipeline", unet=unet, scheduler=scheduler)
    return pipe, without(parts.prompts(height=32, width=24), "negative_prompt")


@pipeline("StableDiffusionUpscalePipeline")
def upscale(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build the upscaler: the small picture as channels, its noise level as a class."""
    unet = parts.denoiser("sd15", in_channels=7, num_class_embeds=1000)
    pipe = twin(
        pipes.sd(parts)[0], "StableDiffusionUpscalePipeline", unet=unet, low_res_scheduler=diffusers.DDPMScheduler()
    )
    return pipe, parts.prompts(image=parts.picture(1, 3, 16, 12))


@pipeline("StableDiffusionImageVariationPipeline")
def variation(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build image variations: one image token instead of a text."""
    pipe = twin(pipes.sd(parts)[0], "StableDiffusionImageVariationPipeline", **seen(parts, 32))
    return pipe, {"image": PICTURE, "height": 32, "width": 24}


@pipeline("StableDiffusionAdapterPipeline")
def t2i_adapter(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Diffusion under a T2I-Adapter."""
    pipe = pipes.sd(parts)[0]
    channels = list(pipe.unet.config.block_out_channels)
    adapter = fresh(
        parts,
        lambda: diffusers.T2IAdapter(
            in_channels=3, channels=channels, num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        ),
    )
    pipe = twin(pipe, "StableDiffusionAdapterPipeline", adapter=adapter)
    return pipe, parts.prompts(image=parts.picture(1, 3, 32, 24), height=32, width=24)


@pipeline("StableDiffusionControlNetImg2ImgPipeline")
def controlnet_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build image to image under a ControlNet."""
    pipe, kwargs = pipes.sd_controlnet(parts)
    pipe = twin(pipe, "StableDiffusionControlNetImg2ImgPipeline")
    return pipe, kwargs | changed(parts, control_image=kwargs["image"])


@pipeline("StableDiffusionControlNetInpaintPipeline")
def controlnet_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build inpainting under a ControlNet."""
    pipe, kwargs = pipes.sd_controlnet(parts)
    pipe = twin(pipe, "StableDiffusionControlNetInpaintPipeline")
    return pipe, kwargs | filled(parts, control_image=kwargs["image"])


@pipeline("StableVideoDiffusionPipeline")
def svd(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Stable Video Diffusion: a picture instead of a prompt, a guidance scale that grows over the frames."""
    vae = fresh(
        parts,
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
            latent_channels=4,
        ),
    )  # fmt: skip
    unet = parts.denoiser("svd")
    dim = unet.config.cross_attention_dim
    pipe = bare(
        "StableVideoDiffusionPipeline", unet=unet, vae=vae, scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
            sigma_max=700.0), **seen(parts, dim, 224),
    )  # fmt: skip
    return pipe, {"image": PICTURE, "height": 32, "width": 24, "num_frames": 4, "decode_chunk_size": 4}


@pipeline("StableDiffusionXLImg2ImgPipeline")
def sdxl_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SDXL image to image."""
    pipe, kwargs = pipes.sdxl(parts)
    return twin(pipe, "StableDiffusionXLImg2ImgPipeline"), without(kwargs, "height", "width") | changed(parts)


@pipeline("StableDiffusionXLInpaintPipeline")
def sdxl_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SDXL inpainting with a plain UNet."""
    pipe, kwargs = pipes.sdxl(parts)
    return twin(pipe, "StableDiffusionXLInpaintPipeline"), kwargs | filled(parts)


@pipeline("StableDiffusionXLControlNetPipeline")
def sdxl_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SDXL under a ControlNet."""
    pipe, kwargs = pipes.sdxl(parts)
    net = fresh(
        parts, lambda: diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    )
    pipe = twin(pipe, "StableDiffusionXLControlNetPipeline", controlnet=net)
    return pipe, kwargs | {"image": parts.picture(1, 3, 32, 24)}


@pipeline("IFImg2ImgPipeline")
def deepfloyd_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DeepFloyd IF, image to image."""
    pipe, kwargs = hosts.deepfloyd(parts)
    pipe = twin(pipe, "IFImg2ImgPipeline")
    return pipe, without(kwargs, "height", "width") | changed(parts)


@pipeline("IFSuperResolutionPipeline")
def deepfloyd_super(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build DeepFloyd IF's second stage: the small picture as channels, its noise level as a class."""
    pipe, kwargs = hosts.deepfloyd(parts)
    unet = parts.denoiser("sd15", in_channels=6, out_channels=6, class_embed_type="timestep")
    pipe = twin(pipe, "IFSuperResolutionPipeline", unet=unet, image_noising_scheduler=diffusers.DDPMScheduler())
    return pipe, kwargs | {"image": parts.picture(1, 3, 8, 6), "height": 16, "width": 12}


@pipeline("KandinskyV22Img2ImgPipeline")
def kandinsky22_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 2.2, image to image."""
    pipe, kwargs = hosts.kandinsky22(parts)
    scheduler = diffusers.DDPMScheduler()
    return twin(pipe, "KandinskyV22Img2ImgPipeline", scheduler=scheduler), kwargs | changed(parts, 64, 48)


@pipeline("KandinskyV22InpaintPipeline")
def kandinsky22_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 2.2, inpainting: mask and known part as channels."""
    pipe, kwargs = hosts.kandinsky22(parts)
    config = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    unet = parts.denoiser("sd15", in_channels=9, out_channels=8, **config)
    pipe = twin(pipe, "KandinskyV22InpaintPipeline", unet=unet, scheduler=diffusers.DDPMScheduler())
    return pipe, kwargs | without(filled(parts, 64, 48), "strength")


@pipeline("AnimateDiffVideoToVideoPipeline")
def animatediff_video(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build AnimateDiff, video to video."""
    pipe, kwargs = pipes.animatediff(parts)
    pipe = twin(pipe, "AnimateDiffVideoToVideoPipeline")
    return pipe, without(kwargs, "num_frames") | {"video": [PICTURE] * zoo.FRAMES, "strength": 0.8}


@pipeline("AnimateDiffControlNetPipeline")
def animatediff_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build AnimateDiff under a ControlNet."""
    pipe, kwargs = pipes.animatediff(parts)
    net = pipes.sd_controlnet(parts)[0].controlnet
    pipe = twin(pipe, "AnimateDiffControlNetPipeline", controlnet=net)
    return pipe, kwargs | {"conditioning_frames": [PICTURE.resize((24, 32))] * zoo.FRAMES}


# Transformers: pictures


@pipeline("StableDiffusion3Img2ImgPipeline")
def sd3_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SD3, image to image."""
    pipe, kwargs = pipes.sd3(parts)
    pipe.vae.register_to_config(shift_factor=0.1)
    return twin(pipe, "StableDiffusion3Img2ImgPipeline"), kwargs | changed(parts)


@pipeline("StableDiffusion3ControlNetPipeline")
def sd3_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SD3 under a ControlNet."""
    pipe, kwargs = pipes.sd3(parts)
    pipe.vae.register_to_config(shift_factor=0.1)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    accepted = inspect.signature(diffusers.SD3ControlNetModel.__init__).parameters
    config = {k: v for k, v in config.items() if k in accepted} | {"num_layers": 1}
    net = fresh(parts, lambda: diffusers.SD3ControlNetModel(**config))
    pipe = twin(pipe, "StableDiffusion3ControlNetPipeline", controlnet=net)
    return pipe, kwargs | {"control_image": parts.picture(1, 3, 32, 24)}


@pipeline("PixArtAlphaPipeline")
def pixart_alpha(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build PixArt-Alpha."""
    pipe, kwargs = pipes.pixart(parts)
    return twin(pipe, "PixArtAlphaPipeline"), kwargs


@pipeline("HunyuanDiTPipeline")
def hunyuandit(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanDiT: two text encoders whose tokens stand one after the other."""
    transformer = parts.denoiser("hunyuandit")
    pipe = bare("HunyuanDiTPipeline", transformer=transformer, scheduler=diffusers.DDPMScheduler())
    config = transformer.config
    kinds = (
        ("prompt_embeds", "prompt_attention_mask", config.cross_attention_dim),
        ("prompt_embeds_2", "prompt_attention_mask_2", config.cross_attention_dim_t5),
    )
    made: Kwargs = {}
    draw = zoo.Draw(1, parts.seed + 1)
    for length, (name, mask, dim) in zip((config.text_len, config.text_len_t5), kinds, strict=True):
        for sign in ("", "negative_"):
            made[f"{sign}{name}"] = draw.rows(length, dim)
            made[f"{sign}{mask}"] = torch.ones(1, length, dtype=torch.long)
    return pipe, zoo.cast(made, parts.dtype) | {"height": 128, "width": 96, "use_resolution_binning": False}


@pipeline("FluxImg2ImgPipeline")
def flux_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1, image to image."""
    return hosts._flux_image(parts, "FluxImg2ImgPipeline"), _flux_asked(parts) | changed(parts)


@pipeline("FluxInpaintPipeline")
def flux_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1, inpainting with true guidance."""
    kwargs = parts.embeds(32, pooled=32, height=32, width=24, true_cfg_scale=4.0)
    return hosts._flux_image(parts, "FluxInpaintPipeline"), kwargs | filled(parts)


@pipeline("FluxKontextInpaintPipeline")
def flux_kontext_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 Kontext, inpainting."""
    kwargs = _flux_asked(parts) | filled(parts) | {"max_area": 32 * 24, "_auto_resize": False}
    return hosts._flux_image(parts, "FluxKontextInpaintPipeline"), kwargs


@pipeline("FluxControlImg2ImgPipeline")
def flux_control_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.1 Control, image to image."""
    pipe = hosts._flux_image(parts, "FluxControlImg2ImgPipeline", 32)
    return pipe, _flux_asked(parts) | changed(parts, control_image=parts.picture(1, 3, 32, 24))


def _flux_asked(parts: Parts) -> Kwargs:
    return positive(parts.embeds(32, pooled=32, height=32, width=24))


@pipeline("Flux2Pipeline")
def flux2_dev(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX.2 with distilled guidance."""
    pipe, kwargs = hosts.flux2_klein(parts)
    return twin(pipe, "Flux2Pipeline"), without(positive(kwargs), "is_distilled")


@pipeline("ChromaImg2ImgPipeline")
def chroma_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Chroma, image to image."""
    pipe, kwargs = hosts.chroma(parts)
    vae = parts.vae()
    vae.register_to_config(shift_factor=0.1, latent_channels=4)
    return twin(pipe, "ChromaImg2ImgPipeline", vae=vae), kwargs | changed(
        parts, height=kwargs["height"], width=kwargs["width"]
    )


@pipeline("ZImageImg2ImgPipeline")
def zimage_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Z-Image, image to image."""
    pipe, kwargs = hosts.zimage(parts)
    vae = parts.vae()
    vae.register_to_config(shift_factor=0.1)
    return twin(pipe, "ZImageImg2ImgPipeline", vae=vae), kwargs | changed(parts, height=32, width=32) | {
        "height": 32,
        "width": 32,
    }


@pipeline("ZImageInpaintPipeline")
def zimage_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Z-Image, inpainting."""
    pipe, kwargs = hosts.zimage(parts)
    vae = parts.vae()
    vae.register_to_config(shift_factor=0.1)
    return twin(pipe, "ZImageInpaintPipeline", vae=vae), kwargs | filled(parts, 32, 32) | {"height": 32, "width": 32}


@pipeline("SanaSprintPipeline")
def sana_sprint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Sana Sprint: two steps, the guidance scale as an input."""
    transformer = parts.denoiser("sana", guidance_embeds=True)
    pipe = bare("SanaSprintPipeline", transformer=transformer, scheduler=diffusers.SCMScheduler())
    kwargs = positive(hosts.masked(parts, 24, height=256, width=192, use_resolution_binning=False))
    return pipe, kwargs | {"num_inference_steps": 2}


@pipeline("Kandinsky5T2IPipeline")
def kandinsky5_image(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Kandinsky 5, text to image."""
    pipe, kwargs = hosts.kandinsky5(parts)
    return twin(pipe, "Kandinsky5T2IPipeline", vae=parts.vae()), without(kwargs, "num_frames")


@pipeline("QwenImageImg2ImgPipeline")
def qwen_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image, image to image."""
    pipe, kwargs = pipes.qwen(parts)
    return twin(pipe, "QwenImageImg2ImgPipeline", vae=hosts._wan_vae(parts, 4)), kwargs | changed(parts, 128, 96)


@pipeline("QwenImageInpaintPipeline")
def qwen_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image, inpainting."""
    pipe, kwargs = pipes.qwen(parts)
    return twin(pipe, "QwenImageInpaintPipeline", vae=hosts._wan_vae(parts, 4)), kwargs | filled(parts, 128, 96)


@pipeline("QwenImageEditInpaintPipeline")
def qwen_edit_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image-Edit, inpainting."""
    pipe, kwargs = hosts.qwen_edit(parts)
    return twin(pipe, "QwenImageEditInpaintPipeline"), kwargs | filled(parts, 128, 96) | {"image": PICTURE}


@pipeline("QwenImageControlNetPipeline")
def qwen_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Qwen-Image under a ControlNet."""
    pipe, kwargs = pipes.qwen(parts)
    config = pipe.transformer.config
    sizes = {"attention_head_dim": config.attention_head_dim, "num_attention_heads": config.num_attention_heads}
    make = diffusers.QwenImageControlNetModel.from_transformer
    net = fresh(parts, lambda: make(pipe.transformer, num_layers=1, **sizes))
    pipe = twin(pipe, "QwenImageControlNetPipeline", controlnet=net, vae=hosts._wan_vae(parts, 4))
    return pipe, kwargs | {"control_image": parts.picture(1, 3, 128, 96)}


@pipeline("OmniGenPipeline")
def omnigen(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build OmniGen: prompts of words, with guidance; as many tokens as an autoencoder of 8 x 8 pixels leaves."""
    levels = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = fresh(
        parts,
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4, down_block_types=levels[0], up_block_types=levels[1], latent_channels=4,
            norm_num_groups=4,
        ),
    )  # fmt: skip
    pipe = bare(
        "OmniGenPipeline", transformer=parts.denoiser("omnigen"), scheduler=hosts.flow(invert_sigmas=True), vae=vae,
        tokenizer=parts.text()["tokenizer"],
    )  # fmt: skip
    return pipe, {"prompt": pipes.PROMPTS[0], "height": 128, "width": 128}


# Transformers: videos


@pipeline("WanVideoToVideoPipeline")
def wan_video(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Wan, video to video."""
    pipe, kwargs = pipes.wan(parts)
    frames = 4 * (zoo.FRAMES - 1) + 1
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = twin(pipe, "WanVideoToVideoPipeline", vae=hosts._wan_vae(parts, 4), scheduler=scheduler)
    return pipe, without(kwargs, "num_frames") | {"video": [PICTURE] * frames, "strength": 0.8}


@pipeline("CogVideoXImageToVideoPipeline")
def cogvideox_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogVideoX, image to video: the picture as channels."""
    pipe, kwargs = pipes.cogvideox(parts)
    transformer = parts.denoiser("cogvideox", in_channels=8)
    pipe = twin(pipe, "CogVideoXImageToVideoPipeline", transformer=transformer, vae=_cog_vae(parts))
    return pipe, kwargs | {"image": PICTURE}


@pipeline("CogVideoXVideoToVideoPipeline")
def cogvideox_video(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogVideoX, video to video."""
    pipe, kwargs = pipes.cogvideox(parts)
    pipe = twin(pipe, "CogVideoXVideoToVideoPipeline", vae=_cog_vae(parts))
    frames = kwargs["num_frames"]
    return pipe, without(kwargs, "num_frames") | {"video": [PICTURE] * frames, "strength": 0.8}


def _cog_vae(parts: Parts) -> Any:
    return fresh(
        parts,
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
    )  # fmt: skip


@pipeline("LTXImageToVideoPipeline")
def ltx_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LTX, image to video: every token has a time of its own."""
    pipe, kwargs = pipes.ltx(parts)
    return twin(pipe, "LTXImageToVideoPipeline", vae=_ltx_vae(parts)), kwargs | {"image": PICTURE}


@pipeline("LTXConditionPipeline")
def ltx_condition(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LTX with pictures at chosen frames."""
    pipe, kwargs = pipes.ltx(parts)
    pipe = twin(pipe, "LTXConditionPipeline", vae=_ltx_vae(parts), scheduler=hosts.flow())
    return pipe, kwargs | {"image": PICTURE}


def _ltx_vae(parts: Parts) -> Any:
    return fresh(
        parts,
        lambda: diffusers.AutoencoderKLLTXVideo(
            in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, True, False),
            decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=4,
            patch_size_t=1, encoder_causal=True, decoder_causal=False,
        ),
    )  # fmt: skip


@pipeline("HunyuanVideoImageToVideoPipeline")
def hunyuan_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanVideo, image to video: the picture as channels."""
    pipe, kwargs = hosts.hunyuanvideo(parts)
    transformer = parts.denoiser("hunyuanvideo", in_channels=9, image_condition_type="latent_concat")
    pipe = twin(
        pipe, "HunyuanVideoImageToVideoPipeline", transformer=transformer, vae=hosts._hunyuan_vae(parts),
        scheduler=hosts.flow(),
    )  # fmt: skip
    return pipe, kwargs | {"image": PICTURE}


@pipeline("SkyReelsV2ImageToVideoPipeline")
def skyreels_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SkyReels V2, image to video."""
    transformer = parts.denoiser("skyreels2", in_channels=2 * 4 + 4, image_dim=8, added_kv_proj_dim=24)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    made = {"transformer": transformer, "scheduler": scheduler, "vae": hosts._wan_vae(parts, 4)}
    pipe = bare("SkyReelsV2ImageToVideoPipeline", **made, **hosts._sees(parts, 8))
    draw = zoo.Draw(1, parts.seed + 3)
    kwargs = {n: draw.normal(1, 512, 16) for n in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe, zoo.cast(kwargs, parts.dtype) | {"image": PICTURE, **VIDEO}


@pipeline("SanaImageToVideoPipeline")
def sana_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Sana-Video, image to video."""
    pipe, kwargs = hosts.sana_video(parts)
    return twin(pipe, "SanaImageToVideoPipeline", vae=hosts._wan_vae(parts, 4)), kwargs | {"image": PICTURE}


@pipeline("HunyuanVideo15ImageToVideoPipeline")
def hunyuan15_i2v(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build HunyuanVideo 1.5, image to video."""
    pipe, kwargs = hosts.hunyuan15(parts)
    made = hosts._sees(parts, 12)
    made = {"image_encoder": made["image_encoder"], "feature_extractor": made["image_processor"]}
    pipe = twin(pipe, "HunyuanVideo15ImageToVideoPipeline", **made)
    return pipe, without(kwargs, "height", "width") | {"image": PICTURE.resize((16, 24))}


@pipeline("CosmosTextToWorldPipeline")
def cosmos1(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Cosmos 1, text to video."""
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    pipe = bare(
        "CosmosTextToWorldPipeline", transformer=parts.denoiser("cosmos"), scheduler=scheduler,
        safety_checker=hosts.Unchecked(),
    )  # fmt: skip
    return pipe, parts.embeds(32, height=96, width=64, num_frames=9)


@pipeline("I2VGenXLPipeline")
def i2vgen(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build I2VGen-XL: words, the picture's tokens and its latents."""
    unet = parts.denoiser("i2vgenxl", cross_attention_dim=32)
    pipe = bare(
        "I2VGenXLPipeline", unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False), vae=parts.vae(),
        **parts.text(), **seen(parts, 32),
    )  # fmt: skip
    return pipe, parts.embeds(32, image=PICTURE, height=32, width=24, num_frames=zoo.FRAMES)


NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Pipeline, Kwargs]:
    """Build one pipeline for one prompt, with the keyword arguments of one call."""
    pipe, kwargs = _RECIPES[name](Parts(batch=1, dtype=dtype, seed=seed))
    return quiet(pipe), kwargs


def run(pipe: Pipeline, kwargs: Kwargs, steps: int = 3) -> Tensor:
    """Run a pipeline from a fixed seed and return what it makes, latents where it can."""
    return hosts.run(pipe, kwargs, steps)
