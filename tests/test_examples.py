"""The examples and walk-throughs that a newcomer copies run as they are written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import grasp

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OWN_METHOD = ROOT / "examples" / "own_method.py"


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program, in a process of its own."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_quickstart(model_directory, tmp_path):
    out = tmp_path / "small"
    done = run(str(ROOT / "examples" / "quickstart.py"), model_directory, str(out), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes, before, after, _ = done.stdout.split("\n", 3)
    dense, small = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", sizes)[:2])
    assert abs((1 - small / dense) - 0.2) < 0.02
    assert before.startswith(f"perplexity of {model_directory}: ")
    assert after.startswith(f"perplexity of {out}: ")
    grasp.load(out)


@pytest.mark.slow
def test_own_method(model_directory, text_file, tmp_path):
    """Half of every matrix of the layers is 0, the smaller half; nothing else is touched."""
    command = ["-m", "grasp", "compress", model_directory, str(tmp_path / "out"), "--quiet"]
    command += ["--data", text_file, "--num-samples", "4", "--seq-len", "32"]
    command += ["--plugin", str(OWN_METHOD), "--method", "my-method"]
    done = run(*command, "--strength", "0.5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    dense = AutoModelForCausalLM.from_pretrained(model_directory)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    matrices = 0
    for (name, before), after in zip(dense.named_parameters(), pruned.parameters(), strict=True):
        if "proj" not in name:
            assert torch.equal(before, after), name
            continue
        matrices, gone = matrices + 1, after == 0
        assert abs(float(gone.float().mean()) - 0.5) < 0.01, name
        assert before[gone].abs().max() <= before[~gone].abs().min(), name
    assert matrices == 4 * 7
    refused = run(*command[:-6], "--strength", "2", *command[-6:], folder=tmp_path)
    assert refused.returncode == 2
    [line] = [line for line in refused.stderr.splitlines() if "--strength 2" in line]
    assert "Traceback" not in refused.stderr and line


def test_the_walk_through_of_a_method(tmp_path):
    """CONTRIBUTING.md, steps 2 and 3, in a copy of the sources: the file moved in, its test."""
    [test] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", WALK, re.DOTALL | re.MULTILINE)
        if "test_the_smallest_numbers_go" in block
    ]
    assert "cp examples/own_method.py src/grasp/methods/my_method.py\n" in WALK
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(OWN_METHOD, tmp_path / "src" / "grasp" / "methods" / "my_method.py")
    (tmp_path / "tests" / "test_my_method.py").write_text(test, encoding="utf-8")
    done = run(
        *("-m", "pytest", "-p", "no:cacheprovider", "tests/test_my_method.py"),
        folder=tmp_path,
        PYTHONPATH=str(tmp_path / "src"),
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_walk_throughs_name_what_is_there():
    """Every file they name exists, but for those that the reader makes."""
    named = set(re.findall(r"\b(?:src|tests|examples)/[\w/]+\.py", WALK))
    assert {"src/grasp/core/families.py", OWN_METHOD.relative_to(ROOT).as_posix()} <= named
    there = [name for name in sorted(named) if "my_" not in name]
    assert [name for name in there if not (ROOT / name).is_file()] == []
