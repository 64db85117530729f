"""A control of your own, outside the package: guidance away from a prediction whose attention is too even.

    python examples/own_control.py --shapes        # offline, with the model that attnctl ships

docs/tutorial/own_control.md explains it line by line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import attnctl
from attnctl.core.registry import knob
from attnctl.processors import AttnCall, Branch, Guidance, Proceed


@dataclass(frozen=True, kw_only=True)
class Tempered(Guidance):
    """Guide away from softmax(s q k^T / temperature) v; the temperature is above 0, and 1 changes nothing."""

    temperature: float = knob(4.0, above=0.0)

    def branch(self, sites: tuple[attnctl.Site, ...], denoiser: torch.nn.Module) -> Branch:
        key = ("tempered", self.temperature, tuple(site.name for site in sites))
        return Branch(key, sites, self.flattened)

    def flattened(self, call: AttnCall, proceed: Proceed) -> torch.Tensor:
        """Attend with every logit divided by the temperature, [B, H, N, D]."""
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        return proceed(call.with_(scale=scale / self.temperature))


if __name__ == "__main__":
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", action="store_true", help="accepted for symmetry; this example always uses it")
    parser.add_argument("--prompt", default="a red circle and a blue square on gray")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    pipe = attnctl.load_shapes("mmdit")
    args.out.mkdir(parents=True, exist_ok=True)
    with attnctl.control(pipe, Tempered(scale=2.5, sites=6)) as handle:
        for name in ("plain", "tempered"):
            handle.enabled = name == "tempered"  # off: the plain pipeline, bit for bit
            noise = torch.Generator("cpu").manual_seed(0)
            image = pipe(args.prompt, guidance_scale=3.0, generator=noise, max_sequence_length=0).images[0]
            image.save(args.out / f"{name}.png")
        print(handle.report())
    print(f"wrote {args.out / 'plain.png'} and {args.out / 'tempered.png'}")
