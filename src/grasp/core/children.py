"""Processes that end with the one that started them, however that one ends: killed, terminated, its
terminal closed.

The child holds the reading end of a pipe whose other end only the parent has; when the parent ends,
the system closes it, and a thread of the child sees that. On Linux the kernel is asked for the same
besides, which works while the child is busy outside Python. A child that ends so has nothing to
clean up: it answers on stdout and writes no files.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

LIFELINE = "GRASP_LIFELINE"
"""Environment variable: the descriptor of the pipe, for a child."""
PATIENCE = 10.0
"""Seconds between asking a child to end and killing it."""
PR_SET_PDEATHSIG = 1


def run_child(
    command: Sequence[str], stderr: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that calls `end_with_parent`; its stdout (and, with `subprocess.PIPE`, stderr)
    as text. It ends if this is interrupted.
    """
    end, hold = os.pipe()
    try:
        environment = {**os.environ, LIFELINE: str(end)}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            pass_fds=(end,),
        ) as child:
            try:
                out, said = child.communicate()
            except BaseException:
                _end(child)
                raise
        return subprocess.CompletedProcess(command, child.returncode, out, said)
    finally:
        os.close(end)
        os.close(hold)


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE)
    child.kill()


def end_with_parent() -> None:
    """In a process that `run_child` started: end when the parent does. In any other: nothing."""
    given = os.environ.pop(LIFELINE, None)
    if given is None:
        return
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(int(given),), daemon=True, name="lifeline").start()


def _watch(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 1):
            pass
    os._exit(128 + signal.SIGKILL)
