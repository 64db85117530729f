"""Where places of the image look: rows of self-, joint and temporal attention, for a `Capture` with points."""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState
from attnctl.core.hosts.linear import linear_attention
from attnctl.core.hosts.listing import halve, unet_halvings
from attnctl.core.hosts.tokens import image_keys
from attnctl.core.hosts.words import Concept
from attnctl.core.sites import Grid
from attnctl.data.maps import Of
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels import linear_rows, query_rows
from attnctl.processors.capture.recorder import Recorder

__all__ = ["PointRecorder", "point_label", "token_at"]


def point_label(point: tuple[float, ...]) -> str:
    """Name a point: "x,y" or "x,y,frame"."""
    return ",".join(f"{v:g}" for v in point)


def token_at(point: tuple[float, ...], h: int, w: int) -> tuple[int, int]:
    """Return row and column of the token that holds a point (x, y, ...), in shares of width and height."""
    return min(int(point[1] * h), h - 1), min(int(point[0] * w), w - 1)


class PointRecorder(Recorder):
    """Collects what some places of the image attend to, as maps over the image or over the frames of a video."""

    of: Of = "points"
    reads_columns = False

    @property
    def points(self) -> tuple[tuple[float, ...], ...]:
        """Return the places: x and y in shares of the image, and the frame where it was given."""
        assert self.capture.points is not None
        return tuple(self.capture.points)

    def _find(self, state: CallState, count: int) -> None:
        """Name the points, the same for each row."""
        self.labels = tuple(map(point_label, self.points))
        self.concepts = [{label: Concept(label, (n,)) for n, label in enumerate(self.labels)}] * count
        self.prompts = ("",) * count
        if state.prompts is not None and len(state.prompts.prompts) * state.prompts.images == count:
            self.prompts = tuple(text for text in state.prompts.prompts for _ in range(state.prompts.images))

    def _maps(self, call: AttnCall, rows: slice) -> tuple[Tensor, Grid]:
        """Compute [images, points, heads, frames * h * w] and the grid of one call."""
        if call.site.kind == "temporal":
            return self._over_frames(call, rows)
        part, m = self._part(call, rows), call.folded
        tokens, grid = self._keys(call)
        frames, h, w = grid
        if frames > 1 and len(self.points[0]) < 3:
            raise ConfigError(
                f"Capture: {call.site.name} attends over {frames} frames at once, so a point needs its frame: "
                f"(x, y, frame), such as {(*self.points[0], 0)}."
            )
        places = []
        for point in self.points:
            row, column = token_at(point, h, w)
            frame = self._frame(call, point, frames) if frames > 1 else 0
            places.append(tokens.start + (frame * h + row) * w + column)
        if call.kernel is linear_attention:
            maps = linear_rows(part.q, part.k, places)
        else:
            maps = query_rows(part.q, part.k, places, mask=part.mask, scale=call.scale)
        start = tokens.start + image_keys(call).start - (call.image.start if call.image is not None else 0)
        maps = (
            maps[..., start : start + tokens.stop - tokens.start].unflatten(0, (-1, m)).permute(0, 3, 2, 1, 4)
        )  # [b, P, H, m, N]
        if len(self.points[0]) == 3 and frames == 1:
            point_frames = [self._frame(call, point, m) for point in self.points]
            maps = torch.stack([maps[:, n, :, frame] for n, frame in enumerate(point_frames)], 1).unsqueeze(3)
        return maps.flatten(-2), (maps.shape[3] * frames, h, w)

    def _frame(self, call: AttnCall, point: tuple[float, ...], frames: int) -> int:
        if point[2] >= frames:
            raise ConfigError(
                f"Capture: frame {point[2]:g} of the point {point_label(point)} is past the end: {call.site.name} sees "
                f"{frames} frames, 0 to {frames - 1}."
            )
        return int(point[2])

    def _keys(self, call: AttnCall) -> tuple[slice, Grid]:
        """Return the image tokens, which are both queries and keys, and how they lie."""
        if call.site.kind != "joint" and call.k.shape[2] != call.q.shape[2]:
            raise UnsupportedModelError(
                f"Capture: {call.site.name} attends with {call.q.shape[2]} tokens to {call.k.shape[2]}, which are "
                "not the image's own: where they lie is not known."
            )
        return call.on_image()

    def _over_frames(self, call: AttnCall, rows: slice) -> tuple[Tensor, Grid]:
        """Compute what each point in its frame pays to its own place in every frame: a grid of frames by 1 by 1."""
        state, frames = call.state, call.q.shape[2]
        if len(self.points[0]) < 3:
            raise ConfigError(
                f"Capture: {call.site.name} attends over frames, so a point needs its frame: (x, y, frame), such as "
                f"{(*self.points[0], 0)}."
            )
        whole = state.grid
        config = getattr(state.denoiser, "config", None)
        h, w = (0, 0) if whole is None else whole[1:]
        if whole is not None and state.family is not None and state.family.unet:
            h, w = halve(h, w, unet_halvings(call.site.name, len(config.block_out_channels)) or 0)  # type: ignore[union-attr]
        if whole is None or call.q.shape[0] != state.rows.total * h * w or call.k.shape[2] != frames:
            raise UnsupportedModelError(
                f"Capture: {call.site.name} was called with {call.q.shape[0]} rows of {frames} queries and "
                f"{call.k.shape[2]} keys; expected one row a place and one token a frame of the whole video."
            )
        part = self._part(call, rows)
        mask = part.mask
        q, k = (x.unflatten(0, (-1, h * w)) for x in (part.q, part.k))
        maps = []
        for point in self.points:
            row, column = token_at(point, h, w)
            at = row * w + column
            place_mask = mask
            if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
                place_mask = mask.unflatten(0, (-1, h * w))[:, at]
            maps.append(
                query_rows(q[:, at], k[:, at], [self._frame(call, point, frames)], mask=place_mask, scale=call.scale)
            )
        return torch.cat(maps, 2).transpose(1, 2), (frames, 1, 1)
