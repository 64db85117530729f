"""Maps of concepts: where an image is like a word that need not stand in its prompt.

"ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features" (arXiv 2502.04320). Beside image x and
text, a stream of concept tokens c goes through the double blocks of a diffusion transformer. It is made as the text is,
by the text's weights and modulation, and reads image and concepts; nothing reads it, so the image stays as it is:

    o_c = softmax(q_c [k_c; k_x]^T / sqrt(d)) [v_c; v_x]      c <- the block's text half of c and o_c
    map = softmax over concepts of <o_x, o_c>                 o_x: the image's own attention outputs, heads joined

No block is written again here: the model's own block runs once more, on the concepts in place of the text and a single
image token in place of the image, whose keys and values in the attention are those of the real image. Models whose text
has no stream, because cross-attention reads it, have no o_c: `concept_keys` says what their maps are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.arguments import bind_call, take_rows
from attnctl.core.hosts.caches import hooks_below
from attnctl.core.hosts.encoding import EncoderWatch
from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.published import Default
from attnctl.core.hosts.text_stream import rotary_of_few, text_stream
from attnctl.core.hosts.textlayout import is_known, text_parts
from attnctl.core.hosts.words import Concept, find_words, words_in
from attnctl.core.live import LiveDenoiser
from attnctl.core.sites import Grid, Selector, Site, select
from attnctl.data.maps import Of
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels import attention
from attnctl.kernels.checks import wide_dtype
from attnctl.processors.capture.fields import CaptureFields
from attnctl.processors.capture.recorder import Recorder

__all__ = [
    "CONCEPT_SITES",
    "ConceptRecorder",
    "StreamConceptRecorder",
    "concept_outputs",
    "concept_path",
    "concept_shares",
    "concept_sites",
    "embed_concepts",
]

_PAPER = Default(span=(15, 19, 19), source="ConceptAttention, arXiv 2502.04320: double blocks 15 to 18 of 19")
_LAST_FIFTH = Default(span=(15, 19, 19), source="in proportion to ConceptAttention, arXiv 2502.04320, on FLUX.1")
CONCEPT_SITES = {
    "Stable Diffusion 3, 3.5": _PAPER,
    "FLUX.1": _PAPER,
    "FLUX.2": _LAST_FIFTH,
    "Qwen-Image": _LAST_FIFTH,
    "CogVideoX": _LAST_FIFTH,
}
"""Joint blocks to read, in the families whose blocks carry a stream of text."""


def concept_outputs(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, scale: float | None = None
) -> Tensor:
    """Let concepts attend to themselves and the image: softmax(q [k; k_x]^T scale) [v; v_x].

    Shapes: q, k, v [B, H, C, D]; image_k, image_v [B, H, N, D] -> [B, H, C, D].
    """
    return attention(q, torch.cat([k, image_k], 2), torch.cat([v, image_v], 2), scale=scale)


def concept_shares(image: Tensor, concepts: Tensor) -> Tensor:
    """Compute softmax over the concepts of <o_x, o_c>, heads joined, in float32 (float64 stays).

    Shapes: attention outputs image [B, H, N, D], concepts [B, H, C, D] -> [B, N, C], which sums to 1 over C.
    """
    wide = wide_dtype(image.dtype)
    return torch.einsum("bhnd,bhcd->bnc", image.to(wide), concepts.to(wide)).softmax(-1)


def concept_sites(sites: Sequence[Site], selector: Selector | None, family: Family) -> tuple[Site, ...]:
    """Choose the double blocks whose maps are recorded, or cross-attention where the text has no stream.

    Where no selector is given: the published blocks, or every cross-attention.

    Raises:
        UnsupportedModelError: The family keeps no text stream that is known here, and has no cross-attention.
        SiteError: The selector matches none.
    """
    published, stream = CONCEPT_SITES.get(family.name), text_stream(family)
    if published is None or stream is None:
        if any(s.kind == "cross" for s in sites) and not any(s.kind == "joint" for s in sites):
            wanted = "cross" if selector is None else selector
            return select(sites, wanted, kinds=("cross",), what="Capture of concepts")
        raise UnsupportedModelError(
            "Capture: concepts follow the text stream of a transformer's joint blocks, as in SD3, FLUX, Qwen-Image and "
            f"CogVideoX, or are read by cross-attention; {family.name} models have none that is known here. Use "
            "words=..., which every family takes."
        )
    double = tuple(s for s in sites if s.kind == "joint" and stream.has(s.module))
    if selector is not None:
        return select(double, selector, kinds=("joint",), what="Capture of concepts")
    return published.of(double, ("joint",), "Capture of concepts")


def concept_path(sites: Sequence[Site], chosen: Sequence[Site], family: Family) -> tuple[Site, ...]:
    """Return the blocks that concepts go through to reach the last of the chosen ones; cross-attention as it is."""
    stream = text_stream(family)
    if stream is None or chosen[0].kind == "cross":
        return tuple(chosen)
    return tuple(s for s in sites if s.kind == "joint" and stream.has(s.module) and s.depth <= chosen[-1].depth)


@torch.no_grad()
def embed_concepts(pipe: Any, concepts: Sequence[str]) -> tuple[Tensor, tuple[Concept, ...]]:
    """Encode each concept as a prompt of its own: one vector each, the mean over its tokens, and these tokens.

    Where several encoders put their tokens one behind the other (SD3), those of the last count, which is T5 if it is
    there.

    Returns:
        [concepts, channels], as the denoiser's text input has them, and the places of each in its own prompt.

    Raises:
        ConfigError: A concept has no token, or too many.
        UnsupportedModelError: The pipeline's tokenizers or text encoders are not known.
    """
    encode = getattr(type(pipe), "encode_prompt", None)
    if encode is None:
        raise UnsupportedModelError(
            f"Capture: {type(pipe).__name__} has no encode_prompt(), by which a concept is encoded. Use words=..., "
            "which every family takes."
        )
    parameters = inspect.signature(encode).parameters
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
    options |= {"num_images_per_prompt": 1} if "num_images_per_prompt" in parameters else {}
    options |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in parameters else {}
    watch = EncoderWatch(pipe)
    with watch.listening():
        states = pipe.encode_prompt(prompt=list(concepts), device=pipe._execution_device, **options)[0]
    entries = _laid_out(pipe, concepts) if is_known(pipe) else _heard(pipe, watch, concepts, states)
    return torch.stack([s[list(c.positions)].mean(0) for s, c in zip(states, entries, strict=True)]), tuple(entries)


def _laid_out(pipe: Any, concepts: Sequence[str]) -> list[Concept]:
    """Find each concept in its own prompt, where the pipeline's layout of text is known."""
    last = max(part.offset for part in text_parts(pipe))
    entries = []
    for concept in concepts:
        (whole,) = find_words(pipe, concept, [concept])
        places = tuple(p for p in whole.positions if p >= last)
        entries.append(Concept(concept, places, whole.tokens[-len(places) :]))
    return entries


