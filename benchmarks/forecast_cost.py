"""Seconds, memory and disk of `grasp compress` as `--dry-run` tells them and as measured, for every
kind of method.

    python benchmarks/random_llama.py small --layers 3 --width 512
    python benchmarks/forecast_cost.py small smollm2 [--alone] [--ways memory,disk] [--rounds 1]
        [--modes "grasp;svd-llm, lstsq"] [--num-samples 4] [--seq-len 512] [--dtype float32]
        [-o results/forecast_cost.json]
    python benchmarks/forecast_cost.py --table results/forecast_cost.json
    python benchmarks/forecast_cost.py --memory results/forecast_memory.json

Every run is a fresh process, which is told the time right before it takes it. Random ids stand for
the text. Time begins when Python and its libraries are there.

--alone: one thread, and told and measured in seconds of a core, not of the clock. That is what a
machine with one core and nothing else to do would take, also on one that is shared; reading a disk
does not count.

Memory and disk are those of benchmarks/offload.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from offload import Watched

MODES: dict[str, dict[str, Any]] = {
    "shortgpt": {"ratio": 0.2},
    "laco": {"ratio": 0.2},
    "streamline": {"ratio": 0.2, "net": "none"},
    "grasp": {"ratio": 0.2},
    "grasp-fisher": {"ratio": 0.2},
    "grasp-fisher, 1 round": {"ratio": 0.2, "rounds": 1},
    "grasp-fisher, ranks": {"ratio": 0.2, "parts": ("ranks",)},
    "svd-llm": {"ratio": 0.2},
    "svd-llm, lstsq": {"ratio": 0.2, "update": "lstsq"},
    "obd-llm": {"ratio": 0.2},
    "asvd": {"ratio": 0.2},
    "fwsvd": {"ratio": 0.2},
    "modegpt": {"ratio": 0.2},
    "slicegpt": {"ratio": 0.2},
    "llm-pruner": {"ratio": 0.2},
    "wanda": {},
    "sparsegpt": {},
}
"""What is run: the method, and its fields."""


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    import grasp
    from grasp.core.clock import Clock
    from grasp.core.records import Calibration
    from grasp.verbs import machine_speed
    from grasp.verbs.dry_run import dry_run
    from grasp.verbs.run_time import seconds, work

    class OfCores(Clock):
        def mark(self) -> float:
            return time.process_time()

    if asked["alone"]:
        torch.set_num_threads(1)
        machine_speed.clock_of = lambda _: OfCores()
    fields = {"method": asked["mode"].partition(",")[0], **MODES[asked["mode"]]}
    ids = torch.randint(0, 49_000, (asked["num_samples"], asked["seq_len"]))
    with tempfile.TemporaryDirectory() as folder:
        place = {"offload": folder} if asked["offloaded"] else {}
        given = {**fields, **place, "dtype": asked["dtype"], "data": Calibration(ids, "random ids")}
        needs = dry_run(asked["model"], **given).needs
        speed = machine_speed.Speed.measured(needs.decoder, needs.dtype, needs.device, ids.shape[1])
        shown = needs.decoder, needs.plan, *ids.shape
        told = seconds(*shown, needs.width, speed, needs.offloaded)
        begin, used = time.perf_counter(), time.process_time()
        with Watched(Path(folder)) as found:
            done = grasp.compress(asked["model"], Path(folder) / "out", **given)
        clock, cores = time.perf_counter() - begin, time.process_time() - used
        return {
            "told": told,
            "rates": dict(speed.rates),
            "work": work(*shown, needs.offloaded),
            "seconds": cores if asked["alone"] else clock,
            "clock_seconds": clock,
            "laps": done.manifest["seconds"],
            "parameters": done.parameters_before,
            "told_bytes": vars(needs.estimate(needs.offloaded)),
            "bytes": {name: getattr(found, name) for name in ("memory", "anonymous", "disk")},
        }


def measured(told: dict[str, Any]) -> dict[str, Any]:
    """A row of the results."""
    command = [sys.executable, __file__, "--child", json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    row = {**told, **json.loads(done.stdout.splitlines()[-1]), "model": Path(told["model"]).name}
    print(
        f"{row['model']:12s} {row['mode']:22s} {row['dtype']:9s}"
        f" {'disk  ' if row['offloaded'] else 'memory'} told {row['told']:6.1f} s, measured"
        f" {row['seconds']:6.1f} (by the clock {row['clock_seconds']:6.1f}),"
        f" {row['told'] / row['seconds']:5.2f}",
        flush=True,
    )
    return row


def table(results: Path) -> None:
    """The rows for the docs."""
    for row in json.loads(results.read_text())["rows"]:
        where = "on the disk" if row["offloaded"] else "in memory"
        print(
            f"| {Path(row['model']).name} | `{row['mode']}` | {where} | {row['told']:.1f} |"
            f" {row['seconds']:.1f} | {row['told'] / row['seconds']:.2f} |"
        )


def memory_table(results: Path) -> None:
    """The rows on memory and disk for the docs: a mode a line, in memory and on the disk."""
    rows = json.loads(results.read_text())["rows"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = []
        for offloaded in (False, True):
            row = next(r for r in rows if (r["mode"], r["offloaded"]) == (mode, offloaded))
            told, seen = row["told_bytes"], row["bytes"]
            cells += [f"{told['memory'] / 1e6:,.0f}", f"{seen['memory'] / 1e6:,.0f}"]
            cells += [f"{seen['anonymous'] / 1e6:,.0f}"]
            cells += [f"{told['disk'] / 1e6:,.0f}", f"{seen['disk'] / 1e6:,.0f}"] * offloaded
        print(f"| `{mode}` | {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--modes", default=";".join(MODES), help="separated by semicolons")
    parser.add_argument("--ways", default="memory", help="memory, disk, or both: memory,disk")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        sys.stdout.write(json.dumps(child(asked.child)) + "\n")
        return 0
    if asked.table:
        table(asked.table)
        return 0
    if asked.memory:
        memory_table(asked.memory)
        return 0
    rows = []
    for _ in range(asked.rounds):
        for model in asked.models:
            for mode, offloaded in product(asked.modes.split(";"), asked.ways.split(",")):
                told = {"model": model, "mode": mode, "offloaded": offloaded == "disk"}
                told["alone"] = asked.alone
                told |= {"num_samples": asked.num_samples, "seq_len": asked.seq_len}
                rows.append(measured({**told, "dtype": asked.dtype}))
                if asked.output:
                    asked.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
