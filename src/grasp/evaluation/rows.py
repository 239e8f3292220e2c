"""One row of a results file: what was measured of a model, with what its manifest says of how it
was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grasp.core.decoder import Decoder
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.results import Generation, Result
from grasp.core.score import Score


def row(
    decoder: Decoder,
    dense: Decoder | None,
    scores: Sequence[Score],
    said: tuple[Generation, ...],
    notes: tuple[str, ...] = (),
) -> Result:
    """A row for one model; what its manifest says goes with it."""
    manifest = manifest_of(decoder.source)
    method = dict(manifest.get("method", {}))
    size = decoder.num_parameters()
    removed = manifest.get("parameters", {}).get("ratio")
    ratio = (
        (None if removed is None else float(removed))
        if dense is None
        else 1 - size / dense.num_parameters()
    )
    label = Path(decoder.source).name or type(decoder.model).__name__
    fields = {key: value for key, value in method.items() if key not in ("name", "paper")}
    name = str(method.get("name", ""))
    seconds = {step: float(taken) for step, taken in manifest.get("seconds", {}).items()}
    told = manifest.get("recovery")
    if "quantization" in manifest:
        fields |= {"quantization": manifest["quantization"]["scheme"]}
    if told:  # the paper's star: trained after compression
        name += "*"
        fields |= {
            "recovery": (
                {key: told["recipe"][key] for key in ("train", "objective")}
                | {"steps": told["steps"]}
            )
        }
        seconds["recovery"] = sum(told["seconds"].values())
    return Result(
        label,
        decoder.source,
        name,
        fields,
        size,
        decoder.num_bytes(),
        ratio,
        tuple(scores),
        said,
        seconds,
        notes=notes,
    )


def manifest_of(source: str) -> dict[str, Any]:
    """What grasp.json says of the checkpoint at `source`; empty for a model that grasp did not
    write.
    """
    return read_manifest(Path(source)) if source and (Path(source) / MANIFEST).is_file() else {}


def number_formats(decoder: Decoder, dense: Decoder | None) -> tuple[str, ...]:
    """Said where the two are computed in different number formats."""
    mine, theirs = (
        str(one.model.dtype).removeprefix("torch.") if one is not None else ""
        for one in (decoder, dense)
    )
    if dense is None or mine == theirs:
        return ()
    return (
        (
            f"compared across number formats: {decoder.source or 'the model'} in {mine},"
            f" {dense.source or 'the dense model'} in {theirs}; a part of every difference, and of"
            f" the speed, is the format's; give both one with --dtype {theirs}"
        ),
    )
