"""A run that ends too soon and goes on: the same result, nothing done twice, and refused where it
is not the same run.
"""

import json
import math
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import test_interruption
import torch
from conftest import FAMILY_ROWS, build, quick
from safetensors.torch import load_file
from test_cli import SMALL, command

import grasp
from grasp.core import journal as journals
from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize, Rewrite, Step
from grasp.core.journal import Journal, journal_of
from grasp.core.partial import hold
from grasp.core.provenance import contents
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.core.tensor_file import NAMES, read_tensors, write_tensors
from grasp.errors import CheckpointError, RecipeError
from grasp.methods.grasp import Grasp
from grasp.methods.grasp_fisher import GraspFisher
from grasp.methods.svd_llm import SVDLLM
from grasp.stages.curvature import Curvatures
from grasp.stages.statistics import AngularDistance, Similarity, WeightGrad

signals = test_interruption.signals

RUNS = {
    "grasp": {"method": "grasp", "layers": (1, 3), "retain_ratio": 0.3},
    "iterative": {"method": "grasp", "layers": (1, 3), "retain_ratio": 0.3, "iterative": True},
    "per sample": {"method": "grasp", "num_layers": 2, "score": "taylor-per-sample"},
    "angular": {"method": "grasp", "num_layers": 1, "angular": True},
    "grasp-fisher": {"method": "grasp-fisher", "ratio": 0.2},
    "two rounds": {"ratio": 0.2, "rounds": 2, "width_multiple": 4},
    "bits": {"size": "45kB", "width_multiple": 4, "rounds": 1},
    "shortgpt": {"method": "shortgpt", "num_layers": 2},
    "least squares": {"method": "svd-llm", "ratio": 0.2, "update": "lstsq"},
    "slicegpt": {"method": "slicegpt", "slicing": 0.25},
    "laco": {"method": "laco", "threshold": 0.1, "merge": 2},
    "streamline": {"method": "streamline", "num_layers": 2, "net": "none"},
}
STOPS = [{"blocks": 3}, {"blocks": 5}, {"edits": 1}, {"edits": 2}, "saving"]


@pytest.fixture
def at_once(monkeypatch):
    """Every block and every edit is written down, from the start."""
    monkeypatch.setattr(journals, "WAIT", 0.0)
    monkeypatch.setattr(journals, "SHARE", math.inf)


class Stopped(Exception):
    pass


class Stop:
    """Counts what a run computes, and ends it before a block or an edit."""

    def __init__(self, monkeypatch, blocks: float = math.inf, edits: float = math.inf):
        self.blocks, self.edits, self.at = 0, 0, (blocks, edits)
        show, take = Resident._block, journals.Journal.record
        makers = [
            (Grasp, "_replacement"),
            (GraspFisher, "replacement"),
            (GraspFisher, "narrower"),
            (SVDLLM, "replacement"),
        ]
        self.made = []

        def block(runner, number):
            self.blocks += 1
            if self.blocks > self.at[0]:
                raise Stopped
            return show(runner, number)

        def record(journal, number, step, parameters):
            take(journal, number, step, parameters)
            self.edits += 1
            if self.edits >= self.at[1]:
                raise Stopped

        for kind, name in makers:
            monkeypatch.setattr(kind, name, self.counted(getattr(kind, name)))
        monkeypatch.setattr(Resident, "_block", block)
        monkeypatch.setattr(journals.Journal, "record", record)

    def counted(self, make):
        def made(*arguments):
            named = next(one for one in arguments if hasattr(one, "path") or hasattr(one, "where"))
            self.made.append(named.path if hasattr(named, "path") else named.where.name)
            return make(*arguments)

        return made


def run(model_directory, text_file, out: Path, name: str, **more):
    asked = {"data": text_file, "num_samples": 4, "seq_len": 32, **RUNS[name], **more}
    return grasp.compress(model_directory, out, **asked)


@pytest.fixture(scope="module")
def whole_run(model_directory, text_file, tmp_path_factory):
    """(run) -> its checkpoint and what it computes when nothing ends it; made once a run."""

    @cache
    def made(name: str) -> tuple[Path, Stop]:
        out = tmp_path_factory.mktemp("whole") / "out"
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop(patch)
            run(model_directory, text_file, out, name)
        return out, stop

    return made


