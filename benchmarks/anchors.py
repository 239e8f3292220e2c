"""The paper's method on a real model, against the figures of an independent prototype: does the
pipeline compute what it should?

    python benchmarks/anchors.py FOLDER [--seeds 0,1,2] [-o results/anchors.json]

FOLDER holds WikiText-2 raw as `wiki.valid.raw` and `wiki.test.raw` (not part of this repository).
Calibration: 32 blocks of 512 tokens of the validation split; perplexity: the first 24 blocks of 512
tokens of the test split, bfloat16. Model: smollm2. About six minutes a seed on two cores. Prints a
table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import grasp
from grasp.core.models import load_model
from grasp.core.provenance import versions

EXPECTED = {
    "dense": (32.6 * 0.99, 32.6 * 1.01),
    "9 layers removed": (170.9 * 0.95, 170.9 * 1.05),
    "magnitude, r = 10 %": (340.2 * 0.90, 340.2 * 1.10),
    "taylor, r = 10 %": (140.0, 280.0),
}
"""Perplexity bands around the prototype's figures."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    valid, test = arguments.folder / "wiki.valid.raw", arguments.folder / "wiki.test.raw"
    rows = []

    def measure(name: str, seed: int | None, model: object, layers: list[int]) -> None:
        result = grasp.evaluate(model, ppl=str(test), seq_len=512, num_blocks=24, dtype=None)
        low, high = EXPECTED[name]
        value = result.scores[0].value
        inside = low <= value <= high
        rows.append(
            {
                "model": name,
                "seed": seed,
                "parameters": result.parameters,
                "layers": layers,
                "perplexity": value,
                "expected": [low, high],
                "inside": inside,
            }
        )
        print(
            f"{name:22s} seed {seed}  {result.parameters:>11,}  perplexity {value:8.2f} "
            f" ({'inside' if inside else 'OUTSIDE'} {low:.1f} to {high:.1f})  layers {layers}",
            flush=True,
        )

    measure("dense", None, load_model("smollm2", dtype="bfloat16"), [])
    for seed in map(int, arguments.seeds.split(",")):
        calibration = {"data": str(valid), "num_samples": 32, "seq_len": 512, "seed": seed}
        removed = grasp.compress("smollm2", method="shortgpt", num_layers=9, **calibration)
        layers = sorted(edit["layer"] for edit in removed.manifest["edits"])
        measure("9 layers removed", seed, _bf16(removed), layers)
        for score in ("magnitude", "taylor"):
            made = grasp.compress(
                "smollm2",
                method="grasp",
                layers=tuple(layers),
                retain_ratio=0.1,
                score=score,
                **calibration,
            )
            measure(f"{score}, r = 10 %", seed, _bf16(made), layers)
    if arguments.output:
        arguments.output.write_text(
            json.dumps(
                {"rows": rows, "versions": versions(), "command": "python " + " ".join(sys.argv)},
                indent=1,
            )
            + "\n"
        )
    return 0 if all(row["inside"] for row in rows) else 1


def _bf16(result: grasp.Compression) -> grasp.Decoder:
    result.model.bfloat16()
    return result.decoder


if __name__ == "__main__":
    sys.exit(main())
