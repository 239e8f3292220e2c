"""What ends a run from outside: Ctrl-C, SIGTERM (a scheduler, a container that stops), SIGHUP (a
terminal that closes). All are an interrupt within, so that what is half written is removed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)))


@contextmanager
def as_interrupts() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGHUP raise `KeyboardInterrupt`; gives a list that then holds
    the signal's number.

    Once: those that follow are ignored, since cleaning up has begun. A signal that was ignored
    before (`nohup`) stays so.
    """
    received: list[int] = []
    before = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if signal.getsignal(number) == signal.SIG_DFL
    }
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def stop(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
