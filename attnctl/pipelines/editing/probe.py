"""What the first call of a transformer shows of a prompt, before anything is computed; and what is refused by it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.control import Control
from attnctl.core.hosts.arguments import main_input, main_name
from attnctl.core.hosts.paths import PathScheduler, Route
from attnctl.core.hosts.reading import Reading
from attnctl.core.hosts.words import row_texts
from attnctl.core.live import LiveControl, LiveDenoiser, PassEnded
from attnctl.core.sites import Grid
from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.pipelines.editing.running import running_on
from attnctl.processors.editing.exchange import read_row

__all__ = ["Probed", "check_read_whole", "first_call", "refusals_of"]


@dataclasses.dataclass
class Probed:
    """What the first call of the denoiser shows.

    Attributes:
        readings: How the text encoders read the prompt.
        inputs: The denoiser's inputs besides the latents.
        grid: Frames, rows and columns of its image tokens; None where the model does not say.
        image: Image tokens.
        text: Text tokens.
    """

    readings: tuple[Reading, ...] = ()
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid: Grid | None = None
    image: int = 0
    text: int = 0


@torch.no_grad()
def first_call(pipe: Any, base: Any, call: Mapping[str, Any]) -> Probed:
    """Run a pipeline up to its first call of the denoiser.

    Args:
        pipe: The pipeline.
        base: The scheduler whose noise levels the run follows.
        call: The arguments of its call.

    Raises:
        ConfigError: The pipeline refuses the call.
        UnsupportedModelError: It does not call its denoiser.
    """
    seen: list[Probed] = []
    path = PathScheduler(base, Route())
    with (
        refusals_of(pipe),
        running_on(pipe, path) as options,
        attach(pipe, _Probe(seen=seen), layout="cond"),
        contextlib.suppress(PassEnded),
    ):
        pipe(**{**call, **options})
    if not seen:
        raise UnsupportedModelError(f"{type(pipe).__name__} did not call its transformer.")
    return seen[0]


@contextlib.contextmanager
def refusals_of(pipe: Any) -> Iterator[None]:
    """Say in our words what a pipeline says against its arguments.

    Raises:
        ConfigError: It raised an error of its own.
    """
    try:
        yield
    except (AttnctlError, PassEnded):
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"{type(pipe).__name__} does not take this call: {reason} Change what it names: the prompt, the frames' "
            "size or number, or an option of the call."
        ) from error


def check_read_whole(pipe: Any, prompts: Mapping[str, Sequence[Reading]]) -> None:
    """Refuse prompts whose end no text encoder sees: what is edited might stand there.

    Args:
        pipe: The pipeline.
        prompts: By what the prompt is ("source", "target"), how it was read.

    Raises:
        ConfigError: One is longer than every encoder takes.
    """
    for which, readings in prompts.items():
        cut = [r for r in readings if (tokens := r.at(r.prompt)) and r.misses(tokens, r.prompt)]
        if not readings or len(cut) < len(readings):
            continue
        most = max(cut, key=lambda r: r.limit)
        longer = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters
        cure = ", or give a larger max_sequence_length" if longer else ""
        raise ConfigError(
            f"The {which} prompt has {most.full} tokens, and {type(pipe).__name__} reads {most.limit} of them: its end "
            f"({most.prompt_text[-30:]!r}) would not count. Shorten it{cure}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe(Control):
    """Look at the first call of the denoiser, and end the run there."""

    seen: list[Probed] = dataclasses.field(compare=False, repr=False, default_factory=list)

    def resolve(self, sites: Any, family: Any) -> tuple[Any, ...]:
        return ()

    def needs_prompt(self) -> bool:
        return True

    def attached(self, sites: Any, denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _Prober(self, pipe)


class _Prober(LiveControl):
    def __init__(self, control: _Probe, pipe: Any) -> None:
        self.control, self.pipe = control, pipe

    def before_call(self, passes: LiveDenoiser) -> None:
        state = passes.state
        readings = read_row(row_texts(state.prompts, state.rows.prompts, "edit")[0], self.pipe, "edit")
        text, x = state.bound.get("encoder_hidden_states"), main_input(state.bound)
        packed = int(x.shape[1]) if isinstance(x, Tensor) else 0
        self.control.seen.append(
            Probed(
                readings,
                {n: v for n, v in state.bound.items() if n != main_name(state.bound)},
                state.grid,
                packed if state.grid is None else math.prod(state.grid),
                int(text.shape[1]) if isinstance(text, Tensor) else 0,
            )
        )
        raise PassEnded
