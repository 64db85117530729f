"""Hosts whose own code runs on: what a class does around torch's fused kernel stays, a mixer takes the kernel.

A host is the original in the shape of a subclass: it shares the children, parameters and buffers, so projections,
biases, norms, rotary embeddings and gates act as they always do. What only a softmax can use, such as tables of
relative positions, is left out unless the mixer takes it as a mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.davit import WindowAttention as DavitWindows
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.maxxvit import Attention2d
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.twins import GlobalSubSampleAttn
from timm.models.visformer import Attention as VisformerAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.volo import Attention as VoloAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnctl.backbones.grid import GridSource
from attnctl.backbones.hosts import Host
from attnctl.backbones.mixers.base import Grid, Mixer
from attnctl.errors import ConfigError

__all__ = ["KERNEL_HOSTS", "KernelHost"]


class _Instead(TorchFunctionMode):
    """Answer torch's fused attention with a function of its arguments."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.mix(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class KernelHost(Host):
    """A class of timm with a mixer at its fused kernel; subclasses name the class.

    Attributes:
        sequence: Whether tokens come as [B, prefix + h * w, C], so that their grid must be found elsewhere.
        channels_first: Whether maps come as [B, C, H, W].
        positions: What holds relative positions: state that a mixer without masks leaves unused.
        biased: Whether the kernel's mask is such a bias, and no mask of tokens.
    """

    sequence: ClassVar[bool] = False
    channels_first: ClassVar[bool] = False
    positions: ClassVar[tuple[str, ...]] = ()
    biased: ClassVar[bool] = False
    mixer: Mixer
    grid: GridSource | None
    prefix: int

    def settle(self, old: nn.Module, mixer: Mixer, grid: GridSource | None, prefix: int) -> None:
        """Take the attributes of the original over, share its state, and hold the mixer."""
        nn.Module.__init__(self)
        hooks = {name for name in vars(self) if name.endswith("hooks")}
        for name, value in vars(old).items():
            if name not in hooks:
                vars(self)[name] = value.copy() if name in _STATE else value
        for name in () if mixer.takes_mask else self.positions:
            self._leave(name)
        if hasattr(self, "fused_attn"):
            self.fused_attn = True
        self.mixer, self.grid, self.prefix = mixer, grid, prefix

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the class's own forward with the mixer at its kernel."""

        def mix(
            q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, **_: Any,
        ) -> Tensor:  # fmt: skip
            return self._mixed(q, k, v, x, attn_mask, is_causal)

        with _Instead(mix):
            return super().forward(x, *args, **kwargs)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if causal or (mask is not None and not self.biased):
            raise ConfigError("attn_mask or is_causal was given; a swapped attention mixes by the grid, without masks.")
        shape = q.shape
        if q.ndim == 3:
            q, k, v = (y.unflatten(0, (-1, self.mixer.heads)) for y in (q, k, v))
        tokens, grid = self._tokens(x, q.shape[2])
        more = {"mask": mask.reshape(-1, *q.shape[1:3], k.shape[2]) if mask is not None and len(shape) == 3 else mask}
        out = self.mixer(q, k, v, tokens, grid, **(more if self.mixer.takes_mask else {}))
        return out.reshape(shape)

    def _tokens(self, x: Tensor, count: int) -> tuple[Tensor, Grid]:
        """Return the tokens before the projection, [B, N, C], and their grid."""
        if x.ndim == 4 and self.channels_first:
            return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
        if x.ndim == 4:
            return x.flatten(1, 2), (x.shape[1], x.shape[2])
        grid = self.grid(count - self.prefix) if self.grid is not None else (1, count)
        if grid[0] * grid[1] != count - self.prefix:
            raise ConfigError(
                f"{count - self.prefix} patch tokens were given, but the grid is {grid[0]}x{grid[1]}. Build the model "
                "with dynamic_img_size=True before swapping, or call set_input_size on it, or give grid=(h, w)."
            )
        return x, grid

    def _leave(self, name: str) -> None:
        for state in (self._parameters, self._modules, self._buffers):
            if name in state:
                state[name] = None
                return
        vars(self)[name] = None

    def keep(self, original: nn.Module) -> None:
        """Take over from an original, and note which of its own parameters and buffers are shared."""
        super().keep(original)
        self._own = tuple(n for n in (*self._parameters, *self._buffers) if self._state_of(n) is not None)

    def _state_of(self, name: str) -> Tensor | None:
        return self._parameters.get(name, self._buffers.get(name))

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Hide what is shared from the original inside the block, so that nothing reaches it twice; share it after."""
        for name in self._own:
            (self.original._parameters if name in self._parameters else self.original._buffers).pop(name)
        try:
            yield
        finally:
            self._share()

    def _share(self) -> None:
        for name in self._own:
            mine, other = (self._parameters, self.original._parameters)
            if name not in mine:
                mine, other = self._buffers, self.original._buffers  # type: ignore[assignment]
            other[name] = mine[name]

    def restored(self) -> nn.Module:
        """Return the original with the state as it has become."""
        self._share()
        return super().restored()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Host:
        with self._apart():
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        with self._apart():
            super()._load_from_state_dict(state_dict, prefix, *rest)


_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class EvaHost(KernelHost, EvaAttention):
    """The place of EVA's attention: rotary embeddings, biases and gates kept."""

    sequence = True


