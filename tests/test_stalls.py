"""No control waits for the device in the steady state: after the first step nothing is read or copied."""

from __future__ import annotations

import processes
import pytest

FAMILIES = ("sd15", "sd3", "flux", "lumina2", "cogview4", "qwen", "hunyuanvideo", "wan", "cogvideox", "animatediff")


# Of each source of waits one; `benchmarks/reliability.py` runs all, and all families.
PIPELINES = ("AStar, masks", "AttendExcite, threshold", "PAG, adaptive", "FateZero, masks", "BroadWay, tau")


@pytest.mark.parametrize(
    "arguments", [*((family,) for family in FAMILIES), ("pipelines", *PIPELINES)], ids=lambda a: a[0]
)
def test_no_control_waits_for_the_device(arguments: tuple[str, ...]) -> None:
    """In a process of its own, since the pretend device changes torch's."""
    done = processes.run("import stalling, sys; sys.exit(stalling.main())", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not done.stdout, done.stdout
