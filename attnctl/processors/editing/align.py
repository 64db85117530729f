"""How the tokens of a source prompt and of a target prompt correspond: what prompt-to-prompt edits exchange.

"Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.1, and its released rules: a
token matrix for prompts of equally many words (`replace_matrix`), an alignment for others (`refine_map`), the steps in
which each target token follows the source (`follow_table`), and weights of target words (`equalizer_row`). Tensors are
on the CPU and in float32; position 0 is the tokenizer's start token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from attnctl.core.hosts.reading import token_spans
from attnctl.errors import ConfigError

__all__ = [
    "Tail",
    "equalizer_row",
    "follow_table",
    "prompt_ids",
    "refine_map",
    "replace_matrix",
    "word_tokens",
]

Tail = Literal["aligned", "official"]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenize a prompt as pipelines do, start and end token included, cut to the tokenizer's length."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return [int(i) for i in ids]


def word_tokens(tokenizer: Any, prompt: str) -> tuple[tuple[int, ...], ...]:
    """Return the token positions of each word of a prompt, words being what single spaces part.

    A word has the tokens that stand for its characters; words cut off by the tokenizer's length have none.
    """
    ids, spans = token_spans(tokenizer, prompt)
    count = len(ids) if len(ids) <= tokenizer.model_max_length else tokenizer.model_max_length - 1
    words, at = [], 0
    for word in prompt.split(" "):
        end = at + len(word)
        inside = [i for i, (a, b) in enumerate(spans[:count]) if a < end and b > at and prompt[a:b].strip()]
        words.append(tuple(inside))
        at = end + 1
    return tuple(words)


def replace_matrix(
    source: str,
    target: str,
    source_words: Sequence[Sequence[int]],
    target_words: Sequence[Sequence[int]],
    length: int = 77,
    tail: Tail = "aligned",
) -> torch.Tensor:
    """Build the matrix [source tokens, target tokens] that carries source columns over to target columns.

    A changed word of n source tokens and m target tokens is taken one to one where n = m; else each of its source
    columns is spread with 1/m. Unchanged tokens correspond. The released code takes what follows the last changed word
    by position, so that it slips where n and m differ: `tail="official"` does that too.

    Args:
        source_words: Token positions of each source word, as `word_tokens` gives them.
        length: Token slots L.

    Returns:
        Float32 [L, L].

    Raises:
        ConfigError: The prompts have different numbers of words.
    """
    words_s, words_t = source.split(" "), target.split(" ")
    if len(words_s) != len(words_t):
        raise ConfigError(
            f"Replacing words needs prompts of equally many words, got {len(words_s)} in {source!r} and "
            f'{len(words_t)} in {target!r}. Use mode="refine", which aligns prompts of any length.'
        )
    changed = [i for i, (a, b) in enumerate(zip(words_s, words_t, strict=True)) if a != b]
    spans = [(list(source_words[i]), list(target_words[i])) for i in changed]
    matrix = torch.zeros(length, length)
    i = j = done = 0
    while i < length and j < length:
        if done < len(spans) and spans[done][0] and spans[done][0][0] == i:
            s, t = spans[done]
            if len(s) == len(t):
                matrix[s, t] = 1
            else:
                for column in t:
                    matrix[s, column] = 1 / len(t)
            i, j, done = i + len(s), j + len(t), done + 1
            continue
        matrix[j if done == len(spans) and tail == "official" else i, j] = 1
        i, j = i + 1, j + 1
    # Where the source runs out first, the padding that is left over corresponds to the last padding of the source.
    if tail == "aligned" and j < length:
        matrix[length - 1, j:] = 1
    return matrix


def refine_map(source: Sequence[int], target: Sequence[int], length: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    """Align two token sequences (Needleman-Wunsch; gap 0, match 1, mismatch -1).

    Args:
        source: Token ids with start and end token.
        target: The same for the target prompt.
        length: Token slots L.

    Returns:
        int64 [L]: the source position of each target position, -1 for new tokens; float32 [L]: 0 for new tokens, else
        1. Slots behind the target's end token correspond by position.
    """
    n, m = len(source), len(target)
    score = [[0] * (m + 1) for _ in range(n + 1)]
    came = [["left"] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        came[i][0] = "up"
        for j in range(1, m + 1):
            left, up = score[i][j - 1], score[i - 1][j]
            diagonal = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            best = score[i][j] = max(left, up, diagonal)
            came[i][j] = "left" if best == left else "up" if best == up else "diagonal"
    mapper = torch.arange(length)
    mapper[:m] = -1
    i, j = n, m
    while i > 0 or j > 0:
        if came[i][j] == "diagonal":
            i, j = i - 1, j - 1
            mapper[j] = i
        elif came[i][j] == "left":
            j -= 1
        else:
            i -= 1
    return mapper, (mapper >= 0).float()


def follow_table(
    steps: int,
    default: tuple[float, float],
    words: Mapping[tuple[int, ...], tuple[float, float]],
    length: int = 77,
) -> torch.Tensor:
    """Tell for each step and target token whether its cross-attention follows the source.

    Bounds are scaled by steps + 1, as released: 0.8 of 50 steps are steps 0 to 39.

    Args:
        default: (start, end) as fractions of the run.
        words: Windows of single words, by their token positions.

    Returns:
        Float32 [steps + 1, L] of zeros and ones.
    """
    table = torch.zeros(steps + 1, length)
    table[int(default[0] * (steps + 1)) : int(default[1] * (steps + 1))] = 1
    for tokens, (start, end) in words.items():
        table[:, list(tokens)] = 0
        rows = torch.arange(int(start * (steps + 1)), min(int(end * (steps + 1)), steps + 1))
        table[rows[:, None], torch.tensor(tokens)[None]] = 1
    return table


def equalizer_row(weights: Mapping[tuple[int, ...], float], length: int = 77) -> torch.Tensor:
    """Return the weight of each target token, float32 [L]: 1 but for the tokens given."""
    row = torch.ones(length)
    for tokens, value in weights.items():
        row[list(tokens)] = float(value)
    return row
