"""What slicing does to the numbers of a model, and which models it suits.

Between two blocks of a pre-norm decoder (attention, MLP) the hidden states x (d) meet three things:
the norm of the next block, whose outputs only matrices read; matrices that add to them; and the
sum itself. With orthonormal columns Q (d, w), states z = Q'x (w) can stand in their place:

1. The norm's weight goes into the matrices that read it, `W diag(weight) Q`, its bias into
   theirs. What is left of it divides by the root of the mean square, which no rotation changes
   (`RootNorm`).
2. A LayerNorm subtracts the mean too. That is a product with M = I - 11'/d, which goes to where
   the states come from. There Q is T = MQ.
3. What writes becomes `T'W`, `T'b`; embeddings become `E T`.
4. The sum goes on in the next basis: the shortcut of a block is Q' T of the next.

With w = d and exact arithmetic nothing changes, up to norms whose eps matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.families import FAMILIES, Ends, Family
from grasp.core.layer import is_dense
from grasp.core.layers.reading_grasp import features
from grasp.core.layers.sliced_grasp import Record, eps_of
from grasp.core.layers.structure_grasp import structure_of
from grasp.errors import ModelError, RecipeError

ATTENTION, MLP, HEAD = "attention", "mlp", "head"
"""Whose norm reads the states that are sliced."""


class Place(NamedTuple):
    """Where states are sliced: in front of a block of layer `layer`, or behind it, the last one, in
    front of the head.
    """

    layer: int
    block: str


@dataclass(frozen=True)
class Norm:
    """What a norm does: `scale * (x - mean if centred) / sqrt(mean square + eps) + shift`."""

    scale: Float[Tensor, "d"]
    shift: Float[Tensor, "d"] | None
    eps: float
    centred: bool


def norm_of(module: Any) -> Norm:
    """What a norm does, its numbers in float64. Raises `ModelError` for one of another kind."""
    if isinstance(module, nn.LayerNorm):
        size = module.normalized_shape[0]
        scale = torch.ones(size) if module.weight is None else module.weight
        shift = None if module.bias is None else module.bias.detach().double()
        return Norm(scale.detach().double(), shift, eps_of(module), True)
    weight, eps = module.weight.detach(), eps_of(module)
    said = module(torch.ones_like(weight)[None])[0].double()
    for scale in (weight.double(), 1 + weight.double()):  # Gemma's weights are differences from 1
        if torch.allclose(said, scale / (1 + eps) ** 0.5, rtol=0.02, atol=0.01):
            return Norm(scale, None, eps, False)
    raise ModelError(f"the norm {type(module).__name__} does more than scale: it cannot be folded")


def norm_module(decoder: Decoder, place: Place) -> Any:
    """The norm that reads the states at `place`."""
    if place.block == HEAD:
        return decoder.model.get_submodule(ends_of(decoder).norm)
    norms = decoder.family.norms
    path = norms.attention if place.block == ATTENTION else norms.mlp
    return decoder.layer(place.layer).module.get_submodule(path)


def places(decoder: Decoder) -> list[Place]:
    """Where states can be sliced, first to last."""
    names = [ATTENTION] if is_parallel(decoder) else [ATTENTION, MLP]
    found = [Place(layer, name) for layer in decoder.kept for name in names]
    return [*found, Place(decoder.kept[-1], HEAD)]


def is_parallel(decoder: Decoder) -> bool:
    """Whether attention and MLP of a layer read the same states, as GPT-NeoX's."""
    return bool(getattr(decoder.config, "use_parallel_residual", False))


def ends_of(decoder: Decoder) -> Ends:
    """The ends of a model that `check_sliceable` has passed."""
    assert decoder.family.ends is not None
    return decoder.family.ends


def tables(decoder: Decoder) -> list[str]:
    """Paths of the embeddings whose sum is what the first layer reads."""
    ends = ends_of(decoder)
    return [path for path in (ends.embedding, ends.positions) if path]


def vocabulary_rows(decoder: Decoder) -> int:
    """Of the embeddings and of the head, which are made anew beside the old ones."""
    model: Any = decoder.model
    paths = [*tables(decoder), ends_of(decoder).head]
    return sum(len(model.get_submodule(path).weight) for path in paths)


def layer_record(decoder: Decoder) -> Record:
    """The record of a layer of this model, nothing of it sliced yet (`SlicedLayer`)."""
    family = decoder.family
    attention, mlp = (
        {
            "norm": norm,
            "run": list(steps) or [family.path(writes).rpartition(".")[0]],
            "reads": list(dict.fromkeys(path for role in reads for path in family.holding(role))),
            "writes": family.path(writes),
        }
        for norm, steps, reads, writes in (
            (family.norms.attention, (), "qkv", "o"),
            (family.norms.mlp, family.mlp_steps, ("gate", "up"), "down"),
        )
    )
    blocks = [[attention, mlp]] if is_parallel(decoder) else [[attention], [mlp]]
    record = {"kind": "sliced", "part": "layer", "hidden": decoder.config.hidden_size}
    return {**record, "blocks": blocks, "widths": [None] * (len(blocks) + 1)}


def check_sliceable(decoder: Decoder) -> None:
    """Raise `ModelError` where the hidden size of a model cannot be sliced, with the reason."""
    family, config = decoder.family, decoder.config
    if family.ends is None or config.model_type not in _known():
        raise ModelError(
            f"the hidden size of {family.name} cannot be sliced: where its norms, embeddings and"
            " head are is not known (a row in src/grasp/core/families.py says it)"
        )
    if structure_of(decoder.model):
        raise ModelError(
            "the hidden size cannot be sliced of a model with modules of grasp's in it; slice the"
            " one it was made from"
        )
    if reason := next(_reasons(decoder, family), ""):
        raise ModelError(f"the hidden size of {family.name} cannot be sliced: {reason}")


