"""A model without anything of ours in it: dense matrices in the place of pairs and of few bits.

These are no edits: they belong to opening and exporting a model, and nothing is logged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grasp.core.decoder import Decoder
from grasp.core.edits.placing import sync
from grasp.core.layer import is_low_rank, is_quantized
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.layers.modeling_grasp import plain_class
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.core.layers.structure_grasp import made, structure_of
from grasp.errors import ModelError


@torch.no_grad()
def multiply_out(decoder: Decoder) -> int:
    """Put dense matrices in the place of all low-rank pairs, products taken in float32 and kept in
    the pair's dtype; returns how many.

    The model is then one of its original class, with nothing of grasp in it. Layers that were
    dropped stay dropped.
    """
    model = decoder.model
    kinds = {path: record["kind"] for path, record in structure_of(model).items()}
    if odd := next((path for path, kind in kinds.items() if kind != "low-rank"), None):
        raise ModelError(
            f"'{odd}' is of the kind '{kinds[odd]}', which has no place in an ordinary model; load"
            " the checkpoint with `import grasp`, or with trust_remote_code=True"
        )
    pairs = {path: module for path, module in model.named_modules() if is_low_rank(module)}
    model.__class__ = plain_class(type(model))
    strip_quantization_marks(model)
    with torch.device("meta"):
        # says which kind of module stood there: GPT-2 stores its matrices (in, out)
        original = type(model)(model.config)
    for path, pair in pairs.items():
        dense, dtype = original.get_submodule(path), pair.weight.dtype
        pair.joint = None
        product = pair.float().product().to(dtype)
        stored = product if isinstance(dense, nn.Linear) else product.T.contiguous()
        dense.weight = nn.Parameter(stored, requires_grad=False)
        if pair.bias is not None:
            dense.bias = nn.Parameter(pair.bias.to(dtype), requires_grad=False)
        model.set_submodule(path, dense)
    return len(pairs)


def strip_quantization_marks(model: Any) -> None:
    """Make a dequantised or multiplied-out model an ordinary one: transformers will not save it as
    such while it bears these marks.
    """
    for holder in (model, model.config):
        for mark in (
            "hf_quantizer",
            "quantization_method",
            "quantization_config",
            "_is_quantized",
            "auto_map",
        ):
            if mark in holder.__dict__:
                delattr(holder, mark)
    model.is_quantized = False


@torch.no_grad()
def dequantize(decoder: Decoder) -> None:
    """Make every quantized linear and pair an ordinary one again, in the dtype of its scales. What
    rounding lost stays lost.
    """
    for path, module in [pair for pair in decoder.model.named_modules() if is_quantized(pair[1])]:
        old: Any = module
        new: Any = _empty(old)
        if old.of is not None:
            new = made(path, new, old.of).to_empty(device=old.weight.device)
        for name in old.shapes:
            dense = old.dequantized(name)
            getattr(new, name).copy_(dense if isinstance(new, nn.Linear) else dense.T)
        for name in ("bias", "places"):
            if getattr(old, name) is not None:
                getattr(new, name).copy_(getattr(old, name))
        decoder.model.set_submodule(path, new.eval())
    fuse(decoder.model)
    sync(decoder)


def _empty(module: QuantizedLinear) -> Any:
    """An unfilled module of the class that a quantized dense matrix stands for: `nn.Linear`, or
    GPT-2's `Conv1D` (out, in).
    """
    with torch.device(module.weight.device):
        if issubclass(module.replaced, torch.nn.Linear):
            new: Any = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
        else:
            new = module.replaced(module.out_features, module.in_features)
    return new.to(module.weight.dtype).requires_grad_(False)
