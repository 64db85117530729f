"""A prompt as one text encoder read it: its tokens, their characters, and where attention sees them.

Words are looked for in the text that was tokenised, by the characters that each token stands for. Upper and lower case,
composed and decomposed letters ("á" in one code point or two) and runs of blanks make no difference.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Reading", "Span", "folded", "locate", "token_spans"]

Span = tuple[int, int]
"""First and end of some characters of a text."""

# Scripts that put no blanks between words: there, a word may begin and end anywhere.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
_SPACED = rf"[^\W{_UNSPACED}]"


@dataclass(frozen=True)
class Reading:
    """A prompt as one text encoder read it.

    Attributes:
        name: The pipeline's name for the tokenizer.
        text: What was tokenised: the prompt after the pipeline's cleaning, with the template around it.
        prompt: The characters of `text` that are the prompt's own.
        tokens: The tokens as the tokenizer writes them.
        spans: The characters of `text` that each token stands for; (0, 0) for those that stand for none.
        places: Place of each token among the text tokens of attention; None where attention does not see it.
        marks: Which tokens are special (start and end marks).
        pads: Places that padding fills.
        total: Text tokens of attention up to the end of this part.
        limit: Most tokens that this encoder keeps.
        full: Tokens that the text has, with those that were cut off.
        convert: Writes a textual inversion's placeholder as the tokens that it stands for.
    """

    name: str
    text: str
    prompt: Span
    tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    places: tuple[int | None, ...]
    marks: tuple[bool, ...]
    pads: tuple[int, ...]
    total: int
    limit: int
    full: int
    convert: Callable[[str], str] = field(default=lambda text: text, compare=False)

    @property
    def prompt_text(self) -> str:
        """Return the prompt as it was tokenised."""
        return self.text[slice(*self.prompt)]

    def occurrences(self, word: str) -> list[Span]:
        """Return the characters of each occurrence of a whole word or phrase in the prompt."""
        wanted, _ = folded(self.convert(word))
        wanted = wanted.strip()
        if not wanted:
            return []
        text, spans = folded(self.text)
        start = rf"(?<!{_SPACED})" if re.match(_SPACED, wanted) else ""
        end = rf"(?!{_SPACED})" if re.match(_SPACED, wanted[-1]) else ""
        matches = [
            (spans[m.start()][0], spans[m.end() - 1][1]) for m in re.finditer(start + re.escape(wanted) + end, text)
        ]
        return [s for s in matches if s[0] >= self.prompt[0] and s[1] <= self.prompt[1]]

    def at(self, span: Span) -> list[int]:
        """Return the tokens that overlap some characters."""
        start, stop = span
        return [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start and self.text[a:b].strip()]

    def misses(self, tokens: Sequence[int], span: Span) -> bool:
        """Tell whether attention sees less than all of some characters, given their tokens."""
        cut = self.full > len(self.tokens) or self.full > self.limit
        return any(self.places[i] is None for i in tokens) or (cut and max(self.spans[i][1] for i in tokens) < span[1])

    def marked(self, name: str) -> list[int]:
        """Return the places of what stands for no text: "<start>", "<end>" or "<pad>"."""
        if name == "<pad>":
            return list(self.pads)
        seen = [i for i, place in enumerate(self.places) if place is not None]
        if not seen or (name == "<start>" and len(self.tokens) < 2):
            return []
        at = seen[0] if name == "<start>" else seen[-1]
        place = self.places[at]
        return [place] if self.marks[at] and place is not None else []


def folded(text: str) -> tuple[str, list[Span]]:
    """Write a text in lower case, composed, with single blanks; and give the characters behind each of its own."""
    out: list[str] = []
    spans: list[Span] = []
    i = 0
    while i < len(text):
        j = i + 1
        if text[i].isspace():
            while j < len(text) and text[j].isspace():
                j += 1
            made = " "
        else:
            while j < len(text) and unicodedata.combining(text[j]):
                j += 1
            made = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text[i:j]).lower())
        out.extend(made)
        spans.extend([(i, j)] * len(made))
        i = j
    return "".join(out), spans


def locate(prompt: str, text: str) -> Span | None:
    """Find a prompt in the text that was made of it, the last time where it stands there twice."""
    wanted = folded(prompt)[0].strip()
    whole, spans = folded(text)
    at = whole.rfind(wanted) if wanted else -1
    return None if at < 0 else (spans[at][0], spans[at + len(wanted) - 1][1])


def token_spans(tokenizer: Any, text: str, ids: Sequence[int] | None = None) -> tuple[list[int], list[Span]]:
    """Tokenise a text without cutting it: ids, and the characters of each token.

    Where a tokenizer gives no offsets, its tokens (or the `ids` that it made) are decoded one after another, and the
    characters counted.
    """
    if getattr(tokenizer, "is_fast", False) and ids is None:
        made = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        return list(made["input_ids"]), [(int(a), int(b)) for a, b in made["offset_mapping"]]
    ids = [int(i) for i in (tokenizer(text, truncation=False)["input_ids"] if ids is None else ids)]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    solid = [i for i, c in enumerate(text) if not c.isspace()]  # tokenizers treat blanks as they please
    spans: list[Span] = []
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
    return ids, spans
