"""How pipelines lay the tokens of their text encoders out, in one table.

A new pipeline whose prompts reach attention as they are is a line in `_LAYOUTS`. Those that wrap the prompt in a
template have no line: their words cannot be found, and places among the text tokens are asked for instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnctl.core.hosts.listing import denoisers_of
from attnctl.errors import UnsupportedModelError

__all__ = ["TextPart", "is_known", "text_parts"]


@dataclass(frozen=True)
class TextPart:
    """One tokenizer's part of the text that attention sees.

    Attributes:
        tokenizer: The tokenizer.
        name: The pipeline's name for it.
        prompt: Which of the pipeline's prompts it reads: 1 for `prompt`, 2 for `prompt_2`.
        offset: Place of its first token.
        length: Most tokens that it keeps, special ones included.
        lower: Whether the pipeline lowers the case of the prompt first.
    """

    tokenizer: Any
    name: str
    prompt: int
    offset: int
    length: int
    lower: bool = False


def _clips(pipe: Any, asked: int | None) -> list[TextPart]:
    """Stable Diffusion 1, 2, XL: one or two CLIPs, whose embeddings are joined channel by channel."""
    names = [n for n in ("tokenizer", "tokenizer_2") if getattr(pipe, n, None) is not None]
    return [TextPart(t := getattr(pipe, n), n, i, 0, _limit(t)) for i, n in enumerate(names, 1)]


def _sd3(pipe: Any, asked: int | None) -> list[TextPart]:
    clip = int(getattr(pipe, "tokenizer_max_length", 77))
    parts = [
        TextPart(getattr(pipe, n), n, i, 0, clip)
        for i, n in enumerate(("tokenizer", "tokenizer_2"), 1)
        if getattr(pipe, n, None) is not None
    ]
    # Without the third encoder the pipeline appends zeros, which no word stands for.
    if getattr(pipe, "tokenizer_3", None) is not None and getattr(pipe, "text_encoder_3", None) is not None:
        parts.append(TextPart(pipe.tokenizer_3, "tokenizer_3", 3, clip, asked or _asked(pipe, 256)))
    return parts


def _flux(pipe: Any, asked: int | None) -> list[TextPart]:
    # CLIP gives FLUX its pooled vector only.
    if getattr(pipe, "tokenizer_2", None) is None:
        return []
    return [TextPart(pipe.tokenizer_2, "tokenizer_2", 2, 0, asked or _asked(pipe, 512))]


def _hunyuan_dit(pipe: Any, asked: int | None) -> list[TextPart]:
    bert = int(getattr(pipe, "tokenizer_max_length", 77))
    parts = [TextPart(pipe.tokenizer, "tokenizer", 1, 0, bert)] if pipe.tokenizer is not None else []
    if getattr(pipe, "tokenizer_2", None) is not None:
        parts.append(TextPart(pipe.tokenizer_2, "tokenizer_2", 1, bert, 256))
    return parts


def _single(length: int, *, lower: bool = False) -> Callable[[Any, int | None], list[TextPart]]:
    def parts(pipe: Any, asked: int | None) -> list[TextPart]:
        if getattr(pipe, "tokenizer", None) is None:
            return []
        return [TextPart(pipe.tokenizer, "tokenizer", 1, 0, asked or _asked(pipe, length), lower)]

    return parts


def _aura_flow(pipe: Any, asked: int | None) -> list[TextPart]:
    registers = int(pipe.transformer.register_tokens.shape[1])  # learnt tokens that stand before the text
    found = _single(256)(pipe, asked)
    return [TextPart(p.tokenizer, p.name, 1, registers, p.length) for p in found]


_LAYOUTS: dict[str, Callable[[Any, int | None], list[TextPart]]] = {
    "UNet2DConditionModel": _clips,
    "UNetMotionModel": _clips,
    "UNet3DConditionModel": _clips,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _single(512),
    "PixArtTransformer2DModel": _single(300, lower=True),
    "HunyuanDiT2DModel": _hunyuan_dit,
    "AuraFlowTransformer2DModel": _aura_flow,
    "LatteTransformer3DModel": _single(120, lower=True),
    "AllegroTransformer3DModel": _single(512, lower=True),
    "CogVideoXTransformer3DModel": _single(226),
    "WanTransformer3DModel": _single(512),
    "LTXVideoTransformer3DModel": _single(128),
    "MochiTransformer3DModel": _single(256),
    "CosmosTransformer3DModel": _single(512),
}


def is_known(pipe: Any) -> bool:
    return _layout(pipe) is not None and any(
        getattr(pipe, n, None) is not None for n in ("tokenizer", "tokenizer_2", "tokenizer_3")
    )


def _layout(pipe: Any) -> Callable[[Any, int | None], list[TextPart]] | None:
    denoiser = next(iter(denoisers_of(pipe).values()))
    return next((_LAYOUTS[c.__name__] for c in type(denoiser).__mro__ if c.__name__ in _LAYOUTS), None)


def text_parts(pipe: Any, max_sequence_length: int | None = None) -> tuple[TextPart, ...]:
    """List the tokenizers whose tokens a pipeline's attention sees, with their places.

    Raises:
        UnsupportedModelError: The pipeline has none, or its layout is not known.
    """
    name, layout = type(pipe).__name__, _layout(pipe)
    if layout is None:
        raise UnsupportedModelError(
            f"{name} wraps its prompts or lays its text out in a way that attnctl does not know, so words cannot be "
            "found in it: give places among the text tokens (whole numbers) instead of words."
        )
    parts = tuple(layout(pipe, max_sequence_length))
    if not parts:
        raise UnsupportedModelError(
            f"{name} has no tokenizer for the text that its attention sees, so words cannot be found: give places "
            "among the text tokens (whole numbers) instead of words."
        )
    return parts


def _limit(tokenizer: Any) -> int:
    length = int(tokenizer.model_max_length)
    return 77 if length > 100_000 else length  # a tokenizer without a limit of its own says 10^30


def _asked(pipe: Any, default: int) -> int:
    """Return the `max_sequence_length` that the pipeline's call has by default."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    value = None if parameter is None else parameter.default
    return value if isinstance(value, int) else default
