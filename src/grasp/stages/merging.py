"""Several decoder layers become one, and how near the model stays (LaCo, arXiv 2402.11187).

    theta_l* = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l)        every matrix and its bias

The norms, and whatever else is no matrix, stay those of layer l.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Edit, Rewrite, trial
from grasp.core.linalg import wide
from grasp.core.runner import Runner
from grasp.errors import NumericsError, RecipeError
from grasp.stages.closeness import Closeness, LastHidden

Merge = tuple[int, ...]
"""Layers that become one, which is the first of them."""


def with_differences(
    first: Float[Tensor, "*shape"], others: Sequence[Float[Tensor, "*shape"]]
) -> Float[Tensor, "*shape"]:
    """`first + sum of (other - first)`, in float32 or wider."""
    found = wide(first).clone()
    for other in others:
        found += wide(other).to(found.device) - wide(first)
    return found


def merging(runner: Runner, merge: Merge) -> Iterator[Edit]:
    """The edits that make one layer of several, the model being as it was before each: all matrices
    of the first, then the others go.
    """
    decoder = runner.decoder
    into, *others = merge
    for name, linear in decoder.layer(into).linears.items():
        beside = [decoder.layer(layer).linears[name] for layer in others]
        with ExitStack() as stack:
            for layer in merge:
                stack.enter_context(runner.holding(layer))
            weight = with_differences(linear.weight, [one.weight for one in beside])
            biases = [one.bias for one in (linear, *beside) if one.bias is not None]
            bias = with_differences(biases[0], biases[1:]) if biases else None
        yield Rewrite(linear.path, weight, bias, how=f"layers {into} to {others[-1]} merged")
    for layer in reversed(others):
        yield Drop(layer)


class Candidates:
    """Compares models with merged layers with the original one, on the first `most` blocks of the
    calibration set. What was compared is not compared again.
    """

    def __init__(self, runner: Runner, most: int):
        self.runner, self.most = runner, most
        self.known: dict[tuple[Merge, ...], float] = {(): 1.0}

    @cached_property
    def reference(self) -> dict[int, Tensor]:
        """The last hidden states of the original model."""
        found = self.runner.sweep([LastHidden()], "the original's last hidden states", self.most)
        return dict(found[LastHidden.name])

    def similarity(self, merges: Sequence[Merge]) -> float:
        """The mean cosine between the last hidden states of the model with these merges, one after
        the other, and of the original. The model comes back unchanged.

        Until then the numbers of one layer a merge are in memory beside the model.
        """
        key = tuple(merges)
        if key not in self.known:
            self.known[key] = self._measured(key, self.reference)
        return self.known[key]

    def _measured(self, merges: Sequence[Merge], reference: dict[int, Tensor]) -> float:
        with ExitStack() as stack:
            try:
                for merge in merges:
                    for edit in merging(self.runner, merge):
                        stack.enter_context(trial(self.runner.decoder, edit))
            except NumericsError:  # sums too large for the model's dtype are no candidate
                return -1.0
            told = f"candidate {len(self.known)}"
            changed = (merges[-1][0], None)  # what is below is the original
            found = self.runner.sweep([Closeness(reference)], told, self.most, layers=changed)
        return float(found[Closeness.name]["cosine"])


def check_alike(decoder: Decoder, layers: Sequence[int], flag: str) -> None:
    """Raise `RecipeError` where these layers cannot be added up: a matrix that is none of the
    family's or low-rank already, or one of another shape than that of the first layer.
    """
    shapes = {
        index: {name: tuple(p.shape) for name, p in decoder.layer(index).module.named_parameters()}
        for index in layers
    }
    for index in layers:
        of_linears = {f"{name}.weight" for name in decoder.layer(index).linears}
        others = {name for name, shape in shapes[index].items() if len(shape) > 1} - of_linears
        differ = [n for n, shape in shapes[index].items() if shapes[layers[0]].get(n) != shape]
        said = (
            f"layer {index} has '{min(others)}', which is no dense matrix of {decoder.family.name}"
            if others
            else f"'{differ[0]}' of layer {index} is of another shape than in layer {layers[0]}"
            if differ
            else f"layer {index} lacks weights of layer {layers[0]}"
            if len(shapes[index]) < len(shapes[layers[0]])
            else ""
        )
        if said:
            raise RecipeError(
                f"{flag}: layers that are not alike cannot be merged: {said}; leave it out with"
                " --lowest-layer or --highest-layer, or take another method"
            )
