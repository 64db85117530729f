"""The tokenizer of the shapes world: a real CLIPTokenizer whose vocabulary makes each world word one token.

The folder it writes (vocab.json, merges.txt and the special tokens) loads in every supported transformers. Byte-pair
merges are learnt on the world's words alone, until each is one token; all 256 bytes stay in the vocabulary, so any
other text is legal and simply takes more tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from attnctl.shapes.scenes import WORDS

__all__ = ["BOS", "EOS", "MAX_LENGTH", "learn_merges", "write_tokenizer"]

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MAX_LENGTH = 16


def learn_merges(words: tuple[str, ...] = WORDS) -> list[tuple[str, str]]:
    """Learn byte-pair merges until each word is one token; deterministic."""
    # Training BPE to the end guarantees that encoding a training word gives one token; hand-made merges do not,
    # because an early merge of one word can cut another in the wrong place.
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while True:
        count = Counter(pair for s in split for pair in pairwise(s))
        if not count:
            return merges
        best = min(count, key=lambda p: (-count[p], p))
        merges.append(best)
        split = [_merge(s, best) for s in split]


def write_tokenizer(folder: str | Path) -> Path:
    """Write the tokenizer's files into `folder` and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges()
    alphabet = list(_byte_alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), BOS, EOS]
    _dump(folder / "vocab.json", {t: i for i, t in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    _dump(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS})
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_LENGTH,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": EOS,
            "do_lower_case": True,
            "errors": "replace",
        },
    )
    return folder


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for s in symbols:
        if out and (out[-1], s) == pair:
            out[-1] += s
        else:
            out.append(s)
    return out


def _byte_alphabet() -> tuple[str, ...]:
    # CLIP's order: printable bytes as themselves, the others shifted past 255.
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return (*(chr(b) for b in keep), *(chr(256 + n) for n in range(256 - len(keep))))


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
