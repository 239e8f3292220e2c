"""Exports: a checkpoint in the format of another runtime.

export()    checkpoint -> a directory that `format`'s own runtime loads
    1. check what was asked, and that the packages are there
    2. read the checkpoint, in the dtype of the export
    3. write model, config, tokenizer and a README that says how to run it; the directory appears
       when it is whole

    dense      safetensors of the original architecture, pairs multiplied out, MLPs of one width:
               loads anywhere; no smaller, but by what all MLPs lost
    onnx       one graph with a key-value cache, pairs kept
    openvino   a model with its own cache and tokenizer, pairs kept
    compressed-tensors
               safetensors of a rounded model as servers read them, number by number
    gguf       one file for llama.cpp, by its own converter, few bits number by number
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.core.compressed_tensors import COMPRESSED_TENSORS
from grasp.core.destination import check_destination, name_of
from grasp.core.edits.ordinary import strip_quantization_marks
from grasp.core.edits.widening import dense_parameters
from grasp.core.extras import need
from grasp.core.fields import PathLike, checked
from grasp.core.layer import is_low_rank
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.models import load_model
from grasp.core.progress import Progress, silent
from grasp.core.proof import answer, check_savable
from grasp.core.writing import whole
from grasp.errors import RecipeError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """What a format takes: packages, by the names they are imported by, values of `dtype` (the
    first is the default) and of `weights`. `is_graph`: transformers traces it. `is_dense`: pairs
    are multiplied out. `keeps_bits`: rounded numbers are written as they are.

    `module`, of `grasp.serving`, says how: `notes(decoder)` before anything changes,
    `write(decoder, folder, kind)`, `how_to_run(kind)` and `prove(decoder, said, folder, out,
    kind)`, where `kind` is the dtype or "int8"; and `check(decoder)` where it keeps bits. With
    `converts`, `write` is given what `find_converter(asked)` finds, too.
    """

    about: str
    module: str
    dtypes: tuple[str | None, ...]
    packages: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    is_graph: bool = False
    is_dense: bool = False
    keeps_bits: bool = False
    converts: bool = False


FORMATS = {
    "dense": Format(
        "ordinary checkpoint, pairs multiplied out, MLPs of one width",
        "dense",
        (None, "float32", "bfloat16", "float16"),
        is_dense=True,
    ),
    "onnx": Format(
        "for onnxruntime, pairs kept",
        "onnx",
        ("float32", "float16"),
        ("onnx", "onnxscript"),
        is_graph=True,
    ),
    "openvino": Format(
        "for openvino-genai, pairs kept",
        "openvino",
        ("float32", "float16"),
        ("openvino", "openvino_tokenizers"),
        ("int8",),
        is_graph=True,
    ),
    COMPRESSED_TENSORS: Format(
        "for servers' own kernels, 8 and 4 bits kept",
        "compressed_tensors",
        (None,),
        keeps_bits=True,
    ),
    "gguf": Format(
        "one file for llama.cpp, pairs multiplied out, few bits kept",
        "gguf",
        (None, "float32", "bfloat16", "float16"),
        ("gguf",),
        is_dense=True,
        keeps_bits=True,
        converts=True,
    ),
}
READING, WRITING, TRYING = "reading", "writing", "trying what was written"
"""Tasks, each of one step: what takes long in them is other libraries' work."""
SPARE_GRAPH = 64e6
"""Bytes that graphs and tokenizers take beside the weights, at most: room asked for on the disk."""
SCRATCH = 2
"""Copies of the dense form on the disk at once, where a converter reads it."""


@dataclass(frozen=True)
class Export:
    """What `export` wrote. `pairs`: low-rank matrices of the checkpoint; `parameters`: its numbers,
    and those of the export where dense.
    """

    path: Path
    format: str
    dtype: str
    weights: str | None
    pairs: int
    parameters_before: int
    parameters_after: int
    bytes: int
    notes: tuple[str, ...]


