"""The text's own stream through a transformer's joint blocks: how it begins, and what it takes to run it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.families import Family

__all__ = ["TextStream", "rotary_of_few", "text_stream"]


@dataclass(frozen=True)
class TextStream:
    """How a family's joint blocks carry the text.

    Attributes:
        layers: The layers that make text tokens of embeddings, in order, by their names in the denoiser.
        output: The place of the text among what a block returns.
        own: Whether the text has projections of its own (`add_k_proj`); else it shares the image's.
    """

    layers: tuple[str, ...] = ("context_embedder",)
    output: int = 0
    own: bool = True

    def begins(self, denoiser: torch.nn.Module, embedded: Tensor, device: torch.device) -> Tensor:
        """Make text tokens of embeddings [..., C], as the denoiser does before its first block."""
        layers: list[Any] = [denoiser.get_submodule(name) for name in self.layers]
        x = embedded.to(device, next(layers[-1].parameters()).dtype)
        for layer in layers:
            x = layer.forward(x)
        return x

    def has(self, module: Any) -> bool:
        """Tell whether an attention is one of the stream's."""
        return not self.own or getattr(module, "add_k_proj", None) is not None


_STREAMS: dict[str, TextStream] = {
    "Stable Diffusion 3, 3.5": TextStream(),
    "FLUX.1": TextStream(),
    "FLUX.2": TextStream(),
    "Qwen-Image": TextStream(("txt_norm", "txt_in")),
    "CogVideoX": TextStream(("patch_embed.text_proj",), output=1, own=False),
}


def text_stream(family: Family) -> TextStream | None:
    """Return how a family's blocks carry the text, or None where that is not known."""
    return _STREAMS.get(family.name)


def rotary_of_few(tables: Any, few: int, text: int, image: int) -> Any:
    """Cut a block's rotary tables to a few tokens at the place of the first text token, and one image token.

    Args:
        tables: (cos, sin) of text and image in one sequence [text + image, D] (FLUX), or of the image alone [image, D]
            (CogVideoX); or the complex tables of image and text (Qwen-Image).
        few: Tokens in place of the text's.
        text: Text tokens of the call.
        image: Image tokens of the call.
    """
    first, second = tables
    if first.is_complex():
        return first[:1], second[:1].expand(few, *second.shape[1:])
    if first.shape[0] == image:
        return tuple(t[:1] for t in tables)
    rows = [0] * few + [text]
    return tuple(t[rows] for t in tables)
