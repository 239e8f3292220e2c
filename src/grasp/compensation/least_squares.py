"""A closed-form start: output factors that give the dense outputs best, in the least-squares sense,
on the compressed model's own inputs.

For a pair (B, A) in the place of W, with x the inputs that the compressed model itself produces and
z = Ax:

    B* = argmin sum |Wx - Bz|^2 = B + (sum (Wx - Bz) z') (sum z z' + e I)^-1

First layer to last, and in a layer in order of use, since every solution changes the inputs of what
follows. (All at once is worse than nothing: smollm2, 9 layers, divergence from the dense model 1.62
before, 3.96 after.) Only sums of size (rank, rank) and (out, rank) are kept. A pivoted pair
reproduces `rank` of the outputs exactly, as A gives them; the others are solved for in the same
way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.edits import EditLog
from grasp.core.layer import matrix_in
from grasp.core.progress import Progress
from grasp.data.rows import Collate, Rows, read_by_model
from grasp.errors import NumericsError

logger = logging.getLogger(__name__)

RIDGE = 1e-4
"""e, as a share of the mean diagonal of sum z z': directions that the text hardly uses stay as they
are.
"""


@dataclass(frozen=True)
class Pair:
    """A low-rank pair of the compressed model and the dense matrix W (out, in) in whose place it
    is.
    """

    path: str
    layer: int
    module: Any
    dense: Tensor


def pairs_of(decoder: Decoder, teacher: Decoder, log: EditLog) -> list[Pair]:
    """Every pair, in order of use. `log`: the edits that made the decoder of the teacher.

    Pairs on narrowed matrices are left out, with a notice: the teacher's are of another shape.
    """
    found, others, origin, ranks = [], 0, log.left, log.ranks()
    for index, layer in enumerate(decoder.stack):
        dense = teacher.layer(origin[index]).linears
        for _, name in decoder.family.matrices:
            path = f"{decoder.family.layers}.{index}.{name}"
            module: Any = matrix_in(layer, name)
            if not ranks.get(path) or not module.weight.numel():
                continue
            if (module.out_features, module.in_features) != dense[name].shape:
                others += 1
                continue
            found.append(Pair(path, index, module, dense[name].weight))
    if others:
        logger.warning(
            "least squares: %d pairs are of narrowed matrices, whose outputs the dense model does"
            " not give; they start as they are",
            others,
        )
    return found


@torch.no_grad()
def least_squares(
    decoder: Decoder,
    pairs: Sequence[Pair],
    rows: Rows,
    collate: Collate,
    *,
    batch: int,
    progress: Progress,
) -> dict[str, float]:
    """Refit the output factor of every pair on `rows`. Returns, per pair, which share of its
    squared output error is left.

    Raises `NumericsError` where a factor would not be finite.
    """
    left: dict[str, float] = {}
    batches = [
        collate([rows[index] for index in range(first, min(first + batch, len(rows)))])
        for first in range(0, len(rows), batch)
    ]
    for index in sorted({pair.layer for pair in pairs}):
        seen = [_inputs_of(decoder, decoder.stack[index], found) for found in batches]
        for pair in pairs:
            if pair.layer == index:
                progress("least squares", len(left), len(pairs))
                left[pair.path] = _refit(decoder.stack[index], pair, seen)
    progress("least squares", len(pairs), len(pairs))
    return left


class _Reached(Exception):
    """The layer was reached: what follows need not run."""


@dataclass(frozen=True)
class _Seen:
    """What a layer is called with, and which of the positions (batch, seq) are real."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    real: Tensor


def _inputs_of(decoder: Decoder, layer: nn.Module, batch: Mapping[str, Tensor]) -> _Seen:
    """Run the model up to `layer`."""
    found = {name: tensor.to(decoder.device) for name, tensor in batch.items()}
    caught: list[Any] = []

    def catch(_module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.extend((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        decoder.model.base_model(**read_by_model(found), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    real = (
        torch.arange(found["input_ids"].shape[1], device=decoder.device) < found["length"][:, None]
    )
    return _Seen(caught[0], caught[1], real)


def _refit(layer: nn.Module, pair: Pair, seen: Sequence[_Seen]) -> float:
    """Solve for the output factor of one pair. Returns the share of squared error that is left."""
    module = pair.module
    # the outputs that the rows of B give
    order = module.places.long().argsort()[module.rank :] if module.pivoted else slice(None)
    dense = pair.dense.float()[order]
    inner_factor = module.weight_in.float()
    factor = module.weight.float()
    # sum z z'
    gram = torch.zeros(module.rank, module.rank, dtype=torch.float64, device=dense.device)
    # sum (Wx - Bz) z'
    missing = torch.zeros(len(dense), module.rank, dtype=torch.float64, device=dense.device)
    error = 0.0
    for call in seen:
        x = _input_of(layer, module, call)  # tokens, in
        inner = x @ inner_factor.T  # tokens, rank
        rest = x @ dense.T - inner @ factor.T  # tokens, rows of B
        gram += (inner.T @ inner).double()
        missing += (rest.T @ inner).double()
        error += float(rest.square().sum())
    ridge = (
        RIDGE
        * gram.diagonal().mean().clamp_min(1e-30)
        * torch.eye(module.rank, dtype=gram.dtype, device=gram.device)
    )
    change = torch.linalg.solve(gram + ridge, missing.T).T  # rows of B, rank
    if not bool(torch.isfinite(change).all()):
        raise NumericsError(
            f"--start least-squares: '{pair.path}' has no finite solution; use --start keep"
        )
    module.weight.add_(change.to(module.weight.dtype))
    gained = 2 * (change * missing).sum() - ((change @ gram) * change).sum()
    return 1 - float(gained) / max(error, 1e-30)


def _input_of(layer: nn.Module, module: nn.Module, call: _Seen) -> Tensor:
    """What `module` reads at the real positions when the layer is called so: (tokens, in)."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        layer(*call.args, **call.kwargs)
    finally:
        handle.remove()
    return caught[0].reshape(*call.real.shape, -1)[call.real].float()
