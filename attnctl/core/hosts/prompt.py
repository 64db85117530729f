"""Knowing the prompt of the pipeline call that is running.

A denoiser receives embeddings, and no pipeline keeps the text that they came from. What nearly all of diffusers'
pipelines share is `encode_prompt`: `PromptWatch` listens there on one pipeline object, and takes itself off again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor

from attnctl.core.hosts.encoding import EncoderWatch
from attnctl.core.hosts.reading import Reading
from attnctl.core.hosts.running import call_arguments
from attnctl.core.hosts.textlayout import text_before

__all__ = ["PromptCall", "PromptWatch", "arguments_of", "prompt_call"]


@dataclass(frozen=True, kw_only=True)
class PromptCall:
    """The text of one pipeline call.

    Attributes:
        prompts: One prompt a sample, before repetition.
        prompts_2: What the second text encoder reads, if it differs.
        prompts_3: What the third text encoder reads, if it differs.
        negatives: The negative prompts, as many, or None where the call has none.
        images: Pictures (or videos) a prompt.
        max_sequence_length: Most tokens of the long text encoder, if the call says so.
        readings: How the text encoders read each prompt, where that can be told.
        negative_readings: The same for the negative prompts.
    """

    prompts: tuple[str, ...]
    prompts_2: tuple[str, ...] | None = None
    prompts_3: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    images: int = 1
    max_sequence_length: int | None = None
    readings: tuple[tuple[Reading, ...], ...] | None = None
    negative_readings: tuple[tuple[Reading, ...], ...] | None = None

    @property
    def samples(self) -> int:
        """Return how many pictures (or videos) the call makes."""
        return len(self.prompts) * self.images


class PromptWatch:
    """Remembers the texts of a pipeline's current call.

    Args:
        pipe: The pipeline to listen to, from `attach` to `detach`.

    Attributes:
        call: The texts of the current call, or None where it was given embeddings, or nothing has run.
        arguments: What the pipeline was called with, by name, before it works on that.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.call: PromptCall | None = None
        self.arguments: dict[str, Any] = {}
        self._open = False
        self._seen = 0
        self._width = 0
        self._again = self._negative_given = False

    def attach(self) -> PromptWatch:
        """Listen on this object; its class and other objects of it stay as they are."""
        for name in ("encode_prompt", "check_inputs"):
            if callable(getattr(self.pipe, name, None)) and name not in vars(self.pipe):
                setattr(self.pipe, name, _Heard(self, name))
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was. Detaching twice does nothing."""
        for name in ("encode_prompt", "check_inputs"):
            heard = vars(self.pipe).get(name)
            if isinstance(heard, _Heard) and heard.watch is self:
                delattr(self.pipe, name)

    def begin(self) -> None:
        """Forget the last call: a new one checks its inputs, or encodes after the denoiser has run."""
        self.call, self._open, self._seen, self._width = None, True, 0, 0
        self.arguments = call_arguments(self.pipe)

    def close(self) -> None:
        """Take the texts as they are: the denoiser runs, and what is encoded next belongs to the next call."""
        self._open = False

    def heard(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call of one of the watched methods."""
        if name == "check_inputs":
            self.begin()
            return
        if not self._open:
            self.begin()
        self._seen += 1
        signature = inspect.signature(getattr(type(self.pipe), name))
        try:
            given = dict(signature.bind_partial(self.pipe, *args, **kwargs).arguments)
        except TypeError:
            return  # the pipeline's own error comes next
        prompts = _texts(given.get("prompt"))
        self._again = given.get("text_encoder_index") is not None
        self._negative_given = given.get("negative_prompt") is not None
        if self._seen > 1:
            # Pipelines with two calls of the denoiser encode the negative prompt by itself, second. HunyuanDiT encodes
            # the same prompt once for each encoder, FreeNoise a negative prompt beside an empty one.
            negatives = _texts(given.get("negative_prompt")) or prompts
            if self.call is not None and negatives is not None and self.call.negatives is None and not self._again:
                self.call = _with_negatives(self.call, negatives)
            return
        self.call = prompt_call(given)

    def encoded(self, encoders: EncoderWatch, result: Any) -> None:
        """Note how the prompts of the call were read, after `encode_prompt` returned its embeddings."""
        call, parts = self.call, list(result) if isinstance(result, (tuple, list)) else [result]
        if call is None or not parts or not encoders.encoded:
            return
        before = text_before(self.pipe)
        first = parts[0]
        like = [p for p in parts[1:] if _alike(p, first)]
        if self._seen == 1 or self._again:
            prompts = self._read(encoders, call.prompts, first, before + self._width)
            negatives = self._read(encoders, call.negatives, like[0], before + self._width) if like else None
            self._width += len(first[0]) if _alike(first, first) else 0
            self.call = replace(
                call,
                readings=_joined(call.readings, prompts) if self._again and self._seen > 1 else prompts,
                negative_readings=_joined(call.negative_readings, negatives)
                if self._again and self._seen > 1
                else negatives,
            )
        elif call.negative_readings is None:
            embeddings = like[0] if like and self._negative_given else first
            self.call = replace(call, negative_readings=self._read(encoders, call.negatives, embeddings, before))

    def _read(
        self, encoders: EncoderWatch, prompts: tuple[str, ...] | None, embeddings: Any, before: int
    ) -> tuple[tuple[Reading, ...], ...] | None:
        return None if not prompts else encoders.readings(prompts, embeddings, before)


