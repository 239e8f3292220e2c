"""In which precision a device computes fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from grasp.core.layers.low_rank_grasp import fuse

if TYPE_CHECKING:
    from grasp.core.decoder import Decoder


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are faster than in float32 on `device`.

    Processors without units for it compute them some five times slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: Mapping[str, object] = (
        getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    )
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16"))


def to_16_bits(decoder: Decoder) -> None:
    """Let weights in 32 bits be bfloat16. Buffers stay: what is computed from positions is exact,
    as in a model that is loaded so.
    """
    for layer in decoder.layers():
        with decoder.changing(layer.module):
            _cast(layer.module)
            fuse(layer.module)  # as loading does
    _cast(decoder.model)
    if decoder.model.config.dtype == torch.float32:
        decoder.model.config.dtype = torch.bfloat16


def _cast(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
