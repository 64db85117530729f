"""Build real, unmodified diffusers pipelines around the tiny denoisers of the zoo.

Stable Diffusion, ControlNet and AnimateDiff carry a tiny tokenizer and text encoder and take prompt strings;
the others take prompt embeddings and have no text encoder. The Stable Diffusion family, SDXL, SD3, PixArt and
AnimateDiff have an autoencoder, which halves both sides; the others return latents only.

All pipelines run in float32 and float64, but not all are float64 throughout: LTX and Sana return float32
latents, and flow matching, Euler and multistep schedulers hold the latents of a step in float32 (SDXL, SD3,
PixArt, FLUX, QwenImage, Wan). Two float64 runs of these still agree to 1e-12, unless a value sits on a
rounding edge. Fully float64: the Stable Diffusion family, AnimateDiff and CogVideoX.

Example:
    pipe, kwargs = pipes.build("sd")
    latents = pipes.run(pipe, kwargs, guidance_scale=3.0)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import zoo
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Kwargs = dict[str, Any]
Pipeline = diffusers.DiffusionPipeline
Recipe = Callable[["Parts"], tuple[Pipeline, Kwargs]]

TOKENIZER = Path(__file__).parent / "fixtures" / "tiny_tokenizer"
PROMPTS = ("a cat", "a black bear in the water", "a watercolor of a dog", "two birds")
IP_DIM = 24

# diffusers' own PAG pipelines, each with the plain pipeline that has the same components.
PAG_TWINS: dict[str, str] = {"sd": "sd_pag", "sdxl": "sdxl_pag", "sd3": "sd3_pag", "pixart": "pixart_pag"}

_PAG_CLASSES = {
    "StableDiffusionPipeline": ("StableDiffusionPAGPipeline", "mid"),
    "StableDiffusionXLPipeline": ("StableDiffusionXLPAGPipeline", "mid"),
    "StableDiffusion3Pipeline": ("StableDiffusion3PAGPipeline", "blocks.1"),
    "PixArtSigmaPipeline": ("PixArtSigmaPAGPipeline", "blocks.1"),
}
_RECIPES: dict[str, Recipe] = {}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Make the components of one pipeline and the inputs of one call."""

    batch: int
    dtype: torch.dtype
    seed: int

    def denoiser(self, name: str, **config: Any) -> nn.Module:
        """Take a denoiser out of the zoo."""
        return zoo.build(name, 1, self.dtype, self.seed, **config)[0]

    def finish(self, model: nn.Module) -> Any:
        """Give a component that is not in the zoo random weights."""
        zoo.randomize(model, torch.Generator().manual_seed(self.seed))
        return model.to(self.dtype).eval()

    def vae(self) -> Any:
        """Build an autoencoder that halves both sides."""
        with torch.random.fork_rng(devices=[]):
            model = diffusers.AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
            )
        return self.finish(model)

    def text(self) -> Kwargs:
        """Build a tokenizer and a text encoder."""
        tokenizer = CLIPTokenizer(str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=77)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            encoder = CLIPTextModel(config)
        return {"tokenizer": tokenizer, "text_encoder": self.finish(encoder)}

    def prompts(self, **kwargs: Any) -> Kwargs:
        """Ask with words: one string, or a list for a batch."""
        words = list(PROMPTS[: self.batch]) if self.batch > 1 else PROMPTS[0]
        negative = ["ugly"] * self.batch if self.batch > 1 else "ugly"
        return {"prompt": words, "negative_prompt": negative, **kwargs}

    def embeds(self, dim: int, *, pooled: int = 0, mask: str = "", **kwargs: Any) -> Kwargs:
        """Ask with embeddings, positive and negative, and where the host wants them pooled ones and masks."""
        draw = zoo.Draw(self.batch, self.seed + 1)
        made: Kwargs = {}
        for sign in ("", "negative_"):
            made[f"{sign}prompt_embeds"] = draw.rows(zoo.TEXT, dim)
            if pooled:
                made[f"{sign}pooled_prompt_embeds"] = draw.rows(pooled)
            if mask:
                made[f"{sign}{mask}"] = torch.ones(self.batch, zoo.TEXT, dtype=torch.long)
        if mask:
            made[f"negative_{mask}"][:, -2:] = 0  # unconditional text is shorter than the longest prompt
        return zoo.cast(made, self.dtype) | kwargs

    def picture(self, *shape: int) -> Tensor:
        """Draw a picture in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.rand(shape, generator=generator).to(self.dtype)


def pipeline(host: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe under its function's name if the installed diffusers has the pipeline."""

    def register(function: Recipe) -> Recipe:
        if host in dir(diffusers):
            _RECIPES[function.__name__] = function
        return function

    return register


