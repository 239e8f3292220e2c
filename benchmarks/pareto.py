"""Quality against speed: what each way to a smaller model costs in perplexity, and gains in decode
and prefill, models in turn.

    python benchmarks/pareto.py FOLDER WORK [-o results/pareto.json] [--dtypes bfloat16,float32]
    [--blocks 64] [--rounds 3] [--draw docs/pareto.png]

FOLDER as for benchmarks/fisher.py; WORK takes the checkpoints (270 MB each). Model: smollm2,
calibrated in bfloat16 on WikiText-2 valid; perplexity on the first 24 blocks of 512 tokens of
WikiText-2 test, in bfloat16. Speed: batch 1, a prompt of 512 tokens, 32 new ones, eager, in
transformers, each model in turn with the dense one. Run it alone on the machine.
Rows that are in the output file are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import grasp
from grasp.core.decoder import Decoder
from grasp.core.models import embedded_model, load_model
from grasp.core.provenance import machine, versions
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.evaluation.bench import ratios
from grasp.evaluation.speed import take_turns
from grasp.methods import make

SIZE = 1 - 105_800_000 / 134_515_008
PARTS = "ranks,channels,values,groups,layers"
LINES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "layers removed (shortgpt)": ("shortgpt", [{"num_layers": n} for n in (2, 5, 9)]),
    "the paper's method (grasp)": ("grasp", [{"num_layers": 9, "retain_ratio": 0.1}]),
    "grasp-fisher, ranks alone": (
        "grasp-fisher",
        [{"ratio": ratio, "parts": "ranks"} for ratio in (0.1, SIZE, 0.3)],
    ),
    "grasp-fisher": ("grasp-fisher", [{"ratio": ratio} for ratio in (0.1, SIZE, 0.3)]),
    "grasp-fisher --shape dense": (
        "grasp-fisher",
        [{"ratio": ratio, "shape": "dense"} for ratio in (0.1, SIZE, 0.3, 0.4)],
    ),
    "grasp-fisher --speedup": (
        "grasp-fisher",
        [{"speedup": speedup, "shape": "dense"} for speedup in (1.1, 1.2, 1.35)],
    ),
}
"""Line of the picture -> (method, fields of its points)."""
TICKS = (30, 40, 60, 100, 200)
"""Where the perplexity's axis has marks."""
COLORS = ("#4a6fa5", "#2e2e2e", "#e39b6f", "#c1440e", "#3f7f5f", "#8a5fa8")


