"""How often and with what clock things are timed, and which code it was."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def times(
    call: Callable[[], Any], device: torch.device, rounds: int, warm: int = 20
) -> list[float]:
    """Milliseconds of each round, after warming up: `warm` times on a GPU, once on a CPU."""
    if device.type == "cpu":
        found = []
        for i in range(rounds + 1):
            started = time.perf_counter()
            call()
            if i:
                found.append(1e3 * (time.perf_counter() - started))
        return found
    for _ in range(warm):
        call()
    ends = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in ends:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in ends]


def quantile(found: list[float], share: float) -> float:
    """The time that a share of the rounds stays below."""
    return sorted(found)[int(share * (len(found) - 1))]


def commit() -> str:
    """Of the checkout; the version where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        from dittune import __version__

        return __version__
