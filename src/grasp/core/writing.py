"""Writing that leaves all or nothing: beside the destination, then renamed when whole. Modes are
what the umask says.

A directory that is there already (it may be a mount point, or the target of a link) is kept and
filled: from a directory inside it, with the file that makes it loadable moved last. So a crash, at
any moment, leaves nothing that loads.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from grasp.core.destination import name_of, real, shown
from grasp.core.partial import partial, remove, remove_dead
from grasp.errors import CheckpointError, GraspError

LAST = "config.json"
"""Without it no library takes a directory for a model."""
FULL = 65536
"""A disk with fewer free bytes is full: what failed then failed for that, whatever it says."""


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A scratch directory that becomes `out` if the block ends well, and vanishes if not. Raises
    `CheckpointError` for what the disk refuses.
    """
    target = real(out)
    inside = target.is_dir()
    home = target if inside else target.parent
    new = [folder for folder in (home, *home.parents) if not os.path.exists(folder)]
    try:
        home.mkdir(parents=True, exist_ok=True)
        for folder in {home, target.parent}:
            remove_dead(folder)
        with partial(home, name_of(target), directory=True) as scratch:
            yield scratch
            _settle(scratch)
            if inside:
                _move_up(scratch, target)
            else:
                os.replace(scratch, target)
                to_disk(home)
    except Exception as failure:
        if not _of_the_disk(failure, home):
            raise
        raise CheckpointError(
            f"OUT {shown(out)}: cannot be written: {failure}; nothing was left behind"
        ) from failure
    finally:
        for folder in new if not os.path.exists(target) else ():
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path` if the block ends well, and vanishes if not. Raises
    `CheckpointError` for what the disk refuses.

    A link is followed; a file that is replaced keeps its mode.
    """
    target = real(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(target.parent)
        with partial(target.parent, target.name, directory=False) as scratch:
            yield scratch
            if target.exists():
                scratch.chmod(stat.S_IMODE(target.stat().st_mode))
            to_disk(scratch)
            try:
                os.replace(scratch, target)
            except OSError as failure:
                if failure.errno != errno.EBUSY:
                    raise
                # a file that is a mount point of its own, as containers have them
                shutil.copyfile(scratch, target)
    except Exception as failure:
        if not _of_the_disk(failure, target.parent):
            raise
        raise CheckpointError(
            f"{shown(path)}: cannot be written: {failure}; nothing was left behind"
        ) from failure


def _of_the_disk(failure: Exception, home: Path) -> bool:
    """Whether writing failed for the disk's sake. Libraries in Rust and C++ say so in errors of
    their own.
    """
    if isinstance(failure, GraspError):
        return False
    if isinstance(failure, (OSError, SafetensorError)) or "(os error " in str(failure):
        return True
    try:
        return shutil.disk_usage(home).free < FULL
    except OSError:
        return False


def _settle(scratch: Path) -> None:
    """Give every file the mode that the system gave the directory (safetensors makes its own
    readable for the owner only); onto the disk.
    """
    allowed = stat.S_IMODE(scratch.stat().st_mode) & 0o777
    for path in scratch.rglob("*"):
        wanted = allowed if path.is_dir() else allowed & 0o666
        if stat.S_IMODE(path.stat().st_mode) & 0o777 != wanted:
            with suppress(OSError):  # some file systems have no modes
                path.chmod(wanted)
        to_disk(path)


def _move_up(scratch: Path, target: Path) -> None:
    """Move everything from `scratch` into the directory around it; what was moved is removed again
    where that does not end well.
    """
    moved: list[Path] = []
    try:
        for path in sorted(scratch.iterdir(), key=lambda path: (path.name == LAST, path.name)):
            if path.name == LAST:
                to_disk(target)
            if os.path.lexists(target / path.name):
                raise FileExistsError(
                    errno.EEXIST,
                    "somebody else has put it there meanwhile",
                    os.fspath(target / path.name),
                )
            moved.append(target / path.name)
            os.rename(path, moved[-1])
        to_disk(target)
    except BaseException:
        for path in reversed(moved):
            remove(path)
        raise


def to_disk(path: Path) -> None:
    """Wait until what was written to a file, or into a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
