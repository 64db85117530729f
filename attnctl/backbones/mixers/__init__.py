"""Forms of attention to swap in. Importing this package registers the built-in ones by their kinds."""

from attnctl.backbones.mixers import agent, linear, multiaxis, routing, softmax
from attnctl.backbones.mixers.base import MIXERS, Mixer, Slot, find_mixer, join_heads, side_conv, split_heads, zero_conv

__all__ = [
    "MIXERS",
    "Mixer",
    "Slot",
    "agent",
    "find_mixer",
    "join_heads",
    "linear",
    "multiaxis",
    "routing",
    "side_conv",
    "softmax",
    "split_heads",
    "zero_conv",
]
