"""Maps of concepts where cross-attention reads the text, which has no stream of its own (Wan, LTX, PixArt, UNets).

There concepts have no outputs to compare an image with ("ConceptAttention", arXiv 2502.04320, does): what the image
compares itself with are keys. Each concept is one token of text, and the image chooses among these tokens alone:

    k_c = the site's key of concept c, made as that of a text token     map = softmax over concepts of s q_x k_c^T

The keys come from a small call of the denoiser, with the concepts as its text and one line of the image: once a run, or
in each call where keys of the text move with the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.arguments import Rows, row_alone, take_rows
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.one_line import one_line
from attnctl.core.live import LiveDenoiser
from attnctl.core.sites import Grid, Site
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.checks import pick, wide_dtype
from attnctl.processors.capture.concepts import ConceptRecorder
from attnctl.processors.capture.fields import CaptureFields
from attnctl.processors.negative.keys import TimeProbe, text_keys

__all__ = ["KeyConceptRecorder", "choice_of_keys"]

_TEXT = "encoder_hidden_states"


def choice_of_keys(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute softmax over the concepts of scale q k^T, in float32 (float64 stays).

    Shapes: image queries q [B, H, N, D], keys of concepts k [1, H, C, D] -> [B, H, N, C], which sums to 1 over C.
    """
    wide = wide_dtype(q.dtype)
    return (scale * q.to(wide) @ k.to(wide).transpose(-1, -2)).softmax(-1)


class KeyConceptRecorder(ConceptRecorder):
    """Collects how image tokens choose among concepts at cross-attention.

    Args:
        capture: What to record.
        sites: Where.
        pipe: The pipeline, whose text encoders embed the concepts.
        denoiser: The denoiser.
    """

    def __init__(self, capture: CaptureFields, sites: Sequence[Site], pipe: Any, denoiser: torch.nn.Module) -> None:
        self.denoiser, self.family, self.time = denoiser, family_of(denoiser), TimeProbe()
        super().__init__(capture, sites, pipe)

    def begin_run(self) -> None:
        """Forget the maps and keys of the last run."""
        super().begin_run()
        self.keys: dict[tuple[str, int], Tensor] = {}
        self.time.begin_run()

    def before_call(self, passes: LiveDenoiser) -> None:
        """Make the concepts' keys, where none that hold are there."""
        super().before_call(passes)
        self._passes = passes
        if self._rows(passes.state.rows) is not None and (self.time.timeless is False or not self.keys):
            self._make()

    def _make(self) -> None:
        """Call the denoiser with the concepts as its text, and keep their keys."""
        state = self._passes.state
        rows: Rows = state.rows
        at = (rows.cond if rows.prompts else slice(0, rows.total)).start
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        inputs = take_rows(state.bound, slice(at, at + 1), rows.total, frames, self.family)
        text = inputs.get(_TEXT)
        if not isinstance(text, Tensor) or text.ndim != 3 or text.shape[-1] != self.embedded.shape[-1]:
            shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise UnsupportedModelError(
                f"Capture: concepts were encoded as {tuple(self.embedded.shape)}, and the denoiser was called with "
                f"{_TEXT} of another form ({shape}). Use words=..., which every family takes."
            )
        # Behind the concepts stand empty tokens: some hosts tell text from an image prompt by its length.
        made = text.new_zeros(text.shape[0], max(text.shape[1], len(self.own)), text.shape[2])
        made[:, : len(self.own)] = self.embedded.to(made)
        inputs |= {name: None for name in inputs if "encoder" in name and "mask" in name} | {_TEXT: made}
        keys: dict[tuple[str, int], Tensor] = {}

        def note(call: AttnCall, proceed: Proceed) -> Tensor:
            text = text_keys(call)
            keys[call.site.name, call.index] = call.k[:1, :, text.start : text.start + len(self.own)].detach()
            return proceed(call)

        kwargs = one_line(self.denoiser, self.family, inputs) or inputs
        with torch.no_grad():
            self._passes.extra_pass("concepts", kwargs, {site.name: note for site in self.sites})
        self.keys = keys

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Leave the call as it is, and record its maps."""
        key = call.site.name, call.index if row_alone(call.q, call.state.rows, call.index) is None else 0
        read = call.state.phase == "base" and self._rows(call.state.rows) is not None
        if read and key in self.keys and self.time.moved(key, call):
            self._make()
        return super().wrap(call, proceed)

    def _maps(self, call: AttnCall, rows: slice) -> tuple[Tensor, Grid]:
        """Compute [images, concepts, heads, frames * h * w] and the grid of one call."""
        alone = row_alone(call.q, call.state.rows, call.index) is not None
        part, m = self._part(call, rows), 1 if alone else call.folded
        image, grid = call.on_image()
        k = self.keys[call.site.name, 0 if alone else call.index]
        k = k.repeat_interleave(call.q.shape[1] // k.shape[1], 1)
        k = k if self.capture.heads is None else pick(k, list(self.capture.heads), 1)
        maps = choice_of_keys(part.q[:, :, image], k, part.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        return maps.unflatten(0, (-1, m)).permute(0, 4, 2, 1, 3).flatten(-2), (m * grid[0], grid[1], grid[2])
