"""How much faster two processes are than one, one thread each: seconds of the sweep of
`grasp compress`, the two in turn. Writes results/several.json.

python benchmarks/several.py FOLDER      (FOLDER: holds wikitext2_raw/wiki.valid.raw)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from grasp.core.provenance import machine, versions

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
METHOD = ("--method", "grasp", "--layers", "0", "--projections", "o", "--retain-ratio", "0.1")
"""Forward and backward through all layers, and one small decomposition."""


def seconds(processes: int, text: Path, blocks: int) -> float:
    """Of the sweep alone, as the run's own record has it."""
    launch = (*LAUNCH, str(processes)) if processes > 1 else ()
    with tempfile.TemporaryDirectory() as folder:
        words = ["compress", "smollm2", f"{folder}/out", *METHOD]
        words += ["--data", str(text), "--num-samples", str(blocks), "--seq-len", "512"]
        subprocess.run(
            [sys.executable, *launch, "-m", "grasp", *words, "--dtype", "float32", "--quiet"],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        told = json.loads(Path(folder, "out", "grasp.json").read_text(encoding="utf-8"))
    return float(told["seconds"]["statistics"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/several.json"))
    arguments = parser.parse_args()
    text = arguments.folder / "wikitext2_raw" / "wiki.valid.raw"
    rounds = []
    for number in range(arguments.rounds):
        one, two = (seconds(processes, text, arguments.blocks) for processes in (1, 2))
        rounds.append({"one": one, "two": two, "ratio": one / two})
        print(f"round {number + 1}: {one:.1f} s, {two:.1f} s, {one / two:.2f} x", flush=True)
    found = {
        "blocks": arguments.blocks,
        "rounds": rounds,
        "ratio": statistics.median(one["ratio"] for one in rounds),
        "versions": versions(),
        "machine": machine(),
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
