"""One dial in bytes: `grasp compress --size`, beside bits alone and beside one width for all.

    python benchmarks/dial.py FOLDER [-o results/dial.json] [--blocks 64] [--only dial,widths]
    [--sizes 110,100,90,80,65] [--groups 64,128]

FOLDER: as for `benchmarks/fisher.py`. Model: smollm2, computed in the dtype that this processor is
fast in, stored in 16 bits and fewer, calibrated on WikiText-2 valid, blocks of 512 tokens;
perplexity on the first 24 such blocks of WikiText-2 test and 12 of PTB valid, of the model as it is
stored. smollm2 was unpacked from 4 bits in groups of 32, so groups of 32 can find its numbers
again: rows that may use them are no evidence for other models. Rows that are in the output file
already are not measured again. One sweep serves all rows; a size that needs a second round takes
some minutes more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Note, Quantize, Step
from grasp.core.edits.base import layer_of
from grasp.core.edits.placing import vocabulary
from grasp.core.layers.packing_grasp import INTEGERS, SCALES, ZEROS, dequantized
from grasp.core.models import load_model
from grasp.core.precision import has_fast_bfloat16
from grasp.core.provenance import versions
from grasp.core.records import Calibration, Statistics
from grasp.core.rounding import rounded
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.methods import make
from grasp.methods.components import Problem
from grasp.methods.costs import INDEX
from grasp.methods.low_rank import staying
from grasp.methods.rounding import roundings
from grasp.stages.options import All
from grasp.stages.rounding import Width
from grasp.stages.sensitivity import Sensitivities

DTYPE = "bfloat16" if has_fast_bfloat16("cpu") else "float32"
LEAST_BY_BITS = 75.0
"""Megabytes below which bits alone do not go."""
Edits = Callable[[Decoder], Iterable[Step]]


class Benchmark:
    """Measures rows and keeps them in a file."""

    def __init__(self, folder: Path, output: Path, blocks: int, groups: list[int]):
        self.wiki, self.ptb = folder / "wikitext2_raw", folder / "ptb" / "ptb.valid.txt"
        self.output, self.blocks, self.groups = output, blocks, groups
        self.rows: dict[str, dict[str, Any]] = (
            json.loads(output.read_text())["rows"] if output.exists() else {}
        )
        self.outside: Any = None
        self.swept: tuple[Calibration, Statistics] | None = None

    def statistics(self, method: Any) -> tuple[Calibration, Statistics]:
        """From one sweep of the dense model."""
        if self.swept is None:
            decoder = load_model("smollm2", dtype=DTYPE)
            source = str(self.wiki / "wiki.valid.raw")
            data = calibrate(decoder, source, num_samples=self.blocks, seq_len=512, seed=0)
            runner = Resident(decoder, data)
            self.swept = data, runner.sweep(method.needs(decoder))
            self.outside = method.outside(runner)
            print(
                "swept",
                {str(k): [round(x, 4) for x in v.losses.tolist()] for k, v in self.outside.items()},
                flush=True,
            )
        return self.swept

    def row(self, name: str, edits: Edits, **facts: Any) -> None:
        """Apply `edits(fresh decoder)`, measure, store."""
        if name in self.rows:
            return
        decoder = load_model("smollm2", dtype=DTYPE)
        notes, kinds = [], Counter[str]()
        for step in edits(decoder):
            step.edit.apply(decoder)
            notes.append(step.note)
            if isinstance(step.edit, Quantize):
                width = Width(step.edit.scheme, step.edit.group_size)
                where = step.edit.path.rpartition(".")[2]
                kinds[f"{where}: {width}"] += 1
            else:
                kinds[step.edit.kind] += 1
        row = {**facts, "megabytes": stored_bytes(decoder) / 1e6, "kinds": dict(kinds)}
        row["expected_rise"] = sum(note.predicted_loss or 0.0 for note in notes)
        for text, place, count in (
            ("wikitext2", self.wiki / "wiki.test.raw", 24),
            ("ptb", self.ptb, 12),
        ):
            found = grasp.evaluate(decoder, ppl=str(place), seq_len=512, num_blocks=count)
            row[text] = found.scores[0].value
        self.rows[name] = row
        print(
            f"{name:40s} {row['megabytes']:7.2f} MB {row['wikitext2']:8.2f} {row['ptb']:8.2f}"
            f" expected {row['expected_rise']:.3f}",
            flush=True,
        )
        text = {
            "rows": self.rows,
            "dtype": DTYPE,
            "versions": versions(),
            "command": "python benchmarks/dial.py FOLDER",
        }
        self.output.write_text(json.dumps(text, indent=1) + "\n")


def stored_bytes(decoder: Decoder) -> int:
    """What the weights take in the file: whole numbers as they are, all others in 16 bits."""
    found = decoder.model.state_dict(keep_vars=True)
    tensors = {id(one): one for one in found.values()}.values()
    return sum(
        one.numel() * (2 if one.is_floating_point() else one.element_size()) + INDEX
        for one in tensors
    )


def dial(bench: Benchmark, sizes: list[str]) -> None:
    """All kinds together, and bits alone."""
    method: Any = make("grasp-fisher", {"size": "100MB", "group_sizes": bench.groups})
    said = f", groups of {' or '.join(map(str, bench.groups))}, {bench.blocks} blocks"
    bench.row("dense", lambda decoder: [], section="widths")
    for size in sizes:
        at = dataclasses.replace(method, size=f"{size}MB")
        bench.row(f"dial, {size} MB{said}", partial(together, bench, at), section="dial")
        if float(size) >= LEAST_BY_BITS:
            name = f"bits alone, {size} MB{said}"
            bench.row(name, partial(bits_alone, bench, at), section="bits")


def together(bench: Benchmark, method: Any, decoder: Decoder) -> Iterable[Step]:
    """As `grasp compress --size` does."""
    data, stats = bench.statistics(method)
    return method.edits(Resident(decoder, data), stats)


def bits_alone(bench: Benchmark, method: Any, decoder: Decoder) -> Iterable[Step]:
    """The same prices and rounding, without ranks and channels."""
    data, stats = bench.statistics(method)
    linears = method.linears(decoder, decoder.kept)
    costs = method.costs(decoder)
    parts = {
        linear.path: staying(linear, costs.of(linear.path)(linear.shape, None))
        for linear in linears
    }
    names = tuple(parts)
    problem = Problem(parts, All(names), names, names)
    offer = method.in_widths(decoder, stats, problem, bench.outside)
    chosen = method.ranks(offer.problem, method.target(costs, offer.problem))
    runner = Resident(decoder, data)
    yield from roundings(runner, stats[Sensitivities.name], offer.rounded(chosen))


def widths(bench: Benchmark, _sizes: list[str]) -> None:
    """One width for all matrices, to the nearest between least and largest, the embedding in 8
    bits: what other tools do without data. The rise to expect is that of the matrices.
    """
    method = make("grasp-fisher", {"size": "100MB", "group_sizes": bench.groups})
    for bits in (8, 6, 5, 4, 3):
        bench.row(
            f"{bits} bits, groups of 64", partial(one_width, bench, method, bits), section="widths"
        )


def one_width(bench: Benchmark, method: Any, bits: int, decoder: Decoder) -> Iterable[Step]:
    """Every linear, and the embedding in 8 bits."""
    _, stats = bench.statistics(method)
    paths = [one.path for layer in decoder.layers() for one in layer.linears.values()]
    for path in [*vocabulary(decoder), *paths]:
        scheme = f"int{bits}" if layer_of(path) >= 0 else "int8"
        weight: Any = decoder.model.get_submodule(path).weight
        numbers = rounded("weight", weight, scheme, 64, torch.bfloat16)
        found = stats[Sensitivities.name].get(path)
        stored = (numbers.get("weight" + part) for part in (INTEGERS, SCALES, ZEROS))
        made: Any = dequantized(*stored, scheme, weight.shape[1], 64)
        lost = None if found is None else found.loss(weight - made)
        yield Step(Quantize(path, scheme, 64, numbers), Note(predicted_loss=lost))


SECTIONS = {"dial": dial, "widths": widths}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/dial.json"))
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--sizes", default="110,100,90,80,65")
    parser.add_argument("--groups", default="64,128")
    arguments = parser.parse_args()
    groups = [int(one) for one in arguments.groups.split(",")]
    bench = Benchmark(arguments.folder, arguments.output, arguments.blocks, groups)
    for section in arguments.only.split(","):
        SECTIONS[section](bench, arguments.sizes.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())
