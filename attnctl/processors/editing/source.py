"""What an edit knows of its source: the inverted latents, and (if asked) the source's attention, step by step.

Three ways to have the source's attention at an editing step, behind one interface:

    recompute   keep the latents alone and run the source once more beside the edit: exact, since an inversion step's
                attention depends on nothing but its latents, its timestep and the prompt
    qk          keep queries and keys
    maps        keep the maps themselves, [frames, heads, queries, keys]: for parity and debugging
"""

from __future__ import annotations

import bisect
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.paths import Bend, PathScheduler
from attnctl.core.sites import Grid
from attnctl.errors import AttnctlError, ConfigError
from attnctl.kernels import columns
from attnctl.kernels.maps import softmax_map
from attnctl.plans.folders import OwnFolder
from attnctl.plans.writing import save_tensors
from attnctl.processors.editing.fusion import Keys, gather_frames, take_queries

__all__ = [
    "Inversion",
    "MemoryBudgetError",
    "Offload",
    "SourceAttention",
    "SourceStore",
    "StoreMode",
    "check_room",
    "token_weights",
]

StoreMode = Literal["recompute", "qk", "maps"]
Offload = Literal["none", "cpu", "disk"]


class MemoryBudgetError(AttnctlError):
    """What a run would keep does not fit: said before the run."""


