"""The second-order sensitivity of the loss to every matrix, collected in one sweep.

With x a matrix's input, d = dL/dy the gradient at its output (loss summed over tokens), X = E[xx']
and D = E[dd'] (means over tokens), a change M of the matrix raises the loss by about `1/2 tr(D M X
M')`: the Fisher information in its Kronecker-factored form (K-FAC, Martens and Grosse, arXiv
1503.05671; the term that section 3.2 of the GRASP paper names and drops).

The singular groups of D^½ W X^½ need the longer side of W only through W' D W (tall matrices) or W
X W' (wide ones), so only sums of the size of the shorter side are kept: a third of the arithmetic,
memory and disk of X and D themselves for a Llama-like layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from grasp.core.collector import Collector, ask_for_gradients_at
from grasp.core.layer import Layer, Linear
from grasp.core.linalg import wide
from grasp.core.records import Curvature
from grasp.core.scratch import Scratch
from grasp.errors import NumericsError
from grasp.stages.routed import asked, watch


class InputCurvatures(Collector):
    """Sums of the outer products of inputs, from forward passes alone. Table: matrix path ->
    `Curvature`, of which the gradients' part is 0.

    Sums: the fields of `Curvature`, as "near.PATH" and so on. X is "near.PATH" of a tall matrix.
    Matrices that read one tensor (q, k and v; gate and up) have the same X, which is kept once, for
    the first of them; for another, "shared.near.PATH=near.FIRST" counts the tokens that it read
    there.

    `inputs`: matrices of which X itself is wanted, also where they are wide; there its sum,
    "inputs.PATH", stands in for "far.PATH", which follows from it. `half`: only the blocks of even
    (0) or odd (1) number are looked at; None: all.
    """

    name: ClassVar[str] = "input_curvature"

    def __init__(
        self,
        paths: Iterable[str],
        scratch: Scratch | None = None,
        inputs: Iterable[str] = (),
        half: int | None = None,
    ):
        super().__init__()
        self.paths = tuple(paths)
        self.scratch: Scratch = scratch or Scratch()
        self.inputs = frozenset(inputs)
        self.half = half
        if half is not None:
            self.name = f"{self.name}.{half}"  # type: ignore[misc]
        self.last_input: tuple[Tensor | None, str] = (None, "")

    @property
    def is_looking(self) -> bool:
        """Whether the block that is shown belongs to its half."""
        return self.half is None or self.block % 2 == self.half

    def begin(self, block: int, mask: Tensor | None) -> None:
        super().begin(block, mask)
        self.last_input = (None, "")

    def detach(self, layer: Layer) -> None:
        super().detach(layer)
        self.last_input = (None, "")

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        for linear in layer.linears.values():
            if linear.path in self.paths:
                undo.callback(linear.module.register_forward_hook(self._forward(linear)).remove)
        watch(self, layer, undo)

    def _forward(self, linear: Linear) -> Callable[..., None]:
        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            if not self.is_looking:
                return
            self.see_inputs(linear.path, linear.weight, self._tokens(inputs[0]), inputs[0])

        return forward

    def see_inputs(self, path: str, weight: Tensor, x: Tensor, given: Tensor | None = None) -> None:
        """Add rows x (tokens, in) that the matrix W (out, in) at `path` reads; `given`: the tensor
        that they are from, where another matrix may read the same.
        """
        self._count("input", path, len(x))
        if weight.shape[0] >= weight.shape[1]:
            self._see_input(f"near.{path}", x if given is None else given, x)
        elif path in self.inputs:
            self._see_input(f"inputs.{path}", x if given is None else given, x)
        else:
            self._add_squares("input", path, x)
            self._add_gram(f"far.{path}", _through(x, weight.mT))

    def _see_input(self, key: str, given: Tensor, x: Tensor) -> None:
        """Add the tokens x (tokens, in) of the input `given` to X, the sum `key`, unless the matrix
        before has done so.
        """
        before, first = self.last_input
        if before is given and key not in self.sums:
            self._add(f"shared.{key}={first}", torch.tensor(len(x)))
            return
        self._add_gram(key, x)
        self.last_input = (given, key)

    def _count(self, side: str, path: str, tokens: int) -> None:
        """Over how many tokens inputs or gradients are summed up."""
        self._add(f"{side}_tokens.{path}", torch.tensor(tokens))

    def _add_squares(self, side: str, path: str, rows: Tensor) -> None:
        """The squares of rows (tokens, width) whose outer products are not summed; of others the
        diagonal has them.
        """
        dtype = torch.promote_types(rows.dtype, torch.float32)
        norm = torch.linalg.vector_norm(rows, dtype=dtype)
        self._add(f"{side}_square.{path}", norm.double().square())

    def _add_gram(self, key: str, rows: Tensor) -> None:
        """Add rows' rows to the sum `key`, in float32."""
        total = self.sums.get(key)
        if total is None:
            total = self.scratch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.sums[key] = total
        with exact_products(rows.dtype):
            rows = rows.float()
            if total.device == rows.device:
                total.addmm_(rows.mT, rows)
            else:
                total.add_((rows.mT @ rows).to(total.device))

    def take(self, key: str, value: Tensor) -> None:
        if value.dim() == 2:
            total = self.scratch.zeros(*value.shape, device=value.device)
            value = total.add_(value.to(total.device))
        super().take(key, value)

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Curvature]:
        if self.half is not None and not sums:
            return {}  # there was only one block
        own = dict(sums)
        shared = [key.removeprefix("shared.") for key in sums if key.startswith("shared.")]
        for key, _, first in (names.partition("=") for names in shared):
            read, paths = int(sums[f"shared.{key}={first}"]), [_path(key), _path(first)]
            seen = [int(sums[f"input_tokens.{path}"]) for path in paths]
            if key in sums or seen != [read, read]:
                raise NumericsError(
                    f"'{paths[0]}' reads the same input as '{paths[1]}' in some blocks and another"
                    " one in others; leave it out: --exclude"
                )
            own[key] = sums[first]
        found = {}
        for path in self.paths:
            found[path] = self._record(own, path)
            self.scratch.release()
        return found

    def _record(self, sums: Mapping[str, Tensor], path: str) -> Curvature:
        """The record of one matrix; in `sums` is its X under its own path."""
        near, far = (sums.get(key) for key in (f"near.{path}", f"far.{path}"))
        inputs, nothing = sums.get(f"inputs.{path}"), torch.zeros(())
        if inputs is not None:
            far = nothing
            check_sum(path, inputs)
        if not self.backward:  # the side of the gradients
            near, far = (nothing, far) if near is None else (near, nothing)
        near, far = check_sum(path, near), check_sum(path, far)
        return Curvature(
            near,
            far,
            _squares(sums, f"input_square.{path}", near if inputs is None else inputs),
            _squares(sums, f"gradient_square.{path}", near) if self.backward else 0.0,
            int(sums[f"input_tokens.{path}"]),
            int(sums.get(f"gradient_tokens.{path}", 0)),
            inputs,
        )


