"""GGUF: one file for llama.cpp and what is built on it, matrices in few bits number by number.

llama.cpp's own converter writes the file from the dense form: it knows architectures, names,
tokenizers and the order of rows that llama.cpp wants. Then every tensor whose rows are rows
of a rounded matrix is written again in blocks of 32 columns, with the numbers of the checkpoint:

    Q8_0   8 bits             d, 32 q               W = d q
    Q4_0   4 bits symmetric   d, 32 q               W = d (q - 8)
    Q4_1   4 and 3 bits       d, m, 32 q            W = d q + m
    Q5_1   5 bits             d, m, 32 q            W = d q + m

where a row has one scale, or a group of 64 or 128 columns has, its blocks repeat it. d and m are in
float16. No type holds 6 bits and a minimum: these are rounded again to 8 bits (Q8_0), which adds a
sixteenth of the squared error. Which row is which is read off the file, by equal numbers; so an
order of rows that a new architecture wants needs no code here, and what is no such row stays dense.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from grasp.core.checkpoint import MAX_SHARD_SIZE
from grasp.core.decoder import Decoder
from grasp.core.edits.ordinary import dequantize, multiply_out
from grasp.core.layer import is_quantized
from grasp.core.layers.packing_grasp import (
    BITS,
    DYNAMIC,
    INTEGERS,
    SYMMETRIC,
    ZEROS,
    is_grouped,
    unpacked,
)
from grasp.core.proof import answer, can_read_gguf, can_try, compare, digits_of, loaded_again
from grasp.errors import RecipeError
from grasp.serving import dense

logger = logging.getLogger(__name__)

FILE = "model.gguf"
CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's program; its packages for macOS and Linux put it on the PATH."""
BLOCK = 32
OWN = ("general.architecture", "general.file_type")
"""Entries that are not copied but written."""
TYPES = {
    "int8": "Q8_0",
    DYNAMIC: "Q8_0",
    "int6": "Q8_0",
    "int5": "Q5_1",
    "int4": "Q4_1",
    SYMMETRIC: "Q4_0",
    "int3": "Q4_1",
}
"""Scheme -> the type of its blocks."""
DENSE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""dtype -> how the converter calls it. Vectors, and what llama.cpp wants so, are in float32."""
AGAIN = "int6"
"""The scheme that has no type."""


def find_converter(asked: Path | None) -> Path:
    """llama.cpp's converter: as asked for, or on the PATH. Raises `RecipeError`."""
    if asked is not None:
        if asked.is_dir():
            asked = asked / CONVERTER
        if not asked.is_file():
            raise RecipeError(
                f"--converter {asked}: no such file; give the {CONVERTER} of a copy of llama.cpp"
            )
        return asked
    found = shutil.which(CONVERTER)
    if found is None:
        raise RecipeError(
            f"--format gguf: needs llama.cpp's {CONVERTER}, which is not on the PATH; give a copy"
            " with --converter FILE (docs/export.md says where to get one)"
        )
    return Path(found)


def check(decoder: Decoder) -> None:
    """Raise `RecipeError` where the converter would have nothing to read words from."""
    if decoder.tokenizer is None:
        raise RecipeError(
            "--format gguf: the model has no tokenizer, which a GGUF file holds; put tokenizer.json"
            " into DIR"
        )


def notes(decoder: Decoder) -> tuple[str, ...]:
    """What becomes of pairs and of matrices in few bits, for people."""
    rounded = _rounded(decoder)
    found = [note for note in dense.notes(decoder) if note != dense.NO_PAIR]
    kinds = Counter(TYPES[module.scheme] for module in rounded.values())
    if rounded:
        each = ", ".join(f"{number} as {kind}" for kind, number in kinds.items())
        found.append(f"matrices in few bits are written in blocks of {BLOCK} columns: {each}")
    if any(module.scheme == AGAIN for module in rounded.values()):
        found.append("the format has no 6 bits with a minimum: these are rounded again to 8")
    if any(BITS[module.scheme] == 3 for module in rounded.values()):
        found.append("numbers of 3 bits take the room of 4")
    if any(is_quantized(one) and getattr(one, "of", None) for one in decoder.model.modules()):
        found.append(
            "matrices in few bits that are pairs, or narrower, are multiplied out and dense"
        )
    return tuple(found)


