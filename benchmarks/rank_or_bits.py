"""Is it better to spend bytes on rank or on bits? Dense, int8 and int4, each alone, on the paper's
method and on `grasp-fisher`, at equal bytes.

    python benchmarks/rank_or_bits.py FOLDER [-o results/rank_or_bits.json] [--model smollm2]
    [--blocks 64] [--seq-len 512]

FOLDER, calibration and texts are those of `benchmarks/fisher.py`: smollm2 in bfloat16, WikiText-2
valid, 64 x 512 tokens; perplexity on the first 24 blocks of 512 tokens of WikiText-2 test and 12 of
PTB valid. One sweep serves all rows of `grasp-fisher`. Rows that are in the output file already are
not measured again. About an hour on two cores (in two pieces, beside other work).

Levels: the bytes of the dense model in 8 bits and in 4 bits (groups of 32), 0.85 of the former and
0.75 of the latter. Bytes are those of the saved tensors, embeddings and places of pivoted pairs
included: the embeddings, 46 % of smollm2 at 4 bits, are never rounded here. For each level, bits
and method the ratio that meets the bytes within half a percent is searched for.

smollm2 comes from a file in 4 bits with groups of 32 (Q4_1), so rounding it to int4 with groups of
32 loses next to nothing. The rows with groups of 128 do not have that advantage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize
from grasp.core.edits.ordinary import dequantize
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.core.models import load_model
from grasp.core.provenance import versions
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.errors import GraspError
from grasp.methods import make

BITS = {"bfloat16": None, "int8": (8, 32), "int4": (4, 32), "int4, groups of 128": (4, 128)}
METHODS = ("none", "grasp-fisher, plain pairs", "grasp-fisher", "grasp")


def stored(
    matrix: tuple[int, int], rank: int | None, pivoted: bool, bits: tuple[int, int] | None
) -> int:
    """Bytes of one matrix (out, in) as it is stored: whole, or as a pair of `rank`."""
    out, into = matrix
    if bits is None:
        rows = out - (rank or 0) if pivoted else out
        numbers = out * into if rank is None else rank * (rows + into)
        return 2 * numbers + (4 * out if pivoted else 0)
    with torch.device("meta"):
        scheme, kept = ("int8" if bits[0] == 8 else "int4"), rank or None
        module = QuantizedLinear(
            into,
            out,
            False,
            scheme,
            bits[1],
            rank if rank is None else kept,
            pivoted,
            dtype=torch.bfloat16,
        )
    return (4 * out if pivoted else 0) + (
        0 if rank == 0 else sum(p.nbytes for p in module.parameters())
    )


class Benchmark:
    """Measures rows and keeps them in a file."""

    def __init__(self, arguments: argparse.Namespace):
        self.wiki = arguments.folder / "wikitext2_raw"
        self.ptb = arguments.folder / "ptb" / "ptb.valid.txt"
        self.asked, self.output = arguments, arguments.output
        self.rows: dict[str, dict[str, Any]] = (
            json.loads(self.output.read_text())["rows"] if self.output.exists() else {}
        )
        self.shapes = {
            linear.path: linear.shape
            for layer in self.fresh().layers()
            for linear in layer.linears.values()
        }
        self.rest = self.fresh().num_bytes() - sum(
            2 * out * into for out, into in self.shapes.values()
        )
        self.share = (
            sum(out * into for out, into in self.shapes.values()) / self.fresh().num_parameters()
        )
        self.made: dict[str, Callable[[float], dict[str, Factorize]]] = {}

    def fresh(self) -> Decoder:
        return load_model(self.asked.model, dtype="bfloat16")

    def bytes(self, edits: dict[str, Factorize], bits: tuple[int, int] | None) -> int:
        """Bytes of the model after `edits`, in `bits`."""
        found = self.rest
        for path, shape in self.shapes.items():
            edit = edits.get(path)
            found += stored(
                shape,
                None if edit is None else edit.rank,
                edit is not None and edit.places is not None,
                bits,
            )
        return found

    def edits(self, method: str) -> Callable[[float], dict[str, Factorize]]:
        """ratio -> the edits of `method`; what they have in common is computed once."""
        if method not in self.made:
            decoder = self.fresh()
            data = calibrate(
                decoder,
                str(self.wiki / "wiki.valid.raw"),
                num_samples=self.asked.blocks,
                seq_len=self.asked.seq_len,
                seed=0,
            )
            if method == "grasp":
                chosen = make("grasp", {"ratio": 0.2})
                stats = Resident(decoder, data).sweep(chosen.needs(decoder))
                self.made = {
                    **self.made,
                    method: lambda ratio: _by_path(
                        dataclasses.replace(chosen, ratio=ratio).edits(
                            Resident(self.fresh(), data), stats
                        )
                    ),
                }
            else:
                base = make("grasp-fisher", {"ratio": 0.2})
                stats = Resident(decoder, data).sweep(base.needs(decoder))
                for name, fields in {
                    "grasp-fisher": {},
                    "grasp-fisher, plain pairs": {"storage": "pair"},
                }.items():
                    chosen: Any = make("grasp-fisher", {"ratio": 0.2, "parts": "ranks", **fields})
                    runner = Resident(self.fresh(), data)
                    costs = chosen.costs(runner.decoder)
                    problem = chosen.pose(runner, stats, costs)
                    self.made[name] = partial(_pairs, chosen, runner, costs, problem)
        return self.made[method]

    def meet(
        self, target: float, whole: int, method: str, bits: tuple[int, int] | None
    ) -> tuple[float, dict[str, Factorize]]:
        """The ratio whose edits come within half a percent of the bytes, by false position: bytes
        are nearly linear in the ratio.
        """
        left, right = (0.0, float(whole)), (self.share, float(self.rest))
        for _ in range(6):
            ratio = left[0] + (right[0] - left[0]) * (left[1] - target) / (left[1] - right[1])
            edits = self.edits(method)(ratio)
            size = float(self.bytes(edits, bits))
            if abs(size - target) <= 0.005 * target:
                break
            left, right = ((ratio, size), right) if size > target else (left, (ratio, size))
        return ratio, edits

    def row(self, level: str, target: float, method: str, bits: str) -> None:
        """Meet the bytes, measure, store."""
        name = f"{level}: {method}, {bits}"
        # pivoted pairs in 4 bits are refused
        if name in self.rows or (method == "grasp-fisher" and bits.startswith("int4")):
            return
        edits: dict[str, Factorize] = {}
        ratio, whole = 0.0, self.bytes({}, BITS[bits])
        if method != "none":
            if whole <= target * 1.005:
                return  # these bits alone are at or below the level
            try:
                ratio, edits = self.meet(target, whole, method, BITS[bits])
            except GraspError as failure:  # a ratio that the method cannot reach
                print(f"{name}: {failure}", flush=True)
                return
        decoder = self.fresh()
        for edit in edits.values():
            edit.apply(decoder)
        if BITS[bits] is not None:
            grasp.quantize(decoder, bits=BITS[bits][0], group_size=BITS[bits][1])
        places = sum(
            b.nbytes for key, b in decoder.model.named_buffers() if key.endswith(".places")
        )
        row = {
            "level": level,
            "method": method,
            "bits": bits,
            "ratio": ratio,
            "bytes": decoder.num_bytes() + places,
            "target": target,
        }
        row["parameters"] = decoder.num_parameters()
        if BITS[bits] is not None:
            # what a product of many tokens does each time: the same numbers, sooner
            dequantize(decoder)
        for text, path, blocks in (
            ("wikitext2", self.wiki / "wiki.test.raw", 24),
            ("ptb", self.ptb, 12),
        ):
            row[text] = (
                grasp.evaluate(
                    decoder, ppl=str(path), seq_len=self.asked.seq_len, num_blocks=blocks
                )
                .scores[0]
                .value
            )
        self.rows[name] = row
        print(
            f"{name:60s} {row['bytes']:>11,} {row['wikitext2']:10.2f} {row['ptb']:10.2f}",
            flush=True,
        )
        text = {
            "rows": self.rows,
            "versions": versions(),
            "command": "python benchmarks/rank_or_bits.py FOLDER",
        }
        self.output.write_text(json.dumps(text, indent=1) + "\n")

    def run(self) -> None:
        """The dense model in each of the bits, then every level, method by method."""
        for bits, asked in BITS.items():
            self.row("alone", self.bytes({}, asked), "none", bits)
        sizes = {f"{bits} x none": self.bytes({}, BITS[bits]) for bits in ("int4", "int8")}
        between = {
            "0.85 of int8 x none": 0.85 * sizes["int8 x none"],
            "0.75 of int4 x none": 0.75 * sizes["int4 x none"],
        }
        for method in METHODS[1:]:
            for level, target in {**sizes, **between}.items():
                for bits in BITS:
                    self.row(level, target, method, bits)


def _pairs(
    method: Any, runner: Resident, costs: Any, problem: Any, ratio: float
) -> dict[str, Factorize]:
    """The pairs of a problem posed once, at a ratio."""
    at = dataclasses.replace(method, ratio=ratio)
    return _by_path(at.replacements(runner, problem, at.target(costs, problem)))


def _by_path(steps: Any) -> dict[str, Factorize]:
    return {step.edit.path: step.edit for step in steps}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/rank_or_bits.json"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    Benchmark(parser.parse_args()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
