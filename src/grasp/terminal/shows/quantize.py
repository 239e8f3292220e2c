"""`grasp quantize`: what was rounded, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.core.checkpoint import bytes_on_disk
from grasp.core.manifest import MANIFEST
from grasp.terminal.bars import emit, megabytes, progress_bars, table
from grasp.verbs import quantize as quantization


def show(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `grasp.quantize` and sum up what it did."""
    with progress_bars(quiet) as bars:
        done = quantization.quantize(model, out, progress=bars, **options)
    told = done.manifest["quantization"]
    rows = [
        (
            "quantized",
            (
                f"{told['matrices']} matrices to {told['scheme']}, {100 * told['share']:.1f} % of"
                " all numbers"
            ),
        ),
        *(
            [("embeddings, output layer", f"{told['embeddings']} bits")]
            if told["embeddings"] < 16
            else []
        ),
        *([("activations", "8 bits, one scale a token")] if told["activations"] == "int8" else []),
        (
            "not quantized",
            "norms, biases"
            if told["embeddings"] < 16
            else "embeddings, output layer, norms, biases",
        ),
        (
            "rounding error",
            (
                f"{100 * told['error_median']:.2f} % of a matrix's norm (median),"
                f" {100 * told['error_largest']:.2f} % at most"
            ),
        ),
        ("bytes", f"{megabytes(told['bytes_before'])} → {megabytes(told['bytes_after'])}"),
        (
            "seconds",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in told["seconds"].items()),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                "quantization": told,
            }
        )
