"""What the pyramids share: the stage, the model with timm's whole interface, and how official weights are read.

A pyramid is a sequence of stages, each of which shrinks the map and mixes it in blocks; output is [B, C, H, W].
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn
from torch.jit import Final

__all__ = ["FeedForward", "Pyramid", "Stage", "drop_rates", "init_linear", "record_input_size", "take_state"]


def init_linear(module: nn.Module) -> None:
    """Give linear layers the usual start: truncated normal weights, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_rates(last: float, blocks: int) -> list[float]:
    """Return the rates at which blocks are left out in training: rising evenly from 0 to the last one's."""
    return [last * i / max(1, blocks - 1) for i in range(blocks)]


def record_input_size(model: nn.Module, img_size: tuple[int, int]) -> None:
    """Tell timm that a model was resized, where timm keeps such a record (1.0.31 and newer)."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:
        return
    update_model_input_size(model, img_size)


def take_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a checkpoint file, as {'model': ...} or {'state_dict': ...}, and drop `module.` prefixes."""
    for key in ("model_ema", "state_dict_ema", "model", "state_dict"):
        inner = state.get(key)
        if isinstance(inner, Mapping):
            state = inner
            break
    return {k.removeprefix("module."): v for k, v in state.items()}


class FeedForward(nn.Module):
    """The two-layer perceptron of every block, under the names fc1 and fc2."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] -> [..., dim]."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Stage(nn.Module):
    """Shrink a map, then mix it in blocks: [B, C, H, W] -> [B, C', H', W'].

    channels_last: the downsampling hands over, and the blocks take, [B, H, W, C].
    """

    channels_last: Final[bool]

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x


class Pyramid(nn.Module):
    """A timm image model made of four stages, with the interface that timm's tools expect.

    Args:
        stages: built stages. dims: their channels. norm: the last norm over [B, C, H, W], or Identity.
        num_classes, in_chans, global_pool ("avg" or ""), drop_rate: as in timm.
        img_size: read by models with parameters that depend on the size, and by no other.
    """

    output_fmt: Final[str]

    def __init__(
        self,
        stages: list[nn.Module],
        dims: tuple[int, ...],
        norm: nn.Module,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._check_pool(global_pool)
        self.output_fmt = "NCHW"
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, c in enumerate(dims)]
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r} was given; expected 'avg', or '' for none.")

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map: images [B, in_chans, H, W] -> [B, C, H / 32, W / 32], rounded up."""
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify: [B, C, h, w] -> [B, num_classes], or the pooled features."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images [B, in_chans, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classification layer."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification layer; the pooling stays unless given."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        )
        self.head.train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stages\.0\.downsample",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that should not decay: position embeddings and attention biases."""
        endings = ("pos_embed", "_bias", "_bias_table")
        return {n for n, _ in self.named_parameters() if n.endswith(endings)}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps after chosen stages, and the last features unless intermediates_only.

        indices: the last n if int, all if None. norm: apply the last norm to the last stage's map.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} was given; this model gives 'NCHW' only.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps: list[Tensor] = []
        stages = self.stages[: last + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        final = len(self.stages) - 1
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                maps.append(self.norm(x) if norm and i == final else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for; return the indices of those asked for."""
        take, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last + 1 < len(self.stages):
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize what depends on the image size (position embeddings, axis biases) to another one."""
        size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        if min(size) < 1:
            raise ValueError(f"img_size={img_size!r} was given; expected a positive size or a pair of them.")
        for stage, grid in zip(self.stages, self.grids(size), strict=False):
            for module in stage.modules():
                resize: Callable[[tuple[int, int]], None] | None = getattr(module, "set_feature_size", None)
                if resize is not None:
                    resize(grid)
        record_input_size(self, size)

    @staticmethod
    def grids(img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Tell the map size (height, width) of each stage for an image size: strides 4, 8, 16, 32, rounded up."""
        sizes = [((img_size[0] + 3) // 4, (img_size[1] + 3) // 4)]
        for _ in range(3):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        return sizes
