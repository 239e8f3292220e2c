"""`grasp-fisher` beside the paper's method, layer removal and plain SVD: sizes, switches,
calibration tokens, other domains.

    python benchmarks/fisher.py FOLDER [-o results/fisher.json] [--only
    sizes,switches,tokens,matrices,parts,forecasts,domains]

FOLDER holds `wikitext2_raw/wiki.valid.raw`, `wikitext2_raw/wiki.test.raw` and `ptb/ptb.valid.txt`
(not part of this repository). Model: smollm2 in bfloat16, calibrated on WikiText-2 valid, 64 x 512
tokens unless said; perplexity on the first 24 blocks of 512 tokens of WikiText-2 test and, for
sizes, tokens, parts and domains, 12 of PTB valid. Rows that are in the output file already are not
measured again. On two cores a row of two rounds takes three to four minutes, another half a minute.

One sweep serves all rows of a calibration set: the methods' own `needs` and `edits` are called as
the driver calls them. Rows are of one round unless they say two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.models import load_model
from grasp.core.provenance import versions
from grasp.core.records import Calibration, Statistics
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.methods import make
from grasp.stages.statistics import WeightGrad

SIZES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
ANCHORS = {"105.8 M": 105_800_000, "112.2 M": 112_200_000}
TOTAL = 134_515_008
PARTS = ("ranks", "channels", "values", "groups", "layers")
BOTH_TEXTS = ("sizes", "tokens", "parts", "domains")
"""Sections that are also measured on PTB."""
Cells = dict[str, tuple[float, str]]
"""Name of a row -> (ratio, allocation)."""
Rows = Iterator[tuple[str, Callable[[Decoder], Iterable[Step]]]]


class Benchmark:
    """Measures rows and keeps them in a file."""

    def __init__(self, folder: Path, output: Path):
        self.wiki, self.ptb = folder / "wikitext2_raw", folder / "ptb" / "ptb.valid.txt"
        self.output = output
        self.rows: dict[str, dict[str, Any]] = (
            json.loads(output.read_text())["rows"] if output.exists() else {}
        )
        self.sweeps: dict[Any, tuple[Calibration, Statistics]] = {}

    def ratio(self, size: int) -> float:
        return 1 - size / TOTAL

    def calibration(
        self, source: str, blocks: int, seed: int, method: Any
    ) -> tuple[Calibration, Statistics]:
        """A calibration set and what methods like this one ask of it, from one sweep of the dense
        model.
        """
        key = (source, blocks, seed, method.predicts)
        if key not in self.sweeps:
            decoder = load_model("smollm2", dtype="bfloat16")
            data = calibrate(decoder, source, num_samples=blocks, seq_len=512, seed=seed)
            fields = {"parts": PARTS} if method.predicts else {"basis": "input"}
            collectors = make("grasp-fisher", {"ratio": 0.2, **fields}).needs(decoder)
            collectors.append(
                WeightGrad(
                    linear.path for layer in decoder.layers() for linear in layer.linears.values()
                )
            )
            self.sweeps = {key: (data, Resident(decoder, data).sweep(collectors))}
        return self.sweeps[key]

    def row(self, name: str, edits: Any, **facts: Any) -> None:
        """Apply `edits(fresh decoder)`, measure, store."""
        if name in self.rows:
            return
        decoder = load_model("smollm2", dtype="bfloat16")
        told = self._apply(decoder, edits(decoder))
        row = {**facts, "parameters": decoder.num_parameters(), **told}
        row["wikitext2"] = (
            grasp.evaluate(
                decoder, ppl=str(self.wiki / "wiki.test.raw"), seq_len=512, num_blocks=24
            )
            .scores[0]
            .value
        )
        if facts["section"] in BOTH_TEXTS:
            row["ptb"] = (
                grasp.evaluate(decoder, ppl=str(self.ptb), seq_len=512, num_blocks=12)
                .scores[0]
                .value
            )
        self.rows[name] = row
        print(
            f"{name:60s} {row['parameters']:>11,} {row['wikitext2']:10.2f}"
            f" {row.get('ptb', math.nan):10.2f}",
            flush=True,
        )
        text = {
            "rows": self.rows,
            "versions": versions(),
            "command": "python benchmarks/fisher.py FOLDER",
        }
        self.output.write_text(json.dumps(text, indent=1) + "\n")

    @staticmethod
    def _apply(decoder: Decoder, steps: Iterable[Step]) -> dict[str, float]:
        """Carry out the edits. Returns what they say of the rise of the loss."""
        notes = []
        for step in steps:
            step.edit.apply(decoder)
            notes.append(step.note)
        expected = [note.predicted_loss for note in notes if note.predicted_loss is not None]
        if not notes or len(expected) < len(notes):
            return {}
        return {
            "expected_rise": sum(expected),
            "seen_rise": sum(note.seen_loss or 0.0 for note in notes),
        }

    def fisher(
        self,
        section: str,
        sizes: dict[str, float],
        blocks: int,
        seed: int,
        source: str = "",
        allocation: tuple[str, ...] = ("global",),
        **fields: Any,
    ) -> None:
        """Rows of `grasp-fisher` with these fields, at several ratios and allocations: decomposed
        once.
        """
        label = ", ".join(
            [
                "grasp-fisher",
                *(f"{key} {value}" for key, value in fields.items()),
                *([f"on {source}"] if source else []),
            ]
        )
        cells = {
            f"{section}: {label}, {ranks}, {blocks} blocks, seed {seed}, {size}": (ratio, ranks)
            for size, ratio in sizes.items()
            for ranks in allocation
        }
        if all(name in self.rows for name in cells):
            return
        texts = {"wikitext2": str(self.wiki / "wiki.valid.raw"), "pydoc": "pydoc"}
        method: Any = make("grasp-fisher", {"ratio": 0.2, "rounds": 1, **fields})
        data, stats = self.calibration(
            ",".join(texts[name] for name in (source or "wikitext2").split("+")),
            blocks,
            seed,
            method,
        )
        facts = {
            "method": "grasp-fisher",
            "section": section,
            "blocks": blocks,
            "seed": seed,
            "source": source or "wikitext2",
            **fields,
        }
        make_edits = self.from_the_start if method.again else self.posed_once
        for name, edits in make_edits(method, data, stats, cells):
            self.row(name, edits, ratio=cells[name][0], allocation=cells[name][1], **facts)

    @staticmethod
    def from_the_start(method: Any, data: Calibration, stats: Statistics, cells: Cells) -> Rows:
        """The second round depends on the size, so nothing is shared but the first sweep."""
        for name, (ratio, ranks) in cells.items():
            at = dataclasses.replace(method, ratio=ratio, allocation=ranks)
            yield name, lambda decoder, at=at: at.edits(Resident(decoder, data), stats)

    @staticmethod
    def posed_once(method: Any, data: Calibration, stats: Statistics, cells: Cells) -> Rows:
        """One round: decomposed once for all sizes."""
        runner = Resident(load_model("smollm2", dtype="bfloat16"), data)
        costs = method.costs(runner.decoder)
        problem = method.pose(runner, stats, costs)
        for name, (ratio, ranks) in cells.items():
            at = dataclasses.replace(method, ratio=ratio, allocation=ranks)
            spend = at.target(costs, problem)
            yield (
                name,
                lambda decoder, at=at, spend=spend: at.replacements(
                    Resident(decoder, data), problem, spend
                ),
            )

    def other(
        self, section: str, method: str, ratio: float, blocks: int, seed: int, **fields: Any
    ) -> None:
        """A row of another method."""
        name = f"{section}: {method}, {blocks} blocks, seed {seed}, {ratio:.4f}"
        if name not in self.rows:
            chosen = make(method, {"ratio": ratio, **fields})
            ours = make("grasp-fisher", {"ratio": 0.2})
            data, stats = self.calibration(str(self.wiki / "wiki.valid.raw"), blocks, seed, ours)
            facts = {
                "method": method,
                "section": section,
                "ratio": ratio,
                "blocks": blocks,
                "seed": seed,
                **fields,
            }
            self.row(name, lambda decoder: chosen.edits(Resident(decoder, data), stats), **facts)


def sizes(bench: Benchmark) -> None:
    """The anchors' sizes and a sweep over ratios, for four methods."""
    bench.row("dense", lambda decoder: [], method="dense", section="sizes", ratio=0.0)
    at = {"105.8 M": bench.ratio(ANCHORS["105.8 M"]), "112.2 M": bench.ratio(ANCHORS["112.2 M"])}
    ladder = {f"{ratio:.0%}": ratio for ratio in SIZES}
    bench.fisher("sizes", {**at, **ladder}, 64, 0, rounds=2)
    for fields in ({}, {"parts": "ranks"}, {"shape": "dense"}):
        bench.fisher("sizes", {**at, **ladder}, 64, 0, **fields)
    bench.fisher("sizes", ladder, 64, 0, basis="plain", storage="pair", allocation=("uniform",))
    for ratio in SIZES:
        bench.other("sizes", "shortgpt", ratio, 64, 0)
        bench.other("sizes", "grasp", ratio, 64, 0)