def arguments_of(pipe: Any) -> dict[str, Any]:
    """Return what the call of a pipeline that is under way was given, by name; {} where there is none.

    Where nobody listens to the pipeline, its variables tell, in which embeddings may stand that it has made of texts,
    and a schedule that it has made of a number of steps: these are left out.
    """
    heard = vars(pipe).get("check_inputs", vars(pipe).get("encode_prompt"))
    if isinstance(heard, _Heard) and heard.watch.arguments:
        return dict(heard.watch.arguments)
    arguments = call_arguments(pipe)
    texts = arguments.get("prompt") is not None
    made = {n: None if texts and n.endswith(("prompt_embeds", "embeds_mask")) else v for n, v in arguments.items()}
    return {n: v for n, v in made.items() if n not in ("timesteps", "sigmas", "num_inference_steps")}


_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def prompt_call(values: Mapping[str, Any]) -> PromptCall | None:
    """Return the texts among the arguments of a pipeline call, or None where it was given none."""
    prompts = _texts(values.get("prompt"))
    if prompts is None:
        return None
    call = PromptCall(
        prompts=prompts,
        prompts_2=_texts(values.get("prompt_2")),
        prompts_3=_texts(values.get("prompt_3")),
        images=next((values[n] for n in _COUNTS if isinstance(values.get(n), int)), 1),
        max_sequence_length=values.get("max_sequence_length"),
    )
    negatives = _texts(values.get("negative_prompt"))
    return call if negatives is None else _with_negatives(call, negatives)


class _Heard:
    """Stands in a pipeline object for one of its methods, and tells a watch of each call."""

    def __init__(self, watch: PromptWatch, name: str) -> None:
        self.watch, self.name = watch, name
        self.method = getattr(watch.pipe, name)
        self.__signature__ = inspect.signature(self.method)
        self.__name__, self.__doc__ = name, self.method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.heard(self.name, args, kwargs)
        if self.name != "encode_prompt":
            return self.method(*args, **kwargs)
        encoders = EncoderWatch(self.watch.pipe)
        with encoders.listening():
            result = self.method(*args, **kwargs)
        self.watch.encoded(encoders, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = memo.get(id(self.watch.pipe), self.watch.pipe)  # nobody listens to the copy of a pipeline
        return MethodType(getattr(type(other), self.name), other)


def _joined(
    first: tuple[tuple[Reading, ...], ...] | None, second: tuple[tuple[Reading, ...], ...] | None
) -> tuple[tuple[Reading, ...], ...] | None:
    """Join the readings of two encoders, prompt by prompt; None where one is not known."""
    if first is None or second is None:
        return None
    return tuple((*a, *b) for a, b in zip(first, second, strict=True))


def _alike(value: Any, first: Any) -> bool:
    """Tell whether a returned value holds embeddings of as many prompts as the first one does."""
    if isinstance(first, Tensor):
        same = isinstance(value, Tensor) and value.ndim == first.ndim == 3 and value.is_floating_point()
        return same and value.shape[0] == first.shape[0] and value.shape[-1] == first.shape[-1]
    rows = value if isinstance(value, (list, tuple)) and isinstance(first, (list, tuple)) else ()
    return len(rows) > 0 and len(rows) == len(first) and all(isinstance(r, Tensor) and r.ndim == 2 for r in rows)


def _texts(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and value and all(isinstance(v, str) for v in value):
        return tuple(value)
    return None


def _with_negatives(call: PromptCall, negatives: tuple[str, ...]) -> PromptCall:
    if len(negatives) == 1:
        negatives *= len(call.prompts)
    if len(negatives) != len(call.prompts):
        return call  # the pipeline refuses the call in its own words
    return replace(call, negatives=negatives)
