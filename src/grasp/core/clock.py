"""Reading the time on the device that computes."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks moments of a computation. This one is right where work is done when its call returns,
    as on a processor, and where the host waits for the device anyway.
    """

    def mark(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to a later one. On a device both must have been waited for."""
        return float(end - begin)


class WaitingClock(Clock):
    """Waits for a device before it looks."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> Any:
        torch.accelerator.synchronize(self.device)
        return super().mark()


class CudaClock(Clock):
    """Marks the stream of a GPU: nothing waits, so what is timed runs as it would."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs on `device`."""
    if device.type == "cuda":
        return CudaClock()
    return Clock() if device.type == "cpu" else WaitingClock(device)
