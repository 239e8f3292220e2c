"""How much the loss depends on every single number of a matrix.

With x the input of a matrix W (out, in) and d = dL/dy the gradient at its output (loss summed over
tokens), the diagonal of the Fisher information is `F_ij = E[d_i^2 x_j^2]`. A change E of the matrix
that has no direction of its own, as rounding has none, raises the loss by about

    1/2 sum_ij F_ij E_ij^2        nats a token

F has as many numbers as W. Kept are the sums of its rows and of its columns; `F_ij` is about row_i
column_j / whole (as Adafactor, arXiv 1804.04235, keeps second moments): the same to half a percent
on smollm2 (docs/log.md). That takes no independence of x and d, unlike the Kronecker form `1/2 tr(D
E X E')`, which is four times too high where tokens with huge inputs have small gradients (attention
sinks: inputs of `v` and `down`).

The columns come with what they have in common, `E[|d|^2 xx']`: the inputs' covariance, in which a
token counts as much as its gradient. Where the columns of a matrix make up for one another's
rounding, they do so in it.

Where the inputs of a product are rounded too, to 8 bits with one scale a token, x_t becomes x_t +
e_t, which has no direction of its own either:

    1/2 E_t[ sum_j (W'd_t)_j^2 e_tj^2 ]      nats a token

with the e_t that rounding leaves of this x_t. Uniform noise in its place, s_t^2 / 12 for every
number, would be nine times too high for `down`: where one number of a token is a hundred times all
others, as at attention sinks, these become zeros and lose no more than they were (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grasp.core.collector import Collector, ask_for_gradients_at
from grasp.core.layer import Layer, Linear
from grasp.core.layers.experts_grasp import SPLIT
from grasp.core.layers.quantized_grasp import whole_tokens
from grasp.core.linalg import wide
from grasp.core.scratch import Scratch
from grasp.errors import NumericsError
from grasp.stages.routed import asked, watch


@dataclass(frozen=True)
class Sensitivity:
    """Of a matrix (out, in), sums over `tokens`: `rows` of d^2 |x|^2 (out,), `inputs` of |d|^2 xx'
    (in, in), `whole` of |d|^2 |x|^2, its trace; `activations` of (W'd)^2 e^2, where they are to be
    rounded. `reached`: how many of the tokens it saw, if it is an expert's and not all.
    """

    rows: Float[Tensor, "out"]
    inputs: Float[Tensor, "in in"]
    whole: float
    tokens: int
    activations: float = 0.0
    reached: int | None = None

    @property
    def columns(self) -> Float[Tensor, "in"]:
        """The sum of |d|^2 x^2, in float64."""
        return self.inputs.diagonal().double()

    def loss(self, change: Float[Tensor, "out in"]) -> float:
        """What a change without a direction costs, in nats a token: `1/2 sum_ij F_ij E_ij^2`."""
        if self.whole == 0.0:
            return 0.0
        squares = change.to("cpu", torch.float64).square()
        return float(self.rows @ squares @ self.columns) / self.whole / self.tokens / 2

    def loss_along(self, change: Float[Tensor, "out in"]) -> float:
        """The same of a change whose columns make up for one another: `1/2 sum_i row_i (E inputs
        E')_ii / whole`, a token.
        """
        if self.whole == 0.0:
            return 0.0
        change = change.to(self.inputs)
        outputs = ((change @ self.inputs) * change).sum(1).double()
        return float(self.rows @ outputs) / self.whole / self.tokens / 2

    @property
    def loss_of_activations(self) -> float:
        """What rounding the inputs to 8 bits costs, in nats a token."""
        return self.activations / self.tokens / 2


def input_losses(
    x: Float[Tensor, "tokens in"], gradient: Float[Tensor, "tokens in"]
) -> Float[Tensor, "tokens"]:
    """Twice what rounding each token x to 8 bits costs in nats, `sum_j g_j^2 e_j^2`, where the loss
    has the gradient g at it.
    """
    numbers, scale = whole_tokens(x)
    return (gradient * (numbers * scale - x)).square().sum(1)


class Sensitivities(Collector):
    """Table: matrix path -> `Sensitivity`. Sums: "rows.PATH", "inputs.PATH" and "tokens.PATH"; with
    `activations` also "activations.PATH", which takes one more product with every matrix. Of
    experts' matrices also "reached.PATH"; one that fewer tokens reached than it has columns takes
    the mean over its layer's experts.
    """

    name: ClassVar[str] = "sensitivity"
    backward: ClassVar[bool] = True
    is_looking: ClassVar[bool] = True

    def __init__(
        self, paths: Iterable[str], scratch: Scratch | None = None, activations: bool = False
    ):
        super().__init__()
        self.paths, self.scratch, self.activations = tuple(paths), scratch, activations

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        own = [linear for linear in layer.linears.values() if linear.path in self.paths]
        if own or asked(layer, self.paths):
            ask_for_gradients_at(layer, undo)
        for linear in own:
            undo.callback(linear.module.register_forward_hook(self._forward(linear)).remove)
        watch(self, layer, undo)

    def _forward(self, linear: Linear) -> Callable[..., None]:
        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = self._tokens(inputs[0])

            def backward(grad: Tensor) -> None:
                self._see(linear.path, linear.weight, x, self._tokens(grad), len(x))

            output.register_hook(backward)

        return forward

    def see_gradients(self, path: str, weight: Tensor, x: Tensor, d: Tensor, tokens: int) -> None:
        """Of an expert (`grasp.stages.routed`)."""
        self._see(path, weight, x, d, tokens)
        self._add(f"reached.{path}", torch.tensor(len(x)))

    def _see(self, path: str, weight: Tensor, x: Tensor, d: Tensor, tokens: int) -> None:
        """Add inputs x (some, in) and gradients d (some, out) of the matrix W (out, in) at `path`;
        those of the others among the `tokens` are 0.
        """
        x, d = wide(x), wide(d)
        squares = d.square()
        self._add(f"rows.{path}", (x.square().sum(1) @ squares).double())
        weighted = x * squares.sum(1, keepdim=True).sqrt()
        self._add(f"inputs.{path}", weighted.mT @ weighted)
        self._add(f"tokens.{path}", torch.tensor(tokens))
        if self.activations and len(x):
            lost = input_losses(x, d @ weight.to(d))
            self._add(f"activations.{path}", lost.double().sum())

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Sensitivity]:
        found = {}
        for path in self.paths:
            tokens = sums.get(f"tokens.{path}")
            if tokens is None:
                raise NumericsError(f"the sensitivity of '{path}' is missing; no token reached it")
            rows, inputs = (sums[f"{name}.{path}"].cpu() for name in ("rows", "inputs"))
            whole, lost = float(rows.sum()), float(sums.get(f"activations.{path}", 0.0))
            if not math.isfinite(whole + lost) or not bool(torch.isfinite(inputs).all()):
                raise NumericsError(
                    f"the statistics of '{path}' are not finite; try --dtype float32"
                )
            few = sums.get(f"reached.{path}")
            reached = None if few is None else int(few)
            found[path] = Sensitivity(rows, inputs, whole, int(tokens), lost, reached)
        return _with_seldom(found)


def _with_seldom(found: Mapping[str, Sensitivity]) -> dict[str, Sensitivity]:
    """With the mean over a layer's experts in the place of those that too few tokens reached."""
    means: dict[str, Sensitivity] = {}
    made = dict(found)
    for path, one in found.items():
        if one.reached is None or one.reached >= len(one.inputs):
            continue
        alike = _of_layer(path)
        if alike not in means:  # made where it is needed: it is as large as the sums of an expert
            means[alike] = _mean([two for at, two in found.items() if _of_layer(at) == alike])
        made[path] = dataclasses.replace(means[alike], reached=one.reached)
    return made


def _of_layer(path: str) -> str:
    """What the matrices of one kind of all experts of a layer have in common."""
    outside, _, inside = path.partition(f".{SPLIT}.")
    return f"{outside}.{inside.partition('.')[2]}"


def _mean(several: Sequence[Sensitivity]) -> Sensitivity:
    rows = torch.stack([one.rows for one in several]).mean(0)
    inputs = torch.zeros_like(several[0].inputs)
    for one in several:
        inputs += one.inputs / len(several)
    lost = sum(one.activations for one in several) / len(several)
    return Sensitivity(rows, inputs, float(rows.sum()), several[0].tokens, lost)