def _path(key: str) -> str:
    """Of the matrix whose sum `key` is."""
    return key.partition(".")[2]


def _squares(sums: Mapping[str, Tensor], key: str, gram: Tensor) -> float:
    """The sum of squares under `key`, or else what the diagonal of `gram` says."""
    return float(sums[key]) if key in sums else float(gram.double().diagonal().sum())


def check_sum(path: str, total: Tensor | None) -> Tensor:
    """The sum of a matrix, which must be there and finite. Raises `NumericsError`."""
    if total is None or not bool(torch.isfinite(total).all()):
        raise NumericsError(
            f"the statistics of '{path}' are {'missing' if total is None else 'not finite'}; try"
            " --dtype float32"
        )
    return total


class Curvatures(InputCurvatures):
    """Sums of the outer products of inputs and of output gradients. Table: matrix path ->
    `Curvature`. Sums: as for inputs alone, of both.
    """

    name: ClassVar[str] = "curvature"
    backward: ClassVar[bool] = True

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        own = (linear.path in self.paths for linear in layer.linears.values())
        if any(own) or asked(layer, self.paths):
            ask_for_gradients_at(layer, undo)
        super()._hook(layer, undo)

    def _forward(self, linear: Linear) -> Callable[..., None]:
        of_input = super()._forward(linear)

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            of_input(module, inputs, output)
            if output.requires_grad and self.is_looking:
                output.register_hook(backward)

        def backward(grad: Tensor) -> None:
            d = self._tokens(grad)
            self._see_gradients(linear.path, linear.weight, d, len(d))

        return forward

    def see_gradients(self, path: str, weight: Tensor, x: Tensor, d: Tensor, tokens: int) -> None:
        """Of an expert (`grasp.stages.routed`)."""
        self._see_gradients(path, weight, d, tokens)

    def _see_gradients(self, path: str, weight: Tensor, d: Tensor, tokens: int) -> None:
        """Add gradients d (some, out) at the output of the matrix W (out, in) at `path`; those of
        the others among the `tokens` are 0.
        """
        self._count("gradient", path, tokens)
        if weight.shape[0] >= weight.shape[1]:
            self._add_squares("gradient", path, d)
            self._add_gram(f"far.{path}", _through(d, weight))
        else:
            self._add_gram(f"near.{path}", d)


def _through(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight, in the rows' dtype; in float32 where they are float16, whose range is too small
    for products.
    """
    rows = wide(rows) if rows.dtype == torch.float16 else rows
    return rows @ weight.to(rows.dtype)


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products multiply in bfloat16 where the numbers are bfloat16 anyway: the same
    sums on faster units.
    """
    backends = [getattr(torch.backends.mkldnn, "matmul", None)]
    if dtype != torch.bfloat16 or not hasattr(backends[0], "fp32_precision"):
        yield
        return
    before = backends[0].fp32_precision  # type: ignore[union-attr]
    backends[0].fp32_precision = "bf16"  # type: ignore[union-attr]
    try:
        yield
    finally:
        backends[0].fp32_precision = before  # type: ignore[union-attr]
