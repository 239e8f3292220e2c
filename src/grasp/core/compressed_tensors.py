"""What the format compressed-tensors can say, as servers read it
(https://github.com/vllm-project/compressed-tensors).

A linear is dense, or its whole matrix has one scale a row and 8 bits, or one scale a group of
columns and 4 bits around 0, no zeros beside them. Servers multiply some linears as one, so these
must be stored alike. Embedding and head stay in 16 bits. `--layout compressed-tensors` keeps a
model to this, so that `grasp export --format compressed-tensors` writes it number by number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GRASP, COMPRESSED_TENSORS = "grasp", "compressed-tensors"
LAYOUTS = (GRASP, COMPRESSED_TENSORS)
"""Which files the numbers are chosen for."""
BITS = (16, 8, 4)
"""Bits that a matrix may have."""
GROUPS = (32, 64, 128)
"""Columns that may share a scale; they must divide all columns of the matrix."""
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Names of linears of one module that vLLM and SGLang multiply as one."""


def alike(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Matrices by path -> those that are stored alike, together: every path once, in their
    order.
    """
    found: dict[tuple[str, int | str], list[str]] = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        number = next((n for n, names in enumerate(FUSED) if name in names), name)
        found.setdefault((owner, number), []).append(path)
    return [tuple(group) for group in found.values()]


def divisors(columns: int, sizes: Sequence[int] = GROUPS) -> tuple[int, ...]:
    """The group sizes that divide so many columns."""
    return tuple(size for size in sizes if columns % size == 0)
