"""The processes that share a job: started by torchrun or `accelerate launch`, or one alone."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["Workers"]


class Workers:
    """Tell which of the processes this one is, and let them tell each other what they found.

    Args:
        device: Where the work computes; None for the accelerator, if torch sees one. Processes on CPUs talk over gloo,
            which accelerate must be asked for: without, each of them takes itself for the only one.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        local: Number of this process on its machine.
    """

    def __init__(self, device: str | None = None) -> None:
        from accelerate import PartialState

        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        cpu = not torch.cuda.is_available() if device is None else device == "cpu"
        self._state = PartialState(cpu=True) if several and cpu else PartialState()
        self.rank, self.size = int(self._state.process_index), int(self._state.num_processes)
        self.local = int(self._state.local_process_index)

    def share(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give every process the records of all, in the order of the processes."""
        if self.size == 1:
            return records
        from accelerate.utils import gather_object

        return list(gather_object(records))

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._state.wait_for_everyone()
