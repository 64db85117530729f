"""Words of a prompt as places in the text that attention sees.

Every text encoder cuts a prompt into tokens its own way, and every pipeline lays the encoders' tokens out its own way:
SDXL's two CLIPs share their places, SD3 appends T5's tokens to CLIP's, FLUX attends to T5 alone. `find_words` answers
with the places of a word in that layout, all encoders' copies together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.core.hosts.textlayout import TextPart, is_known, text_parts
from attnctl.errors import ConfigError

__all__ = ["Concept", "find_words", "prompt_words", "weights"]


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
    """Find words in a prompt, as places among the text tokens of the pipeline's attention.

    A word is matched whole and whatever its case; a phrase may span several words. A word that occurs several times
    means all its occurrences together; "cat#2" means the second alone. A whole number is a place itself. Where a prompt
    does not hold these words itself, "<start>" and "<end>" are the tokens that mark its ends, and "<pad>" is what fills
    the rest.

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
    if all(_is_place(w) for w in words) and not is_known(pipe):
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

    def marks(self, name: str) -> list[int]:
        """Return the places of the tokens that stand for no text: "<start>", "<end>" or "<pad>"."""
        special = set(getattr(self.part.tokenizer, "all_special_ids", ()))
        if name == "<start>":
            return [0] if len(self.ids) > 1 and self.ids[0] in special else []
        end = min(len(self.ids), self.part.length) - 1
        if name == "<end>":
            return [end] if self.ids and self.ids[-1] in special else []
        return list(range(end + 1, self.part.length))

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
    if word in _MARKS and not any(r.occurrences(word) for r in read):
        return _mark(word, read)
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


_MARKS = ("<start>", "<end>", "<pad>")


def _mark(name: str, read: Sequence[_Read]) -> Concept:
    places = tuple(dict.fromkeys(r.part.offset + p for r in read for p in r.marks(name)))
    if not places:
        raise ConfigError(f"No token is {name} here: the tokenizer sets none, or the prompt leaves no room for it.")
    return Concept(name, places, (name,) * len(places))


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