@checked
def export(
    checkpoint: PathLike,
    out: PathLike,
    *,
    format: str,
    dtype: str | None = None,
    weights: str | None = None,
    converter: PathLike | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write a checkpoint in another format.

    Args:
        checkpoint: a directory that `compress` or `recover` wrote, or any other MODEL. It is not
            changed.
        out: directory to write; must not exist or be empty.
        format: "dense", "onnx", "openvino", "compressed-tensors" or "gguf".
        dtype: of the export. None: as stored for dense, float32 for the graphs. There is no choice
            for compressed-tensors, which is exact.
        weights: "int8" stores the matrices of an OpenVINO model in 8 bits.
        converter: llama.cpp's convert_hf_to_gguf.py, or the folder that it is in; for gguf. None:
            the one on the PATH.

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    place, out = str(checkpoint), Path(out)
    asked = check(format, dtype, weights)
    options = _converting(asked, format, converter)
    check_destination(out, 0, checkpoint)
    kind = dtype or asked.dtypes[0]
    computed = None if asked.converts else "float32" if format == "openvino" else kind
    progress(READING, 0, 1)
    decoder = load_model(
        place,
        device="cpu",
        dtype=computed,
        trust_remote_code=trust_remote_code,
        dequantize=not asked.keeps_bits,
    )
    # only now: each format's module needs its own packages
    writer = importlib.import_module(f"grasp.serving.{asked.module}")
    decoder.check_finite()
    if asked.keeps_bits:
        writer.check(decoder)
    check_savable(decoder)
    kind = kind or str(decoder.model.dtype).removeprefix("torch.")
    if asked.converts:  # others read it in float32, and arithmetic in 16 bits hides what differs
        decoder.model.float()
    pairs = sum(is_low_rank(module) for module in decoder.model.modules())
    before = decoder.num_parameters()
    after = dense_parameters(decoder) if asked.is_dense else before
    needed = after * decoder.model.dtype.itemsize * (SCRATCH if asked.converts else 1)
    check_destination(out, needed + int(SPARE_GRAPH if asked.is_graph else 0))
    numbers, notes = weights or kind, writer.notes(decoder)
    said = answer(decoder)
    progress(READING, 1, 1)
    progress(WRITING, 0, 1)
    with whole(out) as folder:
        writer.write(decoder, folder, numbers, **options)
        strip_quantization_marks(decoder.model)
        if asked.is_graph:
            decoder.config.dtype = kind
            decoder.model.config.save_pretrained(folder)
            decoder.model.generation_config.save_pretrained(folder)
        if decoder.tokenizer is not None:
            decoder.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(
            _card(
                *(place, name_of(out), format, kind, weights),
                *((before, after), notes, writer.how_to_run(numbers)),
            ),
            encoding="utf-8",
        )
        progress(WRITING, 1, 1)
        progress(TRYING, 0, 1)
        writer.prove(decoder, said, folder, out, numbers)
    progress(TRYING, 1, 1)
    size = sum(
        file.stat().st_size
        for file in out.iterdir()
        if file.suffix in (".safetensors", ".onnx", ".data", ".bin", ".gguf")
    )
    return Export(out, format, kind, weights, pairs, before, after, size, notes)


def check(format: str, dtype: str | None, weights: str | None) -> Format:
    """The format's row. Raises `RecipeError` for what it does not take, and where its packages are
    missing.
    """
    asked = FORMATS.get(format)
    if asked is None:
        raise RecipeError(
            f"--format {format}: unknown; allowed:"
            f" {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
        )
    _check_value("--dtype", dtype, [name for name in asked.dtypes if name], format)
    _check_value("--weights", weights, asked.weights, format)
    if weights and dtype not in (None, "float32"):
        raise RecipeError(
            f"--weights {weights} --dtype {dtype}: the rest of an {weights} model is float32; leave"
            " out --dtype or --weights"
        )
    need(f"--format {format}", format, *asked.packages, *(["nncf"] if weights else []))
    if asked.is_graph and importlib.util.find_spec("transformers.exporters.runners") is None:
        raise RecipeError(
            f"--format {format}: needs transformers 5.23 or newer (Python 3.11); run `pip install"
            " -U transformers`, or take dense"
        )
    return asked


def _converting(asked: Format, format: str, converter: PathLike | None) -> dict[str, Path]:
    """What `write` needs besides, of a format that a program of others writes."""
    if asked.converts:
        find = importlib.import_module(f"grasp.serving.{asked.module}").find_converter
        return {"converter": find(None if converter is None else Path(converter))}
    if converter is not None:
        raise RecipeError(
            f"--converter {converter}: --format {format} needs no converter; leave it out"
        )
    return {}


def _check_value(flag: str, value: str | None, allowed: Sequence[str], format: str) -> None:
    if value is not None and value not in allowed:
        choice = (
            f"allowed with --format {format}: {', '.join(allowed)}"
            if allowed
            else f"--format {format} has no such choice; leave it out"
        )
        raise RecipeError(f"{flag} {value}: {choice}{did_you_mean(value, allowed)}")


def _card(
    place: str,
    name: str,
    format: str,
    kind: str,
    weights: str | None,
    sizes: tuple[int, int],
    notes: Sequence[str],
    how: str,
) -> str:
    """README.md of the export: where it comes from and how to run it."""
    facts: dict[str, Any] = read_manifest(Path(place)) if (Path(place) / MANIFEST).is_file() else {}
    rows = [
        f"| exported from | {Path(place).name} |",
        f"| format | {format}, {kind}{f', matrices {weights}' if weights else ''} |",
    ]
    if facts:
        method, source = facts["method"], facts["model"]["source"]
        origin = f", from {source}" if source else ""
        rows.append(
            f"| compressed by | `{method['name']}` ({method['paper']}) with grasp{origin} |"
        )
    before, after = sizes
    rows.append(
        f"| parameters | {after:,}{f' ({before:,} in the checkpoint)' if before != after else ''} |"
    )
    head = [
        "---",
        f"library_name: {format if FORMATS[format].packages else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [grasp]",
        "---",
    ]
    said = [note[0].upper() + note[1:] + "." for note in notes]
    return "\n".join(
        [
            *head,
            "",
            f"# {name}",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *said,
            "",
            "## Run",
            how.format(out=name),
        ]
    )
