"""Costs as shares of a model's time: their structure by a clock that counts products, so that
nothing here depends on the machine.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import build
from torch.utils.flop_counter import FlopCounterMode

from grasp.core.clock import Clock, WaitingClock, clock_of
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Narrow
from grasp.stages import in_place, measuring
from grasp.stages.in_place import lowest_tenth, prompt_length
from grasp.stages.latency import Latency
from grasp.stages.measuring import Curve, Ring, Times, Variant, filled

LAYER = "model.layers.1"


def attention(query, key, _value, *_, **__):
    """Products of the scores and of the values."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten.mul: lambda *_, out_shape, **__: math.prod(out_shape),
}


class Products(Clock):
    """Pretends that multiplications take time and nothing else does."""

    def __init__(self, counter):
        self.counter = counter

    def mark(self):
        return self.counter.get_total_flops()


@contextmanager
def latency(name="llama", pivoted=True, model=None):
    decoder = model or Decoder(build(name), source=name)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        yield decoder, Latency(decoder, pivoted, Products(counter))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measuring, "COLD_BYTES", 10_000)
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "MOST_COPIES", 2)
    monkeypatch.setattr(in_place, "ROUNDS", 1)


def whole(decoder, costs):
    """The cost of all matrices, layers and ends."""
    layers = list(decoder.layers())
    matrices = [one for layer in layers for one in layer.linears.values()]
    return (
        sum(costs.of(one.path)(one.shape, None) for one in matrices)
        + sum(costs.layer(layer.index) for layer in layers)
        + costs.ends
    )


def test_the_dense_model_costs_one(family):
    with latency(family) as (decoder, costs):
        assert whole(decoder, costs) == pytest.approx(1)
        assert 0 < costs.ends < 1 and costs.layer(0) > 0
        assert costs.whole.prefill > costs.whole.decode > 0
        kinds = [costs.kind_of[index] for index in decoder.kept]
        assert sum(kind.count for kind in costs.kinds) == len(kinds)


