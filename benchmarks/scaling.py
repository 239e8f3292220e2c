"""How time and memory of `grasp compress` grow with tokens, layers and width, and what that says of
models that are too large to try here.

    python benchmarks/scaling.py FOLDER -o results/scaling.json
    python benchmarks/scaling.py --tell results/scaling.json
    python benchmarks/scaling.py --plot results/scaling.json -o docs/scaling.png
    python benchmarks/scaling.py --predict

FOLDER takes the random models. One quantity grows at a time, the others stay at 4 blocks of 256
tokens, 4 layers and a width of 512. Every run is a fresh process with one thread; its time is that
of a core, so that other work on the machine hardly counts. Memory: the largest resident set, over
what was there before the model was opened.

`--tell` writes into the results what the formula of today tells of these runs.

`--predict` runs nothing: it takes the formulas of `--dry-run`, with the shapes of Llama 3 8B and
70B and with the speeds that `MACHINES` assumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload import in_a_process

METHODS: dict[str, dict[str, Any]] = {
    "svd-llm": {"ratio": 0.2},
    "grasp-fisher": {"ratio": 0.2, "rounds": 1},
}
COLORS = {"svd-llm": "#4a6fa5", "grasp-fisher": "#c1440e"}
BLOCKS, LENGTH, LAYERS, WIDTH, VOCABULARY = 4, 256, 4, 512, 49_152
GROWS = {
    "tokens": [512, 1024, 2048, 4096],
    "layers": [2, 4, 8, 12],
    "width": [256, 512, 768, 1024],
}

SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
"""Of Llama 3's config.json."""


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes, of each of so many `processes`; `cores` that decompose at once; `rates`:
    what each does a second, by kind of operation (`grasp.stages.operations`).
    """

    name: str
    memory: float
    processes: int
    cores: int
    rates: dict[str, float]


GPU = {"pass": 4e14, "sum": 3e13, "single": 3e13, "double": 3e13,
       "eigh": 4e10, "svd": 1e10, "touch": 3e11}  # fmt: skip
"""ASSUMED, not measured: 40 % of the bfloat16 rate that an H100's data sheet states, half of its
rates in float32 and float64, a tenth of a percent of that for eigenvalues, 3.3 TB/s of memory.
"""
LAPTOP = {"pass": 4e11, "sum": 3e11, "single": 3e11, "double": 1.5e11,
          "eigh": 1e10, "svd": 5e9, "touch": 4e9}  # fmt: skip
"""ASSUMED: eight cores, each about as fast as one of those that measured the rest."""
MACHINES = (
    Machine("one 80 GB GPU", 80e9, 1, 8, GPU),
    Machine("eight 80 GB GPUs", 80e9, 8, 8, GPU),
    Machine("a laptop, 8 cores, 32 GB", 32e9, 1, 8, LAPTOP),
)


def model(folder: Path, layers: int, width: int) -> Path:
    """A random Llama, made where it is not there."""
    out = folder / f"llama-{layers}-{width}"
    if not out.exists():
        command = [sys.executable, str(Path(__file__).with_name("random_llama.py")), str(out)]
        subprocess.run(
            [*command, "--layers", str(layers), "--width", str(width)], check=True, cwd=folder
        )
    return out


def measured(folder: Path, method: str, grows: str, at: int) -> dict[str, Any]:
    """A row of the results, by a run of benchmarks/offload.py."""
    layers, width, blocks = shape_of(grows, at)
    told = {
        "model": str(model(folder, layers, width)),
        "offloaded": False,
        "method": method,
        "fields": METHODS[method],
        "num_samples": blocks,
        "seq_len": LENGTH,
        "folder": str(folder),
    }
    found = in_a_process(told, OMP_NUM_THREADS="1")
    row = {
        "method": method,
        "grows": grows,
        "at": at,
        "parameters": found["parameters"],
        "seconds": found["cpu_seconds"],
        "bytes": found["peak"] - found["before"],
        "told_bytes": found["told"]["memory"],
    }
    print(
        f"{method:13s} {grows} {at:5d}: {row['seconds']:6.1f} s of a core,"
        f" {row['bytes'] / 1e6:6.0f} MB, told {row['told_bytes'] / 1e6:6.0f}",
        flush=True,
    )
    return row


def tell(results: Path) -> None:
    """What `--dry-run` tells of the memory of every row now."""
    import torch
    from random_llama import config_of
    from transformers import AutoModelForCausalLM

    from grasp.core.decoder import Decoder
    from grasp.methods import make
    from grasp.verbs.preflight import estimate

    torch.set_num_threads(1)
    found = json.loads(results.read_text())
    for row in found["rows"]:
        layers, width, blocks = shape_of(row["grows"], row["at"])
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config_of(layers, width, VOCABULARY))
        decoder = Decoder(empty)
        plan = make(row["method"], METHODS[row["method"]]).plan(decoder)
        told = estimate(decoder, plan, blocks, LENGTH, torch.bfloat16)
        row["told_bytes"] = told.memory
    results.write_text(json.dumps(found, indent=1) + "\n")


def shape_of(grows: str, at: int) -> tuple[int, int, int]:
    """Layers, width and blocks of a run."""
    blocks = at // LENGTH if grows == "tokens" else BLOCKS
    return at if grows == "layers" else LAYERS, at if grows == "width" else WIDTH, blocks


def plot(results: Path, picture: Path) -> None:
    """Time and memory against each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(results.read_text())["rows"]
    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
    for column, grows in enumerate(GROWS):
        for method, color in COLORS.items():
            mine = [r for r in rows if (r["method"], r["grows"]) == (method, grows)]
            at = [row["at"] for row in mine]
            panels[0, column].plot(
                at,
                [row["seconds"] for row in mine],
                "o-",
                color=color,
                label="" if column else method,
            )
            panels[1, column].plot(at, [row["bytes"] / 1e6 for row in mine], "o-", color=color)
            panels[1, column].plot(at, [row["told_bytes"] / 1e6 for row in mine], ":", color=color)
        panels[1, column].set_xlabel(grows)
        for panel in panels[:, column]:
            panel.set_ylim(0, None)
            panel.set_xlim(0, None)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("seconds of a core")
    panels[1, 0].set_ylabel("MB over Python's own\n(dotted: told)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=120)


def predict() -> None:
    """The rows for the docs."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from grasp.core.decoder import Decoder
    from grasp.methods import make
    from grasp.recipes.calibration import CalibrationRecipe
    from grasp.recipes.memory import MemoryRecipe
    from grasp.verbs.machine_speed import Speed
    from grasp.verbs.preflight import Preflight
    from grasp.verbs.run_time import seconds

    blocks, length, dtype = 512, 512, torch.bfloat16
    text = CalibrationRecipe(num_samples=blocks, seq_len=length)
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(LlamaConfig(**shape, dtype=dtype))
        decoder = Decoder(empty, None, name)
        for machine, method in itertools.product(MACHINES, ("grasp", "svd-llm", "grasp-fisher")):
            torch.set_num_threads(machine.cores)
            os.environ["WORLD_SIZE"] = str(machine.processes)  # what the estimate asks
            plan, free = make(method, {"ratio": 0.2}, ()).plan(decoder), int(machine.memory)
            device = torch.device("cuda" if "GPU" in machine.name else "cpu")
            recipes = [MemoryRecipe()]
            if machine.processes > 1:
                recipes += [MemoryRecipe(fsdp=True)]
            ways = [Preflight(decoder, plan, text, one, dtype, free, device) for one in recipes]
            ways = [one for one in ways if one.estimate(one.offloaded).memory <= free]
            words = f"| {name} | `{method}` | {machine.name} |"
            if not ways:
                least = Preflight(decoder, plan, text, MemoryRecipe(), dtype, free, device)
                print(f"{words} needs {least.estimate(True).memory / 1e9:.0f} GB | | | |")
                continue
            best = min(ways, key=lambda one: (one.offloaded, not one.memory.fsdp))
            way = (
                "`--fsdp`" if best.memory.fsdp else "on the disk" if best.offloaded else "in memory"
            )
            each = replace(plan, once={k: v / machine.processes for k, v in plan.once.items()})
            reads, share = way == "on the disk", blocks // machine.processes
            time = seconds(decoder, each, share, length, 2, Speed(machine.rates), reads)
            cost = best.estimate(best.offloaded)
            lasts = f"{time / 60:.0f} min" if time < 3600 else f"{time / 3600:.0f} h"
            sizes = f"{cost.memory / 1e9:.0f} GB | {cost.disk / 1e9:.0f} GB"
            print(f"{words} {way} | {sizes} | {lasts} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tell", type=Path)
    parser.add_argument("--predict", action="store_true")
    asked = parser.parse_args()
    if asked.plot:
        plot(asked.plot, asked.output)
        return 0
    if asked.tell:
        tell(asked.tell)
        return 0
    if asked.predict:
        predict()
        return 0
    from grasp.core.provenance import versions

    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for grows, values in GROWS.items():
        for method in METHODS:
            for at in values:
                rows.append(measured(asked.folder.resolve(), method, grows, at))
                told = {"rows": rows, "versions": versions(), "command": "benchmarks/scaling.py"}
                if asked.output:
                    asked.output.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
