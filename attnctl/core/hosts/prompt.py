"""Knowing the prompt of the pipeline call that is running.

A denoiser receives embeddings, and no pipeline keeps the text that they came from. What nearly all of diffusers'
pipelines share is `encode_prompt`: `PromptWatch` listens there on one pipeline object, and takes itself off again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

__all__ = ["PromptCall", "PromptWatch"]


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
    """

    prompts: tuple[str, ...]
    prompts_2: tuple[str, ...] | None = None
    prompts_3: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    images: int = 1
    max_sequence_length: int | None = None


class PromptWatch:
    """Remembers the texts of a pipeline's current call.

    Args:
        pipe: The pipeline to listen to, from `attach` to `detach`.

    Attributes:
        call: The texts of the current call, or None where it was given embeddings, or nothing has run.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.call: PromptCall | None = None
        self._open = False
        self._seen = 0

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
        self.call, self._open, self._seen = None, True, 0

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
        if self._seen > 1:
            # Pipelines with two calls of the denoiser encode the negative prompt by itself, second.
            if self.call is not None and prompts is not None and self.call.negatives is None:
                self.call = _with_negatives(self.call, prompts)
            return
        if prompts is None:
            return
        images = next((given[n] for n in _COUNTS if isinstance(given.get(n), int)), 1)
        call = PromptCall(
            prompts=prompts,
            prompts_2=_texts(given.get("prompt_2")),
            prompts_3=_texts(given.get("prompt_3")),
            images=images,
            max_sequence_length=given.get("max_sequence_length"),
        )
        negatives = _texts(given.get("negative_prompt"))
        self.call = call if negatives is None else _with_negatives(call, negatives)


_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class _Heard:
    """Stands in a pipeline object for one of its methods, and tells a watch of each call."""

    def __init__(self, watch: PromptWatch, name: str) -> None:
        self.watch, self.name = watch, name
        self.method = getattr(watch.pipe, name)
        self.__signature__ = inspect.signature(self.method)
        self.__name__, self.__doc__ = name, self.method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.heard(self.name, args, kwargs)
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = memo.get(id(self.watch.pipe), self.watch.pipe)  # nobody listens to the copy of a pipeline
        return MethodType(getattr(type(other), self.name), other)


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
