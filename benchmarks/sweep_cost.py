"""What the statistics of `grasp-fisher` cost over a plain forward and backward pass on the same
tokens, in one run, in turn.

    python benchmarks/sweep_cost.py [--blocks 4] [--rounds 5] [--dtype float32,bfloat16] [-o
    results/sweep_cost.json]

Plain: the loss of each block of 512 tokens and `backward()` with all of the model's parameters
asking for gradients, as in training. Sweep: what `grasp compress` runs (block influence and the
curvature of all 210 matrices of smollm2). Also shown: the factorisations, and the sweep with its
sums in files. Compare the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from grasp.core.models import load_model
from grasp.core.provenance import versions
from grasp.core.records import Calibration
from grasp.core.runner import Resident
from grasp.methods import make


def measure(dtype: str, blocks: int, rounds: int) -> list[dict[str, object]]:
    """Rows of one dtype: each sweep's ratio to the plain passes, and the seconds behind them."""
    decoder = load_model("smollm2", dtype=dtype)
    ids = torch.randint(0, 49_000, (blocks, 512), generator=torch.Generator().manual_seed(0))
    data, method = Calibration(ids, "random ids"), make("grasp-fisher", {"ratio": 0.2})

    runner = Resident(decoder, data)

    def plain() -> None:
        decoder.model.requires_grad_(True)
        for block in range(blocks):
            decoder.loss(ids[block : block + 1])[0].backward()
        decoder.model.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        in_files = make("grasp-fisher", {"ratio": 0.2, "scratch": folder})
        jobs = {
            "plain": plain,
            "sweep": lambda: runner.sweep(method.needs(decoder)),
            "sweep, sums in files": lambda: runner.sweep(in_files.needs(decoder)),
        }
        for job in jobs.values():
            job()  # warm up
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                begin = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - begin)
    stats = runner.sweep(method.needs(decoder))
    begin = time.perf_counter()
    method.pose(runner, stats, method.costs(decoder))  # type: ignore[attr-defined]
    factorising = time.perf_counter() - begin
    rows: list[dict[str, object]] = []
    for name in ("sweep", "sweep, sums in files"):
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        rows.append(
            {
                "dtype": dtype,
                "what": name,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
        )
        print(
            f"{dtype:9s} {name:22s} {statistics.median(ratios):5.2f} x plain ({min(ratios):.2f} to"
            f" {max(ratios):.2f})",
            flush=True,
        )
    seconds = {name: statistics.median(values) / blocks for name, values in times.items()}
    print(f"{dtype:9s} seconds a block {seconds}; factorising {factorising:.1f} s", flush=True)
    return [
        *rows,
        {"dtype": dtype, "what": "seconds a block", **seconds, "factorising": factorising},
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for dtype in arguments.dtype.split(",")
        for row in measure(dtype, arguments.blocks, arguments.rounds)
    ]
    if arguments.output:
        text = {"rows": rows, "versions": versions(), "command": "python " + " ".join(sys.argv)}
        arguments.output.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
