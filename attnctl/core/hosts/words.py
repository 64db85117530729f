"""Words of a prompt as places in the text that attention sees.

Every text encoder cuts a prompt into tokens its own way, and every pipeline lays the encoders' tokens out its own way:
SDXL's two CLIPs share their places, SD3 appends T5's tokens to CLIP's, FLUX attends to T5 alone. `row_words` answers
with the places of words for each row of a running pipeline, from what its encoders were given; `find_words` for a
prompt that no encoder has read, from the layouts of `hosts.textlayout`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.hosts.reading import Reading
from attnctl.core.hosts.textlayout import is_known, layout_readings
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["Concept", "RowText", "find_words", "given_text", "prompt_words", "row_texts", "weights", "words_in"]


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


def find_words(
    pipe: Any,
    prompt: str,
    words: Sequence[str | int],
    *,
    prompt_2: str | None = None,
    prompt_3: str | None = None,
    max_sequence_length: int | None = None,
) -> tuple[Concept, ...]:
    """Find words in a prompt that no encoder has read, as places among the text tokens of the pipeline's attention.

    Args:
        pipe: The pipeline, whose tokenizers decide.
        prompt: The prompt.
        words: Words, phrases or places: see `words_in`.
        prompt_2: What the second tokenizer reads, if it differs.
        prompt_3: What the third tokenizer reads, if it differs.
        max_sequence_length: The call's own, where it was given.

    Raises:
        ConfigError: A word is not in the prompt, or was cut off with its end; a place is the first token's, or past
            the end.
        UnsupportedModelError: The pipeline has no tokenizer, or lays its text out in a way that is not known here.
    """
    _check_words(words)
    if all(_is_place(w) for w in words) and not is_known(pipe):
        return tuple(_bare_place(int(w)) for w in words)
    return words_in(layout_readings(pipe, (prompt, prompt_2, prompt_3), max_sequence_length), words)


def words_in(readings: Sequence[Reading], words: Sequence[str | int]) -> tuple[Concept, ...]:
    """Find words in a prompt as its encoders read it.

    A word is matched whole and whatever its case; a phrase may span several words. A word that occurs several times
    means all its occurrences together; "cat#2" means the second alone. A whole number is a place itself. Where a prompt
    does not hold these words itself, "<start>" and "<end>" are the tokens that mark its ends, and "<pad>" is what fills
    the rest.

    Raises:
        ConfigError: A word is not in the prompt, or was cut off with its end; a place is the first token's, or past
            the end.
    """
    _check_words(words)
    return tuple(_place(int(w), readings) if _is_place(w) else _find(str(w), readings) for w in words)


def _check_words(words: Any) -> None:
    if isinstance(words, (str, int)):
        raise ConfigError(f"words={words!r}: give a list of words, such as [{words!r}].")
    if not words:
        raise ConfigError("words is empty: give at least one word of the prompt.")


# Words of each row of a call ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowText:
    """The text of one row of a denoiser call.

    Attributes:
        prompt: The prompt; empty where the pipeline was given embeddings and the control no prompt.
        number: Which prompt of the call it is.
        readings: What the encoders were given; None where no encoder ran, or what it read cannot be told.
        options: The call's own options for `find_words`.
        given: Whether there is a prompt at all, an empty one included.
    """

    prompt: str
    number: int
    readings: tuple[Reading, ...] | None
    options: dict[str, Any]
    given: bool = True

    def find(self, pipe: Any, words: Sequence[str | int], n_text: int | None, what: str) -> tuple[Concept, ...]:
        """Find words in this row's prompt.

        Args:
            pipe: The pipeline, or None for a bare denoiser.
            words: Words, phrases or places.
            n_text: Text tokens that the denoiser was given, where that can be told.
            what: The control that asks, for messages.

        Raises:
            ConfigError: A word is not there, or the prompt is not known.
            UnsupportedModelError: The pipeline's way from text to attention is not known.
        """
        if self.readings is not None:
            return words_in(self.readings, words)
        if all(_is_place(w) for w in words):  # attention itself shows how many there are
            return tuple(_bare_place(int(w)) for w in words)
        if pipe is None:
            raise ConfigError(
                f"{what}: the prompt is not known, and a bare denoiser has no tokenizer, so words cannot be found: "
                "give words as places of text tokens (whole numbers)."
            )
        if not self.given:
            raise ConfigError(
                f"{what}: the prompt is not known (the pipeline was called with embeddings), so words cannot be found "
                "in it. Pass prompt=..., or words as places of text tokens."
            )
        readings = layout_readings(
            pipe,
            (self.prompt, self.options.get("prompt_2"), self.options.get("prompt_3")),
            self.options.get("max_sequence_length"),
        )
        laid = max(r.total for r in readings)
        if n_text is not None and n_text > laid:
            raise ConfigError(
                f"{what}: the denoiser was given {n_text} text tokens, where {type(pipe).__name__} makes {laid} of a "
                "prompt: these embeddings were made in another way (long prompts in chunks, say), so words cannot be "
                "found in them. Give words as places of text tokens."
            )
        return words_in(readings, words)


def row_texts(
    call: PromptCall | None,
    count: int,
    what: str,
    *,
    prompt: Any = None,
    negative: bool = False,
    lists: int | None = None,
) -> list[RowText]:
    """Return the text of each of a call's rows that carry the prompt (or, if asked, the negative one).

    Args:
        call: The texts of the pipeline's call, or None where it was given embeddings.
        count: Rows.
        what: The control that asks, for messages.
        prompt: A prompt, or one for each sample, that was given to the control.
        negative: Whether the rows carry the negative prompt.
        lists: For how many prompts the control has lists of words, where it has one for each.

    Raises:
        ConfigError: The call has no negative prompt, or another number of prompts than there are lists.
        UnsupportedModelError: The rows are not those of the prompts.
    """
    readings: Sequence[tuple[Reading, ...]] | None = None
    images = 1
    options: dict[str, Any] = {}
    if call is not None and call.max_sequence_length is not None:
        options["max_sequence_length"] = call.max_sequence_length
    if prompt is not None:
        texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    elif call is None:  # embeddings: a control's lists alone say how many prompts there are
        many = lists or 1
        if count % many:
            raise ConfigError(f"{what}: words for {many} prompts do not fit {count} images.")
        return [RowText("", n // (count // many), None, options, given=False) for n in range(count)]
    elif negative and call.negatives is None:
        raise ConfigError(f'{what}: rows="uncond" was asked for, but the call has no negative prompt.')
    else:
        texts, readings = (call.negatives or (), call.negative_readings) if negative else (call.prompts, call.readings)
        images = call.images
    if lists is not None and lists != len(texts):
        raise ConfigError(f"{what}: words has lists for {lists} prompts, but there are {len(texts)}.")
    expected = len(texts) * images
    if prompt is None and expected != count and len(set(texts)) == 1:  # FreeNoise says one prompt for several frames
        texts, images, expected = texts[:1], count, count
    if prompt is not None and count % len(texts):
        raise ConfigError(
            f"{what}: {count} rows for {len(texts)} prompts do not fit: give one prompt, or one an image."
        )
    if prompt is None and expected != count:
        raise UnsupportedModelError(
            f"{what}: the denoiser was called with {count} rows for {len(texts)} prompts with {images} images each: an "
            "unknown row layout."
        )
    rows = []
    for n, text in enumerate(texts):
        second = {}
        if call is not None and prompt is None and not negative:
            given = {"prompt_2": call.prompts_2, "prompt_3": call.prompts_3}
            second = {name: many[n] for name, many in given.items() if many}
        row = RowText(text, n, None if readings is None else readings[n], options | second)
        rows += [row] * (count // len(texts))  # pipelines repeat each prompt in place
    return rows


def given_text(bound: Mapping[str, Any]) -> int | None:
    """Count the text tokens that a denoiser was called with, or return None where its arguments do not say."""
    text = bound.get("encoder_hidden_states")
    return int(text.shape[1]) if isinstance(text, torch.Tensor) and text.ndim == 3 else None


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


# Finding words ------------------------------------------------------------------------------------------------


def _find(word: str, readings: Sequence[Reading]) -> Concept:
    if not word.strip():
        raise ConfigError("A word is empty: give a word of the prompt.")
    there = any(r.occurrences(word) for r in readings)
    if word in _MARKS and not there:
        return _mark(word, readings)
    name, number = word, None
    if not there and (m := re.fullmatch(r"(.+)#(\d+)", word, re.DOTALL)):
        name, number = m[1], int(m[2])
    positions: dict[int, str] = {}
    cut: Reading | None = None
    for r in readings:
        spans = r.occurrences(name)
        if number is not None and spans:
            if not 1 <= number <= len(spans):
                times, give = (
                    ("once", f"{name!r}")
                    if len(spans) == 1
                    else (f"{len(spans)} times", f"'{name}#1' to '{name}#{len(spans)}'")
                )
                raise ConfigError(f"{word!r}: {name!r} occurs {times} in the prompt {r.prompt_text!r}. Give {give}.")
            spans = [spans[number - 1]]
        parts = [r.at(span) for span in spans]
        if any(not part or r.misses(part, span) for part, span in zip(parts, spans, strict=True)):
            cut = r
            continue
        for i in (i for part in parts for i in part):
            place = r.places[i]
            assert place is not None
            positions.setdefault(place, r.tokens[i])  # two CLIPs share their places: the first speaks for both
    if positions:
        return Concept(word, tuple(positions), tuple(positions.values()))
    if cut is not None:
        raise ConfigError(
            f"{word!r} is cut off: the prompt has {cut.full} tokens, and {cut.name} keeps {cut.limit}. "
            "Shorten the prompt, or move the word to its front."
        )
    listed = list(dict.fromkeys(w for r in readings for w in prompt_words(r.prompt_text)))
    close = difflib.get_close_matches(name.lower(), listed, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, close))}?" if close else f"Its words: {', '.join(listed) or 'none'}."
    raise ConfigError(f"{word!r} is not in the prompt {readings[0].prompt_text!r}. {hint}")


_MARKS = ("<start>", "<end>", "<pad>")


def _mark(name: str, readings: Sequence[Reading]) -> Concept:
    places = tuple(dict.fromkeys(p for r in readings for p in r.marked(name)))
    if not places:
        raise ConfigError(f"No token is {name} here: the tokenizer sets none, or the prompt leaves no room for it.")
    return Concept(name, places, (name,) * len(places))


def _is_place(word: Any) -> bool:
    if isinstance(word, bool) or not isinstance(word, (str, int)):
        raise ConfigError(f"{word!r} is neither a word of the prompt nor the place of a token (a whole number).")
    return isinstance(word, int)


def _bare_place(place: int) -> Concept:
    if place < 0:
        raise ConfigError(f"Place {place} is negative: the places of text tokens count from 0.")
    return Concept(str(place), (place,))


def _place(place: int, readings: Sequence[Reading]) -> Concept:
    bare = _bare_place(place)
    for r in readings:
        worded = [p for p, mark in zip(r.places, r.marks, strict=True) if p is not None and not mark]
        if place in r.places:
            i = r.places.index(place)
            if r.marks[i] and (not worded or place < worded[0]):
                raise ConfigError(
                    f"Place {place} is the start token, which stands for no word. The words begin at {place + 1}."
                )
            if not r.marks[i] or place < worded[-1]:
                return Concept(str(place), (place,), (r.tokens[i],))
        if place in r.places or place in r.pads:
            raise ConfigError(
                f"Place {place} is past the end of the prompt, whose last word ends at place "
                f"{worded[-1] if worded else 0}; what follows are end and padding tokens."
            )
    most = max(r.total for r in readings)
    if place < most:
        return bare
    raise ConfigError(f"Place {place} is past the end: attention sees {most} text tokens, 0 to {most - 1}.")
