"""What ends a run from outside: it says what is left, leaves nothing half written, and no child
goes on without it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import test_faults
from test_cli import SMALL, command

from grasp import cli
from grasp.core import children
from grasp.core.children import LIFELINE, end_with_parent, run_child
from grasp.core.edits import EditLog
from grasp.core.partial import partials
from grasp.core.results import Result
from grasp.terminal.interruption import as_interrupts
from grasp.verbs import compare as comparison
from grasp.verbs import compress as pipeline
from grasp.verbs import demo

contents = test_faults.contents

HOW = {
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP",
    signal.SIGINT: "interrupted",
}


@pytest.fixture(autouse=True)
def signals():
    """As a shell in the foreground starts a program."""
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int):
    """Whatever it replaces sends this process a signal; saving does in the folder that becomes OUT
    only.
    """

    def sends(*arguments: object, **__: object) -> None:
        if len(arguments) > 1 and ".partial-" not in str(arguments[1]):
            return
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("it went on")

    return sends


@pytest.mark.parametrize("number", HOW, ids=lambda number: number.name)
@pytest.mark.parametrize("inside", [True, False])
def test_a_signal_while_saving_leaves_nothing(
    number, inside, model_directory, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", send(number))
    out = tmp_path / "new" / "out"
    if inside:
        out.mkdir(parents=True)
    done = command(
        "compress",
        model_directory,
        out,
        "--method",
        "shortgpt",
        "--layers",
        "3",
        "--data",
        text_file,
        *SMALL,
    )
    assert (
        done.status == 128 + number
        and done.err.splitlines()[-1] == f"grasp: error: {HOW[number]}; nothing was left behind"
    )
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if inside else [])
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_second_signal_does_not_stop_the_cleaning_up():
    with as_interrupts() as received, pytest.raises(KeyboardInterrupt):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGHUP]


def test_a_signal_that_was_ignored_stays_ignored():
    """`nohup grasp ...`"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with as_interrupts() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_terminal_cannot_be_written_to(monkeypatch):
    """The bars fail as they are taken away, and so does the last line."""

    @click.command()
    def gone() -> None:
        try:
            send(signal.SIGHUP)()
        finally:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "cli", gone)
    monkeypatch.setattr(
        cli.click, "echo", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    assert command().status == 128 + signal.SIGHUP


def test_a_file_that_ends_too_soon_is_no_interrupt(monkeypatch):
    """click takes EOFError, as a cut .gz raises it, for Ctrl-D."""

    @click.command()
    def cut() -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr(cli, "cli", cut)
    done = command()
    assert done.status == 1 and "unexpected EOFError: Compressed file" in done.err


# --- what is left is said


@pytest.fixture(scope="module")
def checkpoint(model_directory, text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "small"
    assert (
        command(
            "compress",
            model_directory,
            out,
            "--method",
            "grasp",
            "--layers",
            "3",
            "--data",
            text_file,
            *SMALL,
        ).status
        == 0
    )
    return out


TRAIN = (
    "--max-steps",
    "4",
    "--batch-size",
    "2",
    "--max-length",
    "32",
    "--held-out",
    "2",
    "--eval-every",
    "2",
)


@pytest.mark.parametrize(
    ("number", "where", "step"),
    [
        (signal.SIGINT, "training", 2),
        (signal.SIGTERM, "saving", 4),
        pytest.param(signal.SIGTERM, "first", 0, marks=pytest.mark.slow),
    ],
)
def test_recover_says_which_state_is_kept(
    where, step, number, checkpoint, text_file, tmp_path, monkeypatch
):
    from grasp.compensation.trainer import Compensation

    take = Compensation.training_step

    def step_or_signal(self, *arguments: object, **options: object):
        if self.state.global_step == step:
            send(number)()
        return take(self, *arguments, **options)

    with monkeypatch.context() as patch:
        if where == "saving":
            patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", send(number))
        else:
            patch.setattr(Compensation, "training_step", step_or_signal)
        done = command("recover", checkpoint, tmp_path / "out", "--data", text_file, *TRAIN)
    run, said = tmp_path / "out.recovery", done.err.splitlines()[-1]
    assert (
        done.status == 128 + number and not (tmp_path / "out").exists() and partials(tmp_path) == []
    )
    if where == "first":
        assert said.endswith("nothing was left behind") and not run.exists()
        return
    assert (
        said == f"grasp: error: {HOW[number]}; the state of step {step} is kept in {run}; the same"
        " command with --resume goes on from there"
    )
    done = command("recover", checkpoint, tmp_path / "out", "--data", text_file, *TRAIN, "--resume")
    assert done.status == 0 and not run.exists(), done.err


def test_two_runs_do_not_train_in_one_folder(checkpoint, text_file, tmp_path):
    from grasp.compensation.training import run_folder
    from grasp.errors import CheckpointError

    with run_folder(tmp_path / "run", {}, resume=False):
        before = contents(tmp_path)
        for resume in (True, False):
            with (
                pytest.raises(CheckpointError, match="another process is training in it"),
                run_folder(tmp_path / "run", {}, resume),
            ):
                pass
        assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made(tmp_path, monkeypatch):
    from grasp.compensation.training import run_folder
    from grasp.errors import CheckpointError

    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="the run cannot be begun"),
        run_folder(tmp_path / "file" / "run", {}, resume=False),
    ):
        pass


