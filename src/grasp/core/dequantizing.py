"""A model that is already quantized, by whatever tool -> an ordinary one, to be looked into or
compressed.

What rounding lost stays lost: the weights are the rounded ones. Each format needs the package that
wrote it, and some cannot be undone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from grasp.core.decoder import Decoder
from grasp.core.edits.ordinary import dequantize, strip_quantization_marks
from grasp.core.layer import is_quantized
from grasp.core.layers.modeling_grasp import NAMES
from grasp.errors import ModelError

logger = logging.getLogger(__name__)

WAY_OUT = "give the model it was made from"


def method_of(written: Any) -> str:
    """The name of the quantization method in a config's `quantization_config` (a dict or an
    object).
    """
    found = (
        written.get("quant_method")
        if isinstance(written, dict)
        else getattr(written, "quant_method", None)
    )
    return str(getattr(found, "value", found) or "bitsandbytes")


def dequantizing(config: Any) -> dict[str, Any]:
    """Options for `from_pretrained` that dequantise while loading, where transformers can do that
    for the model's format.
    """
    written = getattr(config, "quantization_config", None)
    if not isinstance(written, dict):
        return {}
    try:
        made = AutoQuantizationConfig.from_dict(dict(written))
    except ValueError:  # transformers does not know the method, and will say so
        return {}
    if method_of(written) in NAMES or not hasattr(made, "dequantize"):
        return {}
    made.dequantize = True
    return {"quantization_config": made}


def ordinary(decoder: Decoder, written: Any, dtype: torch.dtype | None) -> None:
    """Make what was loaded an ordinary model, with a warning. Raises `ModelError` where its format
    cannot be undone.
    """
    model, method = decoder.model, method_of(written)
    if method in NAMES:
        modules: list[Any] = [module for module in model.modules() if is_quantized(module)]
        if not modules:
            return
        method = f"grasp quantize ({', '.join(sorted({module.scheme for module in modules}))})"
        dequantize(decoder)
    else:
        _undo(decoder, method)
        strip_quantization_marks(model)
        # saving would undo them all, and those of a quantizer cannot be undone
        read_by = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            c
            for c in read_by
            if not any(getattr(op, "hf_quantizer", None) for op in getattr(c, "operations", ()))
        ]
    if dtype is not None:
        model.to(dtype)
    name = str(model.dtype).removeprefix("torch.")
    logger.warning(
        "%s: already quantized (%s). It is dequantised to %s: the weights are the rounded ones,"
        " nothing that rounding lost comes back, and what is saved may be larger than the quantized"
        " files",
        decoder.source,
        method,
        name,
    )


def _undo(decoder: Decoder, method: str) -> None:
    model = decoder.model
    packed = {
        name: p
        for name, p in model.named_parameters()
        if type(p.data).__module__.startswith("torchao")
    }
    for name, parameter in packed.items():
        owner, _, last = name.rpartition(".")
        dense = parameter.data.dequantize().to(model.dtype)
        setattr(model.get_submodule(owner), last, nn.Parameter(dense, requires_grad=False))
    if packed or _is_plain(model):
        return
    try:
        decoder.model = model.dequantize()
    except (NotImplementedError, ValueError, RuntimeError, ImportError) as failure:
        raise ModelError(
            f"MODEL {decoder.source}: is quantized with {method}, which cannot be dequantised here"
            f" ({' '.join(str(failure).split())[:120]}); {WAY_OUT}"
        ) from failure


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether every parameter is an ordinary float one and every linear an ordinary linear:
    transformers dequantised while loading.
    """
    floats = all(
        type(p.data) is torch.Tensor and p.is_floating_point() and p.dtype.itemsize > 1
        for p in model.parameters()
    )
    return floats and all(
        type(m).__module__.startswith(("torch.", "transformers.", "grasp."))
        for m in model.modules()
    )
