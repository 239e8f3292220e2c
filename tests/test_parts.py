"""Tensor parallelism without a server: what every device holds of a low-rank linear, and that
together they compute the whole.
"""

import pytest
import torch
from torch.nn.functional import linear

from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.serving.parts import Part, Stack, global_order, local_places, padded, spans

IN, SIZES, HEAD = 24, (24, 12, 12), 4
DEVICES = [1, 2, 3, 6]


def matrix(
    kind: str, out: int, rank: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors as a checkpoint has them, the matrix (out, in) they stand for) of one kind: dense,
    pair, pivoted.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        weight = torch.randn(out, IN, generator=generator, dtype=torch.float64)
        return {"weight": weight}, weight
    module = LowRankLinear(IN, out, rank, False, dtype=torch.float64, pivoted=kind == "pivoted")
    tensors = {"weight": module.weight.data, "weight_in": module.weight_in.data}
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    if kind == "pivoted":
        module.places.copy_(torch.randperm(out, generator=generator))
        tensors["places"] = module.places
    return tensors, module.product()


def run(
    parts: list[Part], stored: list[dict[str, torch.Tensor]], x: torch.Tensor, fill: int = 1
) -> torch.Tensor:
    """One device's output, by plain products; ranks filled up to a multiple of `fill`, as some
    kernels want.
    """
    for part, tensors in zip(parts, stored, strict=True):
        for name in sorted(tensors, reverse=part.out_features % 8 == 0):  # any order
            part.load(name, tensors[name], torch.device("cpu"), torch.float64)
        assert not part.missing()
    rows = [padded(part.first(), fill if part.rank is not None else 1, 1) for part in parts]

    def second(part):
        factor = part.second()
        return (
            None
            if factor is None
            else lambda z: linear(z, padded(factor, 1, fill if part.rank else 1))
        )

    width = sum(len(span) for part in parts for span in part.outputs)
    widths = [part.first().shape[0] for part in parts]
    stack = Stack(
        [r.shape[0] for r in rows],
        widths,
        [second(p) for p in parts],
        [p.pivoted for p in parts],
        global_order(parts),
        width,
    )
    return stack(x, lambda inputs: linear(inputs, torch.cat(rows)))


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize(
    "kinds",
    [
        ("pair",) * 3,
        ("pivoted",) * 3,
        ("dense",) * 3,
        ("pair", "dense", "pivoted"),
        ("dense", "pivoted", "pair"),
    ],
    ids=" ".join,
)
def test_split_by_outputs(kinds, devices):
    """q, k, v stacked, each its own kind and rank: the devices' heads laid side by side are the
    whole output.
    """
    made = [
        matrix(kind, size, rank, seed)
        for seed, (kind, size, rank) in enumerate(zip(kinds, SIZES, (5, 3, 7), strict=True))
    ]
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    kv_heads = SIZES[1] // HEAD
    replicas = max(1, devices // kv_heads)
    found: list[list[torch.Tensor]] = [[], [], []]
    for device in range(devices):
        local = [SIZES[0] // devices, *[max(SIZES[1] // devices, HEAD)] * 2]
        index = [device, device // replicas, device // replicas]
        here = spans(SIZES, local, index, stored_as_one=False)
        parts = [
            Part(
                f"m.{i}",
                SIZES[i],
                IN,
                here[i],
                range(IN),
                None if kinds[i] == "dense" else (5, 3, 7)[i],
                kinds[i] == "pivoted",
            )
            for i in range(3)
        ]
        for i, piece in enumerate(
            run(parts, [tensors for tensors, _ in made], x, fill=8 if device % 2 else 1).split(
                local, dim=-1
            )
        ):
            if i == 0 or device % replicas == 0:
                found[i].append(piece)
    for i, (_, whole) in enumerate(made):
        torch.testing.assert_close(torch.cat(found[i], dim=-1), linear(x, whole))


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["pair", "pivoted"])
def test_split_by_inputs(kind, devices):
    """o, down: every device multiplies its share of the input; the sum is the whole output."""
    tensors, whole = matrix(kind, 20, 6, 0)
    x = torch.randn(4, IN, dtype=torch.float64)
    width = IN // devices
    total = torch.zeros(4, 20, dtype=torch.float64)
    for device in range(devices):
        mine = range(device * width, (device + 1) * width)
        part = Part("o", 20, IN, [range(20)], mine, 6, kind == "pivoted")
        total += run([part], [tensors], x[:, mine.start : mine.stop])
    torch.testing.assert_close(total, linear(x, whole))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("kind", ["pair", "pivoted"])
def test_stored_as_one(kind, devices):
    """Phi-3 and GPT-2 keep q, k, v as one matrix, so one pair stands for three: every device takes
    its heads of each.
    """
    tensors, whole = matrix(kind, sum(SIZES), 9, 1)
    x = torch.randn(5, IN, dtype=torch.float64)
    for device in range(devices):
        local = [size // devices for size in SIZES]
        [here] = spans(SIZES, local, [device] * 3, stored_as_one=True)
        part = Part("qkv", sum(SIZES), IN, here, range(IN), 9, kind == "pivoted")
        q, k, v = (
            rows[device * n : (device + 1) * n]
            for rows, n in zip(whole.split(SIZES), local, strict=True)
        )
        torch.testing.assert_close(run([part], [tensors], x), linear(x, torch.cat((q, k, v))))


def test_a_device_keeps_no_more_than_its_share():
    """Split by outputs, B is never larger than the outputs that live here."""
    tensors, _ = matrix("pivoted", 24, 10, 2)
    for device in range(4):
        rows, places = local_places(tensors["places"], [range(device * 6, device * 6 + 6)], 10)
        assert len(rows) <= 6 and len(places) == 6 and int(places.max()) < 10 + len(rows)
    whole, places = local_places(tensors["places"], [range(24)], 10)
    assert whole.tolist() == list(range(14)) and torch.equal(places, tensors["places"].long())


@pytest.mark.parametrize("kind", ["pair", "pivoted"])
def test_rank_zero(kind):
    tensors, whole = matrix(kind, 20, 0, 3)
    part = Part("o", 20, IN, [range(20)], range(IN), 0, kind == "pivoted")
    x = torch.randn(4, IN, dtype=torch.float64)
    assert (
        torch.equal(run([part], [tensors], x), torch.zeros(4, 20, dtype=torch.float64))
        and not whole.any()
    )
    assert torch.equal(
        Stack([0], [0], [None], [False], None, 20)(x, None), torch.zeros(4, 20, dtype=torch.float64)
    )


@pytest.mark.parametrize("scheme", ["int8", "int6", "int5", "int4", "int4-symmetric", "int3"])
def test_few_bits_are_dequantised_and_sliced(scheme):
    """The stored numbers of a pair, in any order, give slices of the matrices they stand for."""
    module = QuantizedLinear(IN, 20, False, scheme, 32, rank=6)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in module.named_parameters():
        low, high = (0, 200) if tensor.dtype == torch.uint8 else (-100, 100)
        values = torch.randint(low, high, tensor.shape, generator=generator)
        tensor.data = values.to(tensor.dtype) if name.endswith("qdata") else values / 100
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        part = Part("o", 20, IN, [range(5, 15)], range(8, 16), 6, scheme=scheme, group_size=32)
        for name in order(dict(module.named_parameters())):
            part.load(name, getattr(module, name), torch.device("cpu"), torch.float32)
        assert not part.missing()
        torch.testing.assert_close(part.second(), module.dequantized("weight")[5:15])
        torch.testing.assert_close(part.first(), module.dequantized("weight_in")[:, 8:16])


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("weight", (20, 5), r"o\.weight has the shape \(20, 5\), config\.json asks for \(20, 6\)"),
        ("weight_in", (6, IN - 1), r"o\.weight_in has the shape \(6, 23\)"),
        ("places", (20,), r"o: the checkpoint has a 'places'"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, shape, says):
    part = Part("o", 20, IN, [range(20)], range(IN), 6)
    with pytest.raises(ValueError, match=says):
        part.load(name, torch.zeros(shape), torch.device("cpu"), torch.float32)
    assert part.missing() == ["weight", "weight_in"]