class RopeHost(KernelHost, AttentionRope):
    """The place of rotary ViTs' attention (DINOv3, Perception Encoder)."""

    sequence = True


class BeitHost(KernelHost, BeitAttention):
    """The place of BEiT's attention."""

    sequence, biased, positions = True, True, ("relative_position_bias_table", "relative_position_index")


class RelPosHost(KernelHost, RelPosAttention):
    """The place of attention with relative positions."""

    sequence, biased, positions = True, True, ("rel_pos",)


class SamHost(KernelHost, SamAttention):
    """The place of SAM's attention: its windows, or the map, are what a mixer sees. Decomposed positions are left out
    together, rotary ones kept.
    """

    biased, positions = True, ("use_rel_pos", "rel_pos_h", "rel_pos_w")


class MetaFormerHost(KernelHost, MetaFormerAttention):
    """The place of CAFormer's attention."""

    sequence = True


class VisformerHost(KernelHost, VisformerAttention):
    """The place of Visformer's attention over maps [B, C, H, W]."""

    channels_first = True


class FastVitHost(KernelHost, FastVitAttention):
    """The place of FastViT's attention."""

    channels_first = True


class VoloHost(KernelHost, VoloAttention):
    """The place of VOLO's plain attention."""


class CoAtNetHost(KernelHost, Attention2d):
    """The place of CoAtNet's attention, over a map or over the windows that its block cuts."""

    channels_first, biased, positions = True, True, ("rel_pos",)


class TwinsHost(KernelHost, GlobalSubSampleAttn):
    """The place of Twins' global attention; keys keep the full resolution."""

    sequence, positions = True, ()

    def settle(self, old: nn.Module, mixer: Mixer, grid: GridSource | None, prefix: int) -> None:
        """Take over, without the reduction of keys."""
        super().settle(old, mixer, grid, prefix)
        for name in ("sr", "norm"):
            self._leave(name)

    def forward(self, x: Tensor, size: Any) -> Tensor:
        """Mix tokens [B, h * w, C] of a grid (h, w)."""
        self.grid = GridSource((int(size[0]), int(size[1])))
        return super().forward(x, size)


class DavitHost(KernelHost, DavitWindows):
    """The place of DaViT's window attention: a mixer sees a window as its map."""

    sequence = True


KERNEL_HOSTS: dict[type[nn.Module], type[KernelHost]] = {
    EvaAttention: EvaHost,
    AttentionRope: RopeHost,
    BeitAttention: BeitHost,
    RelPosAttention: RelPosHost,
    SamAttention: SamHost,
    MetaFormerAttention: MetaFormerHost,
    VisformerAttention: VisformerHost,
    FastVitAttention: FastVitHost,
    VoloAttention: VoloHost,
    Attention2d: CoAtNetHost,
    GlobalSubSampleAttn: TwinsHost,
    DavitWindows: DavitHost,
}