def write(decoder: Decoder, folder: Path, kind: str, converter: Path) -> None:
    """Write `model.gguf` to `folder`, what is not in few bits in the dtype `kind`. The model in
    memory is in float32, and then dense.
    """
    rows = Rows(_rounded(decoder), getattr(torch, kind))
    name = Path(decoder.source or "model").name  # the file tells it
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch:
        plain, wide = Path(scratch) / "dense" / name, Path(scratch) / FILE
        dequantize(decoder)
        multiply_out(decoder)
        decoder.model.save_pretrained(plain, max_shard_size=MAX_SHARD_SIZE)
        if decoder.tokenizer is not None:  # see `check`
            decoder.tokenizer.save_pretrained(plain)
        _convert(converter, plain, wide, DENSE[kind])
        shutil.rmtree(plain)
        missing = rows.paths - write_again(wide, folder / FILE, rows)
    if missing:
        logger.warning(
            "%d of %d matrices in few bits are in %s in the file, which orders their numbers in"
            " another way (%s)",
            *(len(missing), len(rows.paths), kind, ", ".join(sorted(missing)[:3])),
        )


def prove(decoder: Decoder, said: Tensor, folder: Path, out: Path, kind: str) -> None:
    """Raise `CheckpointError` where transformers, where it reads GGUF files of this architecture,
    does not read the model. Scales are in float16, and 6 bits rounded again, so digits are those of
    bfloat16.
    """
    if not can_read_gguf(decoder) or not can_try("gguf", "accelerate"):
        return
    digits = max(digits_of(getattr(torch, kind)), digits_of(torch.bfloat16))
    compare(said, answer(loaded_again(decoder, folder / FILE, out)), digits, out)


def how_to_run(_kind: str) -> str:
    """For the README beside the model: `str.format` with `out`."""
    return """
```
llama-cli -m {out}/model.gguf -p "The capital of France is" -n 16
```

Any program that is built on llama.cpp reads the file, and so does transformers, which makes it
dense in memory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}", gguf_file="model.gguf")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```
"""


# --- blocks


def blocks(module: Any) -> UInt8[ndarray, "rows bytes"]:
    """The rows of a matrix in few bits, in blocks."""
    import gguf

    rows, columns = module.shapes["weight"]
    if module.scheme == AGAIN:
        matrix = module.dequantized("weight").detach().float().numpy()
        return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[TYPES[AGAIN]])
    bits, number = BITS[module.scheme], columns // BLOCK
    whole = unpacked(getattr(module, "weight" + INTEGERS), module.scheme, columns)
    numbers = whole.unflatten(1, (number, BLOCK)).numpy()
    size = module.group_size if is_grouped(module.scheme) else columns
    group = torch.arange(number) * BLOCK // size
    scale = module.weight.detach().float()
    parts = [_halves(scale[:, group])]
    if TYPES[module.scheme].endswith("_1"):
        zero = getattr(module, "weight" + ZEROS).detach().float()
        parts.append(_halves((zero - 2 ** (bits - 1) * scale)[:, group]))
    parts.extend(_integers(numbers, TYPES[module.scheme]))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _halves(values: Float[Tensor, "rows blocks"]) -> UInt8[ndarray, "rows blocks 2"]:
    return values.half().numpy()[..., None].view(np.uint8)


def _integers(
    numbers: Int[ndarray, "rows blocks 32"], kind: str
) -> Iterator[UInt8[ndarray, "rows blocks bytes"]]:
    """What lies behind the scales: where there are 5 bits the fifth ones first, then column j in
    the low half of byte j, column j + 16 in the high.
    """
    if kind == "Q8_0":
        yield numbers.view(np.uint8)
        return
    if kind == "Q5_1":
        yield np.packbits(numbers >> 4, axis=-1, bitorder="little")
    low, high = np.split(numbers & 15, 2, axis=-1)
    yield low | (high << 4)


