"""Which words a `Capture` records: those of the call's prompts, as places among the text tokens of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from attnctl.core.call import CallState
from attnctl.core.hosts.words import Concept, find_words, prompt_words
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.capture.fields import CaptureFields

__all__ = ["Found", "WordFinder"]

Found: TypeAlias = tuple[tuple[str, ...], list[dict[str, Concept]], tuple[str, ...]]


class WordFinder:
    """Finds the words of a capture in the prompts that a pipeline was called with.

    Args:
        capture: What to record.
        pipe: The pipeline, whose tokenizers find the words; None for a bare denoiser.
    """

    def __init__(self, capture: CaptureFields, pipe: Any) -> None:
        self.capture, self.pipe = capture, pipe

    def find(self, state: CallState, count: int) -> Found:
        """Return the labels of all words, each row's concepts by label, and each row's prompt.

        Raises:
            ConfigError: A word is not there, or the prompt is not known.
            UnsupportedModelError: The rows are not those of the prompts.
        """
        told = state.prompts
        texts, images = self._texts(state)
        options: dict[str, Any] = {}
        if told is not None and told.max_sequence_length is not None:
            options["max_sequence_length"] = told.max_sequence_length
        if texts is None:
            texts, images = ("",), count
            self._need_places()
        if count % len(texts) or (told is not None and self.capture.prompt is None and len(texts) * images != count):
            raise UnsupportedModelError(
                f"Capture: the denoiser was called with {count} rows for {len(texts)} prompts with {images} images "
                "each: an unknown row layout."
            )
        wanted = self._wanted(len(texts))
        found: list[dict[str, Concept]] = []
        for n, text in enumerate(texts):
            second = {
                name: given[n]
                for name, given in (("prompt_2", told and told.prompts_2), ("prompt_3", told and told.prompts_3))
                if given and len(given) == len(texts) and self.capture.rows == "cond"
            }
            found.append(self._concepts(text, wanted[n], {**options, **second}))
        labels = tuple(dict.fromkeys(label for concepts in found for label in concepts))
        each = count // len(texts)  # pipelines repeat each prompt in place
        concepts = [concepts for concepts in found for _ in range(each)]
        return labels, concepts, tuple(text for text in texts for _ in range(each))

    def _texts(self, state: CallState) -> tuple[tuple[str, ...] | None, int]:
        given, told = self.capture.prompt, state.prompts
        if given is not None:
            return ((given,) if isinstance(given, str) else tuple(given)), 1
        if told is None:
            return None, 1
        if self.capture.rows == "cond":
            return told.prompts, told.images
        if told.negatives is None:
            raise ConfigError('Capture: rows="uncond" was asked for, but the call has no negative prompt.')
        return told.negatives, told.images

    def _need_places(self) -> None:
        words = self.capture.words
        flat = [] if words is None else [w for part in words for w in (part if isinstance(part, tuple) else (part,))]
        if not flat or not all(isinstance(w, int) for w in flat):
            raise ConfigError(
                "Capture: the prompt is not known (the pipeline was called with embeddings, or a bare denoiser is "
                "under control), so words cannot be found in it. Pass prompt=..., or words as places of text tokens."
            )

    def _wanted(self, prompts: int) -> list[Sequence[Any] | None]:
        words = self.capture.words
        if words is None or not isinstance(words[0], tuple):
            return [words] * prompts
        if len(words) != prompts:
            raise ConfigError(f"Capture: words has lists for {len(words)} prompts, but the call has {prompts}.")
        return list(words)

    def _concepts(self, text: str, words: Sequence[Any] | None, options: dict[str, Any]) -> dict[str, Concept]:
        if self.pipe is None or not text:
            if words is None or not all(isinstance(w, int) for w in words):
                raise ConfigError(
                    "Capture: a bare denoiser has no tokenizer, and an empty prompt no words: give words as places of "
                    "text tokens (whole numbers)."
                )
            return {str(w): Concept(str(w), (w,)) for w in words}
        if words is not None:
            return {c.word: c for c in find_words(self.pipe, text, words, **options)}
        found = {}
        for word in prompt_words(text):
            try:
                found[word] = find_words(self.pipe, text, [word], **options)[0]
            except ConfigError:
                continue  # cut off with the prompt's end: attention does not see it
        if not found:
            raise ConfigError(f"Capture: the prompt {text!r} has no word to record. Name words or places of tokens.")
        return found