@pytest.fixture
def experiment(tmp_path, model_directory, text_file) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(
        f"model = {model_directory!r}\n[calibration]\ndata = {text_file!r}\nnum_samples ="
        f" 2\nseq_len = 16\n[evaluation]\nppl = [{text_file!r}]\nseq_len = 32\nnum_blocks ="
        " 2\n[[methods]]\nmethod = 'shortgpt'\nnum_layers = 1\n"
    )
    return path


@pytest.mark.parametrize("finished", [0, 1])
def test_compare_says_which_cells_are_kept(finished, experiment, tmp_path, monkeypatch):
    cells = []

    def cell(_path: Path, cell, _quiet: bool) -> Result:
        cells.append(cell)
        if len(cells) > finished:
            send(signal.SIGTERM)()
        return Result(cell.label, cell.model, key=cell.key)

    monkeypatch.setattr(comparison, "_run_apart", cell)
    out = tmp_path / "out.json"
    done = command("compare", experiment, "-o", out)
    said = (
        f"1 of 2 cells are finished in {out}; the same command goes on from there"
        if finished
        else "no cell is finished"
    )
    assert (
        done.status == 128 + signal.SIGTERM
        and done.err.splitlines()[-1] == f"grasp: error: ended by SIGTERM; {said}"
    )
    assert out.exists() == bool(finished)


@pytest.mark.parametrize("finished", [0, 1])
def test_the_demo_says_what_is_finished(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "embedded_model", lambda: None)
    made = []

    def compress(_model: str, out: Path, **_: object):
        made.append(out)
        if len(made) > finished:
            send(signal.SIGTERM)()
        out.mkdir(parents=True)
        return type("", (), {"manifest": {}, "log": EditLog(), "ratio": 0.1})

    monkeypatch.setattr(pipeline, "compress", compress)
    done = command("demo", "-o", tmp_path / "shown")
    left = (
        f"{tmp_path / 'shown'} holds what was finished (grasp); remove it to begin anew"
        if finished
        else "nothing was left behind"
    )
    assert (
        done.status == 128 + signal.SIGTERM
        and done.err.splitlines()[-1] == f"grasp: error: ended by SIGTERM; {left}"
    )