def stopped(monkeypatch, *asked, **at) -> Stop:
    """A run that was ended."""
    with monkeypatch.context() as patch:
        stop = Stop(patch, **at)
        with pytest.raises(Stopped):
            run(*asked)
    return stop


def check_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same weights, to the bit, and tell the same of them."""
    found, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    told, before = (json.loads((out / "grasp.json").read_text()) for out in (one, other))
    for key in before.keys() - {"seconds", "seal"}:
        assert told[key] == before[key], key


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param(name, at, marks=() if is_quick else pytest.mark.slow)
        for name in RUNS
        for at in STOPS
        for is_quick in [name == "grasp-fisher" or (name != "bits" and at == {"edits": 2})]
    ],
)
def test_a_run_goes_on_where_it_was(
    name, at, whole_run, at_once, model_directory, text_file, tmp_path, monkeypatch
):
    asked = (model_directory, text_file)
    expected, whole = whole_run(name)
    if at == {"blocks": 5} and whole.blocks <= 5:
        pytest.skip("one sweep only")
    out, folder = tmp_path / "out", tmp_path / "out.journal"
    if at == "saving":
        with monkeypatch.context() as patch:
            first = Stop(patch)
            patch.setattr("grasp.verbs.compress.save", raises(Stopped))
            with pytest.raises(Stopped):
                run(*asked, out, name)
    else:
        first = stopped(monkeypatch, *asked, out, name, **at)
    assert (folder / "run.json").is_file() and not out.exists()
    with monkeypatch.context() as patch:
        second = Stop(patch)
        run(*asked, out, name, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_same(out, expected)
    shown = first.blocks - (first.blocks > first.at[0])
    begun = 4 if name == "bits" and at == {"blocks": 5} else 1  # an embedding is tried on four
    assert 0 <= shown + second.blocks - whole.blocks < begun
    assert sorted(first.made + second.made) == sorted(whole.made)


def raises(kind):
    def fail(*_, **__):
        raise kind

    return fail


@pytest.mark.parametrize("folder", [False, True])
def test_sums_go_on_in_memory_and_in_files(folder, at_once, tmp_path, calibration, monkeypatch):
    """Every collector, padding too; a sum in a file is in a file again."""
    mask = torch.arange(20) < torch.tensor([20, 13, 1, 20, 7, 20])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    scratch = Scratch(tmp_path / "scratch") if folder else None

    def collectors(decoder):
        paths = [one.path for layer in decoder.layers() for one in layer.linears.values()]
        every = [Similarity(), AngularDistance(), WeightGrad(paths), Curvatures(paths, scratch)]
        assert all(isinstance(one, Collector) for one in every)
        return every

    decoder = Decoder(build("gpt2"))
    expected = collectors(decoder)
    known = Resident(decoder, data).sweep(expected)
    began, made = collectors(decoder), collectors(decoder)
    taken = []
    zeros = Scratch.zeros
    with pytest.raises(Stopped), journal_of(tmp_path / "out", False, 0.0) as journal:
        journal.accept({})
        with monkeypatch.context() as patch:
            Stop(patch, blocks=4)
            Resident(decoder, data, journal).sweep(began)
    with journal_of(tmp_path / "out", True, 0.0) as journal, monkeypatch.context() as patch:
        journal.accept({})
        patch.setattr(Scratch, "zeros", lambda *a, **o: taken.append(a[1:]) or zeros(*a, **o))
        stop = Stop(patch)
        found = Resident(decoder, data, journal).sweep(made)
    assert stop.blocks == 2 and (found.loss, found.num_tokens) == (known.loss, known.num_tokens)
    assert len(taken) == sum(value.dim() == 2 for value in expected[3].sums.values())
    for one, other in zip(made, expected, strict=True):
        assert one.sums.keys() == other.sums.keys()
        for key, value in one.sums.items():
            assert value.dtype == other.sums[key].dtype and torch.equal(value, other.sums[key]), key


def test_a_short_run_writes_no_journal(model_directory, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "write", lambda *_: pytest.fail("written"))
    run(model_directory, text_file, tmp_path / "new" / "out", "grasp")
    stopped(monkeypatch, model_directory, text_file, tmp_path / "other", "grasp", edits=2)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_what_a_run_did_before_it_was_old_enough_is_written_later(
    model_directory, text_file, tmp_path, monkeypatch
):
    record = journals.Journal.record

    def third(journal, number, step, parameters):
        if number == 2:
            monkeypatch.setattr(journals, "WAIT", 0.0)
        record(journal, number, step, parameters)

    monkeypatch.setattr(journals.Journal, "record", third)
    stopped(monkeypatch, model_directory, text_file, tmp_path / "out", "grasp", edits=4)
    lines = (tmp_path / "out.journal" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3]
    assert all(json.loads(line)["key"] for line in lines)


def test_writing_takes_a_share_of_the_time(tmp_path, calibration, monkeypatch):
    """A slow disk gets few sums: the first is taken to cost what a known disk would."""
    now, written = [100.0], []
    monkeypatch.setattr(journals, "WAIT", 0.0)
    monkeypatch.setattr(journals.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        Journal, "write", lambda *told: (written.append(told[3]), now.__setitem__(0, now[0] + 1.0))
    )
    journal = Journal(tmp_path / "x.journal")
    journal.accept({})
    collector = Similarity()
    collector.sums["cosine.0"] = torch.zeros(1)
    kept = journal.sweep([collector], torch.device("cpu"))
    for _ in range(100):
        now[0] += 1.0
        kept.add(0.0, 1, last=False)
    assert written == [f"sums-0-{number}" for number in (1, 21, 41, 61, 81)]
    kept.cost = 1e9
    kept.add(0.0, 1, last=True)
    assert len(written) == 5


# --- refused


CHANGED = {
    "--retain-ratio 0.3, not 0.4": {"retain_ratio": 0.4},
    "--score taylor, not gradient": {"score": "gradient"},
    "--method grasp, not shortgpt": {"method": "shortgpt", "retain_ratio": None},
    "--dtype float32, not bfloat16": {"dtype": "bfloat16"},
    "other calibration tokens": {"num_samples": 3},
}


@pytest.mark.parametrize("said", CHANGED)
def test_another_recipe_is_refused(
    said, at_once, model_directory, text_file, tmp_path, monkeypatch
):
    out, folder = tmp_path / "out", tmp_path / "out.journal"
    stopped(monkeypatch, model_directory, text_file, out, "grasp", edits=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = {"data": text_file, "num_samples": 4, "seq_len": 32, **RUNS["grasp"], **CHANGED[said]}
    with pytest.raises(CheckpointError) as failure:
        given = {name: value for name, value in asked.items() if value is not None}
        grasp.compress(model_directory, out, resume=True, **given)
    assert (
        str(failure.value) == f"--resume: {folder} was begun with {said}; give the same, or remove"
        " it to begin anew"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_model_or_version_is_refused(
    at_once, model_directory, text_file, tmp_path, monkeypatch
):
    out, folder = tmp_path / "out", tmp_path / "out.journal"
    stopped(monkeypatch, model_directory, text_file, out, "grasp", edits=2)
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[7, 5] += 1e-3
    changed.save_pretrained(model)
    with pytest.raises(CheckpointError, match="was begun with other model weights; give"):
        run(str(model), text_file, out, "grasp", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("grasp.verbs.compress.__version__", "9.9")
        with pytest.raises(CheckpointError, match=r"begun with grasp 0.1.0, not 9.9; give"):
            run(model_directory, text_file, out, "grasp", resume=True)
    assert folder.is_dir()
    moved = tmp_path / "moved"  # the same model elsewhere is the same
    shutil.copytree(model_directory, moved)
    run(str(moved), text_file, out, "grasp", resume=True)


@pytest.mark.parametrize("name", quick(FAMILY_ROWS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_hash_is_of_every_number(name, dtype):
    """The last bit of any weight counts; threads do not."""
    model = build(name, dtype)
    before = contents(Decoder(model))
    assert before == contents(Decoder(build(name, dtype)))
    parameters = list(model.parameters())
    for parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        whole = parameter.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
        for place in (0, -1):
            whole.view(-1)[place] ^= 1
            after = contents(Decoder(model))
            assert after["model weights"] != before["model weights"]
            assert after["model settings"] == before["model settings"]
            whole.view(-1)[place] ^= 1
    assert before == contents(Decoder(model))


def test_a_journal_without_resume_and_resume_without_a_journal(
    at_once, model_directory, text_file, tmp_path, monkeypatch, caplog
):
    out, folder = tmp_path / "out", tmp_path / "out.journal"
    stopped(monkeypatch, model_directory, text_file, out, "grasp", edits=2)
    assert "the journal in" in caplog.text and "keeps 2 edits and the sums of 4" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("grasp.verbs.compress.open_model", raises(AssertionError))
        with pytest.raises(CheckpointError) as failure:
            run(model_directory, text_file, out, "grasp")
    assert (
        str(failure.value) == f"{folder}: an unfinished run, with 2 edits and the sums of 4 blocks"
        " of sweep 1; go on from it with --resume, or remove it to begin anew"
    )
    run(model_directory, text_file, tmp_path / "other", "grasp", resume=True)
    assert "holds no run; beginning anew" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"out.journal", "other"}


def test_resume_of_nothing(model_directory, text_file):
    with pytest.raises(RecipeError, match="--resume: needs OUT"):
        run(model_directory, text_file, None, "grasp", resume=True)


def test_two_processes_do_not_share_a_journal(
    at_once, model_directory, text_file, tmp_path, monkeypatch
):
    out, folder = tmp_path / "out", tmp_path / "out.journal"
    stopped(monkeypatch, model_directory, text_file, out, "grasp", edits=2)
    with hold(folder):
        for resume in (True, False):
            with pytest.raises(CheckpointError, match="another process is compressing there"):
                run(model_directory, text_file, out, "grasp", resume=resume)
    assert folder.is_dir()
    with (  # one that began meanwhile
        pytest.raises(CheckpointError, match="another process is compressing there"),
        journal_of(tmp_path / "new", False, 0.0) as journal,
    ):
        (tmp_path / "new.journal").mkdir()
        journal.accept({})
        journal.due()
    assert (tmp_path / "new.journal").is_dir()


def test_a_folder_of_that_name_that_is_no_journal(model_directory, text_file, tmp_path):
    (tmp_path / "out.journal").mkdir()
    (tmp_path / "out.journal" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match=r"it holds mine.txt; move it away"):
        run(model_directory, text_file, tmp_path / "out", "grasp")
    assert (tmp_path / "out.journal" / "mine.txt").exists()


# --- damaged


def cut_line(folder: Path) -> None:
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])


def cut_in_the_middle(folder: Path) -> None:
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if b'"edit-1.' in line)
    lines[place] = lines[place][:40] + b"\xff\n"
    (folder / "log.jsonl").write_bytes(b"".join(lines))


def missing_file(folder: Path) -> None:
    (folder / "edit-1.safetensors").unlink()


def damaged_file(folder: Path) -> None:
    data = bytearray((folder / "edit-1.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "edit-1.safetensors").write_bytes(data)


def damaged_sums(folder: Path) -> None:
    [path] = folder.glob("sums-0-*")
    path.write_bytes(path.read_bytes()[:-1])


def left_over(folder: Path) -> None:
    (folder / "edit-9.safetensors").write_bytes(b"half")


@pytest.mark.parametrize(
    ("damage", "made", "blocks"),
    [
        (cut_line, 1, 0),
        (cut_in_the_middle, 1, 0),
        (missing_file, 1, 0),
        (damaged_file, 1, 0),
        (damaged_sums, 0, 4),
        (left_over, 0, 0),
    ],
)
@pytest.mark.parametrize("name", [pytest.param("grasp", marks=pytest.mark.slow), "grasp-fisher"])
def test_what_is_damaged_is_made_again_and_nothing_else(
    damage,
    made,
    blocks,
    name,
    whole_run,
    at_once,
    model_directory,
    text_file,
    tmp_path,
    monkeypatch,
):
    asked, out = (model_directory, text_file), tmp_path / "out"
    expected, whole = whole_run(name)
    stopped(monkeypatch, *asked, out, name, edits=3)
    damage(tmp_path / "out.journal")
    with monkeypatch.context() as patch:
        stop = Stop(patch)
        run(*asked, out, name, resume=True)
    assert (len(stop.made), stop.blocks) == (len(whole.made) - 3 + made, blocks)
    check_same(out, expected)
    assert not (tmp_path / "out.journal").exists()


def test_steps_that_were_not_named_are_compared(tmp_path, at_once):
    with pytest.raises(Stopped), journal_of(tmp_path / "out", False, 0.0) as journal:
        journal.accept({})
        journal.record(0, Step(Drop(3)), 5)
        raise Stopped
    with journal_of(tmp_path / "out", True, 0.0) as journal:
        journal.accept({})
        assert journal.repeated(0, Step(Drop(3))).edit == Drop(3)
        with pytest.raises(CheckpointError, match="edit 0 was drop 3 and is now drop 2, so the"):
            journal.repeated(0, Step(Drop(2)))


def test_the_record_is_applied_not_what_was_made_anew(tmp_path, at_once):
    """On another machine the numbers would differ in their last bits."""
    one, other = (Step(Rewrite("a.1.b", torch.full((2, 2), value))) for value in (1.0, 2.0))
    with pytest.raises(Stopped), journal_of(tmp_path / "out", False, 0.0) as journal:
        journal.accept({})
        journal.record(0, one, 5)
        raise Stopped
    with journal_of(tmp_path / "out", True, 0.0) as journal:
        journal.accept({})
        edit = journal.repeated(0, other).edit
        assert isinstance(edit, Rewrite) and torch.equal(edit.weight, one.edit.weight)


def test_a_full_disk_ends_the_journal_and_not_the_run(
    at_once, model_directory, text_file, tmp_path, monkeypatch, caplog
):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grasp.core.journal_folder.write_tensors", full)
    run(model_directory, text_file, tmp_path / "out", "grasp")
    assert "no journal is kept, so --resume will not help: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_of_the_recipe_leaves_no_journal(
    at_once, model_directory, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(Factorize, "apply", raises(RecipeError))
    with pytest.raises(RecipeError):
        run(model_directory, text_file, tmp_path / "a" / "b" / "out", "grasp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_tensors_come_back_as_they_were(dtype, tmp_path):
    """Also where a narrow one would come before a wide one, and what holds nothing."""
    kinds = {"a": (3, 5), "b": (), "c": (0, 4)}
    made = {name: torch.rand(shape).mul(3).to(dtype) for name, shape in kinds.items()}
    made["wide"] = torch.rand(7, dtype=torch.float64)
    made["turned"] = torch.rand(3, 4).T
    digest = write_tensors(tmp_path / "x.safetensors", made)
    for found in (
        dict(read_tensors(tmp_path / "x.safetensors", digest)),
        load_file(tmp_path / "x.safetensors"),
    ):
        assert found.keys() == made.keys()
        for name, value in made.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            assert torch.equal(found[name].double(), value.double())
    with pytest.raises(ValueError, match="have changed"):
        next(read_tensors(tmp_path / "x.safetensors", "0" * 64))


# --- on the command line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_says_what_the_journal_keeps(
    number, at_once, model_directory, text_file, tmp_path, monkeypatch
):
    flags = "--method", "grasp", "--layers", "3", "--data", text_file, *SMALL
    record = journals.Journal.record

    def ends(journal, place, step, parameters):
        record(journal, place, step, parameters)
        if place == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "record", ends)
        done = command("compress", model_directory, tmp_path / "out", *flags)
    folder = tmp_path / "out.journal"
    assert done.status == 128 + number
    blocks = SMALL[SMALL.index("--num-samples") + 1]
    assert (
        done.err.splitlines()[-1]
        == f"grasp: error: {test_interruption.HOW[number]}; the journal in {folder} keeps 2 edits"
        f" and the sums of {blocks} blocks of sweep 1; the same command with --resume goes on from"
        " there"
    )
    with monkeypatch.context() as patch:  # the same before it is looked at
        patch.setattr("grasp.verbs.compress.open_model", test_interruption.send(number))
        done = command("compress", model_directory, tmp_path / "out", *flags, "--resume")
        assert f"the journal in {folder} keeps 2 edits" in done.err.splitlines()[-1]
    assert command("compress", model_directory, tmp_path / "out", *flags, "--dry-run").status == 0
    assert command("compress", model_directory, tmp_path / "out", *flags, "--resume").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