class SourceStore:
    """Tensors of the source's attention, by inversion step and site name.

    Args:
        mode: What is kept.
        offload: Where: "none" (where it is computed), "cpu", or "disk" (a temporary folder, removed by `close`).
        folder: Folder below which "disk" makes its own.

    Attributes:
        nbytes: Bytes kept now.
        peak: Most bytes kept at any time.
    """

    def __init__(self, mode: StoreMode, offload: Offload = "none", folder: str | Path | None = None) -> None:
        for name, value, options in (("store", mode, StoreMode), ("offload", offload, Offload)):
            if value not in get_args(options):
                raise ConfigError(f"{name}={value!r} is unknown. Choose one of {', '.join(get_args(options))}.")
        self.mode, self.offload = mode, offload
        self.nbytes = self.peak = 0
        self._kept: dict[tuple[int, str], dict[str, Tensor] | Path] = {}
        self._text: dict[str, Tensor] = {}
        self.scales: dict[str, float | None] = {}
        self._folder = None if offload != "disk" else OwnFolder("attnctl-source-", folder)

    def put(self, step: int, site: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors of one site at one step."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.nbytes += size
        self.peak = max(self.peak, self.nbytes)
        if self._folder is not None:
            path = self._folder.path / f"{step}-{site}.safetensors"
            try:
                save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
            except OSError as error:
                self.close()
                raise MemoryBudgetError(f"Writing the source's attention to disk failed: {error}.") from None
            self._kept[step, site] = path
        elif self.offload == "cpu":
            self._kept[step, site] = {n: t.detach().cpu() for n, t in tensors.items()}
        else:
            self._kept[step, site] = {n: _alone(t.detach()) for n, t in tensors.items()}

    def put_text(self, site: str, k: Tensor) -> None:
        """Keep a cross-attention's keys, which are the same at every step."""
        if site not in self._text:
            self._text[site] = _alone(k.detach())
            self.nbytes += k.numel() * k.element_size()
            self.peak = max(self.peak, self.nbytes)

    def text(self, site: str) -> Tensor:
        """Return what `put_text` kept."""
        return self._text[site]

    def get(self, step: int, site: str, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of one site at one step."""
        entry = self._kept.get((step, site))
        if entry is None:
            steps = sorted({s for s, _ in self._kept})
            raise ConfigError(
                f"The inversion kept nothing of {site} at step {step} (it kept steps {steps}): invert with the control "
                "that edits."
            )
        if isinstance(entry, Path):
            return load_file(entry, device=str(device))
        return {n: t.to(device, non_blocking=True) for n, t in entry.items()}

    def forget(self) -> None:
        """Drop everything kept in memory."""
        self._kept.clear()
        self._text.clear()
        self.nbytes = 0

    def close(self) -> None:
        """Drop everything, and remove what lies on disk."""
        self.forget()
        if self._folder is not None:
            self._folder.close()


class SourceAttention:
    """The source's attention: what writes it down during a pass of the source, and gives it to the edit.

    Args:
        store: Where it is kept.
        mode: "qk" or "maps".
    """

    def __init__(self, store: SourceStore, mode: Literal["qk", "maps"]) -> None:
        self.store, self.mode = store, mode

    def write(self, step: int, call: AttnCall, indices: Sequence[Sequence[int]]) -> None:
        """Keep what an attention call of a source pass computes with; `call.k` not gathered yet."""
        tensors: dict[str, Tensor] = {}
        self.store.scales[call.site.name] = call.scale
        if self.mode == "maps":
            tensors["map"] = softmax_map(call.q, gather_frames(call.k, indices), call.scale)
        elif call.site.kind == "cross":
            tensors["q"] = call.q
            self.store.put_text(call.site.name, call.k)
        else:
            tensors["q"], tensors["k"] = call.q, call.k
        self.store.put(step, call.site.name, tensors)

    def attend(
        self,
        step: int,
        call: AttnCall,
        v: Tensor,
        indices: Sequence[Sequence[int]],
        proceed: Proceed,
        at: Tensor | None = None,
    ) -> Tensor:
        """Compute the source's map times given values [f, H, Nk, D], for some queries [f, n] or all."""
        if self.mode == "maps":
            tensors = self.store.get(step, call.site.name, v.device)
            return take_queries(tensors["map"], at).to(v.dtype) @ v
        q, k = self.queries_keys(step, call, indices)
        return proceed(call.with_(q=take_queries(q, at), k=k, v=v))

    def queries_keys(self, step: int, call: AttnCall, indices: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the source's queries and gathered keys."""
        tensors = self.store.get(step, call.site.name, call.q.device)
        if call.site.kind == "cross":
            return tensors["q"], self.store.text(call.site.name).to(call.q.device)
        return tensors["q"], gather_frames(tensors["k"], indices)

    def columns(self, step: int, site: str, tokens: Sequence[int], device: torch.device) -> Tensor:
        """Sum a cross-attention map over some tokens and average it over heads: [f, N], float32."""
        tensors = self.store.get(step, site, device)
        if "map" in tensors:
            shares = torch.stack([tensors["map"][..., token] for token in tokens], -1)
            return shares.float().sum(-1).mean(1)
        k = self.store.text(site).to(device)
        return columns(tensors["q"], k, token_weights(tokens, k), scale=self.store.scales[site])[..., 0].mean(1)


def _alone(x: Tensor) -> Tensor:
    """Return a tensor that keeps nothing else alive: a part of fused projections would keep the other parts."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()


def token_weights(tokens: Sequence[int], k: Tensor) -> Tensor:
    """Return the column that sums some tokens, [Nk, 1] float32, for keys [f, H, Nk, D]."""
    weights = torch.zeros(k.shape[2], 1, device=k.device)
    for token in tokens:  # a list of places would be copied to the device
        weights[token] = 1
    return weights


@dataclass
class Inversion:
    """A source taken back to noise, with what an edit needs of it.

    Attributes:
        prompt: The source prompt.
        latents: x_0 to x_T, each [frames, C, h, w]; x_s is what the denoiser saw at inversion step s.
        timesteps: Timestep of each inversion step, ascending.
        inputs: The denoiser's other inputs in the source's pass.
        keys: Frames that self-attention looked at.
        indices: The rows that each row's self-attention looked at.
        store: The source's attention; None in mode "recompute".
        settings: What the control that inverted would edit; another control may not ask for more.
        levels: Noise level of each of the latents, 0 clean and 1 noise; none where DDIM has inverted on a UNet.
        rule: What has inverted.
        readings: How the text encoders read the prompt.
        columns: Attention to the blend words, [1, N], by the noise level at which it was seen.
        grid: The grid of tokens that it was seen on.
        region: Where a mask allows changes, bool [frames, rows, columns] of pixels; None for no mask.
        psnr: How near the way back, with the source's prompt, comes to the source, in dB; None if not measured.
        path: The scheduler that has inverted.
    """

    prompt: str
    latents: list[Tensor]
    timesteps: tuple[int, ...]
    inputs: dict[str, Any]
    keys: Keys
    indices: list[list[int]] = field(default_factory=list)
    store: SourceStore | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    rule: str = "ddim"
    readings: tuple[Any, ...] = ()
    columns: list[tuple[float, Tensor]] = field(default_factory=list)
    grid: Grid | None = None
    region: Tensor | None = None
    psnr: float | None = None
    path: PathScheduler | None = None

    @property
    def steps(self) -> int:
        """Return the number of steps T."""
        return len(self.levels) - 1 if self.levels else len(self.timesteps)

    def way_back(self, note: Callable[[int, Tensor], None] = lambda i, x: None) -> PathScheduler:
        """Make the scheduler that leads an edit back along this path.

        Args:
            note: Called with the number and the latents of each level that is reached.

        Raises:
            ConfigError: DDIM has inverted on a UNet, whose way back is `attnctl.pipelines.ddim_of(pipe.scheduler)`.
        """
        if self.path is None:
            raise ConfigError(
                "This inversion was made on a UNet: edit with pipe.scheduler = "
                "attnctl.pipelines.ddim_of(pipe.scheduler)."
            )
        back = self.path.back(note)
        if self.rule == "rf_inversion":  # eta 0.9 for the first quarter of the steps, as published
            back.route = dataclasses.replace(back.route, bend=Bend(self.latents[0], 0.9, -(-self.steps // 4)))
        return back

    def between(self, level: float) -> Tensor:
        """Return the source's latents at a noise level, on the straight line between its two neighbours."""
        assert self.path is not None
        i = max(1, min(len(self.levels) - 1, bisect.bisect_left(self.levels, level - 1e-9)))
        for at in (i - 1, i):
            if abs(self.levels[at] - level) < 1e-9:
                return self.latents[at]
        return self.path.mixed(self.latents[i - 1], self.levels[i - 1], self.latents[i], self.levels[i], level)

    def columns_at(self, level: float) -> Tensor | None:
        """Return the attention to the blend words at the nearest noise level at which it was seen."""
        return min(self.columns, key=lambda item: abs(item[0] - level))[1] if self.columns else None

    @property
    def frames(self) -> int:
        """Return the number of frames."""
        return int(self.latents[0].shape[0])

    @property
    def noise(self) -> Tensor:
        """Return x_T, where the edit begins."""
        return self.latents[-1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of latents and stored attention."""
        latents = sum(x.numel() * x.element_size() for x in self.latents)
        return latents + (0 if self.store is None else self.store.nbytes)

    def close(self) -> None:
        """Let go of stored attention, in memory and on disk."""
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Inversion:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_room(
    needed: int,
    offload: Offload,
    device: torch.device,
    budget: int | None = None,
    folder: str | Path | None = None,
    what: str = "The source's attention",
    remedy: str = 'store="recompute", which keeps latents only, or fewer steps or frames, or offload="disk"',
) -> None:
    """Refuse a run whose store does not fit, before it begins.

    Args:
        needed: Bytes.
        offload: Where they would go.
        device: Where the model is.
        budget: Most bytes allowed; None for what is free.
        folder: Where "disk" writes.
        what: What is kept, for the message.
        remedy: What to use instead.

    Raises:
        MemoryBudgetError: They do not fit.
    """
    if offload == "disk":
        free, where = shutil.disk_usage(folder or tempfile.gettempdir()).free, "on the disk"
    elif offload == "none" and device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], f"on {device}"
    else:
        free, where = _free_memory(), "in memory"
    if budget is not None and needed > budget:
        free, where = budget, "in the budget given"
    if needed > free:
        raise MemoryBudgetError(
            f"{what} would take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free {where}. Use {remedy}."
        )


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # other systems tell in other ways
        return 2**63
