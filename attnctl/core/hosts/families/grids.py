"""How the tokens of a denoiser call lie, read from its arguments: grids, and what stands beside the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.families.row import Bound, Tokens
from attnctl.core.hosts.readings import read_once
from attnctl.core.sites import Grid

__all__: list[str] = []


def patch(model: torch.nn.Module) -> tuple[int, int]:
    """Return the patch size (time, space) from a model's config."""
    config: Any = model.config
    size = getattr(config, "patch_size", 1)
    if isinstance(size, (tuple, list)):  # (time, height, width)
        return int(size[0]), int(size[-1])
    return int(getattr(config, "patch_size_t", None) or 1), int(size)


def image(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, C, H, W]."""
    h, w = bound["hidden_states"].shape[-2:]
    p = patch(model)[1]
    return 1, h // p, w // p


def video(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, C, F, H, W]."""
    f, h, w = bound["hidden_states"].shape[-3:]
    pt, p = patch(model)
    return math.ceil(f / pt), h // p, w // p


def frames_first(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, F, C, H, W]."""
    _, f, _, h, w = bound["hidden_states"].shape
    pt, p = patch(model)
    return math.ceil(f / pt), h // p, w // p


def channels_last(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, F, H, W, C] (Kandinsky 5, 6)."""
    _, f, h, w, _ = bound["hidden_states"].shape
    pt, p = patch(model)
    return f // pt, h // p, w // p


def latte(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, C, F, H, W] of a model without patches in time."""
    f, h, w = bound["hidden_states"].shape[-3:]
    p = patch(model)[1]
    return f, h // p, w // p


def sample(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the full-resolution grid of a UNet off its sample [B, C, H, W] or [B, C, F, H, W]."""
    shape = bound["sample"].shape
    return (1 if len(shape) == 4 else shape[2]), shape[-2], shape[-1]


