"""The shapes mmdit: a real StableDiffusion3Pipeline, small enough to train on two cores, and its training loss.

StableDiffusion3Pipeline asks both CLIP encoders for every prompt: here they are one trained encoder under two names.
The T5 encoder is absent, and the pipeline pads the text with 256 zero vectors in its place, as it does for everyone
who runs SD3 without T5. No position tells these null tokens apart, so they stay equal in every layer, and any number n
of them acts exactly like one whose attention logit is raised by log(n). Training uses that: it pays for one null token,
and draws n from 256 (what a plain call gives) and 0 (`max_sequence_length=0`, twice as fast), so that both are served.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnctl.shapes.data import Latents, encode_captions
from attnctl.shapes.tokenizer import BOS, EOS, MAX_LENGTH
from attnctl.shapes.training.models import LATENT_CHANNELS, LATENT_SIZE, TEXT_WIDTH

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from diffusers.models.attention_processor import Attention
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "HEADS",
    "LAYERS",
    "NULL_TOKENS",
    "Flow",
    "NullAttention",
    "assemble",
    "build_scheduler",
    "build_text_encoder",
    "build_transformer",
    "draw_levels",
    "inherit_text",
]

LAYERS, HEADS, HEAD_DIM = 8, 6, 24
NULL_TOKENS = 256  # the pipeline's default `max_sequence_length`
_TEXT_LAYERS = 3  # one more than text2image: the pipeline takes the last but one
_NEVER = -1e4


def build_transformer() -> SD3Transformer2DModel:
    """Build the denoiser: eight joint blocks of six heads on 256 image tokens; every block starts as the identity."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    # adaLN-zero (Peebles and Xie, arXiv 2212.09748), which diffusers leaves to whoever trains.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")):
                nn.init.zeros_(module.weight)
    return model


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build the text encoder: three layers, width 96, causal as CLIP's."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    eos = tokenizer.convert_tokens_to_ids(EOS)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=_TEXT_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def inherit_text(text_encoder: CLIPTextModelWithProjection, source: CLIPTextModel) -> None:
    """Copy the embeddings and layers of text2image's text encoder; the last layer and the projection stay new."""
    # Some versions of transformers put the prefix into the names and some do not.
    plain = {n.removeprefix("text_model."): t for n, t in source.state_dict().items()}
    plain = {n: t for n, t in plain.items() if not n.startswith("final_layer_norm")}
    target = getattr(text_encoder, "text_model", text_encoder)
    result = target.load_state_dict(plain, strict=False)
    if result.unexpected_keys:
        raise RuntimeError(f"The text encoders do not fit together: {result.unexpected_keys}.")


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler: rectified flow, Euler steps, as many of them at the noisy end as `Flow` draws there."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """Put the parts together as a StableDiffusion3Pipeline without a T5 encoder."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    vae.register_to_config(shift_factor=0.0)  # this pipeline adds it without asking whether it is there
    transformer.set_attn_processor(JointAttnProcessor2_0())
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=build_scheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class NullAttention:
    """Run joint attention whose last text token counts as many, by `null_bias` [batch] added to its logits.

    Only for training: written out, because on a CPU in bfloat16 that is twice as fast as the fused kernel's backward.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        null_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the image rows [batch, image, width] and the text rows [batch, text, width]."""
        assert null_bias is not None

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        rows = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q2, k2, v2 = (heads(f(encoder_hidden_states)) for f in rows)
        q = torch.cat([attn.norm_q(q), attn.norm_added_q(q2)], 2)
        k = torch.cat([attn.norm_k(k), attn.norm_added_k(k2)], 2)
        v = torch.cat([v, v2], 2)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.to(v.dtype) * q.shape[-1] ** -0.5) @ k.to(v.dtype).mT
            bias = torch.zeros(len(logits), 1, 1, logits.shape[-1], dtype=v.dtype, device=v.device)
            bias[..., -1] = null_bias[:, None, None]
            out = (logits + bias).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        image, text = out.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def draw_levels(generator: torch.Generator, n: int, centre: float) -> Tensor:
    """Draw `n` noise levels, 0..1: logit-normal around `centre`, uniform for a tenth; stratified."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999))
    uniform = torch.rand(2, n, generator=generator)
    return torch.where(uniform[0] < 0.1, uniform[1], torch.sigmoid(centre + normal))


class Flow:
    """The training loss of mmdit: velocity of the straight path from noise to latent, a tenth of the prompts empty.

    The noise level is logit-normal (arXiv 2403.03206) around the middle of `build_scheduler`'s steps, and uniform for a
    tenth of the samples, so that both ends are seen.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        latents: Latents,
        *,
        batch: int = 32,
        pairs: float | list[tuple[int, float]] = 0.125,
        drop: float = 0.1,
        bf16: bool = True,
    ) -> None:
        self.transformer, self.text_encoder, self.latents = transformer, text_encoder, latents
        self.batch, self.drop, self.bf16 = batch, drop, bf16
        self.pairs = [(0, pairs)] if isinstance(pairs, float) else list(pairs)
        self.device = next(transformer.parameters()).device
        self.ids = encode_captions(tokenizer, [*latents.captions, ""])
        self.centre = math.log(build_scheduler().config.shift)
        transformer.set_attn_processor(NullAttention())

    def levels(self, generator: torch.Generator) -> Tensor:
        """Draw the batch's noise levels, 0..1; stratified, which leaves their distribution as it is."""
        return draw_levels(generator, self.batch, self.centre)

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens as the pipeline does: [batch, 16 + one null token, 192] and the pooled [batch, 192]."""
        out = self.text_encoder(ids, output_hidden_states=True)
        words, pooled = out.hidden_states[-2], out.text_embeds
        words = torch.cat([words, words], -1)
        return torch.cat([words, torch.zeros_like(words[:, :1])], 1), torch.cat([pooled, pooled], -1)

    def __call__(self, generator: torch.Generator, step: int) -> Tensor:
        """Return the loss of one batch drawn from `generator`; the share of pairs is the last one due at `step`."""
        share = [share for first, share in self.pairs if first <= step][-1]
        index = self.latents.draw(generator, self.batch, share)
        x = self.latents.values[index].float()
        dropped = torch.rand(self.batch, generator=generator) < self.drop
        ids = torch.where(dropped[:, None], self.ids[-1], self.ids[index])
        noise = torch.randn(x.shape, generator=generator)
        level = self.levels(generator)
        null = torch.where(torch.rand(self.batch, generator=generator) < 0.5, math.log(NULL_TOKENS), _NEVER)
        s = level[:, None, None, None]
        noisy, target = (1 - s) * x + s * noise, noise - x
        # Drawn on the CPU, so that a seed means the same everywhere.
        ids, noisy, target, level, null = (a.to(self.device) for a in (ids, noisy, target, level, null))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            text, pooled = self.text(ids)
            v = self.transformer(
                noisy, text, pooled, level * 1000, joint_attention_kwargs={"null_bias": null}, return_dict=False
            )[0]
        return (v.float() - target).square().mean()