def _heard(pipe: Any, watch: EncoderWatch, concepts: Sequence[str], states: Any) -> list[Concept]:
    """Find each concept in what the text encoders were given, in a template or not."""
    readings = watch.readings(tuple(concepts), states)
    if readings is None:
        raise UnsupportedModelError(
            f"Capture: what the text encoders of {type(pipe).__name__} make of a concept cannot be told from what they "
            "were given. Use words=..., which every family takes."
        )
    return [words_in(group[-1:], [concept])[0] for group, concept in zip(readings, concepts, strict=True)]


class ConceptRecorder(Recorder):
    """Collects concept maps of one denoiser during one run.

    Args:
        capture: What to record.
        sites: Where.
        pipe: The pipeline, whose text encoders embed the concepts.
    """

    of: Of = "concepts"
    reads_columns = False

    def __init__(self, capture: CaptureFields, sites: Sequence[Site], pipe: Any) -> None:
        if pipe is None:
            raise ConfigError(
                "Capture: concepts are embedded by the pipeline's text encoders: control the pipeline, not the bare "
                "denoiser."
            )
        super().__init__(capture, sites, pipe)
        assert capture.concepts is not None
        self.embedded, self.own = embed_concepts(pipe, capture.concepts)

    def _find(self, state: CallState, count: int) -> None:
        """Name the concepts, the same for each row."""
        self.labels = tuple(concept.word for concept in self.own)
        self.concepts = [{concept.word: concept for concept in self.own}] * count
        self.prompts = ("",) * count
        if state.prompts is not None and len(state.prompts.prompts) * state.prompts.images == count:
            self.prompts = tuple(text for text in state.prompts.prompts for _ in range(state.prompts.images))


