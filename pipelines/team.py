"""The processes that share a command: one, or those that `accelerate launch` has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class Team:
    """All processes of this command.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine.
    """

    def __init__(self) -> None:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.size = state.process_index, state.num_processes
        self.local_rank = state.local_process_index

    def device(self, wanted: str) -> str:
        """The device of this process: `auto` with several processes is one GPU each."""
        spread = wanted == "auto" and self.size > 1 and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if spread else wanted

    def own(self, log: Path) -> Path:
        """The file this process writes instead of `log`."""
        return log if self.rank == 0 else log.with_suffix(f".{self.rank}{log.suffix}")

    def logs(self, log: Path) -> list[Path]:
        """The files of all processes of this and earlier runs."""
        return [log, *sorted(log.parent.glob(f"{log.stem}.*{log.suffix}"))]

    def share(self, jobs: list[Any]) -> list[Any]:
        """The jobs of this process."""
        return jobs[self.rank :: self.size]

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in every process; waits for all of them."""
        from accelerate.utils import gather_object

        return gather_object(rows) if self.size > 1 else rows
