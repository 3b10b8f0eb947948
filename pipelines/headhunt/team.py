"""The processes that share a search: one, or those that `accelerate launch` has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Team:
    """All processes of this command.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine.
    """

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.size = state.process_index, state.num_processes
        self.local_rank = state.local_process_index

    def own(self, log: Path) -> Path:
        """The file this process writes instead of `log`."""
        return log if self.rank == 0 else log.with_suffix(f".{self.rank}{log.suffix}")

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in every process; waits for all of them."""
        from accelerate.utils import gather_object

        return gather_object(rows) if self.size > 1 else rows
