"""What is written has the modes that the umask asks for, is whole or not there, and leaves nothing
beside it, whatever fails.
"""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_cli import SMALL, command

import grasp
from grasp.core import models, partial, writing
from grasp.core.destination import check_destination
from grasp.core.partial import bytes_of, partials, state_of
from grasp.core.results import Result, Results
from grasp.core.writing import whole, whole_file
from grasp.errors import CheckpointError
from grasp.report import plots, vega


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027], ids=oct)
def umask(request):
    """Every usual umask in turn."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    return {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in directory.rglob("*")
        if path.is_file()
    }


def picture(path: Path) -> Path:
    """A small picture in the file."""
    return plots._written(Figure(figsize=(1, 1)), path)


# --- modes


def test_the_modes_of_a_checkpoint_are_the_umasks(
    umask, model_directory, text_file, tmp_path, monkeypatch
):
    """Shards too, in a new directory and in one that was there."""
    monkeypatch.setattr("grasp.core.checkpoint.MAX_SHARD_SIZE", "60KB")
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        out = tmp_path / name
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
        assert done.status == 0, done.err
        assert len(list(out.glob("*.safetensors"))) > 1
        assert set(modes(out).values()) == {0o666 & ~umask}, modes(out)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~umask


def test_an_existing_directory_keeps_its_mode(tmp_path):
    (tmp_path / "out").mkdir(mode=0o750)
    (tmp_path / "out").chmod(0o750)
    with whole(tmp_path / "out") as scratch:
        (scratch / "config.json").touch(0o600)
        (scratch / "adapter").mkdir(0o700)
        (scratch / "adapter" / "weights").touch(0o700)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert set(modes(tmp_path / "out").values()) == {0o666 & ~_umask()}
    assert stat.S_IMODE((tmp_path / "out" / "adapter").stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_modes_of_single_files_are_the_umasks(umask, tmp_path):
    Results((Result("a", "b"),)).write(tmp_path / "new" / "r.json")
    for kind in ("png", "svg", "pdf", "svgz", "jpg", "eps"):
        picture(tmp_path / f"seen.{kind}")
    runtime = vega.Runtime(tmp_path)
    runtime.stop()
    runtime._keep("script")
    assert set(modes(tmp_path).values()) == {0o666 & ~umask}, modes(tmp_path)


def test_the_unpacked_model_in_the_cache_has_the_umasks_modes(
    umask, tmp_path, monkeypatch, decoder, tokenizer, model_directory
):
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").touch()
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda _: type("", (), {"submodule_search_locations": [str(package)]}),
    )
    read = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *_, **__: read(model_directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = models.embedded_model()
    assert "model.safetensors" in modes(home) and set(modes(home).values()) == {0o666 & ~umask}
    assert list(home.parent.iterdir()) == [home] and models.embedded_model() == home


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_is_followed(tmp_path):
    (tmp_path / "r.json").touch()
    (tmp_path / "r.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("r.json")
    Results((Result("a", "b"),)).write(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and Results.read(tmp_path / "r.json").rows
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o640


# --- a disk that is full


FAILURES = {
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
    "of tokenizers": Exception("No space left on device (os error 28)"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "of tokenizers, a quota": Exception("Disk quota exceeded (os error 122)"),
}


def fail(failure: BaseException):
    def raises(*_: object, **__: object) -> None:
        raise failure

    return raises


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", FAILURES)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name, inside, model_directory, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "new" / "out"
    if inside:
        out.mkdir(parents=True)
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.save_pretrained", fail(FAILURES[name])
    )
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
        done.status == 2
        and "cannot be written" in done.err
        and "nothing was left behind" in done.err
        and str(out) in done.err
    )
    assert [path for path in tmp_path.rglob("*")] == ([out.parent, out] if inside else [])


def test_what_a_library_says_of_a_disk_that_is_full(tmp_path, monkeypatch):
    """openvino: "Can't open bin file"; where there is room, an error stays what it is."""
    with pytest.raises(RuntimeError, match="bin file"), whole(tmp_path / "out"):
        raise RuntimeError("Can't open bin file")
    usage = writing.shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="bin file"), whole(tmp_path / "out"):
        raise RuntimeError("Can't open bin file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [*FAILURES.values(), KeyboardInterrupt(), ZeroDivisionError()], ids=repr
)
def test_a_file_that_cannot_be_finished_leaves_nothing(failure, tmp_path, monkeypatch):
    """Results while they are written, half a picture."""

    def half(path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    expected = CheckpointError if failure in FAILURES.values() else type(failure)
    for old in (False, True):
        if old:
            (tmp_path / "seen.png").write_text("old")
        with pytest.raises(expected), monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda _self, path, **__: half(path))
            picture(tmp_path / "seen.png")
    for name in ("write_text", "replace"):
        with pytest.raises(expected), monkeypatch.context() as patch:
            patch.setattr(Path if name == "write_text" else os, name, fail(failure))
            Results((Result("a", "b"),)).write(tmp_path / "r.json")
    assert [path.name for path in tmp_path.iterdir()] == ["seen.png"] and (
        tmp_path / "seen.png"
    ).read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where one may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place],
            check=False,
            capture_output=True,
        ).returncode
    ):
        pytest.skip("only root mounts")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("left", [4, 60, 108])
def test_a_disk_that_is_really_full(left, small_disk, model_directory, text_file, monkeypatch):
    """`left` kilobytes when saving begins: too few for the directory, weights (95 kB), tokenizer.
    (The check beforehand is taken away.)
    """
    monkeypatch.setattr("grasp.core.checkpoint.check_destination", lambda *_: None)
    monkeypatch.setattr("grasp.verbs.compress.check_destination", lambda *_: None)
    (small_disk / "filler").write_bytes(bytes((300 - left) * 1024))
    (small_disk / "there").mkdir()
    for out in ("new", "there"):
        words = (
            "compress",
            model_directory,
            small_disk / out,
            "--method",
            "shortgpt",
            "--layers",
            "2,3",
            "--data",
            text_file,
            *SMALL,
        )
        done = command(*words)
        assert done.status == 2 and "cannot be written" in done.err, done.err
        assert sorted(path.name for path in small_disk.rglob("*")) == ["filler", "there"]
    with pytest.raises(CheckpointError, match="No space left"):
        Results(tuple(Result("a" * 5000, "b") for _ in range(100))).write(small_disk / "r.json")
    assert sorted(path.name for path in small_disk.rglob("*")) == ["filler", "there"]


# --- filled in place


def test_what_makes_a_directory_loadable_is_moved_last(tmp_path, monkeypatch):
    """And is never there alone: all that was moved goes again where a move fails."""
    (tmp_path / "out").mkdir()
    moved, rename = [], os.rename

    def seen(path, target) -> None:
        moved.append(Path(target).name)
        rename(path, target)
        if fails and len(moved) == fails:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writing.os, "rename", seen)
    for fails in (1, 2, 3, 4, 0):
        moved.clear()
        try:
            with whole(tmp_path / "out") as scratch:
                assert scratch.parent == tmp_path / "out"
                for name in ("model.safetensors", "config.json", "grasp.json"):
                    (scratch / name).touch()
                (scratch / "adapter").mkdir()
                (scratch / "adapter" / "x").touch()
        except CheckpointError:
            assert fails and list((tmp_path / "out").iterdir()) == []
    assert moved == ["adapter", "grasp.json", "model.safetensors", "config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(moved)


def test_what_somebody_else_put_there_meanwhile_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="meanwhile"), whole(tmp_path / "out") as scratch:
        for name in ("a", "config.json"):
            (scratch / name).touch()
        (tmp_path / "out" / "config.json").write_text("mine")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


# --- what dead processes left


@pytest.fixture
def dead_process() -> int:
    """The number of a process that has ended."""
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    return child


def left(folder: Path, process: int, machine: str | None = None, age: float = 0) -> Path:
    """A partial checkpoint as a killed process leaves it."""
    path = folder / f".out.partial-{machine or partial._machine()}-{process}-0123abcd"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(1000))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_what_a_killed_run_left_is_removed_by_the_next(dead_process, tmp_path, caplog):
    caplog.set_level("INFO", "grasp")
    old = left(tmp_path, dead_process)
    assert state_of(old) == "dead"
    with whole(tmp_path / "other"):
        assert not old.exists()
    assert f"removed {old}" in caplog.text
    old = left(tmp_path, dead_process)
    Results((Result("a", "b"),)).write(tmp_path / "r.json")
    assert not old.exists()


def test_what_a_killed_run_left_in_out_is_removed_too(dead_process, tmp_path):
    (tmp_path / "out").mkdir()
    old = left(tmp_path / "out", dead_process)
    check_destination(tmp_path / "out", 0)
    assert old.exists(), "checking removes nothing"
    with whole(tmp_path / "out") as scratch:
        (scratch / "config.json").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_what_will_be_removed_counts_as_room(dead_process, tmp_path, monkeypatch):
    usage = writing.shutil.disk_usage("/")._replace(free=500)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="has 500 bytes free"):
        check_destination(tmp_path / "out", 1400)
    assert bytes_of(left(tmp_path, dead_process)) == 1000
    check_destination(tmp_path / "out", 1400)


def test_what_is_being_written_is_never_removed(tmp_path):
    """Nor is it room, nor an empty OUT, whatever its process is called and however old it is."""
    with whole(tmp_path / "out") as scratch:
        os.utime(scratch, (0, 0))
        gone = scratch.rename(
            scratch.with_name(scratch.name.replace(f"-{os.getpid()}-", "-999999999-"))
        )
        assert state_of(gone) == "writing"
        with whole(tmp_path / "other"), whole_file(tmp_path / "file"):
            assert len(partials(tmp_path)) == 3
        assert gone.is_dir()
        gone.rename(scratch)
    (tmp_path / "there").mkdir()
    with (
        whole(tmp_path / "there"),
        pytest.raises(CheckpointError, match="another process is writing there"),
    ):
        check_destination(tmp_path / "there", 0)


def test_a_process_of_the_same_number_that_is_young_or_old(tmp_path):
    """Not locked: it may be about to be, or its process died and its number was given again."""
    young = left(tmp_path, os.getpid())
    assert state_of(young) == "writing"
    os.utime(young, (0, 0))
    assert state_of(young) == "dead"


def test_what_another_machine_left_is_named(tmp_path, dead_process, caplog, monkeypatch):
    other = left(tmp_path, dead_process, machine="00000000")
    with whole(tmp_path / "new"):
        assert other.exists()
    assert str(other) in caplog.text and "remove it if that run has ended" in caplog.text
    monkeypatch.setattr(partial.fcntl, "flock", fail(OSError(errno.EOPNOTSUPP, "not supported")))
    unlocked = left(tmp_path, dead_process)
    with whole(tmp_path / "newer"):
        assert unlocked.exists()
    assert str(unlocked) in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        ".out.partial-",
        ".out.partial-abcdefgh",
        ".out.partial-0123abcd-x-0123abcd",
        "out.partial-0123abcd-9-0123abcd",
    ],
)
def test_other_names_are_nobodys_business(name, tmp_path):
    (tmp_path / name).mkdir()
    with whole(tmp_path / "out"):
        pass
    assert (tmp_path / name).is_dir()


def test_a_link_of_that_name_is_not_followed(tmp_path, dead_process):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (tmp_path / f".out.partial-{partial._machine()}-{dead_process}-0123abcd").symlink_to("mine")
    with whole(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "kept").exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_long_name_has_room_for_its_partial(name, tmp_path):
    check_destination(tmp_path / name, 0)
    with whole(tmp_path / name) as scratch:
        (scratch / "config.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_public_api_writes_the_same_way(model_directory, text_file, tmp_path, dead_process):
    old = left(tmp_path, dead_process)
    grasp.compress(
        model_directory,
        tmp_path / "out",
        method="shortgpt",
        layers=(3,),
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    assert not old.exists() and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_loading_needs_nothing_that_a_system_lacks(monkeypatch):
    """Windows has neither such locks nor SIGHUP; a checkpoint loads there all the same."""
    import importlib

    from grasp.core import partial as locks
    from grasp.terminal import interruption

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        patch.delattr(signal, "SIGHUP")
        assert importlib.reload(locks).fcntl is None and importlib.reload(interruption).SIGNALS == (
            signal.SIGTERM,
        )
        with pytest.raises(OSError), locks.hold(Path("nowhere")):
            raise OSError  # the block's own errors are not taken for a lack of locks
    importlib.reload(locks)
    importlib.reload(interruption)
