"""What a pipeline's text encoders were really given, and where their outputs went.

While `encode_prompt` runs, in this order: the pipeline cleans the prompt and writes its template around it; a tokenizer
turns that text into ids; the pipeline pads, cuts or joins them; a text encoder makes one state of each; the pipeline
drops, packs and joins states, and returns what attention will see. `EncoderWatch` notes text, ids and states on the
way. A token's place among the text tokens of attention is then found by value: where its state stands in what was
returned. No pipeline's template, padding side or order of encoders is written down here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.reading import Reading, Span, locate, token_spans

__all__ = ["EncoderWatch"]

_PROBES = 8


@dataclass(frozen=True)
class _Tokenised:
    """One text as a tokenizer made ids of it, padding included."""

    name: str
    tokenizer: Any
    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    real: tuple[bool, ...]
    """Which ids are no padding."""


@dataclass(frozen=True)
class _Encoded:
    """One row of a text encoder's call."""

    ids: tuple[int, ...]
    states: tuple[Tensor, ...]
    """The layers' outputs [L, C], the last first."""


class EncoderWatch:
    """Notes what a pipeline's tokenizers and text encoders do while it encodes a prompt.

    Args:
        pipe: The pipeline. Nothing of it is changed outside `listening`.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.texts: list[_Tokenised] = []
        self.encoded: list[_Encoded] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note what happens inside the block."""
        with contextlib.ExitStack() as undo:
            for name, tokenizer in _tokenizers(self.pipe).items():
                undo.enter_context(_recorded(tokenizer, functools.partial(self._tokenised, name, tokenizer)))
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"):
                encoder = getattr(self.pipe, name, None)
                if isinstance(encoder, torch.nn.Module):
                    undo.callback(encoder.register_forward_hook(self._encoded, with_kwargs=True).remove)
            yield

    def _tokenised(self, name: str, tokenizer: Any, given: Any, made: Any) -> None:
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            return
        rows = made["input_ids"]
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        rows = [rows] if rows and not isinstance(rows[0], (list, tuple)) else rows
        encodings = getattr(made, "encodings", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        for n, (text, row) in enumerate(zip(texts, rows, strict=False)):
            ids = tuple(int(i) for i in row)
            if encodings:
                spans: Sequence[Span] = [(int(a), int(b)) for a, b in encodings[n].offsets]
                real = [bool(m) for m in encodings[n].attention_mask]
            else:
                real = _unpadded(ids, pad)
                inner = iter(token_spans(tokenizer, text, [i for i, r in zip(ids, real, strict=True) if r])[1])
                spans = [next(inner) if r else (0, 0) for r in real]
            self.texts.append(_Tokenised(name, tokenizer, text, ids, tuple(spans), tuple(real)))

    def _encoded(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        layers = [x for x in (getattr(output, "last_hidden_state", None),) if isinstance(x, Tensor)]
        layers += reversed(getattr(output, "hidden_states", None) or ())
        if not layers and isinstance(output, (tuple, list)):
            layers = [x for x in output if isinstance(x, Tensor)]
        rows, length = ids.shape
        # ChatGLM puts the tokens before the rows.
        layers = [
            x.transpose(0, 1) if x.ndim == 3 and x.shape[:2] == (length, rows) != (rows, length) else x for x in layers
        ]
        layers = [x for x in layers if x.ndim == 3 and x.shape[:2] == (rows, length)]
        for n, row in enumerate(ids.tolist()):
            self.encoded.append(_Encoded(tuple(row), tuple(x[n] for x in layers)))

    def readings(
        self, prompts: Sequence[str], returned: Any, before: int = 0
    ) -> tuple[tuple[Reading, ...], ...] | None:
        """Say how each prompt was read; None where that cannot be told.

        Args:
            prompts: The prompts, as the pipeline was called.
            returned: Embeddings of these prompts: rows [T, C], of which there are a multiple of the prompts.
            before: Text tokens that attention sees in front of them.
        """
        rows = list(returned) if isinstance(returned, (list, tuple, Tensor)) else []
        if not rows or len(rows) % len(prompts) or not all(isinstance(r, Tensor) and r.ndim == 2 for r in rows):
            return None
        each = len(rows) // len(prompts)
        all_readings = [self._read(prompt, rows[n * each], before) for n, prompt in enumerate(prompts)]
        return tuple(all_readings) if all(all_readings) else None

    def _read(self, prompt: str, row: Tensor, before: int) -> tuple[Reading, ...]:
        """Return the readings of one prompt by all encoders whose states stand in its embeddings."""
        offset, offsets = 0, {0}
        for encoded in self.encoded:  # encoders whose channels are joined follow each other
            if encoded.states and (offset := offset + encoded.states[0].shape[-1]) < row.shape[-1]:
                offsets.add(offset)
        by_value: dict[str, tuple[float, Reading]] = {}
        by_length: dict[str, tuple[float, Reading]] = {}
        for encoded in self.encoded:
            # An empty negative prompt's end mark stands among the ids of every other prompt: the longest text counts.
            sources = [s for t in reversed(self.texts) if (s := _shifted(t, encoded.ids)) is not None]
            if not sources:
                continue
            text, shift = max(sources, key=lambda s: (len(s[0].ids) == len(encoded.ids), sum(s[0].real)))
            real = [i + shift for i, r in enumerate(text.real) if r]
            places = _places(row, encoded.states, real, sorted(offsets))
            if places is not None:
                share = sum(places[i] is not None for i in real) / len(real)
                reading = self._reading(prompt, text, shift, places, len(row), before)
                _keep(by_value, share, reading, prompt)
            elif len(encoded.ids) == len(row):
                # Normalised or projected behind the encoder: the order of the tokens is all that is left. LTX-2's
                # connectors move padding behind the text.
                first = real[0] if getattr(self.pipe, "connectors", None) is not None else 0
                order: list[int | None] = [(i - first) % len(row) for i in range(len(row))]
                reading = self._reading(prompt, text, shift, order, len(row), before)
                _keep(by_length, 0.0, reading, prompt)
        chosen = by_value or {name: item for name, item in by_length.items() if _has_prompt(item[1], prompt)}
        return tuple(reading for _, reading in chosen.values())

    def _reading(
        self, prompt: str, text: _Tokenised, shift: int, places: list[int | None], total: int, before: int
    ) -> Reading:
        converted = _convert(self.pipe, text.tokenizer)
        span = locate(converted(prompt), text.text) or locate(prompt, text.text)
        if span is None and prompt.strip():
            span = _same_words(prompt, text.text)
        special = set(getattr(text.tokenizer, "all_special_ids", ()))
        at = [i for i, r in enumerate(text.real) if r]
        attended = tuple(None if (p := places[i + shift]) is None else p + before for i in at)
        taken = {p - before for p in attended if p is not None}
        in_row = [p for p in places if p is not None]
        full = len(at)
        if at and len(at) == len(text.ids):  # nothing was padded: something may have been cut
            full = max(full, len(token_spans(text.tokenizer, text.text)[0]))
        pads = [p for p in range(min(in_row, default=0), max(in_row, default=-1) + 1) if p not in taken]
        return Reading(
            name=text.name,
            text=text.text,
            prompt=span or (0, 0),
            tokens=tuple(str(text.tokenizer.convert_ids_to_tokens(text.ids[i])) for i in at),
            spans=tuple(text.spans[i] for i in at),
            places=attended,
            marks=tuple(text.ids[i] in special for i in at),
            pads=tuple(p + before for p in pads),
            total=total + before,
            limit=len(text.ids),
            full=full,
            convert=converted,
        )


def _keep(best: dict[str, tuple[float, Reading]], share: float, reading: Reading, prompt: str) -> None:
    """Keep the better of two readings by one tokenizer: other prompts of a batch may begin with the same states."""
    first = best.get(reading.name)
    if first is None or (_has_prompt(reading, prompt), share) > (_has_prompt(first[1], prompt), first[0]):
        best[reading.name] = share, reading


def _has_prompt(reading: Reading, prompt: str) -> bool:
    return not prompt.strip() or reading.prompt[1] > reading.prompt[0]


def _convert(pipe: Any, tokenizer: Any) -> Callable[[str], str]:
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return (lambda text: text) if convert is None else (lambda text: str(convert(text, tokenizer)))


def _same_words(prompt: str, text: str) -> Span | None:
    """Return all of a text that is a prompt after cleaning: most of its words are the prompt's."""
    words = set(prompt.lower().split())
    mine = text.lower().split()
    return (0, len(text)) if mine and sum(w in words for w in mine) * 2 > len(mine) else None


def _unpadded(ids: tuple[int, ...], pad: int | None) -> list[bool]:
    """Mark the ids that are no padding, of a tokenizer that does not say: a run at one end, but for an end mark."""
    real = [True] * len(ids)
    for order in (range(len(ids)), range(len(ids) - 1, -1, -1)):
        run = []
        for i in order:
            if ids[i] != pad:
                break
            run.append(i)
        for i in run[:-1] if order.step < 0 else run:  # CLIP pads with its end mark, the first of which ends the text
            real[i] = False
    return real


def _shifted(text: _Tokenised, fed: tuple[int, ...]) -> tuple[_Tokenised, int] | None:
    """Find a text's ids, padding left out, as a run among the ids that an encoder was fed."""
    at = [i for i, r in enumerate(text.real) if r]
    if not at or at[-1] - at[0] + 1 != len(at):
        return None
    ids = text.ids[at[0] : at[-1] + 1]
    if len(text.ids) == len(fed):
        return (text, 0) if text.ids == fed else None
    for first in range(len(fed) - len(ids) + 1):
        if fed[first : first + len(ids)] == ids:
            return text, first - at[0]
    return None


def _places(
    row: Tensor, states: Sequence[Tensor], real: Sequence[int], offsets: Sequence[int]
) -> list[int | None] | None:
    """Find the states of an encoder in the rows of embeddings, by value.

    Returns:
        For each state its first equal row in order, or None where it was dropped; None for all where no layer's states
        stand there, or not in order.
    """
    best: list[int | None] | None = None
    score = 0
    for layer in states:
        width = layer.shape[-1]
        for offset in offsets:
            if offset + width > row.shape[-1]:
                continue
            there = row[:, offset : offset + width]
            here = layer.detach().to(row.device, row.dtype)
            probes = torch.linspace(0, width - 1, min(_PROBES, width), device=row.device).long()
            equal = (there[:, None, probes] == here[None, :, probes]).all(-1)
            first = equal.to(torch.uint8).argmax(0)
            same = equal.any(0) & (there[first] == here).all(-1)
            places = [int(p) if s else None for p, s in zip(first.tolist(), same.tolist(), strict=True)]
            mine = [p for i in real if (p := places[i]) is not None]
            if len(mine) > score and all(a < b for a, b in itertools.pairwise(mine)):
                best, score = places, len(mine)
            if score == len(real):
                return best
    return best


def _tokenizers(pipe: Any) -> dict[str, Any]:
    tokenizers: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4", "processor", "text_processor"):
        part = getattr(pipe, name, None)
        part = getattr(part, "tokenizer", None) or part  # a processor holds one
        if (
            callable(part)
            and hasattr(part, "convert_ids_to_tokens")
            and not any(part is t for t in tokenizers.values())
        ):
            tokenizers[name] = part
    return tokenizers


# Listening to an object's calls needs a class of its own, as Python looks `__call__` up there: the object's class is
# swapped for a subclass, made once per class, and swapped back.
@functools.cache
def _listening_class(cls: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = cls.__call__(self, *args, **kwargs)
        given = args[0] if args else kwargs.get("text")
        for heard in list(vars(self).get("_attnctl_heard", ())):
            heard(given, made)
        return made

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__})


@contextlib.contextmanager
def _recorded(tokenizer: Any, heard: Callable[[Any, Any], None]) -> Iterator[None]:
    """Hear of each call of a tokenizer inside the block; of none, where its class cannot be swapped."""
    cls: Any = type(tokenizer)
    listeners = vars(tokenizer).get("_attnctl_heard")
    if listeners is None:
        try:
            tokenizer.__class__ = _listening_class(cls)
        except TypeError:
            yield
            return
        listeners = vars(tokenizer)["_attnctl_heard"] = []
    listeners.append(heard)
    try:
        yield
    finally:
        listeners.remove(heard)
        if not listeners:
            vars(tokenizer).pop("_attnctl_heard", None)
            tokenizer.__class__ = type(tokenizer).__mro__[1]
