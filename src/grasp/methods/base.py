"""What a method is: a frozen dataclass. Its fields are its flags, its saved recipe and its row in the docs; it yields edits."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from grasp.core.decoder import Decoder
from grasp.core.edits import Edit
from grasp.core.records import Calibration, Statistics
from grasp.core.sweep import Collector
from grasp.errors import RecipeError


def flag(default: Any, help: str) -> Any:
    """A dataclass field with the text that `--help` and the docs show for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Plan:
    """What a method will do, as far as it can tell before it has seen the statistics.

    `parameters` None: the size follows from the scores. `forward_sweeps` and `backward_sweeps` count passes over the calibration set.
    """

    num_layers: int
    num_edits: int
    parameters: int | None
    forward_sweeps: int
    backward_sweeps: int
    gradient_parameters: int = 0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. The driver (`grasp.pipeline`) collects what the method `needs` in one sweep, then applies each edit
    before it asks for the next, so a one-shot and a sequential method are one thing: the latter calls `model.sweep` between edits.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def check(self, model: Decoder) -> None:
        """Raise `RecipeError` where the fields do not fit the model. Called before any work is done."""

    @abstractmethod
    def plan(self, model: Decoder) -> Plan:
        """What will be done, from the model's shapes alone."""

    @abstractmethod
    def needs(self, model: Decoder) -> list[Collector]:
        """The statistics of the dense model that the method starts from."""

    @abstractmethod
    def edits(self, model: Decoder, data: Calibration, stats: Statistics) -> Iterator[Edit]:
        """The edits, in order; each is applied before the next is asked for."""

    def recipe(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def check_layers(model: Decoder, layers: Sequence[int] | None, num_layers: int | None, most: int) -> None:
    """Raise `RecipeError` for a layer the model lacks, or more layers than it can give."""
    for layer in layers or ():
        if not 0 <= layer < model.num_layers:
            raise RecipeError(f"--layers {layer}: the model has layers 0 to {model.num_layers - 1}")
    if num_layers is not None and num_layers > most:
        raise RecipeError(f"--num-layers {num_layers}: the model has {model.num_layers} layers; at most {most} are allowed")


def check_size_flags(method: Method, *names: str) -> None:
    """Exactly one of the fields `names` must be given, and it must make sense. Raises `RecipeError`."""
    given = [name for name in names if getattr(method, name) is not None]
    flags = ", ".join("--" + name.replace("_", "-") for name in names)
    if len(given) != 1:
        said = "none was given" if not given else "got " + " and ".join("--" + name.replace("_", "-") for name in given)
        raise RecipeError(f"--method {method.name}: say how much to compress with one of {flags}; {said}")
    value = getattr(method, given[0])
    if given[0] == "ratio" and not 0 <= value < 1:
        raise RecipeError(f"--ratio {value}: the share of all parameters to remove must be at least 0 and below 1")
    if given[0] == "num_layers" and value < 0:
        raise RecipeError(f"--num-layers {value}: must be 0 or more")
    if given[0] == "layers" and len(set(value)) != len(value):
        raise RecipeError(f"--layers {','.join(map(str, value))}: a layer is named twice")


def ratio_unreachable(ratio: float, largest: float, hint: str) -> RecipeError:
    """The error for a ratio beyond what a method can remove; `largest` is rounded down so that it can be asked for."""
    return RecipeError(f"--ratio {ratio}: cannot be reached; the largest reachable is {int(largest * 1e4) / 1e4} ({hint})")