# --- children


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:  # one that nobody waits for is dead all the same
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def wait_for(condition, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


CHILD = """
import os, sys, time
from grasp.core import children
if {portable}:
    children.sys.platform = "another"
children.end_with_parent()
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.replace(sys.argv[1] + ".new", sys.argv[1])
{busy}
"""
PARENT = """
import sys
from grasp.core.children import run_child
run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""
BUSY = {
    "asleep": "time.sleep(300)",
    "in a loop": "while True: pass",
    "deaf": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)",
}


@pytest.mark.parametrize("portable", [False, True], ids=["as here", "without prctl"])
@pytest.mark.parametrize("busy", BUSY)
def test_a_child_ends_when_its_parent_is_killed(busy, portable, tmp_path):
    """Neither end imports torch, so this is quick."""
    note = tmp_path / "child"
    script = CHILD.format(portable=portable, busy=BUSY[busy])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, script, str(note)])
    assert wait_for(note.exists, 30)
    parent.kill()
    parent.wait()
    child = int(note.read_text())
    assert wait_for(lambda: not is_alive(child)), f"{child} goes on"


def test_an_interrupted_parent_ends_its_child_even_a_deaf_one(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "PATIENCE", 0.2)
    note = tmp_path / "child"
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    script = CHILD.format(
        portable=False, busy=BUSY["deaf"] + f"\nos.kill({os.getpid()}, signal.SIGALRM)"
    ).replace("time.sleep(300)\n", "")
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", script + "time.sleep(300)", str(note)])
    assert not is_alive(int(note.read_text()))


def test_what_a_child_says_and_that_it_leaves_no_descriptor_open():
    before = len(os.listdir("/dev/fd"))
    done = run_child(
        [
            sys.executable,
            "-c",
            "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
        ],
        stderr=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(FileNotFoundError):
        run_child(["/no/such/program"])
    assert len(os.listdir("/dev/fd")) == before


def test_a_cell_that_nobody_waits_for_is_no_child(monkeypatch):
    """`grasp compare X --cell KEY` typed by a person: nothing is watched."""
    monkeypatch.delenv(LIFELINE, raising=False)
    monkeypatch.setattr(
        children.threading, "Thread", lambda **_: pytest.fail("a thread was started")
    )
    end_with_parent()


@pytest.mark.parametrize(
    "words", [("compare", "x.toml", "--cell", "k"), ("demo", "--measure", "x")]
)
def test_the_hidden_commands_end_with_their_parent(words, monkeypatch):
    """Before anything heavy is imported."""

    class Asked(Exception):
        pass

    def asked() -> None:
        raise Asked

    monkeypatch.setattr(cli, "end_with_parent", asked)
    monkeypatch.setattr(cli, "_show", lambda _: pytest.fail("too late"))
    assert "unexpected Asked" in command(*words).err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_killed_compare_leaves_no_cell_computing(number, experiment, tmp_path):
    """As a user meets it: the cell is found by its parent's number while it computes."""
    experiment.write_text(
        experiment.read_text()
        .replace("num_blocks = 2", "num_blocks = 40")
        .replace("seq_len = 32", "seq_len = 128")
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "grasp",
            "compare",
            str(experiment),
            "-o",
            str(tmp_path / "out.json"),
        ],
        cwd=tmp_path,
    )

    def cells() -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(parent.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(line) for line in found.stdout.split()]

    assert wait_for(lambda: bool(cells()), 60)
    time.sleep(3)
    [cell] = cells()
    parent.send_signal(number)
    parent.wait(60)
    assert parent.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert wait_for(lambda: not is_alive(cell)), f"{cell} goes on"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_a_run_that_is_killed_while_it_writes(number, model_directory, text_file, tmp_path):
    """SIGTERM and SIGHUP clean up; after SIGKILL the next run does."""
    script = (
        "import sys, time, transformers\nfrom grasp.cli import main\n"
        "save = transformers.PreTrainedTokenizerBase.save_pretrained\n"
        "def wait(self, folder, *_, **__):\n"
        "    if '.partial-' not in str(folder):\n        return save(self, folder, *_, **__)\n"
        "    print('now', flush=True)\n    time.sleep(100)\n"
        "transformers.PreTrainedTokenizerBase.save_pretrained = wait\nmain()\n"
    )
    words = [
        "compress",
        model_directory,
        str(tmp_path / "out"),
        "--method",
        "shortgpt",
        "--layers",
        "3",
        "--data",
        text_file,
        *SMALL,
    ]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout.readline() == "now\n"
            [scratch] = partials(tmp_path)
            child.send_signal(number)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    if number != signal.SIGKILL:
        assert (
            child.returncode == 128 + number and f"{HOW[number]}; nothing was left behind" in said
        )
        assert list(tmp_path.iterdir()) == []
        return
    assert list(tmp_path.iterdir()) == [scratch]
    done = command(*words)
    assert done.status == 0 and f"removed {scratch}" in done.err and os.listdir(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "grasp.json").read_text())["edits"]


def test_a_disk_that_is_full_before_the_first_state_is_kept(
    checkpoint, text_file, tmp_path, monkeypatch
):
    """There is nothing to go on from, and it is not promised."""
    from grasp.compensation import trainer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_file", full)
    done = command("recover", checkpoint, tmp_path / "out", "--data", text_file, *TRAIN)
    assert (
        "the state of step 0 cannot be written" in done.err
        and "nothing was left behind" in done.err
        and "--resume" not in done.err
    )
    assert done.status == 2 and list(tmp_path.iterdir()) == []
