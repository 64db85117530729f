"""What a pipeline would hand its denoiser for another prompt: its own call, broken off before the denoiser runs.

`encode_prompt` differs from pipeline to pipeline, in what it takes, in what it returns, and in how the call goes on
with that. Nothing of it need be known: a copy of the pipeline is called as the user has called it, with the negative
prompt as its prompt, and a hook before the denoiser keeps the arguments and ends the call.

    copy of the pipeline     the same components; a scheduler of its own, so that no step of the run is counted
    its __call__             templates, tokenizers, text encoders, padding, masks, batches: all the pipeline's own
    denoiser, pre-hook       the arguments by name are kept; PassEnded
    torch's random state     as before

Which of the arguments are the text's is read off the two calls: those that differ between prompt and negative prompt.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from attnctl.core.hosts.arguments import bind_call, main_name
from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.hosts.readings import version_of
from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["EMBEDS", "TextComparison", "equal", "ghost_call", "negative_arguments", "text_arguments"]

_TEXT = re.compile(r"encoder|text|txt|cap|prompt|context|input_ids|position_ids|mask|indicator|lens?$|lengths?$")
# Pooled embeddings modulate the image: they stay the prompt's. Others are not the text's.
_OTHERS = re.compile(r"pool|projection|_image|image_|residual|block_samples|controlnet|latent|timestep|guidance")


class _Reached(BaseException):
    """Ends the call of the copy; no Exception, so that no host catches it."""


def negative_arguments(
    pipe: Any, arguments: Mapping[str, Any], text: Any = None, embeds: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call with the negative prompt in place of the prompt.

    Args:
        pipe: The pipeline.
        arguments: What it was called with, by name.
        text: The negative prompt; None for the call's own.
        embeds: Embeddings in place of a text, by the names that the call has for the prompt's.

    Raises:
        ConfigError: There is no negative prompt.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    values = {name: value for name, value in arguments.items() if name in parameters}
    prompts = [name for name in parameters if re.match(r"(pooled_)?prompt(_|$)(?!template)", name)]
    given = {name: values.get(f"negative_{name}") for name in prompts if values.get(f"negative_{name}") is not None}
    encoded = {name: value for name, value in given.items() if "embeds" in name or "mask" in name}
    # A text of the control's own goes before what the call was given, embeddings before its text.
    if embeds is not None:
        chosen = dict(embeds)
    elif text is not None:
        chosen = {"prompt": text}
    else:
        chosen = encoded or given
    if not chosen:
        raise ConfigError(_NONE)
    if embeds is None and "prompt" in prompts and not any(n == "prompt" or "embeds" in n for n in chosen):
        chosen["prompt"] = ""  # a negative prompt for another encoder alone: pipelines take the first one's as empty
    count = _prompts(values)
    if count is not None:
        chosen = {n: _repeated(v, count, embeds is not None) for n, v in chosen.items()}
    # Pooled embeddings stay the prompt's in any case; a pipeline may ask for them beside others.
    replaced = [name for name in prompts if "prompt" in chosen or "pooled" not in name]
    return values | dict.fromkeys(replaced) | chosen


def _prompts(arguments: Mapping[str, Any]) -> int | None:
    """Count the prompts of a call that was given a list of them, or embeddings of several; None for a single one."""
    if isinstance(arguments.get("prompt"), (list, tuple)):
        return len(arguments["prompt"])
    embeds = arguments.get("prompt_embeds") if arguments.get("prompt") is None else None
    count = len(embeds) if isinstance(embeds, (torch.Tensor, list)) else 1
    return count if count > 1 else None


def _repeated(value: Any, count: int, embeds: bool) -> Any:
    """Repeat a text, or a control's embeddings of one, for as many prompts."""
    if isinstance(value, str):
        return [value] * count
    rows = embeds and isinstance(value, torch.Tensor) and 2 <= value.ndim <= 3 and len(value) == 1
    return value.expand(count, *value.shape[1:]) if rows else value


_NONE = (
    "NAG has no negative prompt: give it to the pipeline's call (negative_prompt=...), or to the control "
    "(NAG(negative_prompt=...)), or pass embeddings of it (NAG(negative_embeds={...}))."
)


EMBEDS = "pass embeddings of it: NAG(negative_embeds={...}), by the names of the pipeline's or the denoiser's arguments"


