"""The experts of a layer one by one, where their architecture keeps all of them in one tensor a
matrix: each with two linears of its own, which may become low-rank pairs of any rank.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SPLIT = "split"
"""Under which name the list of experts is in the module."""
MATRICES = {"gate_up": "gate_up_proj", "down": "down_proj"}
"""An expert's linears -> the parameters of the module that it replaces."""


class Expert(nn.Module):
    """One expert: `down(gate(gate_up(x)))`, the gating that of its architecture."""

    def __init__(self, gate_up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate_up = gate_up
        self.down = down


class SplitExperts(nn.Module):
    """Stands in the place of a module of fused experts, and is called like one.

    `replaced`: the class of that module, whose gating is used; its settings are taken over.
    """

    replaced: Any

    def __init__(self, old: nn.Module, experts: list[Expert]):
        super().__init__()
        for name, value in vars(old).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, module in old.named_children():
            if name != SPLIT:
                setattr(self, name, module)
        self.replaced = type(old)
        self.split = nn.ModuleList(experts)

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (tokens, width), the numbers and the weights of each token's experts (tokens, some) ->
        the weighted sum of what these make of it (tokens, width).
        """
        output, gate = torch.zeros_like(hidden_states), self.replaced._apply_gate
        for number in chosen.unique().tolist():
            tokens, place = torch.where(chosen == number)
            expert: Any = self.split[number]
            inner = gate(self, expert.gate_up(hidden_states[tokens]))
            made = expert.down(inner) * weights[tokens, place, None]
            output.index_add_(0, tokens, made.to(output.dtype))
        return output

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return {"kind": "experts"}

    def check(self, path: str) -> None:
        """Its linears are checked by themselves."""


def matrix_of(old: Any, name: str, number: int) -> tuple[Tensor, Tensor | None]:
    """(W (out, in), b (out) or None) of one expert in fused tensors; views of them."""
    parameter = MATRICES[name]
    weight = getattr(old, parameter)[number]
    bias = getattr(old, f"{parameter}_bias", None)
    is_transposed = getattr(old, "is_transposed", False)
    return weight.T if is_transposed else weight, None if bias is None else bias[number]


def split_like(old: Any, device: Any = None) -> SplitExperts:
    """The experts of a fused module apart, unfilled."""
    experts = []
    for number in range(old.num_experts):
        linears = []
        for name in MATRICES:
            weight, bias = matrix_of(old, name, number)
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, bias is not None, device, weight.dtype)
            linears.append(linear.requires_grad_(False))
        experts.append(Expert(*linears))
    return SplitExperts(old, experts)


def check_record(path: str, record: dict[str, Any]) -> None:
    """There is nothing in it that could be wrong."""


def place(path: str, old: nn.Module, record: dict[str, Any]) -> SplitExperts:
    """The experts that a record describes, without memory. Raises `ValueError`."""
    if not all(hasattr(old, name) for name in (*MATRICES.values(), "num_experts")):
        raise ValueError(f"config.json gives '{path}' experts, but {type(old).__name__} has none")
    return split_like(old, "meta")
