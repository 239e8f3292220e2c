"""Gathers what experiments/recovery.sh measured into results/recovery.json, from which docs/generate.py makes the table of docs/recovery.md.

    python benchmarks/recovery_table.py OUT

OUT: the folder of that script. Of every checkpoint: its row as `grasp eval` measured it, and from the manifest how it was trained.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from grasp.core.manifest import read_manifest
from grasp.core.provenance import machine, versions
from grasp.core.results import Result, Results

NAMES = ("removed", "grasp", "grasp-fisher", "removed-lora-lm", "grasp-lm", "grasp-distill", "grasp-fisher-distill")
OUTPUT = Path(__file__).parents[1] / "results" / "recovery.json"


def row_of(folder: Path, name: str, found: Result) -> Result:
    """The row with the training's facts; names of texts without the place they were read from."""
    manifest = read_manifest(folder / name)
    told = manifest.get("recovery")
    fields = dict(found.fields)
    if told:
        looks = [look for look in told["curve"] if "held_out_loss" in look]
        fields["recovery"] = {
            **{key: told["recipe"][key] for key in ("train", "objective", "learning_rate", "batch_size", "max_length")},
            "steps": told["steps"], "tokens_seen": told["tokens_seen"], "trained_parameters": told["trained_parameters"],
            "held_out_lm_loss": [looks[0]["held_out_lm_loss"], told["best"]["held_out_lm_loss"]],
            "held_out_loss": [looks[0]["held_out_loss"], told["best"]["held_out_loss"]],
            "curve": told["curve"],
        }  # fmt: skip
    return replace(
        found, label=name, model=name, fields=fields, scores=tuple(replace(score, name=Path(score.name).name) for score in found.scores)
    )


def main() -> None:
    folder = Path(sys.argv[1])
    rows, dense = [], None
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.is_file():
            first, last = Results.read(path).rows
            dense = replace(
                first, label="dense", model="smollm2", scores=tuple(replace(score, name=Path(score.name).name) for score in first.scores)
            )
            rows.append(row_of(folder, name, last))
    assert dense is not None, f"{folder} holds no results; run experiments/recovery.sh first"
    Results((dense, *rows), "Recovery of smollm2 at 105.8 M parameters", "experiments/recovery.sh", versions(), machine()).write(OUTPUT)
    print(json.dumps({row.label: [round(score.value, 2) for score in row.scores if score.unit == "perplexity"] for row in (dense, *rows)}))


if __name__ == "__main__":
    main()
