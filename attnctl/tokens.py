"""Words of a prompt as places in the text that attention sees.

Every text encoder cuts a prompt into tokens its own way, and every pipeline lays the encoders' tokens out its own way:
SDXL's two CLIPs share their places, SD3 appends T5's tokens to CLIP's, FLUX attends to T5 alone. `find_words` answers
with the places of a word in that layout, all encoders' copies together.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.sites import denoisers_of

__all__ = ["Concept", "TextPart", "find_words", "prompt_words", "text_parts", "weights"]


@dataclass(frozen=True)
class Concept:
    """One word, phrase or token of a prompt.

    Attributes:
        word: What was asked for: a word, a phrase, "cat#2", or the number of a token as text.
        positions: Places among the text tokens of attention, all encoders' copies.
        tokens: The tokens there, as the tokenizer writes them; empty where places were given.
    """

    word: str
    positions: tuple[int, ...]
    tokens: tuple[str, ...] = ()


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


def find_words(
    pipe: Any,
    prompt: str,
    words: Sequence[str | int],
    *,
    prompt_2: str | None = None,
    prompt_3: str | None = None,
    max_sequence_length: int | None = None,
) -> tuple[Concept, ...]:
    """Find words in a prompt, as places among the text tokens of the pipeline's attention.

    A word is matched whole and whatever its case; a phrase may span several words. A word that occurs several times
    means all its occurrences together; "cat#2" means the second alone. A whole number is a place itself.

    Args:
        pipe: The pipeline, whose tokenizers decide.
        prompt: The prompt.
        words: Words, phrases or places.
        prompt_2: What the second tokenizer reads, if it differs.
        prompt_3: What the third tokenizer reads, if it differs.
        max_sequence_length: The call's own, where it was given.

    Raises:
        ConfigError: A word is not in the prompt, or was cut off with its end; a place is the first token's, or past
            the end.
        UnsupportedModelError: The pipeline has no tokenizer, or lays its text out in a way that is not known here.
    """
    if isinstance(words, (str, int)):
        raise ConfigError(f"words={words!r}: give a list of words, such as [{words!r}].")
    if not words:
        raise ConfigError("words is empty: give at least one word of the prompt.")
    prompts = {1: prompt, 2: prompt_2 or prompt, 3: prompt_3 or prompt}
    if all(_is_place(w) for w in words) and not _known(pipe):
        return tuple(_place(int(w), None) for w in words)
    parts = text_parts(pipe, max_sequence_length)
    read = [_Read(part, prompts[part.prompt], pipe) for part in parts]
    return tuple(_place(int(w), read) if _is_place(w) else _find(str(w), read) for w in words)


def weights(concepts: Sequence[Concept], n_text: int) -> torch.Tensor:
    """Write concepts as columns of `kernels.columns`: the mean over each concept's tokens, [n_text, C] float32.

    Raises:
        ConfigError: A concept lies past the end of the text.
    """
    out = torch.zeros(n_text, len(concepts))
    for column, concept in enumerate(concepts):
        if not concept.positions or not 0 <= min(concept.positions) <= max(concept.positions) < n_text:
            raise ConfigError(
                f"{concept.word!r} stands at places {concept.positions}, but attention sees {n_text} text tokens, "
                f"0 to {n_text - 1}."
            )
        out[list(concept.positions), column] = 1 / len(concept.positions)
    return out


def prompt_words(prompt: str) -> tuple[str, ...]:
    """List the different words of a prompt, in order."""
    return tuple(dict.fromkeys(m.group().lower() for m in _WORD.finditer(prompt)))


_WORD = re.compile(r"\w(?:[\w'’-]*\w)?")


# How pipelines lay their text out ------------------------------------------------------------------------------


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


def _known(pipe: Any) -> bool:
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


# Finding words ------------------------------------------------------------------------------------------------


class _Read:
    """A prompt as one tokenizer reads it: token texts and the characters that each stands for."""

    def __init__(self, part: TextPart, prompt: str, pipe: Any) -> None:
        self.part, self.pipe = part, pipe
        self.text = self.converted(prompt.lower().strip() if part.lower else prompt)
        tokenizer = part.tokenizer
        if getattr(tokenizer, "is_fast", False):
            made = tokenizer(self.text, return_offsets_mapping=True, truncation=False, verbose=False)
            self.ids, self.spans = list(made["input_ids"]), [tuple(s) for s in made["offset_mapping"]]
        else:
            self.ids = list(tokenizer(self.text, truncation=False)["input_ids"])
            self.spans = _decoded_spans(tokenizer, self.ids, self.text)
        # Where the text is cut, its end marker takes the last place.
        self.kept = len(self.ids) if len(self.ids) <= part.length else part.length - 1

    def converted(self, text: str) -> str:
        """Write a textual inversion's placeholder as the tokens that it stands for."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return text if convert is None else convert(text, self.part.tokenizer)

    def occurrences(self, word: str) -> list[tuple[int, int]]:
        """Return the characters of each occurrence of a whole word or phrase."""
        words = self.converted(word).split()
        if not words:
            return []
        body = r"\s+".join(re.escape(w) for w in words)
        start = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
        end = r"(?!\w)" if re.match(r".*\w$", words[-1], re.DOTALL) else ""
        return [m.span() for m in re.finditer(start + body + end, self.text, re.IGNORECASE)]

    def places(self, span: tuple[int, int]) -> list[int]:
        """Return the tokens that overlap some characters."""
        start, stop = span
        return [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start and self.text[a:b].strip()]


