"""Which text tokens of two prompts exchange attention, from how a pipeline's encoders read them.

Transformers read prompts with other tokenizers than CLIP's, in templates, with several encoders behind each other. A
reading (`attnctl.core.hosts.reading`) says of every token where attention sees it; tokens of one encoder correspond to
tokens of the same encoder alone, so the column map R of two encoders is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.reading import Reading
from attnctl.core.hosts.textlayout import layout_readings
from attnctl.core.hosts.words import RowText, words_in
from attnctl.errors import ConfigError, UnsupportedModelError, window
from attnctl.processors.editing.align import follow_table, refine_map, replace_matrix
from attnctl.processors.editing.fusion import CrossEdit
from attnctl.processors.editing.prompts import WordEdit

__all__ = ["Exchange", "check_reads", "read_row"]


def check_reads(pipe: Any, what: str) -> None:
    """Refuse a pipeline without a tokenizer, whose prompts have no words.

    Raises:
        UnsupportedModelError: It has none, or there is no pipeline.
    """
    names = ("tokenizer", "tokenizer_2", "tokenizer_3", "processor")
    if pipe is None or all(getattr(pipe, name, None) is None for name in names):
        raise UnsupportedModelError(
            f"{what} reads its prompts with the pipeline's tokenizer, which "
            f"{'a bare model' if pipe is None else type(pipe).__name__} has not. Pass the pipeline to control()."
        )


def read_row(row: RowText, pipe: Any, what: str) -> tuple[Reading, ...]:
    """Return how a row's prompt was read by the encoders, or how the pipeline would have it read.

    Raises:
        ConfigError: The pipeline was called with embeddings, of which no words are known.
        UnsupportedModelError: The pipeline's way from text to attention is not known.
    """
    if row.readings is not None:
        return row.readings
    if not row.given or pipe is None:
        raise ConfigError(
            f"{what}: the prompt is not known (the pipeline was called with embeddings), so its words cannot be "
            "matched with the source's. Pass prompt=..."
        )
    return layout_readings(pipe, (row.prompt, None, None), row.options.get("max_sequence_length"))


@dataclass(frozen=True)
class Exchange:
    """Two prompts as the encoders of one pipeline read them.

    Attributes:
        control: The edit.
        source: The source's readings.
        target: The target's readings, by the same encoders.
    """

    control: WordEdit
    source: tuple[Reading, ...]
    target: tuple[Reading, ...]

    def __post_init__(self) -> None:
        names = [[r.name for r in side] for side in (self.source, self.target)]
        if names[0] != names[1]:
            raise ConfigError(
                f"{type(self.control).__name__}: the source's prompt was read by {', '.join(names[0])}, the target's "
                f"by {', '.join(names[1])}: their tokens cannot be matched. Run both with the same pipeline."
            )
        length = max(r.total for r in self.target)  # what does not correspond is said at once
        self.how(max(r.total for r in self.source), length)
        self.follow(1, length)
        for words, side in zip(self.control.blend_sides, (self.source, self.target), strict=True):
            if words:
                words_in(side, words)

    def how(self, of_source: int, of_target: int) -> CrossEdit:
        """Return the column map R for so many text tokens of the source and of the target."""
        take, new = torch.zeros(of_source, of_target), torch.zeros(of_target)
        placed: set[int] = set()
        for s, t in zip(self.source, self.target, strict=True):
            columns = self._columns(s, t)
            for j, place in enumerate(t.places):
                if place is None or place in placed or place >= of_target:
                    continue
                placed.add(place)
                shares = [(s.places[i], share) for i, share in columns.get(j, ())]
                for at, share in shares:
                    if at is not None and at < of_source:
                        take[at, place] = share
                if not shares:
                    new[place] = 1
        fills = {p for r in self.source for p in r.pads if p < of_source}
        last = max(fills, default=-1)
        words = {p for r in self.source for p in r.places if p is not None}
        for place in set(range(of_target)) - placed:  # padding corresponds to padding
            at = place if place < of_source and place not in words else last
            if at >= 0:
                take[at, place] = 1
            else:
                new[place] = 1
        return CrossEdit(take, new, self.weights(of_target))

    def _columns(self, s: Reading, t: Reading) -> dict[int, list[tuple[int, float]]]:
        """Return the tokens of the source, with their shares, that each token of the target is made of."""
        if self.control.mode == "refine":
            ids: dict[str, int] = {}
            numbers = [[ids.setdefault(token, len(ids)) for token in r.tokens] for r in (s, t)]
            mapper, mask = refine_map(numbers[0], numbers[1], length=max(len(numbers[0]), len(numbers[1])))
            return {
                j: [(int(mapper[j]), 1.0)] for j in range(len(t.tokens)) if mask[j] and int(mapper[j]) < len(s.tokens)
            }
        matrix = replace_matrix(
            s.prompt_text,
            t.prompt_text,
            _words(s),
            _words(t),
            max(len(s.tokens), len(t.tokens)),
            self.control.replace_tail,
        )
        columns: dict[int, list[tuple[int, float]]] = {}
        for i, j in matrix.nonzero().tolist():
            if i < len(s.tokens) and j < len(t.tokens):
                columns.setdefault(j, []).append((i, float(matrix[i, j])))
        return columns

    def weights(self, length: int) -> Tensor:
        """Return the equalizer, [length]."""
        row = torch.ones(length)
        for word, value in (self.control.equalizer or {}).items():
            places = [p for p in words_in(self.target, [word])[0].positions if p < length]
            row[places] = float(value)
        return row

    def follow(self, steps: int, length: int) -> Tensor:
        """Return w for every step of a run, [steps + 1, length] of zeros and ones."""
        windows = dict(self.control._windows)
        default = window(windows.pop("default_", 1.0), "cross_replace")
        words = {words_in(self.target, [w])[0].positions: window(v, "cross_replace") for w, v in windows.items()}
        return follow_table(steps, default, words, length)

    def blend(self, of_target: bool = False) -> tuple[int, ...]:
        """Return the places of the blend words of the source, or of the target."""
        words: Sequence[str] = self.control.blend_sides[1 if of_target else 0]
        side = self.target if of_target else self.source
        return tuple(p for concept in (words_in(side, words) if words else ()) for p in concept.positions)


def _words(r: Reading) -> list[list[int]]:
    """Return the tokens of each word of a prompt, words being what single spaces part."""
    words, at = [], r.prompt[0]
    for word in r.prompt_text.split(" "):
        words.append(r.at((at, at + len(word))))
        at += len(word) + 1
    return words
