"""IR-Diffusion: subjects of one picture do not look at each other, and each looks at a reference of its own size.

"Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention",
arXiv 2411.19261, sections 3.2 and 3.3. For the queries of subject i in a picture, whose boxes are given:

    isolation    softmax(q_i [k without the other subjects' tokens, k_ref,i]^T / sqrt(d)) [v without them, v_ref,i]
    reposition   k_ref,i and v_ref,i are resampled bilinearly from the box of the reference to the box of the picture

The background attends as ever. Attention that knows no positions does not notice where keys stand, so that bringing a
subject to another place is to bring it to the other's size. Attention with positions (transformers) would need the
keys before these: there references stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.families import Family
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError, unboxed, whole
from attnctl.kernels.areas import box_on_grid, checked_box, patterns
from attnctl.kernels.checks import as_bias, check_mask, send
from attnctl.kernels.sharing import Keys, joined_keys
from attnctl.processors.sharing.share_attention import ShareAttention

__all__ = ["IRDiffusion", "resampled"]

Box: TypeAlias = tuple[float, float, float, float]
_OWN = ("sources", "take", "parts", "adain", "factor", "share")


def resampled(x: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring the tokens of a rectangle to another size, bilinearly.

    Shapes: x [B, H, N, D]; box [h, w], the places of the rectangle's tokens; size (h', w') -> [B, H, h' w', D].
    """
    if tuple(box.shape) == size:
        return x[:, :, box.flatten()]
    cut = x[:, :, box.flatten()].flatten(0, 1).transpose(1, 2).unflatten(2, tuple(box.shape))
    moved = F.interpolate(cut, size, mode="bilinear", align_corners=False, antialias=True)
    return moved.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])


class _Part(NamedTuple):
    """Keys and values of some rows [b, H, K, D], their places among the keys of these, and what their logits gain."""

    k: Tensor
    v: Tensor
    rows: tuple[int, int]
    columns: Tensor | None
    bias: float


@functools.lru_cache(maxsize=512)
def _marks(boxes: tuple[Box | None, ...], grid: tuple[int, int, int]) -> Tensor:
    """Return whether each subject holds each token of a picture, bool [subjects, tokens]; one token at least."""
    marks = []
    for box in boxes:
        share = torch.zeros(grid[1], grid[2]) if box is None else box_on_grid(box, grid[1], grid[2])
        mark = torch.zeros_like(share, dtype=torch.bool) if box is None else share >= share.max().clamp_max(0.5)
        marks.append(mark.flatten().repeat(grid[0]))
    return torch.stack(marks)