def ghost_call(
    pipe: Any, arguments: Mapping[str, Any], what: str = "the negative prompt", remedy: str = EMBEDS
) -> dict[str, Any]:
    """Call a copy of a pipeline up to its denoiser; return the arguments that the denoiser would receive, by name.

    Args:
        pipe: The pipeline. Nothing of it changes.
        arguments: Arguments of its call by name.
        what: What the text is called in errors.
        remedy: What to do where the pipeline cannot encode it.

    Raises:
        ConfigError: The pipeline cannot encode the prompt: its text encoder was deleted, or it refuses the call.
    """
    ghost = copy.copy(pipe)
    # What listens to this pipeline object listens to no copy.
    for name in ("encode_prompt", "check_inputs"):
        vars(ghost).pop(name, None)
    vars(ghost)["scheduler"] = copy.deepcopy(getattr(pipe, "scheduler", None))
    vars(ghost)["_progress_bar_config"] = {"disable": True}
    reached: list[dict[str, Any]] = []

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(bind_call(module, args, kwargs))
        raise _Reached

    with contextlib.ExitStack() as undo:
        for module in denoisers_of(pipe).values():
            hook = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
            undo.callback(hook.remove)
        undo.enter_context(_same_random_state())
        undo.enter_context(contextlib.suppress(_Reached))
        try:
            type(pipe).__call__(ghost, **_fresh(arguments))
        except Exception as error:
            raise _refused(pipe, arguments, error, what, remedy) from error
    if not reached:
        raise UnsupportedModelError(f"{type(pipe).__name__} ended without calling its denoiser for {what}: {remedy}.")
    return reached[0]


def _refused(pipe: Any, arguments: Mapping[str, Any], error: Exception, what: str, remedy: str) -> ConfigError:
    name = type(pipe).__name__
    encoders = [n for n in vars(pipe) if re.fullmatch(r"text_encoder(_\d)?", n)]
    if encoders and all(getattr(pipe, n) is None for n in encoders) and arguments.get("prompt") is not None:
        return ConfigError(
            f"{name} has no text encoder to encode {what} with (it was deleted, or not loaded). Encode it while the "
            f"encoder is there: {remedy}."
        )
    if arguments.get("prompt") is None:
        return ConfigError(
            f"{name} does not take the embeddings that were given for {what} ({type(error).__name__}: {error}). Give "
            "them as it makes them, in the shapes of the call's own, or by the names of the denoiser's arguments."
        )
    return ConfigError(f"{name} could not encode {what} ({type(error).__name__}: {error}): {remedy}.")


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Replace generators by new ones, so that the run's own draw what they would have drawn."""

    def fresh(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return torch.Generator(value.device).manual_seed(0)
        return [fresh(v) for v in value] if isinstance(value, list) else value

    return {name: fresh(value) for name, value in arguments.items()}


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def text_arguments(negative: Mapping[str, Any], positive: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the text says in a denoiser's call: the arguments that differ from those of another text.

    The latents, the time, images, and embeddings without a token axis (pooled ones, which modulate the image) are no
    part of it.
    """
    main = main_name(positive)
    chosen = {}
    for name in dict.fromkeys([*negative, *positive]):
        value, other = negative.get(name), positive.get(name)
        if name != main and _speaks_of_text(name, value) and not equal(value, other):
            chosen[name] = value
    return chosen


def _speaks_of_text(name: str, value: Any) -> bool:
    return bool(_TEXT.search(name)) and not _OTHERS.search(name) and not isinstance(value, dict)


class TextComparison:
    """Which arguments differ between two texts, compared once for the tensors of a call.

    Comparing waits for the device, and pipelines hand the same tensors to the denoiser in every step. Other tensors,
    or the same ones with something else written into them, are compared anew. No tensor is kept alive for it.
    """

    def __init__(self) -> None:
        self._marks: list[Any] | None = None
        self._names: tuple[str, ...] = ()

    def differing(
        self, bound: Mapping[str, Any], other: Mapping[str, Any], compare: Callable[[], Iterable[str]]
    ) -> dict[str, Any]:
        """Return those arguments of another text that differ from the call's.

        Args:
            bound: The arguments of the call, with all its rows.
            other: The arguments with the other text.
            compare: Names those that differ; called where the call's text is not the one of the last comparison.
        """
        texts = {name: value for name, value in bound.items() if _speaks_of_text(name, value)}
        if self._marks is None or not _unchanged(self._marks, texts):
            self._names, self._marks = tuple(compare()), _mark(texts)
        return {name: other.get(name) for name in self._names}


def _mark(value: Any) -> Any:
    """Note what an argument is, without keeping its tensors."""
    if isinstance(value, torch.Tensor):
        return weakref.ref(value), version_of(value)
    if isinstance(value, Mapping):
        return [(name, _mark(part)) for name, part in value.items()]
    return [_mark(part) for part in value] if isinstance(value, (list, tuple)) else value


def _unchanged(mark: Any, value: Any) -> bool:
    """Tell whether an argument is the one of a mark."""
    if isinstance(value, torch.Tensor):
        is_tensor_mark = isinstance(mark, tuple) and isinstance(mark[0], weakref.ref)
        return bool(is_tensor_mark and mark[0]() is value and mark[1] == version_of(value))
    if isinstance(value, Mapping):
        names = [name for name, _ in mark]
        return names == list(value) and all(_unchanged(m, value[name]) for name, m in mark)
    if isinstance(value, (list, tuple)):
        same = isinstance(mark, list) and len(mark) == len(value)
        return same and all(map(_unchanged, mark, value))
    return not isinstance(mark, (list, tuple)) and bool(mark == value)


def equal(a: Any, b: Any) -> bool:
    """Tell whether two arguments of a denoiser, or fields of a control, say the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a is b or a.is_meta:  # shapes alone tell nothing
            return a is b
        return bool(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return bool(a == b)
