"""The command line. Results go to stdout, talk to stderr; exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from attnctl.app.commands.bench import Bench
from attnctl.app.commands.calibrate import Calibrate
from attnctl.app.commands.classify import Classify
from attnctl.app.commands.common import Result, UsageError
from attnctl.app.commands.controls import Controls
from attnctl.app.commands.demo import Demo
from attnctl.app.commands.edit import Edit
from attnctl.app.commands.env import Env
from attnctl.app.commands.export import Export
from attnctl.app.commands.generate import Generate
from attnctl.app.commands.hunt import Hunt
from attnctl.app.commands.maps import Maps
from attnctl.app.commands.models import Models
from attnctl.app.commands.predict import Predict
from attnctl.app.commands.reproduce import Reproduce
from attnctl.app.commands.segment import Segment
from attnctl.app.commands.sites import Sites
from attnctl.app.commands.ui import Ui
from attnctl.data.provenance import command_line
from attnctl.errors import AttnctlError, missing_package
from attnctl.plans.hub import fetching

__all__ = ["main"]

_COMMANDS: dict[str, type] = {
    "demo": Demo,
    "generate": Generate,
    "edit": Edit,
    "maps": Maps,
    "calibrate": Calibrate,
    "hunt": Hunt,
    "classify": Classify,
    "segment": Segment,
    "predict": Predict,
    "export": Export,
    "bench": Bench,
    "reproduce": Reproduce,
    "controls": Controls,
    "models": Models,
    "sites": Sites,
    "ui": Ui,
    "env": Env,
}
_ABOUT = (
    "Attention control for diffusers pipelines: PAG, SoftPAG and relatives, one line on, one line off. A command "
    "imports PyTorch and diffusers first, which takes some seconds, and up to half a minute the first time; it says so "
    "at once, and then shows how far it is."
)


def _parse(args: Sequence[str]) -> Any:
    union: Any = None
    for name, cls in _COMMANDS.items():
        command: Any = Annotated[cls, tyro.conf.subcommand(name)]
        union = command if union is None else union | command
    return tyro.cli(
        union,
        prog="attnctl",
        description=_ABOUT,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args:
        args = ["--help"]
    try:
        chosen = _parse(args)
    except SystemExit as stop:  # help, or a usage error that has been explained on stderr
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with fetching(
            getattr(chosen, "fetch", False)
        ):  # --model names what the user wants; controls and records do not
            result: Result = chosen.run(command_line(["attnctl", *args]))
        if result.data is not None:  # of several processes, one has the result
            text = json.dumps(result.data, indent=2, allow_nan=False) if chosen.json else result.text
            print(text, flush=True)
        return result.code
    except BrokenPipeError:  # `attnctl sites | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("attnctl: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if chosen.debug:
            raise
        print(f"attnctl: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, AttnctlError):
        return message
    if isinstance(error, ImportError) and (needed := missing_package(error)) is not None:
        return needed
    return f"unexpected {type(error).__name__}: {message} (run again with --debug to see where)"
