"""Where large sums live: in memory, or in files that the operating system pages in and out.

The statistics of all matrices of a 7B model are about 24 GB; kept in files, a sweep needs memory
for the model and one block only.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from grasp.errors import GraspError

logger = logging.getLogger(__name__)

CHUNK = 1 << 28
"""Bytes of the largest file that holds several tensors: a process may not open many files."""


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping, where the system says it (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


class Scratch:
    """Hands out zero tensors: in memory, or, with a folder, in files there. The files have no
    names, so a killed process leaves none.

    `on_device` False: in the computer's memory, whatever the device.
    """

    def __init__(self, folder: str | Path | None = None, on_device: bool = True):
        self.folder = None if folder is None else Path(folder)
        self.on_device = on_device
        self._files: list[weakref.ref[mmap.mmap]] = []
        self._last: mmap.mmap | None = None
        self._used = self._taken = 0
        self._lock = threading.Lock()

    @classmethod
    def for_bytes(
        cls, num_bytes: int, device: torch.device, folder: str | Path | None = None
    ) -> Scratch:
        """Where `num_bytes` fit: `folder` if one is named, else the device, the computer's memory,
        or files in the temporary folder.

        At most half of what is free is taken for granted.
        """
        if folder is not None:
            return cls(folder)
        if device.type == "cuda" and num_bytes < torch.cuda.mem_get_info(device)[0] / 2:
            return cls()
        free = available_memory()
        if free is None or num_bytes < free / 2:
            return cls(on_device=device.type != "cuda")
        logger.warning(
            "the statistics (%.1f GB) are kept in files in %s, since %.1f GB of memory are free;"
            " --scratch names another folder",
            num_bytes / 1e9,
            tempfile.gettempdir(),
            free / 1e9,
        )
        return cls(tempfile.gettempdir())

    def zeros(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """A float32 tensor of zeros; with a folder it lies in a file, whatever the device. Raises
        `GraspError` where the disk is full.
        """
        numel = math.prod(shape)
        if self.folder is None or numel == 0:
            return torch.zeros(shape, device=device if self.on_device else "cpu")
        with self._lock:
            if self._last is None or self._used + 4 * numel > len(self._last):
                self._last, self._used = self._file(max(4 * numel, min(self._taken, CHUNK))), 0
            file, begin = self._last, self._used
            self._used += 4 * numel
        return torch.frombuffer(file, dtype=torch.float32, count=numel, offset=begin).view(shape)

    def _file(self, num_bytes: int) -> mmap.mmap:
        """A new file of zeros, mapped into memory; gone with the last tensor in it."""
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix="grasp-", suffix=".sum", dir=self.folder)
            try:
                # a file with holes would end the process when the disk is full
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, num_bytes)
                else:
                    os.truncate(descriptor, num_bytes)
                made = mmap.mmap(descriptor, num_bytes)
            finally:
                os.close(descriptor)
                os.unlink(path)
        except OSError as failure:
            reason = failure.strerror or failure
            raise GraspError(
                f"--scratch {self.folder}: {reason}; name a folder on a disk with more free space"
            ) from None
        self._files = [*(one for one in self._files if one() is not None), weakref.ref(made)]
        self._taken += num_bytes
        return made

    def release(self) -> None:
        """Take the pages of all files out of this process's memory. Their numbers stay, and come
        back when they are looked at.
        """
        for one in self._files if hasattr(mmap, "MADV_DONTNEED") else ():
            if (pages := one()) is not None:
                pages.madvise(mmap.MADV_DONTNEED)

    def hold(self, value: Tensor) -> Tensor:
        """`value` in float32, in memory on the CPU or in a file."""
        return (
            value.float().cpu()
            if self.folder is None
            else self.zeros(*value.shape).add_(value.cpu())
        )
