"""Several processes that share the blocks see the same statistics, make the same edits and write
the same checkpoint as one; one that fails ends them all.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import grasp
from grasp.core.runner import Resident
from grasp.core.several import Several
from grasp.errors import RecipeError

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TEXT = ("--num-samples", "5", "--seq-len", "24", "--dtype", "float32")
FAILING = '''
import os
from dataclasses import dataclass
from grasp.methods.random_layers import RandomLayers

@dataclass(frozen=True, kw_only=True)
class Failing(RandomLayers):
    """Fails in the second process, in the middle of the work."""
    name = "failing"

    def edits(self, runner, stats):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the disk is on fire")
        yield from super().edits(runner, stats)
'''


def launched(processes, *words):
    """`grasp WORDS` by so many processes; 1: without torchrun."""
    launch = (*LAUNCH, str(processes)) if processes > 1 else ()
    return subprocess.run(
        [sys.executable, *launch, "-m", "grasp", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_add_up_to_the_whole(world, decoder, calibration, monkeypatch):
    """All blocks are shown, each by one process, also where there are more processes."""
    shown = []
    for number in range(world):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        runner = Several(decoder("llama"), calibration)
        shown += runner._own(range(calibration.num_blocks))
    assert sorted(shown) == list(range(calibration.num_blocks))
    assert list(Resident(decoder("llama"), calibration)._own(range(3))) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("grasp-fisher", ("--ratio", "0.2", "--offload", "LAYERS")),
        ("grasp-fisher", ("--ratio", "0.2", "--fsdp")),
        ("svd-llm", ("--ratio", "0.2", "--fsdp")),
        ("grasp", ("--ratio", "0.2")),
        ("asvd", ("--ratio", "0.1", "--allocation", "strs")),
    ],
)
def test_two_processes_make_what_one_makes(method, flags, model_directory, text_file, tmp_path):
    told, manifests, logits = [], [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        alone = processes == 1
        here = [str(tmp_path / "layers") if one == "LAYERS" else one for one in flags]
        here = [one for one in here if not (alone and one == "--fsdp")]
        asked = (model_directory, out, "--method", method, *here, "--data", text_file, *TEXT)
        done = launched(processes, "compress", *asked, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('"manifest"') == 1  # the first speaks
        told.append(json.loads(done.stdout.splitlines()[-1]))
        manifests.append(json.loads((out / "grasp.json").read_text()))
        with torch.no_grad():
            logits.append(grasp.load(out).model(torch.arange(20)[None]).logits)
    assert told[0]["parameters"] == told[1]["parameters"]
    plans = [
        [{name: value for name, value in edit.items() if name != "note"} for edit in one["edits"]]
        for one in manifests
    ]
    assert plans[0] == plans[1]
    losses = [manifest["calibration"]["loss_before"] or 0 for manifest in manifests]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*logits, atol=1e-4)
    assert not list(tmp_path.glob("*.journal*"))


PARTS = """
import torch
import torch.distributed as dist
from grasp.core.processes import joined, rank
from grasp.core.shards import Shards

with joined():
    whole = [
        torch.arange(7 * 5.0).view(7, 5),  # rows that three processes cannot share evenly
        torch.arange(6).view(1, 2, 3).to(torch.bfloat16),  # fewer rows than processes
        torch.arange(12, dtype=torch.int8).view(6, 2),
    ]
    weights = [torch.nn.Parameter(torch.zeros_like(one), requires_grad=False) for one in whole]
    shards, read = Shards(), []

    def source(number, factor):
        def rows(begin, end):
            read.append((number, begin, end))
            return whole[number][begin:end] * factor
        return factor, rows

    for factor in (1, 1, 2):  # the second time nothing is read; the third all lies elsewhere
        found = shards.whole(weights, [source(number, factor) for number in range(3)])
        assert all(torch.equal(one, factor * other) for one, other in zip(found, whole)), found
    assert [one.dtype for one in found] == [one.dtype for one in whole]
    assert len(read) == (6 if rank() == 0 else 4), read
    shards.keep(weights[:1])
    shards.whole(weights, [source(number, 2) for number in range(3)])
    assert [one[0] for one in read[len(read) - 2 :]] == ([1, 2] if rank() == 0 else [2, 2]), read
"""


@pytest.mark.slow
def test_each_has_its_rows_and_all_have_the_whole(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    done = subprocess.run(
        [sys.executable, *LAUNCH, "3", tmp_path / "parts.py"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_alone_has_nobody_to_share_with(model_directory, tmp_path):
    with pytest.raises(RecipeError, match=r"--fsdp: there is one process.*torchrun"):
        grasp.compress(model_directory, tmp_path / "out", ratio=0.2, fsdp=True)


@pytest.mark.slow
def test_one_that_fails_alone_is_named_and_ends_the_others(model_directory, text_file, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    asked = (model_directory, tmp_path / "out", "--plugin", tmp_path / "failing.py")
    asked += ("--method", "failing", "--num-layers", "1", "--data", text_file, *TEXT)
    begin = time.monotonic()
    done = launched(2, "compress", *asked)
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "grasp: error: process 1: " in done.stderr and "the disk is on fire" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_all_get_wrong_is_said_once(model_directory, text_file, tmp_path):
    asked = (model_directory, tmp_path / "out", "--speedup", "1.2", "--data", text_file, *TEXT)
    done = launched(2, "compress", *asked)
    assert done.returncode != 0 and done.stderr.count("run it without torchrun") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_is_told_once(model_directory, text_file, tmp_path):
    asked = (model_directory, tmp_path / "out", "--ratio", "0.2", "--data", text_file, *TEXT)
    told = [
        json.loads(launched(processes, "compress", *asked, "--dry-run", "--json").stdout)
        for processes in (1, 2)
    ]
    assert told[0]["parameters_after"] == told[1]["parameters_after"]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(model_directory, text_file, tmp_path):
    asked = (model_directory, "--ppl", text_file, "--seq-len", "24", "--dtype", "float32", "--json")
    asked += ("--against", model_directory)
    told = [launched(processes, "eval", *asked) for processes in (1, 2)]
    assert [one.stdout.count('"scores"') > 0 for one in told] == [True, True], told[1].stderr
    assert told[1].stdout.count("\n") == told[0].stdout.count("\n")  # the first speaks
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in told)
    for mine, theirs in zip(one["rows"][-1]["scores"], two["rows"][-1]["scores"], strict=True):
        assert theirs["value"] == pytest.approx(mine["value"], rel=1e-9)
        assert theirs["num_blocks"] == mine["num_blocks"]