def switches(bench: Benchmark) -> None:
    """Score x basis x allocation at 105.8 M, as plain pairs, so that only the switch differs."""
    at = {"105.8 M": bench.ratio(ANCHORS["105.8 M"])}
    for score in ("taylor", "magnitude"):
        for basis in ("plain", "input", "fisher"):
            bench.fisher(
                "switches",
                at,
                64,
                0,
                score=score,
                basis=basis,
                storage="pair",
                allocation=("uniform", "per-layer", "global"),
            )


def tokens(bench: Benchmark) -> None:
    """Other numbers of calibration blocks, and other draws of them."""
    at = {"105.8 M": bench.ratio(ANCHORS["105.8 M"])}
    for blocks, seed in ((8, 0), (32, 0), (32, 1), (32, 2)):
        bench.fisher("tokens", at, blocks, seed, rounds=2)


def parts(bench: Benchmark) -> None:
    """What may become smaller, at 105.8 M."""
    at = {"105.8 M": bench.ratio(ANCHORS["105.8 M"])}
    for names in ("ranks", "channels", "ranks,channels,values", ",".join(PARTS)):
        bench.fisher("parts", at, 64, 0, parts=names)


def forecasts(bench: Benchmark) -> None:
    """What is expected of unseen text, from few tokens to many, beside what comes."""
    ratios = {f"{ratio:.0%}": ratio for ratio in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)}
    for blocks in (16, 64, 128):
        for names in ("ranks", "channels", "ranks,channels"):
            bench.fisher("forecasts", ratios, blocks, 1, parts=names)


