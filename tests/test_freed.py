"""Memory that is free goes back at once, where that is asked for."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grasp.core.freed import given_back

MEGABYTES = 24
"""Of a block: below what the C library asks the system for one by one, once it has seen larger."""


def resident() -> int:
    """Megabytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) // 1024


def rise(count: int) -> int:
    """By how many megabytes memory has risen when all but the last of `count` blocks are free."""

    def work(_: int) -> tuple[int, torch.Tensor]:
        before = resident()
        blocks = [torch.ones(MEGABYTES << 18) for _ in range(count)]
        last = blocks.pop()
        blocks.clear()
        return resident() - before, last

    with ThreadPoolExecutor(1) as pool:
        return next(pool.map(work, [0]))[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_goes_back_inside_and_is_kept_for_later_outside():
    with given_back():
        assert rise(6) < 2 * MEGABYTES
    with pytest.raises(ZeroDivisionError), given_back():
        1 / 0  # noqa: B018
    assert rise(6) > 4 * MEGABYTES
