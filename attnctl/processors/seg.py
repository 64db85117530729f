"""SEG: guidance away from a prediction with blurred self-attention queries.

"Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention", arXiv 2408.00760:
pred += w (c - p), where p attends with G_sigma * q, a Gaussian blur over the token grid. sigma = inf is the mean query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.linear import is_linear
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels import blur_queries
from attnctl.kernels.perturbation.blur import MOST_SIGMA

__all__ = ["SEG"]


@dataclass(frozen=True, kw_only=True)
class SEG(Guidance):
    """Guide away from the prediction whose queries are blurred over the image (arXiv 2408.00760, eq. 12).

    Text queries of a joint sequence stay as they are.

    Attributes:
        sigma: Standard deviation of the blur in tokens; inf takes the mean query.
    """

    sigma: float = knob(math.inf, 0.0, unit="tokens", hint="tokens; inf: the mean", shown=True)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "dual")
    about: ClassVar[About] = About(
        does="guides away from blurred queries",
        page="seg",
        goal="sharpen structure",
        paper="arXiv 2408.00760",
        cite=(
            "Hong, *Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention*, "
            "arXiv 2408.00760",
        ),
    )
    presets: ClassVar[tuple[Preset, ...]] = (Preset("shapes:mmdit", "SEG(scale=2.5, sites=6)"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if MOST_SIGMA < self.sigma < math.inf:
            raise ConfigError(f"SEG: sigma={self.sigma} is out of range: give 0 to {MOST_SIGMA:g} tokens, or math.inf.")

    def weight(self, state: object) -> float:
        return 0.0 if self.sigma == 0 else super().weight(state)  # type: ignore[arg-type]

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        for site in sites:
            if is_linear(type(getattr(site.module, "processor", None))):
                raise UnsupportedModelError(
                    f"SEG: {site.name} is linear attention, for which blurred queries have no published form."
                )
        names = tuple(s.name for s in sites)
        return Branch(("seg", self.sigma, names), sites, self._blurred)

    def _blurred(self, call: AttnCall, proceed: Proceed) -> torch.Tensor:
        grid = call.grid
        if call.site.kind == "joint" and call.image is None:
            raise UnsupportedModelError(
                f"SEG: image and text tokens cannot be told apart at {call.site.name}. "
                "Use SoftPAG(target='query_mean')."
            )
        n = call.q.shape[-2] if call.image is None else call.image.stop - call.image.start
        if math.isinf(self.sigma):
            size = (1, n)
        elif grid is None or grid[0] != 1:
            raise UnsupportedModelError(
                f"SEG: sigma={self.sigma} needs a two-dimensional token grid at {call.site.name}; "
                f"found {'none' if grid is None else 'one with frames'}. Use sigma=math.inf."
            )
        else:
            size = grid[1:]
        return proceed(call.with_(q=blur_queries(call.q, size, self.sigma, call.image)))
