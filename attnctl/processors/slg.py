"""SLG: guidance away from a prediction with whole transformer blocks skipped.

    pred = base + w (c - p),   p: the prediction with block output := block input in the chosen blocks

Skip-layer guidance, Stability AI's SD3.5 reference; for video also STG, "Spatiotemporal Skip Guidance for Enhanced
Video Diffusion Sampling", arXiv 2411.18664.

With `skip_in="negative"` the blocks are skipped where the negative prompt is predicted, and nowhere else:
classifier-free guidance then pushes away from the damaged u, and no further pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnctl.core.call import CallState
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.caches import check_reached
from attnctl.core.hosts.listing import blocks_around
from attnctl.core.hosts.published import Default
from attnctl.core.hosts.sums import check_negative, unguided
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import UnsupportedModelError

__all__ = ["SLG"]

SkipIn = Literal["extra", "negative"]
_TOKENS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True, kw_only=True)
class SLG(Guidance):
    """Guide away from the prediction that skips some transformer blocks.

    The published setting for SD3.5 medium is blocks 7, 8 and 9 at scale 2.8 from 1 % to 20 % of the run.

    Attributes:
        skip_in: "extra" runs a further pass without the blocks. "negative" leaves the blocks out of the prediction for
            the negative prompt: no further pass runs, and `scale` is not used. It needs classifier-free guidance.

    Example:
        >>> SLG(sites=["transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"]).scale
        2.8
    """

    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2
    skip_in: SkipIn = knob("extra", options=SkipIn)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal")
    about: ClassVar[About] = About(
        does="guides away from skipped blocks",
        page="slg",
        goal="sharpen structure",
        paper="SD3.5 reference; for video arXiv 2411.18664",
        cite=("Hyung et al., *Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling*, arXiv 2411.18664",),
    )
    published: ClassVar[Mapping[str, Default]] = {
        "Stable Diffusion 3, 3.5": Default(
            sites=("transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"),
            blocks=24,
            source="Stability AI's SD3.5 medium reference: blocks 7, 8, 9",
        )
    }

    @property
    def _negative(self) -> bool:
        return self.skip_in == "negative"

    def weight(self, state: CallState) -> float:
        return 0.0 if self._negative else super().weight(state)

    def acts(self, state: CallState) -> bool:
        return self.in_window(state) if self._negative else super().acts(state)

    def is_off(self) -> bool:
        return not self._negative and super().is_off()

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl | None:
        return _NegativeSkip(self, blocks_around(sites, denoiser)) if self._negative else None

    skips_blocks: ClassVar[bool] = True

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        blocks = blocks_around(sites, denoiser)
        return Branch(("skip", tuple(blocks.values())), blocks={m: _skip(n) for m, n in blocks.items()})


class _Ends:
    """Where a block's outputs go on from its inputs.

    Args:
        name: The block, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.order: list[int | None] = []
        self.single = False

    @staticmethod
    def tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """List the token tensors that a block was called with, hidden states first."""
        candidates = [*args[:2], *(kwargs[n] for n in _TOKENS if kwargs.get(n) is not None)]
        return [t for t in candidates if isinstance(t, torch.Tensor) and t.ndim >= 3]

    def learn(self, output: Any, inputs: list[torch.Tensor]) -> None:
        """Match outputs with inputs.

        Raises:
            UnsupportedModelError: They cannot be matched.
        """
        self.single = isinstance(output, torch.Tensor)
        for part in [output] if self.single else output:
            if part is None:
                self.order.append(None)
                continue
            fits = [i for i, t in enumerate(inputs) if t.shape == part.shape and i not in self.order]
            if not fits or (len(fits) > 1 and fits[0] == 0 and len(inputs) > 1 and not self.single):
                raise UnsupportedModelError(
                    f"SLG: block {self.name} cannot be skipped: its outputs cannot be matched with its inputs "
                    f"(shapes {[tuple(t.shape) for t in inputs]})."
                )
            self.order.append(fits[0])

    def outputs(self, inputs: list[torch.Tensor]) -> Any:
        """Return inputs in the places of outputs."""
        parts = tuple(None if i is None else inputs[i] for i in self.order)
        return parts[0] if self.single else parts


def _skip(name: str) -> Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]:
    """Make a forward that returns a block's inputs in the places where the block returns its outputs."""
    ends = _Ends(name)

    def make(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skipped(*args: Any, **kwargs: Any) -> Any:
            inputs = ends.tokens(args, kwargs)
            if not ends.order:  # the first time, the block runs once to show where its outputs go
                ends.learn(forward(*args, **kwargs), inputs)
            return ends.outputs(inputs)

        return skipped

    return make


class _NegativeSkip(LiveControl):
    """Skips blocks in the rows of the negative prompt, in the base pass.

    Args:
        control: The control that it belongs to.
        blocks: The blocks, and their names.
    """

    def __init__(self, control: SLG, blocks: dict[torch.nn.Module, str]) -> None:
        self.control = control
        self.blocks = {module: _Ends(name) for module, name in blocks.items()}
        self.begin_run()

    def begin_run(self) -> None:
        self.guided = self.single = False
        self.reached: set[torch.nn.Module] = set()

    def before_call(self, passes: LiveDenoiser) -> None:
        rows, self.passes = passes.state.rows, passes
        if not self.guided:
            check_negative(self.control.describe(), passes.pipe, rows)
        self.reached = set()
        self.single = rows.uncond is None
        if rows.uncond is not None:
            self.guided = True
            passes.listening.extend(
                module.register_forward_hook(self._skipped, with_kwargs=True) for module in self.blocks
            )

    def _skipped(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.passes.running:
            return None
        ends, inputs = self.blocks[module], _Ends.tokens(args, kwargs)
        if not ends.order:
            ends.learn(output, inputs)
        self.reached.add(module)
        skipped = ends.outputs(inputs)
        if ends.single:
            return self._rows(output, skipped)
        return tuple(self._rows(a, b) for a, b in zip(output, skipped, strict=True))

    def _rows(self, output: Any, skipped: Any) -> Any:
        """Put a block's input in the place of its output, in the negative prompt's rows."""
        rows = self.passes.state.rows
        if output is None or rows.role == "uncond":
            return skipped
        times, rest = divmod(output.shape[0], rows.total)
        if rest:
            raise UnsupportedModelError(
                f"{self.control.describe()}: a block runs {output.shape[0]} rows where the denoiser was called with "
                f"{rows.total}: its rows cannot be told apart."
            )
        assert rows.uncond is not None
        chosen = slice(rows.uncond.start * times, rows.uncond.stop * times)
        changed = output.clone()
        changed[chosen] = skipped[chosen]
        return changed

    def after_call(self, output: Any) -> None:
        if self.passes.state.rows.uncond is not None:
            places = [(ends.name, module in self.reached) for module, ends in self.blocks.items()]
            check_reached(places, self.passes.state.step, "the pass for the negative prompt")

    def stepping(self, latents: torch.Tensor) -> torch.Tensor:
        if self.single and not self.guided:
            raise unguided(self.control.describe(), self.passes.pipe)
        return latents
