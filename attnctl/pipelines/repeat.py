"""A recorded call again: what a record asks for is bounded before anything is built, and what differs is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from attnctl.core.hosts.sizes import usual_size
from attnctl.data.record import Record, RecordError
from attnctl.data.specs import control_from_dict
from attnctl.errors import AttnctlError
from attnctl.pipelines.bounds import MOST, check_wholes
from attnctl.pipelines.generate import INFINITE, Call, Sampled, sample, scheduler_config
from attnctl.pipelines.models import Loaded

__all__ = ["differences", "sample_again"]

_LARGER = 16  # pixels that a record may ask for, in those of the model's usual picture


def sample_again(loaded: Loaded, record: Record, step: Callable[[], object] = lambda: None) -> Sampled:
    """Make the images of a record again, with its scheduler and its number of threads.

    Raises:
        RecordError: the record was made with another pipeline class or an unknown scheduler.
    """
    import torch

    pipe = loaded.pipe
    _check_record(pipe, record)
    if type(pipe).__name__ != record.pipeline:
        raise RecordError(f"The record was made with {record.pipeline}, but {loaded.name} is a {type(pipe).__name__}.")
    if scheduler_config(pipe.scheduler) != record.scheduler:
        pipe.scheduler = _scheduler(record.scheduler)
    sized = {"width", "height"} <= set(inspect.signature(type(pipe).__call__).parameters)
    call = Call(
        prompts=record.prompts,
        seeds=record.seeds,
        steps=record.steps,
        guidance=record.guidance,
        negative=record.negative,
        width=record.width if sized else None,
        height=record.height if sized else None,
        options=record.options,
        controls=tuple(control_from_dict(control) for control in record.controls),
        backend=record.backend,
        command=record.command,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, record.threads))
    try:
        again = sample(loaded, call, step)
    except AttnctlError:
        raise
    except Exception as error:  # whatever comes of values that no run of attnctl has written
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecordError(f"The record cannot be run ({type(error).__name__}: {reason}): it is damaged.") from error
    finally:
        torch.set_num_threads(threads)
    return replace(again, record=replace(again.record, shows=record.shows))


def differences(before: Record, after: Record) -> dict[str, tuple[str, str]]:
    """Name what differs between two runs of one record and can change pixels."""
    changes: dict[str, tuple[str, str]] = {}
    for name in sorted({*before.versions, *after.versions}):
        changes[name] = before.versions.get(name, "not installed"), after.versions.get(name, "not installed")
    for name in ("revision", "device", "dtype", "threads", "hardware", "sites"):
        changes[name] = str(getattr(before, name)), str(getattr(after, name))
    return {name: (a, b) for name, (a, b) in changes.items() if a != b}


def _check_record(pipe: Any, record: Record) -> None:
    """Refuse what no run should begin with, before anything is built for it.

    Raises:
        RecordError: a number is out of range, the pictures are far larger than the model makes, or an option is not of
            this world.
    """
    label = "the record's "
    check_wholes({"threads": max(1, record.threads), "batch": len(record.prompts)}, RecordError, label)
    for seed in record.seeds:
        check_wholes({"seed": seed}, RecordError, label)
    for name in ("steps", "width", "height"):
        check_wholes({name: getattr(record, name)}, RecordError, label)
    pixels, usual = record.width * record.height, usual_size(pipe)
    if usual is not None and pixels > _LARGER * usual[0] * usual[1]:
        raise RecordError(
            f"The record is of {record.width}x{record.height} pixels, and {type(pipe).__name__} makes {usual[1]}x"
            f"{usual[0]} as a rule; expected at most {_LARGER} times as many. Make it with `attnctl generate`, --width "
            "and --height, if you want it."
        )
    for name, value in record.options.items():
        _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    """Raise RecordError for an option of a record that asks for a size that no option has."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if len(value) > MOST["steps"]:
            raise RecordError(f"The record's option {name} has {len(value)} entries; expected {MOST['steps']} at most.")
        for part in value:
            _check_option(name, part)
    elif isinstance(value, (int, float)) and abs(value) > MOST["option"]:
        raise RecordError(f"The record's option {name} is {value!r:.40}; expected {MOST['option']} at most.")


def _scheduler(config: Mapping[str, Any]) -> Any:
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise RecordError(f"The record's scheduler {name!r:.80} is not one of diffusers' schedulers.")
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MOST["num_train_timesteps"]:
            raise RecordError(
                f"The record's scheduler has {key}={value}; expected {MOST['num_train_timesteps']} at most."
            )
    infinite = {text: value for value, text in INFINITE.items()}
    options = {
        key: infinite.get(value, value) if isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith("_")
    }
    try:
        return cls.from_config(options)  # type: ignore[attr-defined]
    except Exception as error:  # whatever comes of values that it never had
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"The record's scheduler {name} cannot be made ({reason}): the record is damaged.") from None