def patched_sample(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off a sample [B, C, H, W] that is cut into patches (Stable Cascade)."""
    p = patch(model)[1]
    return 1, bound["sample"].shape[-2] // p, bound["sample"].shape[-1] // p


def sample_frames_first(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off a sample [B, F, C, H, W]."""
    _, f, _, h, w = bound["sample"].shape
    return f, h, w


def length(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the length of a sound off hidden states [B, C, N]."""
    return 1, 1, int(bound["hidden_states"].shape[-1])


def rows_of_time(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the length of a sound off hidden states [B, N, C]."""
    return 1, 1, int(bound["hidden_states"].shape[1]) // patch(model)[1]


def counted(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off the numbers that a call gives, or off its tokens' places (LTX-Video, LTX-2)."""
    size = (bound.get("num_frames"), bound.get("height"), bound.get("width"))
    if None not in size:
        return int(size[0]), int(size[1]), int(size[2])  # type: ignore[arg-type]
    places = bound.get("video_coords")
    return None if places is None or places.is_meta else read_once(places, "box", _box)


def _box(places: Tensor) -> Grid | None:
    """Find the video among tokens at places [B, 3, N] in time, height and width: it begins at the last first corner.

    Conditions stand before it (LTXConditionPipeline), each at a later time than the first.
    """
    axes = places[0]
    corner = (axes == axes.amin(1, keepdim=True)).all(0).nonzero()[-1]
    counts = [torch.tensor([axis.unique().numel()], device=axes.device) for axis in axes[1:]]
    first, rows, columns = torch.cat([corner, *counts]).tolist()
    frames, rest = divmod(axes.shape[1] - first, rows * columns)
    return None if rest else (frames, rows, columns)


# Position ids and shapes ------------------------------------------------------------------------------------------


def _plane(ids: Tensor) -> tuple[int, int, int, int, int]:
    """Find the image among the tokens of position ids: tokens before it, its own, those behind; rows and columns.

    The first column counts images, and the one that is denoised comes first in it, wherever its tokens lie: reference
    images have higher numbers.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    at = (ids[:, 0] == ids[:, 0].min()).nonzero()[:, 0]
    first, count = at[0], at.numel()
    plane = ids[at]
    size = plane.amax(0) - plane.amin(0) + 1
    read = torch.stack([first, size[1].long(), size[2].long()]).tolist()
    return int(read[0]), count, len(ids) - int(read[0]) - count, int(read[1]), int(read[2])


def _planes(bound: Bound, name: str) -> tuple[int, int, int, int, int] | None:
    ids = bound.get(name)
    if ids is None or ids.is_meta:
        return None
    return read_once(ids, "plane", _plane)


def ids(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off position ids [N, 3 or 4] (image, row, column, ...)."""
    plane = _planes(bound, "img_ids")
    return None if plane is None else (1, plane[3], plane[4])


def ids_tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count the tokens of position ids; a call without them holds the image alone."""
    plane = _planes(bound, "img_ids")
    whole = int(bound["hidden_states"].shape[1])
    if plane is None or plane[1] != plane[3] * plane[4] or sum(plane[:3]) != whole:
        return Tokens(whole)
    return Tokens(plane[1], plane[0], plane[2])


def packed(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Take all tokens of packed hidden states [B, N, C] for the image's."""
    return Tokens(int(bound["hidden_states"].shape[1]))


def counted_last(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count tokens beside a grid that the call gives; what is packed in front of it are conditions (LTX-Video)."""
    n, rest = _counted_rest(model, bound)
    return Tokens(n, before=rest)


def counted_first(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count tokens beside a grid that the call gives; what is packed behind it are conditions (LTX-2)."""
    n, rest = _counted_rest(model, bound)
    return Tokens(n, after=rest)


def _counted_rest(model: torch.nn.Module, bound: Bound) -> tuple[int, int]:
    whole, grid = int(bound["hidden_states"].shape[1]), counted(model, bound)
    n = whole if grid is None or math.prod(grid) > whole else math.prod(grid)
    return n, whole - n


def _shapes(model: torch.nn.Module, bound: Bound, name: str) -> list[Grid]:
    shapes = bound.get(name)
    if not shapes:
        return []
    first = shapes[0]
    entries = first if isinstance(first, list) else [first]
    return [(int(s[0]), int(s[1]), int(s[2])) for s in entries]


def shapes(name: str) -> Callable[[torch.nn.Module, Bound], Grid | None]:
    """Make a reader of the grid from shapes [(frames, rows, columns), ...]: what is generated stands first."""

    def grid(model: torch.nn.Module, bound: Bound) -> Grid | None:
        entries = _shapes(model, bound, name)
        if not entries:
            return None
        if getattr(model.config, "use_layer3d_rope", False) and len(entries) > 1:  # layers, then what they are cut from
            return (len(entries) - 1, *entries[0][1:])
        return entries[0]

    return grid


def shapes_tokens(name: str) -> Callable[[torch.nn.Module, Bound], Tokens]:
    """Make a counter of tokens from the same shapes: reference images stand behind what is generated."""
    grid = shapes(name)

    def tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
        size, whole = grid(model, bound), int(bound["hidden_states"].shape[1])
        n = whole if size is None else math.prod(size)
        return Tokens(n, after=whole - n) if n <= whole else Tokens(whole)

    return tokens


def vision_shapes(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off the shapes of Cosmos 3's vision tokens: the last entry is what is generated."""
    given = bound.get("vision_token_shapes")
    if not given:
        return None
    size = given[-1] if isinstance(given[-1], (tuple, list)) else given
    size = size[-1] if isinstance(size[-1], (tuple, list)) else size
    return int(size[0]), int(size[1]), int(size[2])


# Families with an arrangement of their own ------------------------------------------------------------------------


def even_text(model: torch.nn.Module, bound: Bound) -> Tokens | None:
    """Count Lumina 2's image tokens; None where prompts of unequal length put the image at unequal places."""
    mask = bound.get("encoder_attention_mask")
    if mask is not None and len(mask) > 1 and not read_once(mask, "even", _even_rows):
        return None
    return Tokens(math.prod(image(model, bound)))


def _even_rows(mask: Tensor) -> bool:
    counts = mask.sum(1)
    return bool((counts == counts[0]).all())


def squared(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count HiDream's tokens: an image that is not square is padded to the most that the model takes."""
    x, n = bound["hidden_states"], math.prod(image(model, bound))
    if x.ndim == 4 and x.shape[-2] == x.shape[-1]:
        return Tokens(n)
    return Tokens(n, after=int(getattr(model, "max_seq", n)) - n)


def history(sizes: dict[str, tuple[int, int, int]]) -> Callable[[torch.nn.Module, Bound], Tokens]:
    """Make a counter of image tokens behind those of earlier frames.

    Args:
        sizes: The patch (frames, rows, columns) that each argument with earlier latents [B, C, F, H, W] is cut into.
    """

    def tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
        before = 0
        for name, size in sizes.items():
            latents = bound.get(name)
            if latents is not None:
                before += math.prod(math.ceil(n / p) for n, p in zip(latents.shape[-3:], size, strict=True))
        prompt = bound.get("image_embeds") if getattr(model.config, "has_image_proj", False) else None
        led = 0 if prompt is None else int(prompt.shape[1])
        return Tokens(math.prod(video(model, bound)), before=before, led=led)

    return tokens


def led_by_image(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count HunyuanVideo 1.5's tokens: an image prompt leads its text, and goes to the end where it is zero."""
    prompt = bound.get("image_embeds")
    n = 0 if prompt is None else int(prompt.shape[1])
    text = sum(int(bound[name].shape[1]) for name in _TEXTS_15 if bound.get(name) is not None)
    leads = prompt is not None and not prompt.is_meta and read_once(prompt, "given", lambda x: bool((x != 0).any()))
    return Tokens(math.prod(video(model, bound)), text=text, led=n if leads else 0)


_TEXTS_15 = ("encoder_hidden_states", "encoder_hidden_states_2")


def timed(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count OmniGen's tokens: one for the time stands between the text and the image."""
    return Tokens(math.prod(image(model, bound)), before=1)


def last_ids(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off the position ids of the last tokens, which are the image's (Krea 2)."""
    given, n = bound.get("position_ids"), int(bound["hidden_states"].shape[1])
    if given is None or given.is_meta:
        return None
    plane = read_once(given, f"plane of {n}", lambda x: _plane(x[..., -n:, :]))
    return 1, plane[3], plane[4]


def last_tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count the tokens of an image, behind which Krea 2's edits may put others."""
    grid, whole = last_ids(model, bound), int(bound["hidden_states"].shape[1])
    n = whole if grid is None else math.prod(grid)
    return Tokens(n, after=whole - n) if n <= whole else Tokens(whole)


def _marked(x: Tensor) -> tuple[int, int, int]:
    """Read rows and columns of the image, and its tokens, off position ids with an indicator as a further column."""
    plane = x[0][x[0][:, -1] == x[0][-1, -1]]
    size = (plane.amax(0) - plane.amin(0) + 1).tolist()
    return int(size[1]), int(size[2]), len(plane)


def marked(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read Ideogram 4's grid off the position ids of the tokens whose indicator is that of the last."""
    given, indicator = bound.get("position_ids"), bound.get("indicator")
    if given is None or indicator is None or given.is_meta:
        return None
    rows, columns, _ = read_once(given, "marked", lambda x: _marked(torch.cat([x, indicator[..., None].to(x)], -1)))
    return 1, rows, columns


def indexed(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read MiniMax H3's grid off the position ids of its video tokens."""
    given, at = bound.get("position_ids"), bound.get("video_indices")
    if given is None or at is None or given.is_meta:
        return None
    size = read_once(given, "indexed", lambda x: (x[at].amax(0) - x[at].amin(0) + 1).tolist())
    return int(size[0]), int(size[1]), int(size[2])


def indexed_tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count MiniMax H3's tokens: its sound stands between text and video."""
    audio = bound.get("audio_indices")
    return Tokens(int(bound["hidden_states"].shape[1]), before=0 if audio is None else len(audio))


def pooled_text(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count Stable Cascade's keys: image, text, pooled text, image prompt; its decoder sees pooled text alone."""
    text = bound.get("clip_text")
    return Tokens(math.prod(patched_sample(model, bound)), text=None if text is None else int(text.shape[1]))


def image_led(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count the tokens of an image prompt that Wan joins in front of its text, where it has no keys of its own."""
    prompt = bound.get("encoder_hidden_states_image")
    return Tokens(math.prod(video(model, bound)), led=0 if prompt is None else int(prompt.shape[1]))


def offset_grid(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read Wan-Animate 2's grid off the sizes that the call gives."""
    given = bound.get("offset_grid_sizes")
    if given is None or given.is_meta:
        return None
    size = read_once(given, "grid", lambda x: x[0].tolist())
    return int(size[0]), int(size[1]), int(size[2])


def ended(model: torch.nn.Module, bound: Bound) -> Tokens | None:
    """Count the image tokens of a sequence whose other tokens stand in front (Stable Audio)."""
    extra = int(getattr(model.config, "num_memory_tokens", 1))
    return Tokens(int(bound["hidden_states"].shape[-1]), before=extra)


def masked(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off the ids of image tokens [B, H, W] (AMUSED)."""
    h, w = bound["input_ids"].shape[-2:]
    config: Any = model.config
    by = 2 if config.downsample else 1
    return 1, h // by, w // by


def last_shape(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read Qwen-Image 2.1's grid off the shapes of its images: the last one is generated."""
    entries = _shapes(model, bound, "img_shapes")
    return entries[-1] if entries else None


def items_tokens(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count the tokens of hidden states [B, items, C, F, H, W]: the references stand behind what is generated."""
    x, n = bound["hidden_states"], math.prod(video(model, bound))
    return Tokens(n, after=n * (x.shape[1] - 1) if x.ndim == 6 else 0)
