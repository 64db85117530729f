"""How pipelines lay the tokens of their text encoders out, in one table: for prompts that no encoder has read.

A pipeline that runs shows by itself what its encoders are given (`hosts.encoding`). The table is for calls with
embeddings, whose prompt is told to the control, and for words that are looked for before a run. A new pipeline whose
prompts reach attention as they are is a line in `_LAYOUTS`. Those that wrap the prompt in a template have no line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.hosts.reading import Reading, token_spans
from attnctl.errors import UnsupportedModelError

__all__ = ["TextPart", "is_known", "layout_readings", "text_before", "text_parts"]


@dataclass(frozen=True)
class TextPart:
    """One tokenizer's part of the text that attention sees.

    Attributes:
        tokenizer: The tokenizer.
        name: The pipeline's name for it.
        prompt: Which of the pipeline's prompts it reads: 1 for `prompt`, 2 for `prompt_2`.
        offset: Place of its first token.
        length: Most tokens that it keeps, special ones included.
        clean: Whether the pipeline cleans the prompt first, at least to lower case.
    """

    tokenizer: Any
    name: str
    prompt: int
    offset: int
    length: int
    clean: bool = False


def _clips(pipe: Any, given: int | None) -> list[TextPart]:
    """Stable Diffusion 1, 2, XL: one or two CLIPs, whose embeddings are joined channel by channel.

    Other UNets read with other tokenizers, of the call's own length: Kolors with ChatGLM's.
    """
    names = [n for n in ("tokenizer", "tokenizer_2") if getattr(pipe, n, None) is not None]
    parts = []
    for i, name in enumerate(names, 1):
        tokenizer = getattr(pipe, name)
        length = _limit(tokenizer)
        if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
            length = given or _asked(pipe, length)
        parts.append(TextPart(tokenizer, name, i, 0, length, callable(getattr(pipe, "_text_preprocessing", None))))
    return parts


def _sd3(pipe: Any, given: int | None) -> list[TextPart]:
    clip = int(getattr(pipe, "tokenizer_max_length", 77))
    parts = [
        TextPart(getattr(pipe, n), n, i, 0, clip)
        for i, n in enumerate(("tokenizer", "tokenizer_2"), 1)
        if getattr(pipe, n, None) is not None
    ]
    # Without the third encoder the pipeline appends zeros, which no word stands for.
    if getattr(pipe, "tokenizer_3", None) is not None and getattr(pipe, "text_encoder_3", None) is not None:
        parts.append(TextPart(pipe.tokenizer_3, "tokenizer_3", 3, clip, given or _asked(pipe, 256)))
    return parts


def _flux(pipe: Any, given: int | None) -> list[TextPart]:
    # CLIP gives FLUX its pooled vector only.
    if getattr(pipe, "tokenizer_2", None) is None:
        return []
    return [TextPart(pipe.tokenizer_2, "tokenizer_2", 2, 0, given or _asked(pipe, 512))]


def _hunyuan_dit(pipe: Any, given: int | None) -> list[TextPart]:
    bert = int(getattr(pipe, "tokenizer_max_length", 77))
    parts = [TextPart(pipe.tokenizer, "tokenizer", 1, 0, bert)] if pipe.tokenizer is not None else []
    if getattr(pipe, "tokenizer_2", None) is not None:
        parts.append(TextPart(pipe.tokenizer_2, "tokenizer_2", 1, bert, 256))
    return parts


def _single(length: int, *, clean: bool = False) -> Callable[[Any, int | None], list[TextPart]]:
    def parts(pipe: Any, given: int | None) -> list[TextPart]:
        if getattr(pipe, "tokenizer", None) is None:
            return []
        return [TextPart(pipe.tokenizer, "tokenizer", 1, 0, given or _asked(pipe, length), clean)]

    return parts


def _aura_flow(pipe: Any, given: int | None) -> list[TextPart]:
    return [TextPart(p.tokenizer, p.name, 1, text_before(pipe), p.length) for p in _single(256)(pipe, given)]


_LAYOUTS: dict[str, Callable[[Any, int | None], list[TextPart]]] = {
    "UNet2DConditionModel": _clips,
    "UNetMotionModel": _clips,
    "UNet3DConditionModel": _clips,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _single(512),
    "PixArtTransformer2DModel": _single(300, clean=True),
    "HunyuanDiT2DModel": _hunyuan_dit,
    "AuraFlowTransformer2DModel": _aura_flow,
    "LatteTransformer3DModel": _single(120, clean=True),
    "AllegroTransformer3DModel": _single(512, clean=True),
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


def layout_readings(
    pipe: Any, prompts: Sequence[str | None], max_sequence_length: int | None = None
) -> tuple[Reading, ...]:
    """Read a prompt with a pipeline's tokenizers, as its layout lays the tokens out.

    Args:
        pipe: The pipeline.
        prompts: The prompt, and what the second and the third tokenizer read, if that differs.
        max_sequence_length: The call's own, where it was given.

    Raises:
        UnsupportedModelError: The pipeline has no tokenizer, or its layout is not known.
    """
    return tuple(
        _laid_out(pipe, part, prompts[part.prompt - 1] or prompts[0] or "")
        for part in text_parts(pipe, max_sequence_length)
    )


def _laid_out(pipe: Any, part: TextPart, prompt: str) -> Reading:
    tokenizer = part.tokenizer
    convert = getattr(pipe, "maybe_convert_prompt", None)

    def converted(text: str) -> str:
        return text if convert is None else str(convert(text, tokenizer))

    text = converted(_cleaned(pipe, prompt) if part.clean else prompt)
    ids, spans = token_spans(tokenizer, text)
    # Where the text is cut, its end marker takes the last place.
    cut = len(ids) > part.length
    count = part.length - 1 if cut else len(ids)
    places = list(range(part.offset, part.offset + count))
    pads = list(range(part.offset + count, part.offset + part.length))
    if cut:
        ids, spans = [*ids[:count], ids[-1]], [*spans[:count], (0, 0)]
        places, pads = [*places, part.offset + count], []
    elif getattr(tokenizer, "padding_side", "right") == "left":
        places, pads = [p + part.length - count for p in places], [p - count for p in pads]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return Reading(
        name=part.name,
        text=text,
        prompt=(0, len(text)),
        tokens=tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in ids),
        spans=tuple(spans),
        places=tuple(places),
        marks=tuple(i in special and span == (0, 0) for i, span in zip(ids, spans, strict=True)),
        pads=tuple(pads),
        total=part.offset + part.length,
        limit=part.length,
        full=len(token_spans(tokenizer, text)[0]) if cut else len(ids),
        convert=converted,
    )


def _cleaned(pipe: Any, prompt: str) -> str:
    """Clean a prompt as the pipeline does before it tokenises."""
    clean = getattr(pipe, "_text_preprocessing", None)
    if clean is None:
        return prompt.lower().strip()
    options = {}
    if "clean_caption" in inspect.signature(clean).parameters:
        given = inspect.signature(type(pipe).__call__).parameters.get("clean_caption")
        options["clean_caption"] = bool(given is not None and given.default is True)
    made = clean(prompt, **options)
    return str(made[0] if isinstance(made, (list, tuple)) else made)


def text_before(pipe: Any) -> int:
    """Count the learnt tokens that a pipeline's denoiser puts in front of its text."""
    registers = getattr(next(iter(denoisers_of(pipe).values())), "register_tokens", None)
    return 0 if registers is None else int(registers.shape[1])


def _limit(tokenizer: Any) -> int:
    length = int(tokenizer.model_max_length)
    return 77 if length > 100_000 else length  # a tokenizer without a limit of its own says 10^30


def _asked(pipe: Any, default: int) -> int:
    """Return the `max_sequence_length` that the pipeline's call has by default."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    value = None if parameter is None else parameter.default
    return value if isinstance(value, int) else default
