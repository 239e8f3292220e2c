"""Gathers what experiments/recovery.sh measured into results/recovery.json, from which
docs/generate.py makes the table of docs/recovery.md.

    python benchmarks/recovery_table.py OUT

OUT: the folder of that script. Of every checkpoint: its row as `grasp eval` measured it, and from
the manifest how it was trained.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from grasp.core.manifest import read_manifest
from grasp.core.provenance import machine, versions
from grasp.core.results import Result, Results
from grasp.core.score import Score

NAMES = (
    "removed",
    "grasp",
    "grasp-fisher",
    "removed-lora-lm",
    "grasp-lm",
    "grasp-distill",
    "grasp-fisher-distill",
)
OUTPUT = Path(__file__).parents[1] / "results" / "recovery.json"


def row_of(folder: Path, name: str, found: Result) -> Result:
    """The row with the training's facts; names of texts without the place they were read from."""
    manifest = read_manifest(folder / name)
    told = manifest.get("recovery")
    fields = dict(found.fields)
    if told:
        looks = [look for look in told["curve"] if "held_out_loss" in look]
        fields["recovery"] = {
            **{
                key: told["recipe"][key]
                for key in ("train", "objective", "learning_rate", "batch_size", "max_length")
            },
            "steps": told["steps"],
            "tokens_seen": told["tokens_seen"],
            "trained_parameters": told["trained_parameters"],
            "held_out_lm_loss": [looks[0]["held_out_lm_loss"], told["best"]["held_out_lm_loss"]],
            "held_out_loss": [looks[0]["held_out_loss"], told["best"]["held_out_loss"]],
            "curve": told["curve"],
        }
        found = replace(found, seconds={**found.seconds, "recovery": sum(told["seconds"].values())})
    return replace(found, label=name, model=name, fields=fields, scores=named(found))


def named(found: Result) -> tuple[Score, ...]:
    """The scores; texts by the names of their files, not by where those were."""
    return tuple(replace(score, name=Path(score.name).name) for score in found.scores)


def main() -> None:
    folder = Path(sys.argv[1])
    missing = [name for name in ("dense", *NAMES) if not (folder / f"{name}.json").is_file()]
    if missing:
        sys.exit(f"{folder} has no {', '.join(missing)}: run experiments/recovery.sh first")
    [dense] = Results.read(folder / "dense.json").rows
    rows = [replace(dense, label="dense", model="smollm2", scores=named(dense))]
    for name in NAMES:
        [found] = Results.read(folder / f"{name}.json").rows
        rows.append(row_of(folder, name, found))
    Results(
        tuple(rows),
        "Recovery of smollm2 at 105.8 M parameters",
        "experiments/recovery.sh",
        versions(),
        machine(),
    ).write(OUTPUT)
    print(
        json.dumps(
            {
                row.label: [
                    round(score.value, 2) for score in row.scores if score.unit == "perplexity"
                ]
                for row in rows
            }
        )
    )


if __name__ == "__main__":
    main()