@dataclass(frozen=True, kw_only=True)
class IRDiffusion(ShareAttention):
    """Keep subjects of one picture apart, and each like its reference in another picture of the batch.

    Attributes:
        boxes: One entry per picture of the batch, or one for all: for each subject its box (left, top, right, bottom)
            in fractions of the picture, or None if it is not in that picture.
        references: The number of each subject's reference picture, from 0; empty for isolation alone.
        isolate_until: Fraction of the run until which subjects do not attend to each other; 0 for references alone.
        reposition: Bring references to the size of the subject, in UNets.
        bias: Added to the logits of a reference's keys.
    """

    boxes: tuple[tuple[Box | None, ...], ...] = knob((), kind="free", values="per picture a box or None per subject")
    references: tuple[int, ...] = knob((), kind="free", values="one picture per subject")
    isolate_until: float = knob(0.4, 0.0, 1.0, shown=True)
    reposition: bool = True

    about: ClassVar[About] = About(
        does="keeps subjects of one picture apart, and like their references",
        page="ir_diffusion",
        goal="make pictures of a batch agree",
        title="IR-Diffusion",
        paper="arXiv 2411.19261",
        cite=(
            "He et al., *Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and "
            "Reposition Attention*, arXiv 2411.19261",
        ),
        group="Sharing",
        offered=False,
        sites="every self-attention in the up blocks of a UNet, every self- and joint attention elsewhere",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {name: getattr(ShareAttention(), name) for name in _OWN}
        if changed := [name for name in _OWN if getattr(self, name) != plain[name]]:
            raise ConfigError(
                f"IRDiffusion takes keys subject by subject: leave out {', '.join(changed)}, or use ShareAttention."
            )
        object.__setattr__(self, "boxes", _checked_boxes(self.boxes))
        given = self.references if isinstance(self.references, (list, tuple)) else (self.references,)
        references = tuple(whole(unboxed(r), "IRDiffusion: references", 0, of="pictures") for r in given)
        object.__setattr__(self, "references", references)
        placed = [[box for box in picture if box is not None] for picture in self.boxes]
        if not references and all(len(set(boxes)) < 2 for boxes in placed):
            raise ConfigError(
                "IRDiffusion: no picture has two subjects in different boxes, so that there is nothing to keep apart: "
                "give each subject a box of its own, or references."
            )
        subjects = len(self.boxes[0])
        if references and len(references) != subjects:
            raise ConfigError(
                f"IRDiffusion: {len(references)} references were given for {subjects} subjects: name one picture per "
                "subject, or none at all."
            )
        for i, r in enumerate(references):
            if len(self.boxes) == 1 or r >= len(self.boxes) or self.boxes[r][i] is None:
                raise ConfigError(
                    f"IRDiffusion: subject {i} has its reference in picture {r}, of which boxes says no place: give "
                    "boxes for each picture of the batch, the references among them."
                )

    @property
    def several(self) -> bool:
        return bool(self.references)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        chosen = super().default_sites(sites, family)
        up = tuple(site for site in chosen if site.name.startswith("up_blocks"))
        return up or chosen

    def is_off(self) -> bool:
        return super().is_off() or (self.isolate_until == 0 and not self.references)

    def needs_steps(self) -> bool:
        return super().needs_steps() or 0 < self.isolate_until < 1

    # What happens at a site -----------------------------------------------------------------------------------

    def _rows(self, tables: dict[Any, Any], call: AttnCall, part: slice) -> Tensor:
        """Return the rows of each picture in some rows, counted from the first of them: [halves * pictures, frames]."""
        rows, frames = call.state.rows, call.folded
        halves = len(rows.groups) if part.stop - part.start == rows.total else 1
        pictures = (part.stop - part.start) // halves
        if len(self.boxes) not in (1, pictures):
            raise ConfigError(
                f"IRDiffusion: boxes of {len(self.boxes)} pictures were given for a batch of {pictures}: give one "
                "entry per picture, or one for all."
            )
        return torch.arange(halves * pictures * frames).unflatten(0, (-1, frames))

    def _attend(self, call: AttnCall, proceed: Proceed, table: Tensor, image: slice, tokens: Tensor) -> Tensor:
        isolated = self._isolated(call.state)
        out = proceed(call)
        if not isolated and not self.references:
            return out
        image, grid = call.on_image()
        pictures, moved = len(table) // self._halves(call, table), out.clone()
        for number, rows in enumerate(table):
            inside = self._inside(number % pictures, grid)
            for group, places in patterns(inside):
                if not group:
                    continue
                half = number // pictures * pictures
                at = int(rows[0]), int(rows[-1]) + 1
                parts = [self._own(call, at, image, inside, group if isolated else None)]
                for subject in group:
                    source = self.references[subject] if self.references else number % pictures
                    if source != number % pictures:
                        first = int(table[half + source][0])
                        reference = first, first + len(rows)
                        parts.append(self._reference(call, at, reference, image, grid, subject, number % pictures))
                queries = send(places + image.start, call.q.device)
                q = call.q[at[0] : at[1]][:, :, queries]
                moved[at[0] : at[1], :, queries] = self._attended(call, q, [_masked(p, call, queries) for p in parts])
        return moved

    def _attended(self, call: AttnCall, q: Tensor, parts: list[Keys]) -> Tensor:
        k, v, mask = joined_keys(parts, q)
        return call.with_(q=q, k=k, v=v, mask=mask).plain()

    def _isolated(self, state: CallState) -> bool:
        return state.progress < self.isolate_until or self.isolate_until == 1

    def _halves(self, call: AttnCall, table: Tensor) -> int:
        rows = call.state.rows
        return len(rows.groups) if table.numel() == rows.total * call.folded else 1

    def _inside(self, picture: int, grid: tuple[int, int, int]) -> Tensor:
        return _marks(self.boxes[picture if len(self.boxes) > 1 else 0], grid)

    def _own(
        self, call: AttnCall, at: tuple[int, int], image: slice, inside: Tensor, group: tuple[int, ...] | None
    ) -> _Part:
        """Return a picture's own keys without those of other subjects: all of them with `group` None."""
        k, v = (x[at[0] : at[1]] for x in (call.k, call.v))
        mask = torch.ones(k.shape[2], dtype=torch.bool)
        if group is not None:
            others = [s for s in range(len(inside)) if s not in group]
            hidden = inside[others].any(0) & ~inside[list(group)].any(0)
            start = image.start if call.keys is None else call.keys.start
            mask[start : start + len(hidden)] = ~hidden
        columns = send(mask.nonzero().flatten(), k.device)
        return _Part(k[:, :, columns], v[:, :, columns], at, columns, 0.0)

    def _reference(
        self,
        call: AttnCall,
        at: tuple[int, int],
        source: tuple[int, int],
        image: slice,
        grid: tuple[int, int, int],
        subject: int,
        picture: int,
    ) -> _Part:
        """Return a subject's keys in its reference, at the size of the picture's own subject."""
        k, v = (x[source[0] : source[1]] for x in (call.k, call.v))
        start = image.start if call.keys is None else call.keys.start
        here = send(self._inside(self.references[subject], grid)[subject].nonzero().flatten() + start, k.device)
        unet = call.state.family is not None and call.state.family.unet
        if not (self.reposition and unet):
            return _Part(k[:, :, here], v[:, :, here], source, here, self.bias)
        if call.mask is not None:
            raise UnsupportedModelError(
                f"IRDiffusion: {call.site.name} masks its keys, which cannot be resampled with them: reposition=False."
            )
        box = here.unflatten(0, _extent(self._inside(self.references[subject], grid)[subject], grid))
        size = _extent(self._inside(picture, grid)[subject], grid)
        return _Part(resampled(k, box, size), resampled(v, box, size), source, None, self.bias)


def _extent(inside: Tensor, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Return rows and columns of a box's tokens in one frame."""
    frame = inside[: grid[1] * grid[2]].unflatten(0, (grid[1], grid[2]))
    return int(frame.any(1).sum()), int(frame.any(0).sum())


def _masked(
    part: _Part,
    call: AttnCall,
    queries: Tensor,
) -> Keys:
    """Return keys and values with their mask for some queries: the columns of the rows that they come from."""
    k, v, rows, columns, bias = part
    if call.mask is None or columns is None:
        return k, v, None if bias == 0 else call.q.new_full((1, 1, 1, k.shape[2]), bias)
    mask = check_mask(call.mask, (*call.q.shape[:3], call.k.shape[2]))
    mask = mask.expand(*mask.shape[:3], call.k.shape[2])
    mask = mask if mask.shape[0] == 1 else mask[rows[0] : rows[1]]
    mask = mask if mask.shape[2] == 1 else mask[:, :, queries]
    return k, v, as_bias(mask[..., columns], call.q.dtype) + bias


def _checked_boxes(boxes: Any) -> tuple[tuple[Box | None, ...], ...]:
    """Check the boxes: one entry per picture, equally many subjects in each."""
    form = "boxes=(((0, 0, 0.5, 1), (0.5, 0, 1, 1)),) for two subjects in halves of every picture"
    if not isinstance(boxes, (list, tuple)) or not boxes or not all(isinstance(p, (list, tuple)) and p for p in boxes):
        raise ConfigError(f"IRDiffusion: boxes={boxes!r:.60}: give one entry per picture, such as {form}.")
    checked = []
    for n, picture in enumerate(boxes):
        entries: list[Box | None] = []
        for box in picture:
            if box is not None and (not isinstance(box, (list, tuple)) or len(box) != 4):
                raise ConfigError(f"IRDiffusion: boxes[{n}] holds {box!r:.60}, which is no box: give {form}.")
            entries.append(None if box is None else checked_box(box, f"IRDiffusion: boxes[{n}]"))
        checked.append(tuple(entries))
    if len({len(p) for p in checked}) > 1:
        counts = ", ".join(str(len(p)) for p in checked)
        raise ConfigError(f"IRDiffusion: boxes of {counts} subjects were given: each picture has an entry per subject.")
    return tuple(checked)
