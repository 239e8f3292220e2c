"""Whole numbers of few bits: their packing, what they stand for, and rounding to the nearest."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.core.layers.packing_grasp import (
    BITS,
    SYMMETRIC,
    dequantized,
    has_zeros,
    integer_dtype,
    is_grouped,
    layout,
    num_bytes,
    num_groups,
    packed,
    unpacked,
)
from grasp.core.rounding import rounded, stored

COLUMNS = [1, 31, 32, 33, 70]


def integers(scheme: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    low = 0 if is_grouped(scheme) else -128
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, low + 2 ** BITS[scheme], (rows, columns), generator=generator)


@pytest.mark.parametrize("scheme", BITS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(0, 80), seed=st.integers(0, 9))
def test_packing_loses_nothing(scheme, rows, columns, seed):
    numbers = integers(scheme, rows, columns, seed)
    found = packed(numbers, scheme)
    assert found.shape == (rows, num_bytes(scheme, columns))
    assert found.dtype == integer_dtype(scheme)
    assert torch.equal(unpacked(found, scheme, columns).long(), numbers)


@pytest.mark.parametrize("scheme", BITS)
def test_a_number_takes_its_bits_and_no_more(scheme):
    assert num_bytes(scheme, 64) == 8 * BITS[scheme]
    for columns in COLUMNS:
        assert 8 * num_bytes(scheme, columns) < BITS[scheme] * columns + 16


def test_the_bytes_are_those_of_the_docs():
    """docs/quantization.md, number by number."""
    four = packed(torch.tensor([[1, 2, 3]]), "int4")
    assert four.tolist() == [[1 | 2 << 4, 3]]
    numbers = torch.arange(10)[None] % 8  # 3 bits: 2, four a byte, then 1, eight a byte
    low, high = numbers[0] & 3, numbers[0] >> 2
    bytes_ = [0] * 5
    for column in range(10):
        bytes_[column % 3] |= int(low[column]) << 2 * (column // 3)
        bytes_[3 + column % 2] |= int(high[column]) << column // 2
    assert packed(numbers, "int3").tolist() == [bytes_]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scheme", BITS)
def test_what_stored_numbers_stand_for(scheme, columns):
    """The formula of docs/quantization.md; and any row by itself."""
    numbers, size = integers(scheme, 6, columns), 32
    groups = num_groups(scheme, columns, size)
    scale = torch.rand(6, groups) + 0.1
    zero = torch.randn(6, groups) if has_zeros(scheme) else None
    tensors = stored("w", numbers, scale, zero, scheme)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == layout("w", 6, columns, scheme, size)
    group = torch.arange(columns) // size if is_grouped(scheme) else torch.zeros(columns).long()
    middle = 2 ** (BITS[scheme] - 1) if is_grouped(scheme) else 0
    right = scale[:, group] * (numbers - middle) + (0 if zero is None else zero[:, group])
    found = dequantized(tensors["w_qdata"], scale, zero, scheme, columns, size)
    torch.testing.assert_close(found, right)
    row = dequantized(
        tensors["w_qdata"][2:3], scale[2:3], None if zero is None else zero[2:3],
        scheme, columns, size,
    )  # fmt: skip
    assert torch.equal(row, found[2:3])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_zeros_it_is_to_the_nearest_of_sixteen_about_zero(columns, dtype):
    """The number of a group that is furthest from 0 is at the end that has one number more."""
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    weight[0] = 0
    weight = weight.float()
    found = rounded("w", weight, SYMMETRIC, 32, dtype)
    assert found.keys() == {"w", "w_qdata"} and found["w"].dtype == dtype
    scale = found["w"].float().repeat_interleave(32, dim=1)[:, :columns]
    for start in range(0, columns, 32):
        group = weight[:, start : start + 32]
        end = group.gather(1, group.abs().argmax(1, keepdim=True))
        step = scale[:, start : start + 1]
        torch.testing.assert_close(-8 * step[1:], end[1:], rtol=2**-8, atol=0)
        choices = step[..., None] * torch.arange(-8, 8)
        nearest = (choices - group[..., None]).abs().amin(-1)
        theirs = dequantized(found["w_qdata"], found["w"], None, SYMMETRIC, columns, 32).float()
        error = (theirs[:, start : start + 32] - group).abs()
        assert bool((error <= nearest + group.abs() * 2**-7 + 1e-6).all())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [scheme for scheme in BITS if scheme != SYMMETRIC])
def test_rounding_is_to_the_nearest(scheme, columns, dtype):
    """Against the formulas written down again: no number is further away than half a step (and what
    the dtype of the scales costs).
    """
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(24, columns, generator=generator).to(dtype).float()
    tensors = rounded("w", weight, scheme, 32, dtype)
    numbers = (tensors["w_qdata"], tensors["w"], tensors.get("w_zero"))
    found = dequantized(*numbers, scheme, columns, 32).float()
    most, exact = 2 ** BITS[scheme] - 1, dtype == torch.float32
    for start in range(0, columns, 32 if is_grouped(scheme) else columns):
        group = weight[:, start : start + 32] if is_grouped(scheme) else weight
        theirs = found[:, start : start + group.shape[1]]
        low, high = group.amin(dim=1, keepdim=True), group.amax(dim=1, keepdim=True)
        if not is_grouped(scheme):
            high = group.abs().amax(dim=1, keepdim=True)
            low = -high
        step = (high - low) / most
        if exact and is_grouped(scheme):
            mine = ((group - low) / step.clamp_min(1e-9)).round().clamp(0, most) * step + low
            torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)
        # a scale in bfloat16 moves the end of the range by up to `most` of its roundings
        slack = 1e-6 if exact else (high - low) * 2**-8 + group.abs() * 2**-7
        assert bool(((theirs - group).abs() <= step * 0.5001 + slack).all())


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: make test-export")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("columns", [31, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchao_rounds_the_same(columns, dtype):
    from torchao.quantization import quant_primitives as ao

    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    weight[0] = 0
    tiny, row = torch.finfo(dtype).tiny, (1, columns)
    scale, zero = ao.choose_qparams_affine(
        weight, ao.MappingType.SYMMETRIC, row, torch.int8, -128, 127,
        eps=tiny, scale_dtype=dtype, zero_point_dtype=torch.int8,
    )  # fmt: skip
    whole = ao.quantize_affine(weight, row, scale.float(), zero, torch.int8, -128, 127)
    ours = rounded("w", weight, "int8", 32, dtype)
    assert torch.equal(ours["w"].flatten(), scale.flatten())
    assert torch.equal(ours["w_qdata"], whole)

    groups = -(-columns // 32)
    room = weight[:, -1:].expand(24, groups * 32 - columns)
    padded, block = torch.cat((weight, room), dim=1), (1, 32)
    scale, zero = ao._choose_qparams_affine_tinygemm(
        padded, ao.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, tiny, dtype, dtype
    )
    numbers = ao._quantize_affine_tinygemm(
        padded, block, scale.float(), zero.float(), torch.int32, 0, 15
    )[:, :columns]
    ours = rounded("w", weight, "int4", 32, dtype)
    assert torch.equal(ours["w"].flatten(), scale.flatten())
    assert torch.equal(ours["w_zero"].flatten(), zero.flatten())
    assert torch.equal(unpacked(ours["w_qdata"], "int4", columns).long(), numbers.long())


@pytest.mark.parametrize(
    ("scheme", "number", "zero", "says"),
    [
        ("int3", 8, True, r"'w' holds numbers outside 0 \.\.\. 7"),
        ("int6", -1, True, r"outside 0 \.\.\. 63"),
        ("int8", 128, False, r"outside -128 \.\.\. 127"),
        ("int8", 0, True, "int8 takes no zeros beside the scales"),
        ("int5", 0, False, "int5 needs zeros beside the scales"),
    ],
)
def test_numbers_that_a_scheme_does_not_have(scheme, number, zero, says):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=says):
        stored("w", torch.tensor([[number]]), one, one if zero else None, scheme)