def cells() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name -> (line, method, fields) of every model."""
    return {
        f"{line}: " + ", ".join(f"{key} {_short(value)}" for key, value in fields.items()): (
            line,
            method,
            fields,
        )
        for line, (method, points) in LINES.items()
        for fields in points
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def made(work: Path, folder: Path, blocks: int) -> dict[str, Path]:
    """The checkpoints, made where they are not there yet, all from one sweep."""
    places = {name: work / hashlib.sha256(name.encode()).hexdigest()[:12] for name in cells()}
    data = stats = None
    for name, (_, kind, fields) in cells().items():
        if places[name].exists():
            continue
        decoder = load_model("smollm2", dtype="bfloat16")
        if data is None:
            text = str(folder / "wikitext2_raw" / "wiki.valid.raw")
            data = calibrate(decoder, text, num_samples=blocks, seq_len=512)
            needs = make("grasp-fisher", {"ratio": 0.2, "parts": PARTS}).needs(decoder)
            needs += [
                one
                for one in make("grasp", {"num_layers": 9, "retain_ratio": 0.1}).needs(decoder)
                if one.name not in {other.name for other in needs}
            ]
            stats = Resident(decoder, data).sweep(needs)
        assert stats is not None
        print(f"making {name}", flush=True)
        for step in make(kind, fields).edits(Resident(decoder, data), stats):
            step.edit.apply(decoder)
        decoder.model.save_pretrained(places[name])
        decoder.tokenizer.save_pretrained(places[name])  # type: ignore[union-attr]
    return places


def perplexity(decoder: Decoder, folder: Path) -> float:
    """On WikiText-2 test."""
    text = str(folder / "wikitext2_raw" / "wiki.test.raw")
    return grasp.evaluate(decoder, ppl=text, seq_len=512, num_blocks=24).scores[0].value


def keep(results: dict[str, Any], path: Path) -> None:
    """Write the rows and what they were measured with."""
    results |= {"versions": versions(), "machine": machine()}
    results["command"] = "python benchmarks/pareto.py FOLDER WORK"
    path.write_text(json.dumps(results, indent=1) + "\n")


def draw(rows: dict[str, dict[str, Any]], dense: float, path: Path) -> None:
    """Perplexity against decode speed and against prefill speed, for every dtype."""
    dtypes = sorted({row["dtype"] for row in rows.values()})
    figure, panels = pyplot.subplots(
        len(dtypes), 2, figsize=(11, 4.4 * len(dtypes)), layout="constrained", squeeze=False
    )
    for axes_row, dtype in zip(panels, dtypes, strict=True):
        for axes, what in zip(axes_row, ("decode", "prefill"), strict=True):
            for color, line in zip(COLORS, LINES, strict=True):
                points = sorted(
                    (row[what], row["perplexity"])
                    for row in rows.values()
                    if row["line"] == line and row["dtype"] == dtype
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        "o-",
                        color=color,
                        label=line,
                        markersize=4.5,
                        linewidth=1.4,
                    )
            axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axes.plot([1], [dense], "*", color="black", markersize=9, label="the dense model")
            axes.set_yscale("log")
            axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
            axes.minorticks_off()
            axes.set_xlabel(f"{what} speed, × dense ({dtype})")
            axes.set_ylabel("perplexity, WikiText-2 test")
    panels[-1][-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/pareto.json"))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", type=Path, default=Path("docs/pareto.png"))
    asked = parser.parse_args()
    results = json.loads(asked.output.read_text()) if asked.output.exists() else {"rows": {}}
    rows = results["rows"]
    if "dense" not in results:
        results["dense"] = perplexity(load_model("smollm2", dtype="bfloat16"), asked.folder)
        keep(results, asked.output)
    wanted = [f"{name}, {dtype}" for name in cells() for dtype in asked.dtypes.split(",")]
    there = all(name in rows for name in wanted)
    places = {} if there else made(asked.work, asked.folder, asked.blocks)
    for dtype in asked.dtypes.split(","):
        left = {name: place for name, place in places.items() if f"{name}, {dtype}" not in rows}
        if not left:
            continue
        dense = load_model(str(embedded_model()), dtype=dtype)
        setting = {"batch_size": 1, "prompt_len": 512, "new_tokens": 32, "rounds": asked.rounds}
        for name, place in left.items():
            # two at a time: oneDNN remembers 1,024 kernels, and every rank has its own
            models = {"dense": dense, name: load_model(str(place), dtype=dtype)}
            timings = take_turns(models, prompt_len=512, new_tokens=32, rounds=asked.rounds)
            found = {
                score.name.partition(" ")[0]: score
                for score in ratios(timings[name], timings["dense"], "dense", setting)
            }
            known = [row["perplexity"] for row in rows.values() if row["name"] == name]
            narrow = models[name] if dtype == "bfloat16" else load_model(str(places[name]))
            row = {
                "name": name,
                "line": cells()[name][0],
                "dtype": dtype,
                "parameters": models[name].num_parameters(),
                "perplexity": known[0] if known else perplexity(narrow, asked.folder),
                **{what: score.value for what, score in found.items()},
                **{
                    f"{what} range": [score.protocol["low"], score.protocol["high"]]
                    for what, score in found.items()
                },
            }
            rows[f"{name}, {dtype}"] = row
            print(
                f"{name:62s} {dtype} {row['parameters']:>11,} perplexity {row['perplexity']:8.2f}"
                f" decode {row['decode']:.2f} prefill {row['prefill']:.2f}",
                flush=True,
            )
            assert math.isfinite(row["perplexity"])
            keep(results, asked.output)
    draw(rows, results["dense"], asked.draw)


if __name__ == "__main__":
    main()
