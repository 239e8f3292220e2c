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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grasp.core.layer import Layer, Linear
from grasp.core.linalg import wide
from grasp.core.records import Curvature
from grasp.core.scratch import Scratch
from grasp.core.sweep import Collector
from grasp.errors import NumericsError


class Curvatures(Collector):
    """Sums of the outer products of inputs and of output gradients. Table: matrix path ->
    `Curvature`.
    """

    name: ClassVar[str] = "curvature"
    backward: ClassVar[bool] = True

    def __init__(self, paths: Iterable[str], scratch: Scratch | None = None):
        self.paths = frozenset(paths)
        self.scratch = scratch or Scratch()
        self.table: dict[str, Curvature] = {}
        self.last_input: tuple[Tensor | None, str] = (None, "")

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        linears = [linear for linear in layer.linears.values() if linear.path in self.paths]
        for linear in linears:
            self.table[linear.path] = Curvature(linear.weight)
        handles = [linear.module.register_forward_hook(self._hook(linear)) for linear in linears]
        return (
            [layer.module.register_forward_pre_hook(_ask_for_gradients, with_kwargs=True), *handles]
            if linears
            else []
        )

    def begin_block(self, mask: Tensor | None) -> None:
        super().begin_block(mask)
        self.last_input = (None, "")

    def _hook(self, linear: Linear) -> Any:
        found = self.table[linear.path]

        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = self._tokens(inputs[0])
            found.input_tokens += x.shape[0]
            found.input_square += float(wide(x).square().sum())
            if not found.is_tall:
                found.far = self._add(found.far, _through(x, found.weight.mT))
            elif self.last_input[0] is inputs[0]:
                # q, k and v read the same input, and so do gate and up
                found.near = self.table[self.last_input[1]].near
            else:
                found.near = self._add(found.near, x)
                self.last_input = (inputs[0], linear.path)
            if output.requires_grad:
                output.register_hook(backward)

        def backward(grad: Tensor) -> None:
            d = self._tokens(grad)
            found.gradient_tokens += d.shape[0]
            found.gradient_square += float(wide(d).square().sum())
            if found.is_tall:
                found.far = self._add(found.far, _through(d, found.weight))
            else:
                found.near = self._add(found.near, d)

        return forward

    def _tokens(self, values: Tensor) -> Tensor:
        """(batch, seq, width), or (batch * seq, width) as in OPT's MLP -> (real tokens, width)."""
        values = values.detach().flatten(0, -2)
        return values if self.mask is None else values[self.mask.bool().flatten()]

    def _add(self, total: Tensor | None, rows: Tensor) -> Tensor:
        """`total` + rows' rows, summed in float32."""
        if total is None:
            total = self.scratch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        with exact_products(rows.dtype):
            rows = rows.float()
            if total.device == rows.device:
                return total.addmm_(rows.mT, rows)
            return total.add_((rows.mT @ rows).to(total.device))

    def result(self) -> Mapping[str, Curvature]:
        for path, found in self.table.items():
            for value in (found.near, found.far):
                if value is None or not bool(torch.isfinite(value).all()):
                    raise NumericsError(
                        f"the statistics of '{path}' are"
                        f" {'missing' if value is None else 'not finite'}; try --dtype float32"
                    )
        return self.table


def _through(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight, in the rows' dtype; in float32 where they are float16, whose range is too small
    for products.
    """
    rows = wide(rows) if rows.dtype == torch.float16 else rows
    return rows @ weight.to(rows.dtype)


def _ask_for_gradients(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let gradients reach this layer's input, whether or not any weight asks for one."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if not hidden.requires_grad:
        hidden.requires_grad_(True)


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
