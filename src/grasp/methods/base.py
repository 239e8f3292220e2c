"""What a method is: a frozen dataclass. Its fields are its flags, its saved recipe and its row in
the docs; it yields edits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.fields import NumLayers, Share, check_fields, declared, flag
from grasp.core.layer import Linear
from grasp.core.records import Redundancy, Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.stages.operations import Operations
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity


@dataclass(frozen=True)
class Plan:
    """What a method will do, as far as it can tell before it has seen the statistics.

    `parameters` None: the size follows from the scores. `forward_sweeps` and `backward_sweeps`
    count passes over the calibration set, `forward_blocks` the blocks that are shown beside them,
    where the set has so many; passes through a few layers count together as so many whole ones.
    `statistics_bytes`: what it collects, and makes of that (`made_bytes` of it), in memory at once.
    Beside that are the hidden states of the whole set, `held_sets` times, and of `held_blocks`
    blocks.
    `decompositions`: matrices whose singular groups are computed. `workspace_bytes`: what work on
    one matrix takes, beside weights and statistics; it goes on at so many of them `at_once`, where
    there are the cores.

    Operations beside those of the passes, by kind (`grasp.stages.operations`): `a_token` of the
    set, over all sweeps, `a_block` of it, and `once`.
    """

    num_layers: int
    num_edits: int
    parameters: int | None
    forward_sweeps: int
    backward_sweeps: int
    statistics_bytes: int = 0
    decompositions: int = 0
    forward_blocks: int = 0
    held_sets: int = 0
    held_blocks: int = 0
    workspace_bytes: int = 0
    at_once: int = 1
    made_bytes: int = 0
    a_token: Operations = field(default_factory=dict)
    a_block: Operations = field(default_factory=dict)
    once: Operations = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. The driver (`grasp.verbs.compress`) collects what the method `needs` in
    one sweep, then applies each edit before it asks for the next, so a one-shot and a sequential
    method are one thing: the latter calls `runner.sweep` between edits.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    changes_experts: ClassVar[bool] = False
    """Whether it does anything to experts; else a model that has some is compressed beside them."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def about(cls) -> str:
        """What the method does, in one line: the first paragraph of its docstring."""
        return " ".join((cls.__doc__ or "").split("\n\n")[0].split())

    def check(self, decoder: Decoder) -> None:
        """Raise `RecipeError` where the fields do not fit the model. Called before any work is
        done.
        """

    @abstractmethod
    def plan(self, decoder: Decoder) -> Plan:
        """What will be done, from the model's shapes alone."""

    @abstractmethod
    def needs(self, decoder: Decoder) -> list[Collector]:
        """The statistics of the dense model that the method starts from."""

    @abstractmethod
    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        """The edits, in order; each is applied before the next is asked for."""

    def notes(self) -> tuple[str, ...]:
        """What a user should know about the result, whatever the model and the text."""
        return ()

    @property
    def over_experts(self) -> bool:
        """Whether it edits the matrices of experts as it does others."""
        return False

    @property
    def predicts(self) -> bool:
        """Whether the scores are losses in nats a token, so that `predict` can be asked."""
        return False

    @property
    def asked_bytes(self) -> int | None:
        """What the weights of the result take in the file, where that is what was asked for."""
        return None

    @property
    def rounds_weights(self) -> bool:
        """Whether weights may get fewer than 16 bits."""
        return False

    @property
    def in_16_bits(self) -> bool:
        """Whether the numbers of the result are stored in 16 bits, whatever was computed in."""
        return False

    @property
    def measures_time(self) -> bool:
        """Whether the edits depend on how fast this machine is."""
        return False

    def predict(
        self, runner: Runner, stats: Statistics, ratios: Sequence[float]
    ) -> dict[float, tuple[float, float]]:
        """Ratio -> rise of the loss to expect on text that was not seen, and on the calibration
        text, in nats a token, for the ratios that can be reached. Changes nothing.
        """
        raise NotImplementedError

    def recipe(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        given = {
            one.name: getattr(self, one.name)
            for one in declared(type(self)).values()
            if one.recipe and getattr(self, one.name) != one.default
        }
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
        }


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """Base of the methods that edit chosen decoder layers: the most redundant ones, as many as
    asked for, or those named.
    """

    ratio: Share | None = flag(
        None, "Share of ALL parameters to remove; the number of layers follows."
    )
    num_layers: NumLayers | None = flag(None, "Edit this many layers, the most redundant ones.")
    layers: tuple[int, ...] | None = flag(None, "Edit these layers, e.g. 21,22,25.")
    angular: bool = flag(
        False,
        "Choose one contiguous span by angular distance at the last token instead of block"
        " influence.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {"--ratio": self.ratio, "--num-layers": self.num_layers, "--layers": self.layers}
        check_one_size(self.name, sizes)
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise RecipeError(f"--layers {','.join(map(str, self.layers))}: a layer is named twice")
        if self.layers == ():
            raise RecipeError("--layers: names no layer; write it like 21,22,25")
        if self.angular and self.layers is not None:
            raise RecipeError("--angular chooses the layers, --layers names them; give one")

    def check_layers(self, decoder: Decoder, most: int) -> None:
        """Raise `RecipeError` for a layer the model lacks, or for more than `most` layers."""
        for layer in self.layers or ():
            if not 0 <= layer < decoder.num_layers:
                raise RecipeError(
                    f"--layers {layer}: the model has layers 0 to {decoder.num_layers - 1}"
                )
        if self.num_layers is not None and self.num_layers > most:
            raise RecipeError(
                f"--num-layers {self.num_layers}: the model has {decoder.num_layers} layers; at"
                f" most {most} are allowed"
            )
        if self.layers is not None and len(self.layers) > most:
            raise RecipeError(
                f"--layers names all {decoder.num_layers} layers of the model; at most {most} are"
                " allowed"
            )

    def needs(self, decoder: Decoder) -> list[Collector]:
        return [Similarity(), AngularDistance()] if self.angular else [Similarity()]

    def redundancy(self, stats: Statistics) -> Redundancy:
        """The scores that the choice of layers goes by."""
        return angular_distance(stats) if self.angular else block_influence(stats)


def check_one_size(name: str, sizes: Mapping[str, object]) -> None:
    """Raise `RecipeError` unless exactly one of these flags of method `name` has a value."""
    given = [one for one, value in sizes.items() if value is not None]
    if len(given) != 1:
        said = f"got {' and '.join(given)}" if given else "none was given"
        raise RecipeError(
            f"--method {name}: say how much to compress with one of {', '.join(sizes)}; {said}"
        )


def check_rank_multiple(multiple: int, linears: Sequence[Linear]) -> None:
    """Raise `RecipeError` where no rank of these matrices is a multiple but 0."""
    largest = max((min(linear.shape) for linear in linears), default=multiple)
    if multiple > largest:
        raise RecipeError(
            f"--rank-multiple {multiple}: no matrix of the model has so large a rank; at most"
            f" {largest}"
        )


def ratio_unreachable(ratio: float, largest: float, hint: str) -> RecipeError:
    """The error for a ratio beyond what a method can remove; `largest` is rounded down so that it
    can be asked for.
    """
    return RecipeError(
        f"--ratio {ratio}: cannot be reached; the largest reachable is {int(largest * 1e4) / 1e4}"
        f" ({hint})"
    )


def layer_sizes(decoder: Decoder) -> dict[int, int]:
    """Numbers of every layer that is there, by its index."""
    return {
        layer.index: sum(p.numel() for p in layer.module.parameters()) for layer in decoder.layers()
    }


def fewest_layers(decoder: Decoder, ratio: float) -> int:
    """The fewest layers without which the share `ratio` of all parameters is gone, whichever they
    are. Raises `RecipeError` where that is more than all but one.
    """
    total, smallest = decoder.num_parameters(), min(layer_sizes(decoder).values())
    count = math.ceil((ratio * total - 1e-6) / smallest)
    if count >= decoder.num_layers:
        raise ratio_unreachable(
            ratio, smallest * (decoder.num_layers - 1) / total, "all layers but one"
        )
    return count
