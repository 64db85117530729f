"""Forms of attention to swap in, one file each or a file of relatives. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from attnctl.backbones.mixers.base import MIXERS, Mixer, Slot, find_mixer, join_heads, side_conv, split_heads, zero_conv

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["MIXERS", "Mixer", "Slot", "find_mixer", "join_heads", "side_conv", "split_heads", "zero_conv"]
