"""What hosts refuse, in words: their own errors name a line of their code, and not what to do."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError, nearest, shown

__all__ = ["check_arguments", "check_pipeline", "check_prompts", "explained"]

_SMALLER = (
    "take a smaller size, fewer pictures per call (batch), or float16; or offload the model (docs/howto/offload.md)"
)
_OF_OPTIONS = (TypeError, AttributeError, LookupError, NotImplementedError, RuntimeError)


def check_pipeline(pipe: Any, what: str) -> None:
    """Raise UnsupportedModelError for what is no whole pipeline, which a job runs by itself."""
    import torch

    if isinstance(pipe, (type, torch.nn.Module)) or not callable(pipe):
        raise UnsupportedModelError(f"{shown(pipe)} was given; {what} needs a whole pipeline, loaded.")


def check_arguments(pipe: Any, names: Collection[str]) -> None:
    """Raise ConfigError for an argument that a pipeline does not name: some swallow any, and leave it out."""
    signature = inspect.signature(type(pipe).__call__).parameters
    if sum(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature.values()) < 2:
        return  # somebody has wrapped it: what it takes cannot be told
    for name in names:
        if name not in signature:
            raise ConfigError(f"{type(pipe).__name__} takes no {name!r}." + nearest(name, signature))


def check_prompts(prompts: Any) -> None:
    """Raise ConfigError unless prompts are a list of texts, or of arguments of a pipeline."""
    many = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not many or not prompts or not all(isinstance(p, (str, Mapping)) for p in prompts):
        raise ConfigError(f"prompts={shown(prompts)} was given; expected a list of at least one prompt, each a text.")


@contextlib.contextmanager
def explained(pipe: Any, options: Collection[str] = ()) -> Iterator[None]:
    """Turn what a pipeline refuses, and a memory that is too small, into errors that say what to do.

    Args:
        pipe: The pipeline that is called in the block.
        options: Names of arguments that the user gave it as they are, whose values it may not understand.

    Raises:
        ConfigError: in place of ValueError and AssertionError, of what allocators raise, and, where options are given,
            of what comes of their values.
    """
    import torch

    name = type(pipe).__name__
    try:
        yield
    except AttnctlError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ConfigError(f"The memory is too small for this call of {name}: {_SMALLER}.") from error
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{name} refuses this call: {_reason(error)}. Change the option that it names.") from error
    except _OF_OPTIONS as error:
        if any(sign in str(error) for sign in ("can't allocate memory", "not enough memory")):
            raise ConfigError(f"The memory is too small for this call of {name}: {_SMALLER}.") from error
        if not options:
            raise
        given = ", ".join(options)
        raise ConfigError(
            f"{name} cannot be called with the given {given} ({type(error).__name__}: {_reason(error)}): leave "
            f"{'it' if len(options) == 1 else 'them'} out, or give other values."
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