class StreamConceptRecorder(ConceptRecorder):
    """Takes concepts through the double blocks of a denoiser, beside its text.

    Args:
        capture: What to record.
        path: The double blocks that the concepts go through.
        sites: Those of them to record.
        pipe: The pipeline, whose text encoders embed the concepts.
        denoiser: The denoiser.
    """

    def __init__(
        self, capture: CaptureFields, path: Sequence[Site], sites: Sequence[Site], pipe: Any, denoiser: torch.nn.Module
    ) -> None:
        super().__init__(capture, sites, pipe)
        self.denoiser: Any = denoiser
        self.recorded = {site.name for site in sites}
        self.blocks: dict[str, Any] = {s.name: denoiser.get_submodule(s.name.rpartition(".")[0]) for s in path}
        stream = text_stream(family_of(denoiser))
        assert stream is not None
        self.stream = stream

    def before_call(self, passes: LiveDenoiser) -> None:
        """Note where to run the concepts' blocks; refuse what they cannot run in."""
        if any(block._compiled_call_impl is not None for block in self.blocks.values()):
            raise UnsupportedModelError(
                "Capture: concepts run through the blocks beside the image, which compiled blocks do not let them. "
                "Attach the capture to a pipeline that is not compiled."
            )
        if hook := next((name for block in self.blocks.values() for name in _hooks(block)), None):
            raise UnsupportedModelError(
                f"Capture: concepts run through the blocks beside the image, and the hook {hook!r} of diffusers (a "
                "cache, group offloading) would take them for it. Switch it off, as with transformer.disable_cache()."
            )
        self._passes = passes
        super().before_call(passes)

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Leave the call as it is, take the concepts through its block, and record their maps."""
        out = proceed(call)
        state = call.state
        rows = self._rows(state.rows)
        if rows is None or state.phase != "base" or call.index != 0:
            return out
        done = state.scratch.setdefault((id(self), "done"), set())
        # Gradient checkpointing computes an attention a second time.
        if call.site.name not in done:
            done.add(call.site.name)
            with torch.no_grad():
                attended = self._carry(call, rows)
                if call.site.name in self.recorded:
                    self._outputs = out[rows], attended
                    try:
                        self._add(call, rows)
                    finally:
                        del self._outputs
        return out

    def _carry(self, call: AttnCall, rows: slice) -> Tensor:
        """Take the concepts through a block; return their attention's outputs [b, H, C, D]."""
        name, state = call.site.name, call.state
        block = self.blocks[name]
        if call.mask is not None or call.image is None or call.block_call is None:
            raise UnsupportedModelError(
                f"Capture: {name} was called with an attention mask or an unknown order of tokens, of which concepts "
                "cannot tell what they may read."
            )
        arguments, options = call.block_call
        inputs = take_rows(bind_call(block, arguments, options), rows, state.rows.total)
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        at = call.image
        image_k, image_v = (x[rows][:, :, at] for x in (call.k, call.v))
        outputs: list[Tensor] = []

        def among(inner: AttnCall, proceed: Proceed) -> Tensor:
            if inner.index != 0:
                return proceed(inner)
            assert inner.text is not None
            q, k, v = (x[:, :, inner.text] for x in (inner.q, inner.k, inner.v))
            outputs.append(concept_outputs(q, k, v, image_k, image_v, inner.scale))
            whole = torch.zeros_like(inner.q)
            whole[:, :, inner.text] = outputs[0]
            return whole

        with self._passes.beside({name: among}):
            key = (id(self), "concepts")
            if key not in state.scratch:
                made = self.stream.begins(self.denoiser, self.embedded, text.device)
                state.scratch[key] = made.to(text.dtype).expand(len(image), -1, -1)
            inputs |= {"hidden_states": image[:, :1], "encoder_hidden_states": state.scratch[key]}
            if inputs.get("image_rotary_emb") is not None:
                tokens = len(self.own), text.shape[1], image.shape[1]
                inputs["image_rotary_emb"] = rotary_of_few(inputs["image_rotary_emb"], *tokens)
            state.scratch[key] = block.forward(**inputs)[self.stream.output]
        return outputs[0]

    def _maps(self, call: AttnCall, rows: slice) -> tuple[Tensor, Grid]:
        """Compute [images, concepts, 1, h * w] and the grid of one call."""
        assert call.image is not None
        image, grid = call.on_image()
        outputs = [x if self.capture.heads is None else x[:, list(self.capture.heads)] for x in self._outputs]
        return concept_shares(outputs[0][:, :, image], outputs[1]).transpose(1, 2).unsqueeze(2), grid


def _hooks(block: torch.nn.Module) -> list[str]:
    """Name diffusers' hooks in a block that keep something from one call to the next."""
    return [name for name, _ in hooks_below(block) if name != "layerwise_casting"]