# Image


def _stable_diffusion(host: str, parts: Parts, in_channels: int = 4, **components: Any) -> Pipeline:
    unet = parts.denoiser("sd15", in_channels=in_channels)
    return getattr(diffusers, host)(
        vae=parts.vae(),
        unet=unet,
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts.text(),
        **components,
    )


@pipeline("StableDiffusionPipeline")
def sd(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build text to image with prompt strings."""
    return _stable_diffusion("StableDiffusionPipeline", parts), parts.prompts(height=32, width=24)


@pipeline("StableDiffusionImg2ImgPipeline")
def sd_img2img(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build image to image; 3 steps at this strength are 2 denoiser calls, from the second timestep on."""
    pipe = _stable_diffusion("StableDiffusionImg2ImgPipeline", parts)
    return pipe, parts.prompts(image=parts.picture(1, 3, 32, 24), strength=0.8)


@pipeline("StableDiffusionInpaintPipeline")
def sd_inpaint(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build inpainting with a plain UNet, which blends the known part after every step."""
    return _inpaint(parts, in_channels=4)


@pipeline("StableDiffusionInpaintPipeline")
def sd_inpaint9(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build inpainting with an inpainting UNet, which sees mask and known part as channels."""
    return _inpaint(parts, in_channels=9)


def _inpaint(parts: Parts, in_channels: int) -> tuple[Pipeline, Kwargs]:
    pipe = _stable_diffusion("StableDiffusionInpaintPipeline", parts, in_channels)
    mask = torch.zeros(1, 1, 32, 24, dtype=parts.dtype)
    mask[..., :12] = 1
    image = parts.picture(1, 3, 32, 24)
    return pipe, parts.prompts(image=image, mask_image=mask, height=32, width=24)


@pipeline("StableDiffusionControlNetPipeline")
def sd_controlnet(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build text to image under a ControlNet."""
    unet = parts.denoiser("sd15")
    with torch.random.fork_rng(devices=[]):
        # Two channel counts make one halving, as many as the autoencoder has.
        net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    pipe = _stable_diffusion("StableDiffusionControlNetPipeline", parts, controlnet=parts.finish(net))
    return pipe, parts.prompts(image=parts.picture(1, 3, 32, 24), height=32, width=24)


@pipeline("StableDiffusionXLPipeline")
def sdxl(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SDXL text to image."""
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=parts.vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=parts.denoiser("sdxl"),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return pipe, parts.embeds(64, pooled=32, height=32, width=24)


@pipeline("StableDiffusion3Pipeline")
def sd3(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build SD3 text to image."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=parts.denoiser("sd3"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe, parts.embeds(32, pooled=64, height=32, width=24)


@pipeline("PixArtSigmaPipeline")
def pixart(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build PixArt-Sigma text to image."""
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=parts.vae(),
        transformer=parts.denoiser("pixart"),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    kwargs = parts.embeds(32, mask="prompt_attention_mask", height=32, width=24)
    return pipe, kwargs | {"negative_prompt": None, "use_resolution_binning": False}


def _flux(parts: Parts) -> Pipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=parts.denoiser("flux"),
    )


@pipeline("FluxPipeline")
def flux(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX text to image with distilled guidance: one row and one call for each prompt and step."""
    kwargs = parts.embeds(32, pooled=32, height=128, width=96)
    return _flux(parts), {key: value for key, value in kwargs.items() if "negative" not in key}


@pipeline("FluxPipeline")
def flux_cfg(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build FLUX text to image with true guidance: a call for cond, then one for uncond."""
    return _flux(parts), parts.embeds(32, pooled=32, height=128, width=96, true_cfg_scale=4.0)


@pipeline("QwenImagePipeline")
def qwen(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build QwenImage text to image: two calls, combined with the norm of cond."""
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=parts.denoiser("qwen"),
    )
    return pipe, parts.embeds(16, mask="prompt_embeds_mask", height=128, width=96, true_cfg_scale=4.0)


@pipeline("SanaPipeline")
def sana(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Sana text to image."""
    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=parts.denoiser("sana"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    kwargs = parts.embeds(24, mask="prompt_attention_mask", height=256, width=192)
    return pipe, kwargs | {"negative_prompt": None, "use_resolution_binning": False}


# Video


@pipeline("AnimateDiffPipeline")
def animatediff(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build AnimateDiff text to video with prompt strings."""
    pipe = diffusers.AnimateDiffPipeline(
        vae=parts.vae(),
        unet=parts.denoiser("animatediff"),
        motion_adapter=None,
        scheduler=_ddim(),
        **parts.text(),
    )
    return pipe, parts.prompts(num_frames=zoo.FRAMES, height=32, width=24)


@pipeline("WanPipeline")
def wan(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build Wan text to video: a call for cond, then one for uncond."""
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=parts.denoiser("wan"),
    )
    return pipe, parts.embeds(16, height=96, width=64, num_frames=4 * (zoo.FRAMES - 1) + 1)


def _cogvideox(parts: Parts, name: str) -> tuple[Pipeline, Kwargs]:
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=parts.denoiser(name),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, parts.embeds(32, height=96, width=64, num_frames=4 * (zoo.FRAMES - 1) + 1)


@pipeline("CogVideoXPipeline")
def cogvideox(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogVideoX-2B text to video."""
    return _cogvideox(parts, "cogvideox")


@pipeline("CogVideoXPipeline")
def cogvideox_rope(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build CogVideoX-5B text to video: with rotary positions."""
    return _cogvideox(parts, "cogvideox_rope")


@pipeline("LTXPipeline")
def ltx(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build LTX text to video."""
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=parts.denoiser("ltx"),
    )
    kwargs = parts.embeds(16, mask="prompt_attention_mask")
    return pipe, kwargs | {"height": 192, "width": 128, "num_frames": 8 * (zoo.FRAMES - 1) + 1}


# diffusers' own PAG pipelines


@pipeline("StableDiffusionPAGPipeline")
def sd_pag(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build diffusers' PAG for Stable Diffusion."""
    return _pag(sd(parts))


@pipeline("StableDiffusionXLPAGPipeline")
def sdxl_pag(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build diffusers' PAG for SDXL."""
    return _pag(sdxl(parts))


@pipeline("StableDiffusion3PAGPipeline")
def sd3_pag(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build diffusers' PAG for SD3."""
    return _pag(sd3(parts))


@pipeline("PixArtSigmaPAGPipeline")
def pixart_pag(parts: Parts) -> tuple[Pipeline, Kwargs]:
    """Build diffusers' PAG for PixArt-Sigma."""
    return _pag(pixart(parts))


def _pag(plain: tuple[Pipeline, Kwargs]) -> tuple[Pipeline, Kwargs]:
    pipe, kwargs = plain
    return pag_twin(pipe), kwargs | {"pag_scale": 3.0}


def pag_twin(pipe: Pipeline, layers: str | list[str] | None = None) -> Pipeline:
    """Build diffusers' PAG pipeline on the very components of a plain pipeline.

    Args:
        pipe: One of the pipelines in PAG_TWINS.
        layers: Where to perturb, as in diffusers' `pag_applied_layers`; None takes diffusers' default.
    """
    host, default = _PAG_CLASSES[type(pipe).__name__]
    twin = getattr(diffusers, host)
    options = pipe.components | {"requires_safety_checker": False, "add_watermarker": False}
    accepted = inspect.signature(twin).parameters  # SD3's twin, for one, has no image encoder
    options = {key: value for key, value in options.items() if key in accepted}
    return quiet(twin(**options, pag_applied_layers=layers or default))


NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0) -> tuple[Pipeline, Kwargs]:
    """Build one pipeline with the keyword arguments of one call.

    Args:
        name: One of NAMES.
        dtype: Type of all weights and inputs.
        batch: Number of prompts.
        seed: Seeds weights and inputs; the global generator stays untouched.
    """
    pipe, kwargs = _RECIPES[name](Parts(batch=batch, dtype=dtype, seed=seed))
    return quiet(pipe), kwargs


def run(pipe: Pipeline, kwargs: Kwargs, **overrides: Any) -> Tensor:
    """Run a pipeline for three steps from a fixed seed and return its final latents.

    Args:
        pipe: A pipeline.
        kwargs: What `build` returned for it.
        **overrides: Further or other arguments of the pipeline's call.
    """
    fixed = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(**fixed | kwargs | overrides, return_dict=False)[0]


def quiet(pipe: Pipeline) -> Pipeline:
    """Turn a pipeline's progress bar off."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Pipeline) -> nn.Module:
    """Return the UNet or transformer of a pipeline."""
    return pipe.components.get("unet") or pipe.components["transformer"]


# Adapters


def load_ip_adapter(pipe: Pipeline, seed: int = 0) -> Kwargs:
    """Load a random IP-Adapter into a UNet pipeline and return the call's further arguments.

    The host's own `load_ip_adapter` is used; its `unload_ip_adapter` takes the adapter off again.
    """
    unet = denoiser(pipe)
    pipe.load_ip_adapter(ip_adapter_state(unet, seed), subfolder="", weight_name="", image_encoder_folder=None)
    embeds = zoo.Draw(2, seed + 1).rows(1, IP_DIM)  # uncond, cond
    return {"ip_adapter_image_embeds": [embeds.to(unet.dtype)]}


def ip_adapter_state(unet: nn.Module, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Draw the weights of an IP-Adapter with 4 image tokens."""
    draw = zoo.Draw(1, seed)
    dim = unet.config.cross_attention_dim
    adapter: dict[str, Tensor] = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_module" in name:
            continue
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        adapter[f"{number}.to_k_ip.weight"] = draw.normal(width, dim) / dim**0.5
        adapter[f"{number}.to_v_ip.weight"] = draw.normal(width, dim) / dim**0.5
        number += 2  # the original counts self and cross attention
    projection = {
        "proj.weight": draw.normal(4 * dim, IP_DIM) / IP_DIM**0.5,
        "proj.bias": 0.1 * draw.normal(4 * dim),
        "norm.weight": 1 + 0.1 * draw.normal(dim),
        "norm.bias": 0.1 * draw.normal(dim),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def lora_state(pipe: Pipeline, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Draw a LoRA for the queries and values of every attention, for `pipe.load_lora_weights`."""
    model = denoiser(pipe)
    prefix = "unet" if "unet" in pipe.components else "transformer"
    draw = zoo.Draw(1, seed)
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith((".to_q", ".to_v")) and isinstance(module, nn.Linear):
            down = draw.normal(rank, module.in_features) / module.in_features**0.5
            state[f"{prefix}.{name}.lora_A.weight"] = down.to(model.dtype)
            state[f"{prefix}.{name}.lora_B.weight"] = draw.normal(module.out_features, rank).to(model.dtype)
    return state


def _ddim() -> diffusers.DDIMScheduler:
    """Build the scheduler of Stable Diffusion."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
