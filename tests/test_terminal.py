"""What is shown while something runs: bars on a terminal, else a line now and then, and the first
at once.
"""

import io
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from grasp import cli
from grasp.terminal import bars as terminal
from grasp.terminal.bars import BEAT


@pytest.fixture
def said(monkeypatch):
    """A console that writes to memory, and is a terminal where asked."""

    def use(is_terminal: bool) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(
            terminal,
            "console",
            Console(file=text, force_terminal=is_terminal, width=100, highlight=False),
        )
        return text

    return use


def wait_for(text: io.StringIO, word: str) -> str:
    for _ in range(500):
        if word in text.getvalue():
            return text.getvalue()
        time.sleep(0.01)
    raise AssertionError(f"no '{word}' in {text.getvalue()!r}")


def test_a_file_gets_lines_while_a_task_does_not_call(said, monkeypatch):
    monkeypatch.setattr(terminal, "BEAT", 0.02)
    text = said(False)
    with terminal.progress_bars() as progress:
        progress("statistics", 0, 64)
        wait_for(text, "statistics: 0 of 64")
        progress("statistics", 16, 64)
        assert "left" in wait_for(text, "statistics: 16 of 64")
        progress("saving", 0, 1)
        wait_for(text, "saving: 0 s")
    before = text.getvalue()
    time.sleep(0.1)
    assert text.getvalue() == before and "\x1b" not in before and "\r" not in before


def test_ten_seconds_never_pass_without_a_line():
    assert BEAT < 10


def test_quiet_says_nothing_and_a_terminal_gets_bars(said, monkeypatch):
    monkeypatch.setattr(terminal, "BEAT", 0.01)
    text = said(False)
    with terminal.progress_bars(quiet=True) as progress, terminal.waiting("loading", quiet=True):
        progress("statistics", 1, 2)
        time.sleep(0.1)
    assert text.getvalue() == ""
    text = said(True)
    with terminal.progress_bars() as progress:
        progress("statistics", 1, 2)
    assert "statistics" in text.getvalue() and "1/2" in text.getvalue()


def test_an_error_ends_the_lines(said):
    said(False)
    with pytest.raises(KeyError), terminal.lines("work") as shown:
        raise KeyError
    assert not shown.thread.is_alive()


def test_the_demo_speaks_before_it_loads_anything_heavy(said, monkeypatch, tmp_path):
    text = said(False)
    monkeypatch.setattr(
        cli, "_show", lambda _: pytest.exit("loaded") if not text.getvalue() else 1 / 0
    )
    assert isinstance(
        CliRunner().invoke(cli.cli, ["demo", "-o", str(tmp_path / "out")]).exception,
        ZeroDivisionError,
    )
    assert "SmolLM2" in text.getvalue()
