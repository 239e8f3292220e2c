"""Runs that are killed at any moment, as by a power cut: what is left can be gone on from, or begun
anew, and the checkpoint is the one of a run that was left alone, to the bit.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from grasp.core import journal as journals

pytestmark = pytest.mark.slow

MOMENTS = 8
"""Of each mode; 20 of each passed once (docs/log.md)."""
COMMAND = (
    "--ratio",
    "0.2",
    "--num-samples",
    "6",
    "--seq-len",
    "32",
    "--dtype",
    "float32",
    "--quiet",
)
MODES = {"in memory": (1, ()), "offloaded": (1, ("--offload",)), "two processes": (2, ())}
"""Processes, and flags; `--offload` takes a folder."""
MOURNING = 60.0
"""Seconds in which the others must have noticed."""
PATIENCE = 120.0
"""Seconds that a run may take."""

# children are forked from a process that has everything loaded and has computed nothing
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    ["grasp.verbs.compress", "grasp.cli", "transformers.models.llama.modeling_llama", "accelerate"]
)


def command(words, rank, world, port, log):
    """`grasp WORDS`, writing down every block and edit from the start."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    journals.WAIT, journals.SHARE = 0.0, float("inf")
    from grasp.cli import main

    sys.argv = ["grasp", *words]
    main()


class Run:
    """A run by one process or several."""

    def __init__(self, words, world, log: Path):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.logs = [log.with_suffix(f".{rank}") for rank in range(world)]
        self.processes = [
            forked.Process(target=command, args=(words, rank, world, port, self.logs[rank]))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds=PATIENCE):
        """Whether all have ended within so many seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
        return all(process.exitcode is not None for process in self.processes)

    def kill(self, first):
        """kill -9 of one, and of all others that do not end by themselves then."""
        for process in (self.processes[first], *self.processes):
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            self.wait(MOURNING)
        assert self.wait()

    def succeed(self):
        assert self.wait()
        told = "\n".join(log.read_text() for log in self.logs)
        assert [process.exitcode for process in self.processes] == [0] * len(self.logs), told


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_goes_on_or_begins_anew(mode, model_directory, text_file, tmp_path):
    world, flags = MODES[mode]
    numbers = random.Random(mode)

    def words(out, resume=False):
        asked = ["compress", str(model_directory), str(out), "--data", str(text_file), *COMMAND]
        asked += [*flags, str(tmp_path / "layers")] if flags else []
        return [*asked, *(["--resume"] if resume else [])]

    def digests(out):
        found = sorted(out.glob("*.safetensors"))
        return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in found}

    Run(words(tmp_path / "warm"), world, tmp_path / "log").succeed()
    begin, work = time.monotonic(), 0.0
    run = Run(words(tmp_path / "whole"), world, tmp_path / "log")
    while not run.wait(0.01):
        if not work and (tmp_path / "whole.journal").exists():
            work = time.monotonic() - begin
    run.succeed()
    whole, expected, gone_on = time.monotonic() - begin, digests(tmp_path / "whole"), 0
    for moment in range(MOMENTS):
        folder = tmp_path / f"{moment}"
        folder.mkdir()
        out = folder / "out"
        run = Run(words(out), world, tmp_path / "log")
        run.wait(numbers.uniform(0.8 * work, whole))
        run.kill(numbers.randrange(world))
        if not out.exists():
            journal = (folder / "out.journal").exists()
            gone_on += journal
            Run(words(out, resume=journal), world, tmp_path / "log").succeed()
        assert digests(out) == expected
        left = {one.name for one in folder.iterdir()} - {"out"}
        assert not {name for name in left if not name.startswith("out.journal")}
    assert gone_on >= MOMENTS // 4, "hardly a moment was in the middle of the work"
