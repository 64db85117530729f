"""The shapes models: real diffusers and transformers classes, small enough to train on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnctl.shapes.scenes import SIZE
from attnctl.shapes.tokenizer import BOS, EOS, MAX_LENGTH, write_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = [
    "LATENT_CHANNELS",
    "LATENT_SIZE",
    "TEXT_WIDTH",
    "assemble",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer",
    "build_unet",
    "build_vae",
]

LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4
TEXT_WIDTH = 96


def build_vae() -> AutoencoderKL:
    """Build the autoencoder, 64x64x3 to 16x16x4 and back; `scaling_factor` is set after training."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write the tokenizer into `folder` and load it from there."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(write_tokenizer(folder)), local_files_only=True)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: two layers, width `TEXT_WIDTH`, causal as CLIP's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", BOS), ("eos", EOS))}
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["eos"],
        )
    )
    # CLIP's tiny initial embeddings drown in the first attention output; words that differ from the start are
    # learnt several times faster.
    embeddings = (model.text_model if hasattr(model, "text_model") else model).embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    return model


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser: cross- and self-attention at 16x16 and at 8x8, four heads everywhere."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build the scheduler: cosine noise, v-prediction, steps counted from pure noise."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # unused by this spacing, but pipelines warn about any other value
        set_alpha_to_one=False,
    )


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Put the parts together as a StableDiffusionPipeline without a safety checker."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def count(module: torch.nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(p.numel() for p in module.parameters())
