"""What a `Capture` keeps while it is attached: running sums of word maps, one a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.arguments import Rows, row_alone
from attnctl.core.hosts.references import references_of
from attnctl.core.hosts.words import Concept, RowText, given_text, prompt_words, row_texts, weights
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Grid, Site
from attnctl.data.maps import Of, WordMaps, joined, reduced
from attnctl.errors import ConfigError, NeverApplied, UnsupportedModelError
from attnctl.kernels.checks import pick
from attnctl.processors.capture.fields import CaptureFields

__all__ = ["Recorder"]


@dataclass
class _Layer:
    """The maps of one site so far."""

    site: Site
    parts: list[Tensor]
    """[images, words, heads, frames, h, w]: the running total, or one tensor a step."""
    count: int
    call: int


class Recorder(LiveControl):
    """Collects the word maps of one denoiser during one run.

    Args:
        capture: What to record.
        sites: Where.
        pipe: The pipeline, whose tokenizers find the words; None for a bare denoiser.
    """

    observes = True
    records = True
    of: Of = "words"
    """What the maps are of."""
    reads_columns = True
    """Whether the maps are columns of the attention map."""

    def __init__(self, capture: CaptureFields, sites: Sequence[Site], pipe: Any) -> None:
        self.capture, self.pipe = capture, pipe
        self.sites = tuple(sites)
        self._check_heads()
        self.begin_run()

    def _check_heads(self) -> None:
        if self.capture.heads is None:
            return
        for site in self.sites:
            if max(self.capture.heads) >= site.heads:
                raise ConfigError(
                    f"Capture: heads={self.capture.heads} do not all exist in {site.name}, which has {site.heads} "
                    f"(0 to {site.heads - 1})."
                )

    def begin_run(self) -> None:
        """Forget the maps of the last run."""
        self.layers: dict[str, _Layer] = {}
        self.steps: list[int] = []
        self.bytes = 0
        self.prompts: tuple[str, ...] = ()
        self.labels: tuple[str, ...] = ()
        self.concepts: list[dict[str, Concept]] = []
        self._weights: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._rows_before: dict[str, list[Tensor]] = {}
        """Maps of the rows of a call that were attended to one by one so far, by site."""

    # Words --------------------------------------------------------------------------------------------------

    def before_call(self, passes: LiveDenoiser) -> None:
        """Find the words of the call's prompt, once a run."""
        state = passes.state
        rows = self._rows(state.rows)
        if rows is None:
            return
        count = rows.stop - rows.start
        if not self.concepts:
            self._find(state, count)
        elif len(self.concepts) != count:
            raise UnsupportedModelError(
                f"Capture: the denoiser was called with {count} rows of the prompt, and with {len(self.concepts)} "
                "before, in one run: maps of both cannot be added up."
            )

    def _rows(self, rows: Rows) -> slice | None:
        """Return the rows to record in this call, or None for none of them."""
        if rows.role == "extra":
            return None
        if self.capture.rows == "uncond":
            return rows.uncond
        return rows.cond if rows.prompts else None

    def _find(self, state: CallState, count: int) -> None:
        """Note prompts and concepts of each row."""
        capture, negative = self.capture, self.capture.rows == "uncond"
        words = capture.words
        lists = len(words) if words is not None and isinstance(words[0], tuple) else None
        rows = row_texts(state.prompts, count, "Capture", prompt=capture.prompt, negative=negative, lists=lists)
        wanted = [words] * (rows[-1].number + 1) if lists is None else list(words or ())
        n_text = given_text(state.bound)
        made: dict[int, dict[str, Concept]] = {}
        for row in rows:
            if row.number not in made:
                made[row.number] = self._row_concepts(row, wanted[row.number], n_text)
        self.concepts = [made[row.number] for row in rows]
        self.labels = tuple(dict.fromkeys(label for concepts in made.values() for label in concepts))
        self.prompts = tuple(row.prompt for row in rows)

    def _row_concepts(self, row: RowText, words: Sequence[Any] | None, n_text: int | None) -> dict[str, Concept]:
        if words is not None:
            return {c.word: c for c in row.find(self.pipe, words, n_text, "Capture")}
        concepts: dict[str, Concept] = {}
        refusal = ConfigError(
            f"Capture: the prompt {row.prompt!r} has no word to record. Name words or places of tokens."
            if row.given
            else "Capture: the prompt is not known (the pipeline was called with embeddings, or a bare denoiser is "
            "under control), so its words are not. Pass prompt=..., or words as places of text tokens."
        )
        for word in prompt_words(row.prompt):
            try:
                concepts[word] = row.find(self.pipe, [word], n_text, "Capture")[0]
            except ConfigError as error:
                refusal = error  # cut off with the prompt's end, perhaps: attention does not see it
        if not concepts:
            raise refusal
        return concepts

    def _columns(
        self, concepts: Sequence[dict[str, Concept]], n_text: int, repeat: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the weights of the words, the same for all rows or each row's own, and the tokens that have any."""
        key = (tuple(map(id, concepts)), n_text, repeat, device)
        if key not in self._weights:
            made = []
            for one in concepts:
                w = torch.zeros(n_text, len(self.labels))
                indices = [n for n, label in enumerate(self.labels) if label in one]
                w[:, indices] = weights([one[self.labels[n]] for n in indices], n_text)
                made.append(w)
            same = all(c is concepts[0] for c in concepts)
            w = made[0] if same else torch.stack(made).repeat_interleave(repeat, dim=0)
            used = w.ne(0).any(-1)
            tokens = (used if same else used.any(0)).nonzero()[:, 0]  # on the CPU: the device need not be waited for
            self._weights[key] = w[..., tokens, :].to(device), tokens.to(device)
        return self._weights[key]

    # Maps ---------------------------------------------------------------------------------------------------

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Leave the call as it is, and record its maps: the attention runs first, and gives its sums if it can."""
        state = call.state
        rows, layer = self._rows(state.rows), self.layers.get(call.site.name)
        alone = row_alone(call.q, state.rows, call.index)
        first = call.index == 0 if alone is None else rows is not None and alone in range(rows.start, rows.stop)
        due = rows is not None and state.phase == "base" and first
        # Gradient checkpointing computes an attention a second time.
        due = due and (layer is None or layer.call < state.call)
        call.wants_sums = call.wants_sums or (due and self.reads_columns)
        out = proceed(call)
        if due and rows is not None:
            with torch.no_grad():
                self._add(call, rows)
        return out

    def _add(self, call: AttnCall, rows: slice) -> None:
        name, state = call.site.name, call.state
        maps, grid = self._maps(call if self.capture.reference is None else self._on_reference(call), rows)
        if (alone := row_alone(call.q, state.rows, call.index)) is not None:
            before = [] if alone == rows.start else self._rows_before[name]
            self._rows_before[name] = [*before, maps]
            if alone < rows.stop - 1:
                return
            maps = torch.cat(self._rows_before.pop(name))
        if "heads" not in self.capture.keep:
            maps = reduced(maps, 2, _how(self.capture)).unsqueeze(2)
        maps = maps.unflatten(-1, grid)
        if self.capture.device is not None:
            maps = maps.to(self.capture.device)
        if state.step not in self.steps:
            self.steps.append(state.step)
        layer, separate = self.layers.get(name), "steps" in self.capture.keep
        if layer is None:
            site = replace(call.site, grid=grid, module=None)
            self._claim(maps, (state.steps or 1) if separate else 1, name)
            self.layers[name] = _Layer(site, [self._stored(maps)], 1, state.call)
            return
        if layer.site.grid != grid:
            raise UnsupportedModelError(
                f"Capture: {name} changed its grid from {layer.site.grid} to {grid} in one run."
            )
        if separate:
            if state.steps is None:
                self._claim(maps, 1, name)
            layer.parts.append(self._stored(maps))
        elif self.capture.reduce == "max":
            layer.parts[0] = torch.maximum(layer.parts[0], self._stored(maps))
        elif self.capture.reduce == "ema":
            layer.parts[0].lerp_(self._stored(maps), 1 - self.capture.decay)
        else:
            layer.parts[0] += maps
        layer.count, layer.call = layer.count + 1, state.call

    def _on_reference(self, call: AttnCall) -> AttnCall:
        """Return the call with a reference picture in place of the image."""
        number, places = self.capture.reference, references_of(call.state)
        assert number is not None
        if number >= len(places):
            raise ConfigError(
                f"Capture: reference={number} was given, and the call of the denoiser tells of {len(places)} reference "
                f"pictures beside the image{' (0 is the first)' if places else ''}."
            )
        start, grid = places[number]
        start += call.on_image()[0].start
        if call.site.kind != "joint" or start + math.prod(grid) > call.q.shape[2]:
            raise UnsupportedModelError(
                f"Capture: {call.site.name} does not hold the tokens of the reference picture. Choose other sites."
            )
        return call.with_(place=(slice(start, start + math.prod(grid)), grid))

    def _stored(self, maps: Tensor) -> Tensor:
        return maps.to(torch.float16 if self.capture.store == "float16" else torch.float32).contiguous()

    def _claim(self, maps: Tensor, times: int, name: str) -> None:
        """Count the bytes that a layer will take against the budget."""
        each = 2 if self.capture.store == "float16" else 4
        self.bytes += maps.numel() * each * times
        if self.bytes > self.capture.budget:
            raise ConfigError(
                f"Capture: the maps would take more than budget={self.capture.budget} bytes: {self.bytes} with {name}, "
                f"which is layer {len(self.layers) + 1} of {len(self.sites)}. Record fewer words, sites or steps, "
                'leave out keep=, or use store="float16", or raise the budget.'
            )

    def _maps(self, call: AttnCall, rows: slice) -> tuple[Tensor, Grid]:
        """Compute [images, words, heads, frames * h * w] and the grid of one call."""
        maps, m, grid = self._probabilities(call, rows)
        return maps.unflatten(0, (-1, m)).permute(0, 4, 2, 1, 3).flatten(-2), (m * grid[0], grid[1], grid[2])

    def _probabilities(self, call: AttnCall, rows: slice) -> tuple[Tensor, int, Grid]:
        """Compute [images * m, heads, image tokens, words], the m frames folded into rows, and the grid of one part."""
        alone = row_alone(call.q, call.state.rows, call.index)
        part, m, text = self._part(call, rows), 1 if alone is not None else call.folded, call.text_keys()
        concepts = self.concepts if alone is None else self.concepts[alone - rows.start :][:1]
        w, tokens = self._columns(concepts, text.stop - text.start, m, call.q.device)
        return part.text_map(w, tokens), m, call.on_image()[1]

    def _part(self, call: AttnCall, rows: slice) -> AttnCall:
        """Return the rows and heads of a call that are recorded."""
        part = call if row_alone(call.q, call.state.rows, call.index) is not None else call.rows(rows)
        heads = None if self.capture.heads is None else list(self.capture.heads)
        if heads is None:
            return part
        groups, mask = part.q.shape[1] // part.k.shape[1], part.mask
        mask = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else pick(mask, heads, 1)
        shared = [h // groups for h in heads]
        sums = None if part.sums is None else pick(part.sums, heads, 1)
        return part.with_(
            q=pick(part.q, heads, 1), k=pick(part.k, shared, 1), v=pick(part.v, shared, 1), mask=mask, sums=sums
        )  # fmt: skip

    # Reading ------------------------------------------------------------------------------------------------

    def result(self, parts: Sequence[LiveControl]) -> WordMaps:
        """Return the maps of the last run, joined where several denoisers took turns."""
        recorders = [part for part in parts if isinstance(part, Recorder)]
        return joined([r.maps() for r in recorders if r.layers] or [self.maps()])

    def maps(self) -> WordMaps:
        """Return what was recorded in the last run.

        Raises:
            NeverApplied: Nothing was.
            UnsupportedModelError: A map holds a value that is not a finite number.
        """
        if not self.layers:
            raise NeverApplied(
                "Capture has recorded nothing yet: run the pipeline first, with a step inside its start and stop"
                + (
                    ' and with a negative prompt that guidance uses (rows="uncond").'
                    if self.capture.rows != "cond"
                    else "."
                )
            )
        order = [site.name for site in self.sites if site.name in self.layers]
        layers = {name: self._layer(self.layers[name]) for name in order}
        tokens = tuple(tuple(c[label].positions if label in c else () for label in self.labels) for c in self.concepts)
        return WordMaps(
            words=self.labels,
            layers=layers,
            sites=tuple(self.layers[name].site for name in order),
            steps=tuple(self.steps),
            prompts=self.prompts,
            tokens=tokens,
            heads=None if self.capture.heads is None else tuple(self.capture.heads),
            rows=self.capture.rows,
            reduce=_how(self.capture),
            keep=tuple(self.capture.keep),
            of=self.of,
            about={} if self.capture.reduce != "ema" else {"steps_reduced": f"ema, decay {self.capture.decay:g}"},
        )

    def _layer(self, layer: _Layer) -> Tensor:
        """Return [images, words, steps, heads, frames, h, w], NaN for the words that an image's prompt lacks."""
        if "steps" in self.capture.keep:
            out = torch.stack(layer.parts, dim=2)
        else:
            whole = layer.parts[0] / layer.count if self.capture.reduce == "mean" else layer.parts[0].clone()
            out = whole.unsqueeze(2)
        if not torch.isfinite(out).all():
            raise UnsupportedModelError(
                f"Capture: the maps of {layer.site.name} hold values that are not finite numbers: attention gave them "
                "there, as where float16 overflows. Run the model in bfloat16 or float32, or choose other sites."
            )
        for n, concepts in enumerate(self.concepts):
            lacks = [i for i, label in enumerate(self.labels) if label not in concepts]
            if lacks:
                out[n, lacks] = torch.nan
        return out


def _how(capture: CaptureFields) -> Any:
    return "mean" if capture.reduce in ("none", "ema") else capture.reduce
