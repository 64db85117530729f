"""All controls by name, for whoever has only the name: records, commands, pages.

A control is known as soon as its module is imported. Modules that bring controls are imported when they are needed:
those named by `provide` at the first look-up, each of the controls in their table of names when it is asked for, and
the entry points of other packages (group `attnctl.controls`) when a name is unknown.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType

from attnctl.core.registry import CONTROLS, HOMES, declared
from attnctl.errors import ConfigError, nearest

__all__ = ["GROUP", "control_named", "controls", "homes", "load_entry_points", "provide"]

GROUP = "attnctl.controls"
_PROVIDERS: list[str] = []


def provide(module: str) -> None:
    """Name a module to import before controls are looked up, because it defines some."""
    if module not in _PROVIDERS:
        _PROVIDERS.append(module)


def homes() -> dict[str, str]:
    """Return the modules of the package's controls and of their bases, by name; none of them is imported for it."""
    for module in _PROVIDERS:
        importlib.import_module(module)
    return HOMES


def controls(package: str = "") -> dict[str, type]:
    """List the controls of the package and those whose modules are imported, by name; of one package if it is named."""
    for module in set(homes().values()):
        importlib.import_module(module)
    classes = {name: CONTROLS[name] for name in sorted(CONTROLS)}
    return {n: c for n, c in classes.items() if not package or c.__module__.partition(".")[0] == package}


def control_named(name: str, module: str | None = None) -> type:
    """Find a control by name, among those imported and those of other packages' entry points.

    Args:
        name: The name of its class.
        module: The module that defined it, where a record says so.

    Raises:
        ConfigError: There is none; or its fields belong to no dataclass.
    """
    broken = ""
    if name in homes():
        importlib.import_module(HOMES[name])
    if name not in CONTROLS:
        try:
            load_entry_points()
        except ConfigError as error:
            broken = f" {error}"
    if name not in CONTROLS:
        names = {n: c for n, c in controls().items() if "<locals>" not in c.__qualname__}
        bring = f"import {module}" if module else "import the module that defines it"
        hint = nearest(name, names) if module is None else ""
        raise ConfigError(
            f"Unknown method {name!r}; known: {', '.join(names)}.{hint} A control of your own is known once its module "
            f"is imported: {bring} first.{broken}"
        )
    declared(CONTROLS[name])
    return CONTROLS[name]


def load_entry_points(group: str = GROUP, base: type | None = None) -> None:
    """Import the controls of other packages that are installed, or what they offer in another group.

    Args:
        group: The group of entry points.
        base: The class of which each must name a subclass, or a module that defines some; controls by default.

    Raises:
        ConfigError: Some of them cannot be imported, or name something else; the others are imported all the same.
    """
    from attnctl.core.control import Control

    base, broken = base or Control, []
    for point in entry_points(group=group):
        package = point.dist.name if point.dist else "that brings it"
        before = set(CONTROLS)
        try:
            loaded = point.load()
        except (Exception, SystemExit) as error:
            for name in set(CONTROLS) - before:
                if CONTROLS[name].__module__ not in sys.modules:  # its file has failed, perhaps amid the class
                    del CONTROLS[name]
            reason = f"cannot be imported ({type(error).__name__}: {error})"
        else:
            if isinstance(loaded, ModuleType) or (isinstance(loaded, type) and issubclass(loaded, base)):
                continue
            reason = f"names {loaded!r:.60}, which is no subclass of {base.__name__}"
        broken.append(
            f"The entry point {point.name} = {point.value!r} of the group {group} {reason}. Mend or remove the package "
            f"{package}."
        )
    if broken:
        raise ConfigError(" ".join(broken))
