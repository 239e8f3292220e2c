"""How a command runs and ends: what a user can get wrong is one line and status 2, a signal is
said, and `--debug` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import typing
from contextlib import suppress

import click

from grasp.errors import GraspError, Interrupted, in_words
from grasp.terminal.interruption import as_interrupts

RANK, WAIT = int(os.environ.get("RANK", "0")), 20.0
"""Which of several processes this is, and the seconds that all but the first wait before they say
what went wrong.
"""


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to `sys.stderr` as it is now: progress bars replace it while they are drawn, so that
    lines appear above them. A warning is said once, however often a run reads the same model.
    """

    stream = property(lambda _: sys.stderr, lambda _, __: None)

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno != logging.WARNING or message not in self.said:
            super().emit(record)
        self.said.add(message)


def run(command: click.Command) -> None:
    """Run a command with the words of this process, and end the process where something went
    wrong.
    """
    debug = "--debug" in sys.argv
    # of several processes, begun by torchrun, the first speaks
    quiet = logging.WARNING if RANK == 0 else logging.ERROR
    logging.basicConfig(
        level=logging.DEBUG if debug else quiet,
        format="%(levelname)s: %(message)s",
        handlers=[_ToStderr()],
        force=True,
    )
    with as_interrupts() as received:
        _run(command, debug, received)


def _run(command: click.Command, debug: bool, received: list[int]) -> None:
    try:
        command.main(standalone_mode=False)
    except GraspError as error:
        _fail(str(error), 2, debug)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort) as stop:
        cause = stop.__cause__ if isinstance(stop, click.Abort) else stop
        if isinstance(cause, EOFError):  # click takes it for an interrupt
            _unexpected(cause, debug)
        how = f"ended by {signal.Signals(received[0]).name}" if received else "interrupted"
        left = cause if isinstance(cause, Interrupted) else "nothing was left behind"
        _fail(f"{how}; {left}", 128 + (received[0] if received else signal.SIGINT), debug)
    except BrokenPipeError:
        sys.exit(1)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if received:  # a terminal that is closed cannot be written to
            sys.exit(128 + received[0])
        _unexpected(error, debug)


def _unexpected(error: BaseException, debug: bool) -> typing.NoReturn:
    """A defect of ours, or something no one has met yet."""
    said, status = in_words(error)
    _fail(f"{said}{' (--debug shows where)' if status == 1 else ''}", status, debug)


def _fail(message: str, status: int, debug: bool) -> typing.NoReturn:
    if RANK:  # what all of them get wrong the first says, and torchrun ends the others
        try:
            time.sleep(WAIT)
        except KeyboardInterrupt:
            sys.exit(status)
        message = f"process {RANK}: {message}"
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # a closed terminal
        click.echo(f"grasp: error: {message}", err=True)
    sys.exit(status)
