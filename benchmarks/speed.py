"""Do nine low-rank layers cost nearly nothing? GRASP beside the same layers removed, the same
layers emptied, and the dense model.

    python benchmarks/speed.py FOLDER [--dtypes float32,bfloat16] [--prompt-lens 64,512]
    [--new-tokens 32] [--rounds 3] [--compile]
                                      [--models removed,grasp,emptied,dense,grasp-fisher] [-o
                                      results/speed.json]

Model: smollm2. The checkpoints are made once and kept in FOLDER, all in float32, so that all are
read the same way (mapped, or converted):

    removed         9 layers of lowest block influence deleted
    grasp           the same layers with 10 % of their parameters, 105.8 M in all
    emptied         the same layers with rank 0: what is left of a layer (norms, rotation, cache,
                    attention, residuals) without any product. No low-rank execution,
                    however fast, can beat it
    grasp-fisher    105.8 M by the default method: every matrix of the model is a pivoted pair

Every setting is a few minutes on two cores; with --compile, the first run takes a quarter of an
hour more. Rows in the output file are kept unless measured again. Beside the times, what does not
depend on the machine's mood: bytes a decode step reads, products and operators it runs, and the
multiplications of a prefill.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import grasp
from grasp.core.decoder import Decoder
from grasp.core.models import embedded_model, load_model
from grasp.core.provenance import machine, versions
from grasp.core.results import Result, Results
from grasp.core.score import Score
from grasp.core.stepping import Stepper
from grasp.evaluation.bench import ratios, roofline, speeds
from grasp.evaluation.hardware import kernels, low_rank_products, read_bandwidth
from grasp.evaluation.speed import TURN, take_turns

LAYERS, RETAIN_RATIO, FISHER_RATIO = 9, 0.1, 0.2135
DATA = {"data": "pydoc", "seq_len": 512, "dtype": "float32"}
FIELDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "removed": {"num_layers": LAYERS},
    "emptied": {"num_layers": LAYERS, "retain_ratio": 0.0},
    "grasp": {"num_layers": LAYERS, "retain_ratio": RETAIN_RATIO},
    "grasp-fisher": {"ratio": FISHER_RATIO},
}
METHODS = {
    "dense": "",
    "removed": "shortgpt",
    "emptied": "grasp",
    "grasp": "grasp",
    "grasp-fisher": "grasp-fisher",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def make(folder: Path, names: list[str]) -> dict[str, Path]:
    """The checkpoints, made where they are not there yet."""
    places = {
        "dense": embedded_model(),
        **{name: folder / name for name in names if name != "dense"},
    }
    samples = {"grasp-fisher": 64}
    for name, place in places.items():
        if not place.exists():
            print(f"making {place}", flush=True)
            grasp.compress(
                "smollm2",
                place,
                method=METHODS[name],
                num_samples=samples.get(name, 4),
                **FIELDS[name],
                **DATA,
            )
    return {name: places[name] for name in names}


@torch.no_grad()
def counts(model: Decoder, prompt_len: int) -> list[Score]:
    """Products and operators of one decode step, and the multiply-adds of a prefill."""
    runner = Stepper(model, 1, prompt_len, 2)
    with FlopCounterMode(display=False) as flops:
        runner.prefill()
    runner.decode(1)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        runner.decode(1)
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    kinds = Counter(event.name for event in events)
    spent = Counter[str]()
    for event in events:
        spent[event.name.removeprefix("aten::")] += event.self_cpu_time_total
    most = {name: round(micros) for name, micros in spent.most_common(8)}
    setting = {"batch_size": 1, "prompt_len": prompt_len}
    products = sum(kinds[name] for name in PRODUCTS)
    return [
        Score(
            "products a step",
            float(products),
            "count",
            {**setting, "joined_outputs": kinds["aten::index_select"] + kinds["aten::gather"]},
        ),
        Score(
            "operators a step",
            float(len(events)),
            "count",
            {**setting, "microseconds_under_the_profiler": most},
        ),
        Score("prefill multiply-adds", flops.get_total_flops() / 2, "count", setting),
    ]


def measure(
    places: dict[str, Path], dtype: str, prompt_len: int, arguments: argparse.Namespace
) -> list[Result]:
    """One row a model: all of them in turn at one setting."""
    models = {name: load_model(str(place), dtype=dtype) for name, place in places.items()}
    bandwidth = read_bandwidth(torch.device("cpu"))
    timings = take_turns(
        models,
        prompt_len=prompt_len,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        compile=arguments.compile,
    )
    rows = []
    for name, model in models.items():
        setting = {
            "batch_size": 1,
            "prompt_len": prompt_len,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "turn": TURN,
            "compile": arguments.compile,
            **kernels(model),
            "low_rank": low_rank_products(model, arguments.compile),
        }
        scores = speeds(timings[name], setting)
        for other in ("removed", "emptied", "dense"):
            if other in models and other != name:
                scores += ratios(timings[name], timings[other], other, setting)
        scores += [
            roofline(model, timings[name], bandwidth, setting),
            *([] if arguments.compile else counts(model, prompt_len)),
        ]
        mode = ", compiled" if arguments.compile else ""
        label = f"{name}, {dtype}, prompt {prompt_len}{mode}"
        rows.append(
            Result(
                label,
                "smollm2",
                METHODS[name],
                FIELDS[name],
                model.num_parameters(),
                model.num_bytes(),
                scores=tuple(scores),
                ratio=1 - model.num_parameters() / 134_515_008,
            )
        )
        shown = [
            f"{s.name} {s.value:.3f} ({s.protocol['low']:.2f} to {s.protocol['high']:.2f})"
            for s in scores
            if s.unit == "ratio"
        ]
        speed = ", ".join(f"{s.name} {s.value:.1f}" for s in scores if s.unit == "tokens/s")
        print(f"{label:44s} {speed} tok/s; {'; '.join(shown)}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="removed,grasp,emptied,dense,grasp-fisher")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--prompt-lens", default="64,512")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/speed.json"))
    arguments = parser.parse_args()
    places = make(arguments.folder, arguments.models.split(","))
    rows = (
        {row.label: row for row in Results.read(arguments.output).rows}
        if arguments.output.exists()
        else {}
    )
    for dtype in arguments.dtypes.split(","):
        for prompt_len in map(int, arguments.prompt_lens.split(",")):
            rows |= {row.label: row for row in measure(places, dtype, prompt_len, arguments)}
            title = "Nine low-rank layers of smollm2 beside the same layers removed"
            Results(
                tuple(rows.values()),
                title,
                "python benchmarks/speed.py FOLDER",
                versions(),
                machine(),
            ).write(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
