"""Experts that are kept one by one, in one tensor a matrix again: what an ordinary checkpoint of
the architecture holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grasp.core.edits.widening import whole
from grasp.core.layers.experts_grasp import MATRICES, SplitExperts
from grasp.core.layers.reading_grasp import record_of


@torch.no_grad()
def joined(apart: SplitExperts, fused: Any) -> Any:
    """The empty module `fused` with the numbers of experts that are apart, pairs multiplied out."""
    for name, parameter in MATRICES.items():
        linears: list[Any] = [getattr(expert, name) for expert in apart.split]
        found = [whole(one) if record_of(one) else (one.weight, one.bias) for one in linears]
        matrices = [matrix.T if fused.is_transposed else matrix for matrix, _ in found]
        setattr(fused, parameter, nn.Parameter(torch.stack(matrices), requires_grad=False))
        biases = [bias for _, bias in found if bias is not None]
        if biases:
            together = nn.Parameter(torch.stack(biases), requires_grad=False)
            setattr(fused, f"{parameter}_bias", together)
    return fused.train(apart.training)
