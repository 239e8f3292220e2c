"""compressed-tensors: an ordinary checkpoint whose rounded linears are stored as transformers (with
the package compressed-tensors) and vLLM read them, so that servers use kernels of their own.

Number by number what the checkpoint holds; what the format has no words for is refused
(`grasp.core.compressed_tensors`). A linear PATH (rows, columns) is written as

    8 and 4 bits   PATH.weight_packed  int32 (rows, ceil(columns bits / 32)): q + 2^(bits - 1), the
                                       first column in the lowest bits (pack-quantized)
                   PATH.weight_shape   int64 (2): rows, columns
    8 bits dynamic PATH.weight         int8 (rows, columns): q (int-quantized)
    all            PATH.weight_scale   float (rows, 1), or (rows, columns / group_size) in 4 bits

and W = scale q. Embedding and head are dense.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from grasp.core.checkpoint import MAX_SHARD_SIZE
from grasp.core.compressed_tensors import COMPRESSED_TENSORS, GROUPS, alike, divisors
from grasp.core.decoder import Decoder
from grasp.core.edits.ordinary import hold
from grasp.core.layer import is_quantized
from grasp.core.layers.embedding_grasp import QuantizedEmbedding, QuantizedHead
from grasp.core.layers.packing_grasp import BITS, DYNAMIC, INTEGERS, SYMMETRIC, has_zeros
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.core.proof import ROUNDED, answer, can_try, compare, digits_of, loaded_again
from grasp.core.sayable import check_sayable
from grasp.errors import RecipeError

FLAG = f"--format {COMPRESSED_TENSORS}"
ROUND = f"`grasp quantize --layout {COMPRESSED_TENSORS}`"
PACK, INT = "pack-quantized", "int-quantized"
"""Names that the format has for how numbers lie in the file."""
Kind = tuple[str, int]
"""(scheme, group size) of a matrix; the size is 0 where a row has one scale."""


def check(decoder: Decoder) -> None:
    """Raise `RecipeError` where the format cannot hold the model as it is."""
    check_sayable(decoder, FLAG, "use --format dense, or serve DIR with grasp's plug-in for vLLM")
    linears = _rounded(decoder)
    if not linears:
        raise RecipeError(f"{FLAG}: nothing in DIR is rounded; {ROUND} does that")
    for path, module in linears.items():
        _check_matrix(path, module)
    names = [path for path, one in decoder.model.named_modules() if isinstance(one, nn.Linear)]
    for group in alike(names):
        kinds = {path: str(_kind_of(linears[path])) for path in group if path in linears}
        if len({kinds.get(path, "") for path in group}) > 1:
            first, other = group[0], next(p for p in group if kinds.get(p) != kinds.get(group[0]))
            raise RecipeError(
                f"{FLAG}: '{first}' and '{other}' are not stored alike, and servers multiply them"
                f" as one; round with {ROUND}, or with `grasp compress --size` and that flag"
            )


def _check_matrix(path: str, module: QuantizedLinear) -> None:
    bits, size = BITS[module.scheme], module.group_size
    if has_zeros(module.scheme):
        what = "4 bits with minima" if bits == 4 else f"{bits} bits"
        raise RecipeError(
            f"{FLAG}: '{path}' has {what}, and servers have kernels for 8 bits and for 4 without"
            f" minima; round the model that DIR was made from with {ROUND}"
        )
    if module.scheme == SYMMETRIC and size not in divisors(module.columns):
        raise RecipeError(
            f"{FLAG}: '{path}' has groups of {size} in {module.columns} columns, and servers want"
            f" {', '.join(map(str, GROUPS))}, a divisor of the columns; round the model that DIR"
            f" was made from with {ROUND}"
        )


def notes(decoder: Decoder) -> tuple[str, ...]:
    """What becomes of what is not in the layers, for people."""
    ends = (QuantizedEmbedding, QuantizedHead)
    found = []
    if any(isinstance(module, ends) for module in decoder.model.modules()):
        found.append("embedding and output layer are dense again, with the rounded numbers")
    if decoder.model.dtype == torch.float32:
        found.append(
            "scales and dense matrices are in float32, which servers round to 16 bits; `grasp"
            " quantize --dtype bfloat16` stores what they compute with"
        )
    return tuple(found)


def write(decoder: Decoder, folder: Path, _kind: str) -> None:
    """Write config and safetensors to `folder`, as `check` allows. The modules in memory then hold
    the written tensors.
    """
    linears = _rounded(decoder)
    kinds = {path: _kind_of(module) for path, module in linears.items()}
    hold(decoder, {path: tensors(module) for path, module in linears.items()})
    model: Any = decoder.model
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.config.quantization_config = config(kinds, dense)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


def prove(decoder: Decoder, said: Tensor, folder: Path, out: Path, kind: str) -> None:
    """Raise `CheckpointError` where what was written, read again where the package is installed, is
    not the model. Where activations are rounded too, readers do that with scales of their own
    (compressed-tensors: the largest is 127.5, not 127).
    """
    if not can_try(COMPRESSED_TENSORS, "compressed_tensors"):
        return
    rounds_inputs = any(one.dtype == torch.int8 for one in decoder.model.parameters())
    with contextlib.redirect_stderr(io.StringIO()):  # the package's bars heed no setting
        heard = answer(loaded_again(decoder, folder, out))
    compare(said, heard, ROUNDED if rounds_inputs else digits_of(getattr(torch, kind)), out)


def tensors(module: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that a linear is written as, by name."""
    found = {"weight_scale": module.weight.detach()}
    if module.bias is not None:
        found["bias"] = module.bias.detach()
    stored = getattr(module, "weight" + INTEGERS).detach()
    if module.scheme == DYNAMIC:
        return found | {"weight": stored}
    whole = stored.view(torch.uint8) ^ 128 if BITS[module.scheme] == 8 else stored
    shape = torch.tensor([module.rows, module.columns])
    return found | {"weight_packed": in_words(whole), "weight_shape": shape}