def check_unsliced(decoder: Decoder, why: str) -> None:
    """Raise `ModelError`, saying `why`, where the hidden size of the model was sliced."""
    if any(record["kind"] == "sliced" for record in structure_of(decoder.model).values()):
        raise ModelError(f"MODEL {decoder.source}: its hidden size was sliced, so {why}")


def _known() -> set[str]:
    return {name for family in FAMILIES for name in family.model_types}


def _reasons(decoder: Decoder, family: Family) -> Iterator[str]:
    """Why a model does not suit; none where it does."""
    ends, config = ends_of(decoder), decoder.config
    if family.norms.after:
        yield (
            "its norms stand behind attention and MLP, where their weights meet the sum, not a"
            " matrix, and do not commute with a rotation"
        )
    if not getattr(config, "do_layer_norm_before", True):
        yield "its norms stand behind the sums (do_layer_norm_before is false)"
    if any(_there(decoder, path) is not None for path in ends.between):
        yield "matrices stand between its embedding and its layers"
    if getattr(config, "add_cross_attention", False):
        yield "it has cross-attention"
    for path in (*tables(decoder), ends.norm, ends.head):
        if _there(decoder, path) is None:
            yield f"it has no '{path}'"
    head = _there(decoder, ends.head)
    if not isinstance(head, nn.Linear):
        yield f"its head is no linear, but {type(head).__name__}"
    if not _scales(_there(decoder, ends.norm)):
        yield f"'{ends.norm}' is no norm with a weight"
    yield from _reasons_in_layers(decoder, family)


def _reasons_in_layers(decoder: Decoder, family: Family) -> Iterator[str]:
    if family.experts is not None:
        yield f"'{family.experts.path}' holds its experts in one tensor, which cannot be sliced yet"
    for layer in decoder.layers():
        for path in (one for _, one in family.matrices if one not in layer.linears):
            yield f"layer {layer.index} has no dense matrix '{path}'"
        for path in (family.norms.attention, family.norms.mlp):
            if not _scales(getattr(layer.module, path, None)):
                yield f"layer {layer.index} has no norm '{path}' with a weight"


def _scales(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) or isinstance(getattr(norm, "weight", None), Tensor)


def _there(decoder: Decoder, path: str) -> Any:
    try:
        return decoder.model.get_submodule(path)
    except AttributeError:
        return None


def sliced_parameters(decoder: Decoder, width: int, head_width: int) -> int:
    """Numbers that a model stores, every place sliced to `width` and that before the head to
    `head_width`; from shapes alone. The shortcuts and a head of its own are numbers too.
    """
    model: Any = decoder.model
    hidden, total = decoder.config.hidden_size, decoder.num_parameters()
    embeddings = [model.get_submodule(path) for path in tables(decoder)]
    head = model.get_submodule(ends_of(decoder).head)
    if head.weight is embeddings[0].weight:
        total += head.weight.numel()
    total += sum(len(table.weight) * (width - hidden) for table in embeddings)
    blocks = layer_record(decoder)["blocks"]
    for layer in decoder.kept:
        module = decoder.layer(layer).module
        for number, branches in enumerate(blocks):
            last = layer == decoder.kept[-1] and number == len(blocks) - 1
            behind = head_width if last else width
            total += width * behind
            for branch in branches:
                norm: Any = module.get_submodule(branch["norm"])
                for path in branch["reads"]:
                    total += _read(module.get_submodule(path), norm, width - hidden)
                writer: Any = module.get_submodule(branch["writes"])
                rows = features(writer)[0] + (writer.bias is not None)
                total += rows * (behind - hidden) - sum(p.numel() for p in norm.parameters())
    norm = norm_module(decoder, Place(decoder.kept[-1], HEAD))
    total += _read(head, norm, head_width - hidden) - sum(p.numel() for p in norm.parameters())
    return total


def _read(reader: Any, norm: Any, wider: int) -> int:
    """Numbers more of a matrix that reads a norm with so many columns more: its bias takes in the
    norm's.
    """
    rows = features(reader)[1]
    is_new = reader.bias is None and getattr(norm, "bias", None) is not None
    return rows * wider + (rows if is_new else 0)


def check_basis(basis: Tensor, hidden: int, place: Place) -> None:
    """Raise `RecipeError` unless `basis` is (hidden, width) with orthonormal columns."""
    fits = basis.dim() == 2 and len(basis) == hidden and 1 <= basis.shape[1] <= hidden
    if fits:
        wide = basis.double()
        eye = torch.eye(basis.shape[1], dtype=wide.dtype, device=wide.device)
        fits = bool(((wide.mT @ wide) - eye).abs().max() < 1e-3)
    if not fits:
        raise RecipeError(
            f"layer {place.layer}, {place.block}: a basis {tuple(basis.shape)} is none of"
            f" orthonormal columns for the hidden size {hidden}"
        )


def dense_matrices(module: nn.Module, paths: list[str]) -> Iterator[Any]:
    """The matrices at `paths` of a layer. Raises `RecipeError` for one that is not dense."""
    for path in paths:
        found = module.get_submodule(path)
        if not is_dense(found):
            raise RecipeError(f"'{path}' is no dense matrix, so it cannot be sliced")
        yield found
