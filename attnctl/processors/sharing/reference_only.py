"""ReferenceOnly: pictures look at a reference picture, which is brought to the noise level of each step.

The "reference-only" control of the ControlNet extension (Zhang, 2023; no paper). In step t, the reference x_0 is noised
to x_t = a_t x_0 + b_t eps and goes through the model in a pass of its own, with the prompts of the call. Each picture
then attends to the keys and values of that pass beside its own:

    A      softmax(q [k, k_ref + bias]^T / sqrt(d)) [v, v_ref]      rows of the prompt
    f A_0 + (1 - f) A                                               rows of the negative prompt, A_0 the plain attention

The fidelity f makes guidance lead towards the reference: with f = 1 the negative rows do not see it at all.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.arguments import Rows, main_name, time_of
from attnctl.core.hosts.autoencoders import Coder
from attnctl.core.hosts.ghost import equal
from attnctl.core.hosts.spaces import level_of
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.data.picture_files import read_picture, upright
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.sharing.lent import Lent, lengthened, lent_by
from attnctl.processors.sharing.share_attention import ShareAttention

__all__ = ["ReferenceOnly"]

_OWN = ("sources", "take", "parts", "adain", "halves")
_FORM = "give a picture file, a picture, or its latents [C, h, w] as the pipeline takes them; or a tuple of one each"


@dataclass(frozen=True, kw_only=True)
class ReferenceOnly(ShareAttention):
    """Let pictures look at a reference picture (reference-only of the ControlNet extension).

    Attributes:
        reference: A picture file, a picture, or latents as the pipeline takes them; or a tuple with one per picture of
            the batch. Pictures are cut to the shape of the run and brought to its size.
        fidelity: How much rows of the negative prompt keep their plain attention, 0 to 1.
        seed: Seed of the reference's noise, and of the draws of `share` and `chance`.
    """

    reference: Any = knob(None, kind="free", values="a file, a picture, latents, or one per picture", compare=False)
    fidelity: float = knob(0.5, 0.0, 1.0, shown=True)

    about: ClassVar[About] = About(
        does="lets pictures look at a reference picture",
        page="share_attention",
        goal="make pictures of a batch agree",
        paper="the ControlNet extension's `reference-only`",
        group="Sharing",
        offered=False,
        sites="every self- and joint attention",
        needs=("a picture", "the pipeline's autoencoder"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {name: getattr(ShareAttention(), name) for name in _OWN}
        if changed := [name for name in _OWN if getattr(self, name) != plain[name]]:
            raise ConfigError(
                f"ReferenceOnly appends the keys of its reference: leave out {', '.join(changed)}, or use "
                "ShareAttention."
            )
        given = self.reference if isinstance(self.reference, (list, tuple)) else (self.reference,)
        if not given:
            raise ConfigError(f"ReferenceOnly: reference={self.reference!r} holds no picture: {_FORM}.")
        object.__setattr__(self, "reference", tuple(_checked(r, "ReferenceOnly: reference") for r in given))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and equal(vars(self), vars(other))

    def __repr__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        shown = copy.copy(self)  # no `replace`, which would check these words
        object.__setattr__(shown, "reference", tuple(map(_named, self.reference)))
        return ShareAttention.describe(shown)

    @property
    def several(self) -> bool:
        return False

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveReference:
        return LiveReference(self, sites, pipe)


class LiveReference(LiveControl):
    """The references of one denoiser's run.

    Raises:
        ConfigError: A file is missing or no picture.
        UnsupportedModelError: There is no pipeline, which knows noise levels, or none whose autoencoder encodes.
    """

    def __init__(self, control: ReferenceOnly, sites: tuple[Site, ...], pipe: Any) -> None:
        if pipe is None:
            raise UnsupportedModelError(
                "ReferenceOnly brings its reference to the noise level of each step, which a bare model does not "
                "tell: control the pipeline."
            )
        self.control, self.names = control, [site.name for site in sites]
        self.pictures = [read_picture(r, ConfigError) if isinstance(r, str) else r for r in control.reference]
        if any(isinstance(p, Image.Image) for p in self.pictures):
            Coder(pipe)
        self.begin_run()

    def begin_run(self) -> None:
        self.clean: Tensor | None = None
        self.lent: dict[str, Lent] = {}
        self.rows = Rows.all(1)

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        """Send the noised reference through the denoiser, and keep its keys for the call."""
        state, self.lent = passes.state, {}
        if state.rows.role == "extra":
            return None
        self.rows = state.rows
        like = passes.latents.of(state)
        if self.clean is None or self.clean.shape[1:] != like.shape[1:]:
            self.clean = torch.cat([self._encoded(p, passes, like) for p in self.pictures])
        kwargs = dict(state.bound)
        name = main_name(kwargs)
        noisy = self._noised(passes, self.clean)[self._spread(state.rows)]
        kwargs[name] = passes.latents.input(noisy.to(like.device, like.dtype), kwargs[name])
        passes.extra_pass("reference", kwargs, dict.fromkeys(self.names, self._note))
        return None

    def after_call(self, output: Any) -> None:
        self.lent = {}

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        lent, rows = self.lent.get(call.site.name), call.state.rows
        if call.index > 0 or lent is None:
            return proceed(call)
        tokens = self.control.drawn_tokens(call, slice(0, lent.k.shape[2]))
        if tokens is None:
            return proceed(call)
        m, negative = call.folded, self.rows.uncond if self.rows.role == "both" else None
        if call.state.phase != "base":  # the extra pass of a guidance is of the prompt's rows alone
            lent, negative = lent.rows(slice(self.rows.cond.start * m, self.rows.cond.stop * m)), None
        if self.rows.role == "uncond":
            negative = slice(0, rows.total)
        if self.control.share < 1:
            lent = Lent(
                lent.k[:, :, tokens], lent.v[:, :, tokens], None if lent.mask is None else lent.mask[..., tokens]
            )
        out = proceed(lengthened(call, lent, self.control.bias, self.control.factor))
        f = self.control.fidelity
        if negative is None or f == 0:
            return out
        cut = slice(negative.start * m, negative.stop * m)
        mixed = f * proceed(call.rows(negative)) + (1 - f) * out[cut]
        return torch.cat([out[: cut.start], mixed, out[cut.stop :]])

    def _note(self, call: AttnCall, proceed: Proceed) -> Tensor:
        if call.index == 0:
            image = self.control.image_keys(call)
            tokens = torch.arange(image.start, image.stop, device=call.k.device)
            self.lent[call.site.name] = lent_by(call, tokens)
        return proceed(call)

    def _spread(self, rows: Rows) -> Tensor:
        """Return the reference of each row of a call."""
        pictures = rows.prompts or rows.total
        count = len(self.pictures)
        if count not in (1, pictures):
            raise ConfigError(
                f"ReferenceOnly: {count} references were given for a batch of {pictures} pictures: give one for all, "
                "or one per picture."
            )
        return torch.arange(rows.total) % pictures if count > 1 else torch.zeros(rows.total, dtype=torch.long)

    def _noised(self, passes: LiveDenoiser, clean: Tensor) -> Tensor:
        """Bring the references to the noise level of the step, [references, ...] in float32 on the CPU or wider."""
        scheduler = getattr(passes.pipe, "scheduler", None)
        level = level_of(scheduler, time_of(passes.state.bound))
        if level is None:
            raise UnsupportedModelError(
                f"ReferenceOnly needs the noise level of the step, which {type(scheduler).__name__} does not tell. "
                "Give the pipeline another scheduler, such as diffusers' Euler or DDIM."
            )
        noise = []
        for i in range(len(clean)):
            generator = torch.Generator().manual_seed(
                ((self.control.seed * 1_000_003 + passes.state.step) * 1_009 + i) % 2**63
            )
            noise.append(torch.randn(clean.shape[1:], generator=generator, dtype=torch.float32))
        return level[0] * clean + level[1] * torch.stack(noise).to(clean)

    def _encoded(self, picture: Any, passes: LiveDenoiser, like: Tensor) -> Tensor:
        """Encode a reference at the size of the run, [1, ...] in float32 or wider."""
        z = _latents(picture, passes, like) if isinstance(picture, Image.Image) else picture
        wanted = (1, *like.shape[1:])
        for given in (z, z[None]):
            if given.ndim == 4 and like.ndim == 5:  # a picture, for every frame of a clip
                given = given[:, :, None].expand(*given.shape[:2], like.shape[2], *given.shape[2:])
            if given.shape == wanted:
                return given.to(like.device, torch.promote_types(like.dtype, torch.float32))
        raise ConfigError(
            f"ReferenceOnly: its {type(picture).__name__} gives latents {tuple(z.shape)}, and this run has "
            f"{wanted[1:]} per picture: give a picture, or latents of this model and size."
        )


def _latents(picture: Image.Image, passes: LiveDenoiser, like: Tensor) -> Tensor:
    """Encode a picture at the size of the run, as still as a clip where the autoencoder takes clips."""
    coder, state, name = Coder(passes.pipe), passes.state, type(passes.pipe).__name__
    if like.ndim >= 4:
        height, width = (n * coder.space for n in like.shape[-2:])
    elif state.grid is not None:
        height, width = (n * coder.multiple for n in state.grid[1:])
    else:
        raise UnsupportedModelError(
            f"ReferenceOnly: nothing tells the size of the pictures that {name} makes: give the reference's latents."
        )
    frames = 1
    if coder.video and coder.solid and like.ndim == 5:
        first = state.family is not None and state.family.frames_first
        frames = coder.frames((like.shape[1 if first else 2] - 1) * coder.time + 1)
    fitted = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    z = coder.encode(np.repeat(fitted[None], frames, 0)).latents
    pack = getattr(passes.pipe, "_pack_latents", None)
    return pack(z) if like.ndim == 3 and z.ndim == 4 and pack is not None else z


def _named(reference: Any) -> str:
    """Name a reference in a line."""
    if isinstance(reference, Image.Image):
        return "picture {}x{}".format(*reference.size)
    return f"latents {list(reference.shape)}" if isinstance(reference, Tensor) else str(reference)


def _checked(reference: Any, what: str) -> Any:
    """Check one reference; a file is read when the control is attached."""
    if isinstance(reference, (str, os.PathLike)):
        return os.fspath(reference)
    if isinstance(reference, np.ndarray) and reference.dtype == np.uint8 and reference.ndim == 3:
        try:
            reference = Image.fromarray(reference)
        except (TypeError, ValueError):
            raise ConfigError(f"{what}: an array of shape {reference.shape} is no picture: {_FORM}.") from None
    if isinstance(reference, Image.Image):
        return upright(reference)
    if not isinstance(reference, Tensor) or reference.is_meta or not reference.is_floating_point():
        raise ConfigError(f"{what}: {reference!r:.60} is no picture: {_FORM}.")
    if reference.ndim < 2 or not reference.numel() or not bool(reference.isfinite().all()):
        raise ConfigError(f"{what}: latents of shape {tuple(reference.shape)} are none, or not finite: {_FORM}.")
    return reference.detach().clone()