def _decoded_spans(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Find the characters of each token where a tokenizer does not tell, by decoding and aligning."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    solid = [i for i, c in enumerate(text) if not c.isspace()]  # tokenizers treat blanks as they please
    spans: list[tuple[int, int]] = []
    body: list[int] = []
    done = 0
    for n, token in enumerate(ids):
        if token in special and (not body or n >= len(ids) - 1 or done >= len(solid)):
            spans.append((0, 0))
            continue
        body.append(token)
        count = min(len("".join(tokenizer.decode(body).split())), len(solid))
        # Bytes of one character: those after the first add no character.
        first, done = (done if count > done else max(done - 1, 0)), max(done, count)
        spans.append((solid[first], solid[done - 1] + 1) if done > first else (0, 0))
    return spans


def _find(word: str, read: Sequence[_Read]) -> Concept:
    if not word.strip():
        raise ConfigError("A word is empty: give a word of the prompt.")
    name, number = word, None
    if not any(r.occurrences(word) for r in read) and (m := re.fullmatch(r"(.+)#(\d+)", word, re.DOTALL)):
        name, number = m[1], int(m[2])
    positions: dict[int, str] = {}
    cut: _Read | None = None
    for r in read:
        spans = r.occurrences(name)
        if number is not None and spans:
            if not 1 <= number <= len(spans):
                times, give = (
                    ("once", f"{name!r}")
                    if len(spans) == 1
                    else (f"{len(spans)} times", f"'{name}#1' to '{name}#{len(spans)}'")
                )
                raise ConfigError(f"{word!r}: {name!r} occurs {times} in the prompt {r.text!r}. Give {give}.")
            spans = [spans[number - 1]]
        places = [p for span in spans for p in r.places(span)]
        if any(p >= r.kept for p in places):
            cut = r
            continue
        for p in places:
            positions[r.part.offset + p] = str(r.part.tokenizer.convert_ids_to_tokens(r.ids[p]))
    if positions:
        return Concept(word, tuple(positions), tuple(positions.values()))
    if cut is not None:
        raise ConfigError(
            f"{word!r} is cut off: the prompt has {len(cut.ids)} tokens, and {cut.part.name} keeps {cut.part.length}. "
            "Shorten the prompt, or move the word to its front."
        )
    known = list(dict.fromkeys(w for r in read for w in prompt_words(r.text)))
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, close))}?" if close else f"Its words: {', '.join(known) or 'none'}."
    raise ConfigError(f"{word!r} is not in the prompt {read[0].text!r}. {hint}")


def _is_place(word: Any) -> bool:
    if isinstance(word, bool) or not isinstance(word, (str, int)):
        raise ConfigError(f"{word!r} is neither a word of the prompt nor the place of a token (a whole number).")
    return isinstance(word, int)


def _place(place: int, read: Sequence[_Read] | None) -> Concept:
    if place < 0:
        raise ConfigError(f"Place {place} is negative: the places of text tokens count from 0.")
    if read is None:
        return Concept(str(place), (place,))
    for r in read:
        index = place - r.part.offset
        if not 0 <= index < r.part.length:
            continue
        special = set(getattr(r.part.tokenizer, "all_special_ids", ()))
        if index == 0 and r.ids and r.ids[0] in special:
            raise ConfigError(
                f"Place {place} is the start token, which stands for no word. The words begin at {place + 1}."
            )
        end = next((i for i in range(r.kept - 1, -1, -1) if r.spans[i] != (0, 0)), 0)
        if index > end:
            raise ConfigError(
                f"Place {place} is past the end of the prompt, whose last word ends at place {r.part.offset + end}; "
                "what follows are end and padding tokens."
            )
        token = str(r.part.tokenizer.convert_ids_to_tokens(r.ids[index]))
        # Two CLIPs share their places: the first speaks for both.
        return Concept(str(place), (place,), (token,))
    most = max(r.part.offset + r.part.length for r in read)
    raise ConfigError(f"Place {place} is past the end: attention sees {most} text tokens, 0 to {most - 1}.")