class Rows:
    """Finds rows of matrices in few bits by their numbers, which are dense in `dtype`."""

    def __init__(self, modules: dict[str, Any], dtype: torch.dtype):
        self.modules = {
            path: module
            for path, module in modules.items()
            if module.shapes["weight"][1] % BLOCK == 0
            and (not is_grouped(module.scheme) or module.group_size % BLOCK == 0)
        }
        self.paths = set(modules)
        self._found: dict[bytes, list[tuple[str, int]]] = {}
        for path, module in self.modules.items():
            matrix = module.dequantized("weight").detach().to(dtype).float().numpy()
            for row, mark in enumerate(_marks(matrix)):
                self._found.setdefault(mark, []).append((path, row))

    def of(
        self, matrix: Float[ndarray, "rows columns"]
    ) -> tuple[str, list[tuple[str, int]]] | None:
        """(type, [(path, row)]) of a matrix all of whose rows are in few bits, of one type."""
        each = list[dict[str, tuple[str, int]]]()
        for mark in _marks(matrix):
            if mark not in self._found:
                return None
            each.append({TYPES[self.modules[one[0]].scheme]: one for one in self._found[mark]})
        shared = set.intersection(*map(set, each)) if each else set()
        return (kind, [one[kind] for one in each]) if (kind := min(shared, default="")) else None

    def whole(self, written: set[tuple[str, int]]) -> set[str]:
        """The paths all of whose rows, or equal ones, are among those that were written."""
        lost = {
            path
            for places in self._found.values()
            if written.isdisjoint(places)
            for path, _ in places
        }
        return self.modules.keys() - lost


def _marks(matrix: Float[ndarray, "rows columns"]) -> Iterator[bytes]:
    for row in np.ascontiguousarray(matrix):
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _rounded(decoder: Decoder) -> dict[str, Any]:
    """Path -> matrix in few bits that is no pair; one that two modules share is there once."""
    found, seen = dict[str, Any](), set()
    for path, module in decoder.model.named_modules():
        one: Any = module
        if is_quantized(module) and getattr(one, "of", None) is None and one.weight not in seen:
            seen.add(one.weight)
            found[path] = one
    return found


# --- the file


def _convert(converter: Path, plain: Path, file: Path, kind: str) -> None:
    words = [sys.executable, str(converter), str(plain), "--outfile", str(file), "--outtype", kind]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode != 0 or not file.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise RecipeError(
            f"--converter {converter}: it ended with status {done.returncode} ({said[-1].strip()});"
            " it takes the architectures and tokenizers that llama.cpp knows"
        )


def write_again(source: Path, target: Path, rows: Rows) -> set[str]:
    """Copy a GGUF file, with matrices of `rows` in their blocks. Returns the paths whose rows are
    all there.
    """
    import gguf

    read = gguf.GGUFReader(source)
    plan = [(tensor, *_blocked(tensor, rows)) for tensor in read.tensors]
    written = gguf.GGUFWriter(target, read.fields["general.architecture"].contents())
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in OWN:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            written.add_key_value(field.name, field.contents(), field.types[0], sub)
    sizes = Counter[str]()
    for tensor, kind, _ in plan:
        sizes[kind.name] += int(tensor.n_elements)
        shape = gguf.quant_shape_to_byte_shape([int(n) for n in reversed(tensor.shape)], kind)
        written.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), kind)
    most = max(sizes, key=lambda name: sizes[name])
    written.add_file_type(gguf.LlamaFileType[f"{'ALL' if most == 'F32' else 'MOSTLY'}_{most}"])
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_ti_data_to_file()
    for tensor, _, found in plan:
        made = {path: blocks(rows.modules[path]) for path in {path for path, _ in found}}
        written.write_tensor_data(
            np.stack([made[path][row] for path, row in found]) if found else tensor.data
        )
    written.close()
    return rows.whole({place for _, _, found in plan for place in found})


def _blocked(tensor: Any, rows: Rows) -> tuple[Any, list[tuple[str, int]]]:
    """The type that a tensor of a file gets, and its rows where these are in few bits."""
    import gguf

    if len(tensor.shape) == 2:
        found = rows.of(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if found is not None:
            return gguf.GGMLQuantizationType[found[0]], found[1]
    return tensor.tensor_type, []
