"""Recovery layer after layer (`--objective block`) beside `distill`, at equal seconds of training,
and the one as a start of the other. Writes results/block_recovery.json.

python benchmarks/block_recovery.py FOLDER [--short 60] [--long 180]

FOLDER: as for `benchmarks/fisher.py`, with alpaca/random_9k.json. smollm2 with nine layers at rank
10 % (16 × 512 tokens of WikiText-2 valid), recovered on Alpaca and WikiText-2 valid, rows of 256
tokens. Perplexity on 12 × 512 tokens of WikiText-2 test and of PTB valid. A trial of few steps says
how many fit into the seconds; the rows say how many it took. `distill` looks at the held-out loss
before and behind the training alone: by itself it looks ten times, at every step of so short a run,
and a look takes as long as some steps. Alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import grasp
from grasp.core.provenance import versions

QUICK: dict[str, Any] = {"preset": "quick", "max_length": 256}
ARMS: dict[str, dict[str, Any]] = {
    "block": {"objective": "block", "epochs": 3.0, "learning_rate": 1e-3},
    "distill": {},
}
TRIAL = 4
"""Steps (of `block`: of every layer) that say how long one takes."""


class Benchmark:
    """The checkpoint and the texts, and what came of it."""

    def __init__(self, folder: Path, work: Path, output: Path):
        wiki = folder / "wikitext2_raw"
        self.text = f"{folder / 'alpaca' / 'random_9k.json'},{wiki / 'wiki.valid.raw'}"
        self.held_out = [str(wiki / "wiki.test.raw"), str(folder / "ptb" / "ptb.valid.txt")]
        self.work, self.output = work, output
        self.rows: list[dict[str, Any]] = []
        self.costs: dict[str, tuple[float, float]] = {}
        self.begin = work / "begin"
        grasp.compress(
            "smollm2",
            self.begin,
            method="grasp",
            num_layers=9,
            retain_ratio=0.1,
            data=str(wiki / "wiki.valid.raw"),
            num_samples=16,
            dtype="float32",
        )
        self.row("before", self.begin, 0.0)

    def recover(self, arm: str, begin: Path, out: Path, steps: int) -> float:
        """Train for so many steps; gives the seconds of it."""
        began = time.perf_counter()
        looks = {"eval_every": steps} if arm == "distill" else {}
        grasp.recover(begin, out, data=self.text, max_steps=steps, **QUICK, **ARMS[arm], **looks)
        return time.perf_counter() - began

    def steps_in(self, arm: str, seconds: float) -> int:
        """How many steps fit. What does not depend on them is seen by trials of two lengths."""
        if arm not in self.costs:
            few, more = (
                self.recover(arm, self.begin, self.work / f"{arm}-{steps}-steps", steps)
                for steps in (TRIAL, 2 * TRIAL)
            )
            self.costs[arm] = few, max((more - few) / TRIAL, 1e-3)
        few, each = self.costs[arm]
        return max(round((seconds - few) / each) + TRIAL, 1)

    def row(self, name: str, model: Path, seconds: float, **facts: Any) -> None:
        """Measure and store."""
        found = grasp.evaluate(str(model), ppl=self.held_out, seq_len=512, num_blocks=12)
        texts = zip(("wikitext2", "ptb"), found.scores, strict=True)
        row = {"name": name, "seconds": seconds, **facts}
        self.rows.append({**row, **{text: score.value for text, score in texts}})
        print(self.rows[-1], flush=True)
        text = {"rows": self.rows, "versions": versions(), "command": "block_recovery.py FOLDER"}
        self.output.write_text(json.dumps(text, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", type=float, default=60)
    parser.add_argument("--long", type=float, default=180)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/block_recovery.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Benchmark(asked.folder, Path(work), asked.output)
        for arm in ARMS:
            for seconds in (asked.short, asked.long):
                steps, out = bench.steps_in(arm, seconds), Path(work) / f"{arm}-{seconds:g}"
                took = bench.recover(arm, bench.begin, out, steps)
                bench.row(arm, out, took, steps=steps)
        steps, out = bench.steps_in("distill", asked.long - asked.short), Path(work) / "both"
        begin = Path(work) / f"block-{asked.short:g}"
        first = next(row["seconds"] for row in bench.rows if row["name"] == "block")
        took = bench.recover("distill", begin, out, steps)
        bench.row("block, then distill", out, first + took, steps=steps)


if __name__ == "__main__":
    main()
