"""What the matrices of experts read and what the loss asks of them, weighted as the router weights
them.

All experts of a layer are in one tensor, and only their sum is seen from outside. So an expert's
matrices are looked at by computing it once more on the tokens that the router sends to it:

    h = gate_up x,   z = gate(h),   out = g down z          g: the router's weight
    dL/d(down z) = g dL/dout,   dL/dh = J_gate(h)' down' (g dL/dout)

with dL/dout the gradient where the layer's experts are summed up. D = E[dd'] is a mean over ALL
tokens, as the others' gradients are 0; so an expert's price is in nats a token of the text, and one
that few tokens reach costs little. Where there are no gradients (a metric of inputs alone), x and z
are multiplied by g, or tokens that hardly count for the output would count as much as others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import linear

from grasp.core.layer import Layer, module_in
from grasp.core.layers.experts_grasp import SPLIT, matrix_of

Numbered = dict[int, dict[str, str]]
"""Expert -> its matrices that are asked for, by name -> path."""


class Looking(Protocol):
    """Who adds up something of the matrices W (out, in) at `paths`. `mask` (batch, seq): which
    tokens are real, None if all are.
    """

    paths: tuple[str, ...]
    backward: ClassVar[bool]
    mask: Tensor | None

    @property
    def is_looking(self) -> bool: ...


@runtime_checkable
class Inputs(Protocol):
    """What they read: rows of inputs (some, in)."""

    def see_inputs(self, path: str, weight: Tensor, x: Tensor) -> None: ...


class Gradients(Protocol):
    """The gradients at their outputs, rows d (some, out), with what was read there, x (some, in);
    those of the other `tokens` are 0.
    """

    def see_gradients(
        self, path: str, weight: Tensor, x: Tensor, d: Tensor, tokens: int
    ) -> None: ...


def watch(sums: Looking, layer: Layer, undo: ExitStack) -> None:
    """Hook onto the experts of a layer, if some of their matrices are asked for."""
    for place, numbered in asked(layer, sums.paths).items():
        experts = module_in(layer.module, place)
        if experts is not None:
            hook = _forward(sums, numbered)
            undo.callback(experts.register_forward_hook(hook).remove)


def asked(layer: Layer, paths: Iterable[str]) -> dict[str, Numbered]:
    """Where experts are in a layer -> which of their matrices are among `paths`."""
    found: dict[str, Numbered] = {}
    for path in paths:
        outside, split, inside = path.partition(f".{SPLIT}.")
        _, here, place = outside.partition(f".{layer.index}.")
        if split and here:
            number, _, name = inside.partition(".")
            found.setdefault(place, {}).setdefault(int(number), {})[name] = path
    return found


def _forward(sums: Looking, numbered: Numbered) -> Callable[..., None]:
    def forward(experts: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not sums.is_looking:
            return
        # tokens, width; tokens, experts a token; tokens, experts a token
        hidden, chosen, weights = (one.detach() for one in args)
        real = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        if sums.mask is not None:
            real = sums.mask.flatten().bool()
        chosen = chosen.masked_fill(~real[:, None], -1)

        def routed() -> Iterator[tuple[int, Tensor, Tensor]]:
            for number in numbered:
                tokens, place = torch.where(chosen == number)
                yield number, tokens, weights[tokens, place, None].to(hidden.dtype)

        def see_inputs(reading: Inputs) -> None:
            for number, tokens, share in routed():
                x, paths = hidden[tokens], numbered[number]
                counted = torch.ones_like(share) if sums.backward else share
                up, bias = _matrix(experts, "gate_up", number)
                if "gate_up" in paths:
                    reading.see_inputs(paths["gate_up"], up, x * counted)
                if "down" in paths:
                    with torch.no_grad():
                        inner = experts._apply_gate(linear(x, up, bias))
                    down, _ = _matrix(experts, "down", number)
                    reading.see_inputs(paths["down"], down, inner * counted)

        if isinstance(sums, Inputs):
            see_inputs(sums)

        def backward(grad: Tensor) -> None:
            asking, count = cast(Gradients, sums), int(real.sum())
            for number, tokens, share in routed():
                at, x, behind = (experts, number), hidden[tokens], grad[tokens] * share
                _see_gradients(asking, numbered[number], at, x, behind, count)

        if sums.backward and output.requires_grad:
            output.register_hook(backward)

    return forward


def _see_gradients(
    sums: Gradients,
    paths: dict[str, str],
    at: tuple[Any, int],
    x: Tensor,
    behind: Tensor,
    tokens: int,
) -> None:
    """From what expert `at` (module, number) reads (some, width) and the gradient at its output
    (some, width).
    """
    experts, number = at
    down, _ = _matrix(experts, "down", number)
    up, bias = _matrix(experts, "gate_up", number)
    raw = linear(x, up, bias).requires_grad_("gate_up" in paths)
    with torch.set_grad_enabled(raw.requires_grad):
        inner = experts._apply_gate(raw)
    if "down" in paths:
        sums.see_gradients(paths["down"], down, inner.detach(), behind, tokens)
    if "gate_up" in paths:
        (found,) = torch.autograd.grad(inner, raw, behind @ down)
        sums.see_gradients(paths["gate_up"], up, x, found, tokens)


def _matrix(experts: Any, name: str, number: int) -> tuple[Tensor, Tensor | None]:
    """(W (out, in), b (out) or None), without a gradient."""
    weight, bias = matrix_of(experts, name, number)
    return weight.detach(), None if bias is None else bias.detach()
