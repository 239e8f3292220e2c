"""Files and directories on their way: written beside their destination under a name of their own,
gone when the writing ends badly.

    .NAME.partial-MACHINE-PROCESS-RANDOM

The writing process holds a lock on it (`flock`), which the system gives back when that process
ends, however it ends. So what a killed run left is told from what a live one is writing, and is
removed by the next that writes beside it: only under that lock, only on the same machine since it
was started, and only where the process is gone. What cannot be told is named, never removed.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows has no such locks: nothing is told of other runs there
    fcntl = None

logger = logging.getLogger(__name__)

PATTERN = re.compile(r"\..+\.partial-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
YOUNG = 60.0
"""Seconds in which a partial without a lock may be one whose process is about to take it, under a
number that was used before.
"""

State = Literal["writing", "dead", "unknown"]


@contextmanager
def partial(folder: Path, name: str, directory: bool) -> Iterator[Path]:
    """A new, locked directory or empty file in `folder`, on its way to be `name`. What is left of
    it after the block is removed.
    """
    path = folder / f".{name[:40]}.partial-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if directory:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with hold(path):
            yield path
    finally:
        remove(path)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder for the length of the block. Raises `BlockingIOError` where another process has
    it.
    """
    held = None
    try:
        with _unlockable():
            if fcntl is None:
                raise OSError("no locks on this system")
            held = os.open(folder, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if held is not None:
            os.close(held)


@contextmanager
def _unlockable() -> Iterator[None]:
    """Go on where a file system has no locks, as some network file systems."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as failure:
        logger.debug("no lock: %s", failure)


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_partial(path: Path) -> bool:
    """Whether the name is one that `partial` gives."""
    return PATTERN.fullmatch(path.name) is not None


def partials(folder: Path) -> list[Path]:
    """All partials in a folder, whoever writes them."""
    try:
        return sorted(path for path in folder.iterdir() if is_partial(path))
    except OSError:
        return []


def state_of(path: Path) -> State:
    """Whether the process that writes a partial is at it, dead, or not to be found out about."""
    with _claimed(path) as state:
        return state


def remove_dead(folder: Path) -> None:
    """Remove the partials of dead processes in a folder, and name those that nothing is known
    about.
    """
    for path in partials(folder):
        with _claimed(path) as state:
            size = bytes_of(path) / 1e6
            if state == "dead":
                remove(path)
                logger.info(
                    "removed %s (%.1f MB), which a run that was killed had left", path, size
                )
            elif state == "unknown":
                logger.warning(
                    "%s (%.1f MB): left by a run on another machine, or before this one was"
                    " started; remove it if that run has ended",
                    path,
                    size,
                )


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    total = 0
    for file in (path, *path.rglob("*")):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


@contextmanager
def _claimed(path: Path) -> Iterator[State]:
    """The state of a partial; where it is "dead" its lock is held for the length of the block."""
    held = None
    try:
        try:
            held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            about = os.fstat(held)
        except OSError:  # gone, or not ours to open
            yield "writing"
            return
        yield _state(path, held, about)
    finally:
        if held is not None:
            os.close(held)


def _state(path: Path, descriptor: int, about: os.stat_result) -> State:
    found = PATTERN.fullmatch(path.name)
    if found is None or fcntl is None or about.st_uid != os.geteuid():
        return "writing"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "writing"
    except OSError:
        return "unknown"
    if found[1] != _machine():
        return "unknown"
    return "writing" if _alive(int(found[2])) and time.time() - about.st_mtime < YOUNG else "dead"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _machine() -> str:
    """A short name of this machine since it was started: process numbers and locks mean something
    only within it.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return hashlib.sha256(f"{platform.node()} {boot}".encode()).hexdigest()[:8]