def matrices(bench: Benchmark) -> None:
    """One matrix at a time: the smallest groups that are predicted to cost 0.005, 0.02 and 0.08
    nats together, dropped.
    """
    method: Any = make("grasp-fisher", {"ratio": 0.2, "storage": "pair", "parts": "ranks"})
    data, stats = bench.calibration(str(bench.wiki / "wiki.valid.raw"), 64, 0, method)
    runner = Resident(load_model("smollm2", dtype="bfloat16"), data)
    problem = method.pose(runner, stats, method.costs(runner.decoder))
    for path, component in list(problem.components.items())[4::26]:
        offer = component.offer
        for rise in (0.005, 0.02, 0.08):
            rank = int(offer.sizes[min(int((offer.losses > rise).sum()), len(offer.sizes) - 1)])
            step = component.make(rank)
            facts = {"method": "grasp-fisher", "section": "matrices", "path": path, "rank": rank}
            bench.row(f"matrices: {path}, {rise}", lambda decoder, step=step: [step], **facts)


def domains(bench: Benchmark) -> None:
    """Calibrated on a mixture with another text."""
    at = {"105.8 M": bench.ratio(ANCHORS["105.8 M"])}
    bench.fisher("domains", at, 64, 0, source="wikitext2+pydoc")


SECTIONS = {
    "sizes": sizes,
    "switches": switches,
    "matrices": matrices,
    "parts": parts,
    "forecasts": forecasts,
    "tokens": tokens,
    "domains": domains,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/fisher.json"))
    parser.add_argument("--only", default=",".join(SECTIONS))
    arguments = parser.parse_args()
    bench = Benchmark(arguments.folder, arguments.output)
    for section in arguments.only.split(","):
        SECTIONS[section](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
