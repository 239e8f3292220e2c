"""Products with matrices in few bits as they are stored, against those with the matrices they
stand for; without a server.
"""

from itertools import groupby

import pytest
import torch
from torch.nn.functional import linear, pad

from grasp.core.layers.packing_grasp import INTEGERS, ZEROS
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.serving.at_width import AtWidth, has_kernel
from grasp.serving.parts import Part
from grasp.serving.stored import Stored, columns_of, joined, kind, with_rows

WITH_KERNEL = ["int8", "int8-dynamic", "int4", "int4-symmetric", "int3"]


def module(scheme, columns, rows, group_size=32, rank=None, pivoted=False, seed=0):
    """A linear with random numbers of each kind that it stores."""
    made = QuantizedLinear(
        columns, rows, False, scheme, group_size, rank=rank, pivoted=pivoted, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in made.named_parameters():
        if name.endswith(INTEGERS):
            low, high = (0, 256) if tensor.dtype == torch.uint8 else (-128, 128)
            values = torch.randint(low, high, tensor.shape, generator=generator)
            tensor.data = values.to(tensor.dtype)
        else:
            tensor.data = torch.randn(tensor.shape, generator=generator) / 50
    if pivoted:
        made.places.copy_(torch.randperm(rows, generator=generator))
    return made


def stored(made, name="weight"):
    zero = getattr(made, name + ZEROS, None)
    numbers = getattr(made, name + INTEGERS).data
    scale = getattr(made, name).data
    zero = None if zero is None else zero.data
    return Stored(numbers, scale, zero, made.scheme, made.shapes[name][1], made.group_size)


@pytest.mark.parametrize("scheme", WITH_KERNEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(1, 1, 32), (20, 33, 32), (16, 64, 64), (37, 100, 128), (5, 300, 256), (130, 96, 32)],
)
def test_the_product_is_that_of_the_dequantised_matrix(scheme, dtype, rows, columns, group_size):
    matrix = stored(module(scheme, columns, rows, group_size)).to(torch.device("cpu"), dtype)
    product, whole = AtWidth(matrix, dtype), matrix.dequantized().float()
    for shape in ((1, columns), (3, 2, columns), (19, columns), (0, columns)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected, found = linear(x.float(), whole), product(x)
        near = 1e-5 if dtype == torch.float32 else 2e-2
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.float(), expected, rtol=near, atol=near * max(1, whole.norm().item())
        )


def test_an_input_may_have_columns_of_zeros():
    """What a first product gives whose rows were filled up."""
    for scheme in WITH_KERNEL:
        matrix = stored(module(scheme, 20, 9, 64))
        x = torch.randn(4, 20)
        product = AtWidth(matrix, torch.float32)
        torch.testing.assert_close(product(pad(x, (0, 12))), product(x))


@pytest.mark.parametrize("scheme", WITH_KERNEL)
def test_it_compiles_for_any_number_of_tokens(scheme):
    product = AtWidth(stored(module(scheme, 50, 20)), torch.float32)
    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 7):
        x = torch.randn(tokens, 50)
        torch.testing.assert_close(compiled(x), product(x))


@pytest.mark.parametrize("scheme", ["int8", "int6", "int5", "int4", "int4-symmetric", "int3"])
def test_slices(scheme):
    """Whole groups stay as they are stored; a cut through one is dequantised."""
    matrix = stored(module(scheme, 100, 20))
    whole, rows = matrix.dequantized(), torch.tensor([3, 0, 19])
    assert torch.equal(matrix[rows].dequantized(), whole[rows])
    for columns in (range(100), range(32, 96), range(64, 100), range(5, 20), range(32, 50)):
        found = columns_of(matrix, columns)
        cut = scheme != "int8" and (columns.start % 32 or columns.stop in (20, 50))
        assert isinstance(found, torch.Tensor if cut else Stored)
        dense = found if cut else found.dequantized()
        assert torch.equal(dense, whole[:, columns.start : columns.stop])
    filled = with_rows(matrix, 32)
    assert torch.equal(filled.dequantized(), pad(whole, (0, 0, 0, 12)))


def test_only_matrices_of_a_kind_are_joined():
    made = [
        stored(module(scheme, 64, rows, size))
        for scheme, rows, size in (
            ("int4", 5, 32),
            ("int4", 8, 32),
            ("int4", 7, 64),
            ("int8", 3, 32),
        )
    ]
    rows = [*made, torch.randn(4, 64)]
    runs = [joined(list(run)) for _, run in groupby(rows, key=kind)]
    assert [run.shape[0] for run in runs] == [13, 7, 3, 4]
    dense = [run if isinstance(run, torch.Tensor) else run.dequantized() for run in runs]
    torch.testing.assert_close(
        torch.cat(dense), torch.cat([*(one.dequantized() for one in made), rows[-1]])
    )


@pytest.mark.parametrize("scheme", WITH_KERNEL)
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("rank", [6, 40])
def test_a_part_that_keeps_its_numbers(scheme, pivoted, rank):
    """A device's share of a pair, multiplied as stored, is that of the whole product."""
    made = module(scheme, 96, 60, rank=rank, pivoted=pivoted)
    here, inputs = range(10, 50), range(96)
    part = Part("o", 60, 96, [here], inputs, rank, pivoted, scheme, 32, keep=True)
    for name, tensor in made.state_dict().items():
        part.load(name, tensor, torch.device("cpu"), torch.float32)
    assert not part.missing()
    first, second = part.first(), part.second()
    assert isinstance(first, Stored) and isinstance(second, Stored)
    x = torch.randn(5, 96)
    inner = AtWidth(first, torch.float32)(x)
    output = AtWidth(second, torch.float32)(inner)
    if pivoted:
        output = torch.cat((inner, output), dim=-1).index_select(-1, part.order())
    with torch.no_grad():
        expected = made._dense("weight", made._dense("weight_in", x))
        if pivoted:
            whole = torch.cat((made._dense("weight_in", x), expected), dim=-1)
            expected = whole.index_select(-1, made.places)
    torch.testing.assert_close(output, expected[:, 10:50], rtol=1e-4, atol=1e-4)


def test_what_has_a_kernel():
    assert all(has_kernel(scheme, 32) for scheme in WITH_KERNEL) and has_kernel("int8", 1)
    assert not any(has_kernel(*how) for how in (("int6", 32), ("int5", 64), ("int4", 16)))