def in_words(numbers: UInt8[Tensor, "rows bytes"]) -> Int32[Tensor, "rows words"]:
    """Bytes of whole numbers, the first in the lowest bits, in words of 32 bits likewise."""
    room = -numbers.shape[1] % 4
    return nn.functional.pad(numbers, (0, room)).contiguous().view(torch.int32)


def config(kinds: Mapping[str, Kind], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` for linears by path, and those that stay dense."""
    groups = {
        f"group_{number}": _group(kind, [path for path in kinds if kinds[path] == kind])
        for number, kind in enumerate(dict.fromkeys(kinds.values()))
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
    }


def _group(kind: Kind, targets: list[str]) -> dict[str, Any]:
    scheme, size = kind
    grouped = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    number = {"type": "int", "symmetric": True}
    dynamic = scheme == DYNAMIC
    inputs = {"num_bits": 8, **number, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": {"num_bits": BITS[scheme], **number, **grouped, "dynamic": False},
        "input_activations": inputs if dynamic else None,
        "output_activations": None,
        "format": INT if dynamic else PACK,
    }


def _rounded(decoder: Decoder) -> dict[str, QuantizedLinear]:
    """Path -> linear in few bits, of the layers."""
    return {
        path: module
        for path, module in decoder.model.named_modules()
        if is_quantized(module)
        and isinstance(module, QuantizedLinear)
        and not isinstance(module, QuantizedHead)
    }


def _kind_of(module: QuantizedLinear) -> Kind:
    return module.scheme, module.group_size if module.scheme == SYMMETRIC else 0


def how_to_run(_kind: str) -> str:
    """For the README beside the model: `str.format` with `out`."""
    return """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```

It needs `pip install compressed-tensors`, and nothing of grasp. vLLM serves it without either:

```
vllm serve {out}
```
"""