def test_a_matrix_costs_its_share_of_the_products():
    with latency() as (decoder, costs):
        [q, up] = [decoder.layer(1).linears[f"{path}_proj"] for path in ("self_attn.q", "mlp.up")]
        assert costs.of(up.path)(up.shape, None) == pytest.approx(
            costs.of(q.path)(q.shape, None) * 48 / 32
        )


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_pair_costs_its_products(name, pivoted):
    """Timed at some ranks; and fused products are as many as single ones."""
    with latency(pivoted=pivoted) as (decoder, costs):
        linear = decoder.layer(1).linears[name]
        (m, n), cost = linear.shape, costs.of(linear.path)
        found = torch.tensor([cost((m, n), rank) for rank in range(min(m, n) + 1)])
        assert float(found[0]) == 0 and bool((found.diff() >= 0).all())
        dense = cost((m, n), None)
        for rank in (1, min(m, n) // 2):
            # a prompt is longer than the rank: the factor is put in order, and multiplies whole
            numbers = rank * (m + n)
            decoding = rank * (m + n - rank) if pivoted else numbers
            share = costs.kinds[0].matrices[name].share
            expected = share.decode * decoding / (m * n) + share.prefill * numbers / (m * n)
            assert cost((m, n), rank) == pytest.approx(expected / 2)
        assert dense == cost((m, n), None)


@pytest.mark.parametrize(("name", "side"), [("mlp.gate_proj", 0), ("mlp.down_proj", 1)])
def test_a_narrower_matrix_costs_its_width(name, side):
    with latency() as (decoder, costs):
        linear = decoder.layer(1).linears[name]
        cost, full = costs.of(linear.path), linear.shape[side]
        shapes = [
            tuple(width if place == side else size for place, size in enumerate(linear.shape))
            for width in range(6, full + 1)
        ]
        dense = torch.tensor([cost(shape, None) for shape in shapes])
        widths = torch.arange(6, full + 1) / full
        assert torch.allclose(dense, dense[-1] * widths)
        for rank in (1, 5, 20):
            pairs = torch.tensor([cost(shape, rank) for shape in shapes])
            assert bool((pairs.diff() >= 0).all()) and float(pairs[0]) > 0
        for shape in shapes[::7]:
            pairs = torch.tensor([cost(shape, rank) for rank in range(min(shape))])
            assert bool((pairs.diff() >= 0).all())


def test_a_spread_matrix_keeps_its_width_outside():
    """Fewer products, and as many numbers to put in their places."""
    with latency() as (decoder, costs):
        v, o = (decoder.layer(1).linears[f"self_attn.{name}_proj"] for name in "vo")
        for linear, shape in ((v, (12, 32)), (o, (32, 24))):
            plain, spread = costs.of(linear.path), costs.of(linear.path, spread=True)
            assert spread(shape, None) == pytest.approx(plain(shape, None))
            assert spread(linear.shape, None) == plain(linear.shape, None)
            decode = costs.times(linear.path, shape, None, spread=True).decode
            assert decode == costs.times(linear.path, linear.shape, None).decode * 3 / 4


def test_shapes_alone():
    """Without a name: the matrices of that shape, or the smallest that becomes it."""
    with latency() as (_, costs):
        for rank in (None, 3):
            gate, up = (costs.of(f"{LAYER}.mlp.{name}_proj") for name in ("gate", "up"))
            assert costs((48, 32), rank) == pytest.approx(
                (gate((48, 32), rank) + up((48, 32), rank)) / 2
            )
            assert costs((40, 32), rank) == pytest.approx(up((40, 32), rank))
        with pytest.raises(ValueError, match=r"\(64, 32\)"):
            costs((64, 32), None)
        with pytest.raises(ValueError, match=r"\(48, 32\) does not become \(32, 48\)"):
            up((32, 48), 2)


def test_what_a_layer_costs_beside_its_matrices_falls_with_its_width():
    """Of norms, attention and activation, what reading a prompt takes in the latter two."""
    with latency() as (_, costs):
        kind, full = costs.kinds[0], costs.layer(1)
        assert kind.attention.prefill > 0 and kind.mlp.prefill > 0
        assert kind.attention.prefill + kind.mlp.prefill < kind.rest.prefill
        assert costs.layer(1, heads=0.5) == pytest.approx(full - kind.attention.prefill / 4)
        assert costs.layer(1, channels=0.25) == pytest.approx(full - kind.mlp.prefill * 3 / 8)
        assert costs.layer(1, heads=0, channels=0) > 0


def test_layers_of_another_width_are_of_another_kind():
    decoder = Decoder(build("llama"), source="llama")
    Narrow(2, "channels", torch.arange(24)).apply(decoder)
    Drop(0).apply(decoder)
    with latency(model=decoder) as (_, costs):
        assert [kind.count for kind in costs.kinds] == [2, 1]
        assert [costs.kind_of[index] for index in (1, 2, 3)] == [0, 1, 0]
        wide, narrow = (
            costs.of(f"model.layers.{index}.mlp.up_proj")((width, 32), None)
            for index, width in ((1, 48), (2, 24))
        )
        assert wide == pytest.approx(2 * narrow) and whole(decoder, costs) == pytest.approx(1)


def test_what_was_measured_outlives_edits():
    with latency() as (decoder, costs):
        before = costs.of(f"{LAYER}.mlp.up_proj")((48, 32), None)
        Drop(1).apply(decoder)
        assert costs.of(f"{LAYER}.mlp.up_proj")((48, 32), None) == before
        assert not any(
            parameter.device.type != "meta"
            for kind in costs.kinds
            for matrix in kind.matrices.values()
            for parameter in matrix.module.parameters()
        )


def test_the_model_comes_back_as_it_was():
    decoder = Decoder(build("llama"), source="llama")
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    Latency(decoder, True)
    assert all(torch.equal(before[name], now) for name, now in decoder.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_time(dtype):
    """Finite, and never falling, whatever the machine does."""
    decoder = Decoder(build("llama", dtype), source="llama")
    costs = Latency(decoder, True)
    assert whole(decoder, costs) == pytest.approx(1)
    for shape in ((48, 32), (16, 32), (32, 48), (20, 32)):
        found = torch.tensor([costs(shape, rank) for rank in range(min(shape))])
        assert bool(found.isfinite().all() and (found >= 0).all() and (found.diff() >= 0).all())
        assert 0 < costs(shape, None) < 1


# --- pieces


def test_curves():
    times = [Times(2.0, 1.0), Times(1.0, 3.0), Times(4.0, 4.0)]
    curve = Curve.rising([1, 2, 4], times)
    assert [curve.at(place) for place in (0, 1, 1.5, 2, 3, 4, 5)] == [
        *[Times(1.0, 1.0)] * 2,
        Times(1.0, 2.0),
        Times(1.0, 3.0),
        Times(2.5, 3.5),
        Times(4.0, 4.0),
        Times(5.5, 4.5),
    ]
    assert Curve([3], times[:1]).at(7) == times[0]


def test_the_lowest_tenth():
    assert lowest_tenth([]) == 0 and lowest_tenth([5.0, 3.0]) == 3.0
    assert lowest_tenth([float(value) for value in range(100, 0, -1)]) == 10.0


def test_variants_take_their_numbers_from_one_ring():
    from grasp.core.layers.low_rank_grasp import LowRankLinear

    ring = Ring(4096, torch.float32, torch.device("cpu"))
    make = {
        f"{name}_proj": LowRankLinear(8, 6, 3, False, "meta", pivoted=True)
        for name in ("gate", "up")
    }
    parents = [filled(Variant(make, True), ring) for _ in range(200)]  # around it, many times
    store = ring.numbers.untyped_storage().data_ptr()
    for parent in parents:
        gate, up = parent.gate_proj, parent.up_proj
        assert gate.joint is up.joint is not None and gate.joint.rows is not None
        assert {p.untyped_storage().data_ptr() for p in parent.parameters()} == {store}
        with torch.no_grad():
            x = torch.randn(1, 1, 8)
            together = [gate(x), up(x)]
            gate.joint = up.joint = None
            assert all(map(torch.allclose, together, [gate(x), up(x)]))


def test_large_models_read_short_prompts(monkeypatch):
    decoder = Decoder(build("llama"), source="llama")
    assert prompt_length(decoder) == 120  # 128 positions, 8 of them for decoding
    monkeypatch.setattr(decoder.config, "max_position_embeddings", 4096)
    found = []
    for products in (1e12, 400.0 * decoder.num_parameters(), 1.0):
        monkeypatch.setattr(in_place, "PRODUCTS", products)
        found.append(prompt_length(decoder))
    assert found == [512, 256, 128]


def test_clocks(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert type(clock_of(torch.device("cpu"))) is Clock
    clock = clock_of(torch.device("mps"))
    begin = clock.mark()
    assert isinstance(clock, WaitingClock) and waited == [torch.device("mps")]
    assert clock.seconds(begin, clock.mark()) >= 0


def test_the_clock_of_a_gpu(monkeypatch):
    """Events on its stream: waited for when they are read, not before."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            log.append("made")

        def record(self):
            log.append("recorded")

        def synchronize(self):
            log.append("waited")

        def elapsed_time(self, _other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = clock_of(torch.device("cuda"))
    begin, end = clock.mark(), clock.mark()
    assert "waited" not in log and clock.seconds(begin, end) == 0.25 and log[-1] == "waited"
