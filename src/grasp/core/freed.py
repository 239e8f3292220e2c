"""Memory that is given back as soon as it is free.

The C library keeps what was freed for later, in pieces: between matrices of some tens of megabytes
it keeps as much as is in use, and no two fit in a piece. Blocks that it asks the system for one by
one go back at once; the system then clears each of them, which takes time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MMAP_THRESHOLD = -3
"""Of malloc.h: M_MMAP_THRESHOLD."""
SMALL, LARGE = 1 << 20, 32 << 20
"""Blocks from so many bytes on are asked for one by one: inside, and the most that glibc itself
would take.
"""


@contextmanager
def given_back() -> Iterator[None]:
    """Inside, what is freed of blocks of `SMALL` bytes and more goes back to the system at once, as
    what was freed before does. Nothing changes where the C library is not glibc.
    """
    library: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, SMALL)
    library.malloc_trim(0)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGE)
