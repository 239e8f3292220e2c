"""A budget of time: what parts cost is measured, and a share of the model's time goes."""

import threading

import pytest
import torch
from conftest import build

import grasp
from grasp.core.decoder import Decoder
from grasp.errors import RecipeError
from grasp.methods import make, size


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return grasp.Calibration(torch.randint(0, 64, (6, 20), generator=generator), "random")


def run(data, **fields):
    return grasp.compress(build("llama"), data=data, width_multiple=4, **fields)


class Staircase:
    """Pretends that a pair takes time by whole eights of its rank, a dense matrix by its size, and
    a layer beside its matrices as much as `beside` of them. `calls`: how it was made.
    """

    calls: tuple = ()
    beside = 0.0

    def __init__(self, decoder, pivoted):
        type(self).calls += ((decoder.num_parameters(), pivoted),)
        shapes = [linear.shape for layer in decoder.layers() for linear in layer.linears.values()]
        self.total = 1.25 * (1 + self.beside) * sum(m * n for m, n in shapes)
        self.rest = self.beside * sum(m * n for m, n in shapes) / decoder.num_layers / self.total

    def of(self, path, spread=False):
        def cost(shape, rank):
            work = shape[0] * shape[1] if rank is None else -(-rank // 8) * 8 * sum(shape)
            return work / self.total

        return cost

    def layer(self, index, heads=1.0, channels=1.0):
        return self.rest


@pytest.fixture
def staircase(monkeypatch):
    monkeypatch.setattr(Staircase, "calls", ())
    monkeypatch.setattr(Staircase, "beside", 0.0)
    monkeypatch.setattr(size, "Latency", Staircase)
    return Staircase


def left(result, timer):
    """The share of the model's time that its matrices take afterwards."""
    total = 0.0
    for layer in Decoder(build("llama")).layers():
        for linear in layer.linears.values():
            module = result.model.get_submodule(linear.path)
            shape = module.out_features, module.in_features
            total += timer.of(linear.path)(shape, getattr(module, "rank", None))
    return total


def test_a_share_of_the_models_time_goes(staircase, data):
    """The matrices take 0.8 of it; every pair fills the step it stands on."""
    result = run(data, ratio=0.4, budget="latency", rounds=1)
    timer = staircase(Decoder(build("llama")), True)
    assert 0.4 - 8 * 80 / timer.total < left(result, timer) <= 0.4 + 1e-9
    assert {rank % 8 for rank in result.log.ranks().values()} == {0}


def test_two_rounds_measure_once(staircase, data):
    """The unit stays that of the model as it was, also where it is edited between."""
    result = run(data, ratio=0.4, budget="latency", rounds=2)
    assert len(staircase.calls) == 1
    timer = staircase(Decoder(build("llama")), True)
    assert left(result, timer) <= 0.4 + 1e-9


def test_a_speedup_is_a_share_of_the_time(staircase, data):
    fast = run(data, speedup=1.6, rounds=1)
    share = run(data, ratio=1 - 1 / 1.6, budget="latency", rounds=1)
    assert fast.log.to_json() == share.log.to_json()
    assert fast.manifest["recipe"]["speedup"] == 1.6
    with pytest.raises(RecipeError, match=r"--speedup 90.*largest reachable is [\d.]+"):
        run(data, speedup=90)


def test_layers_go_where_they_cost_beside_their_matrices(staircase, data, monkeypatch):
    monkeypatch.setattr(Staircase, "beside", 20.0)
    result = run(data, speedup=1.3, shape="dense")
    assert "layers dropped" in result.log.counts()


def test_time_is_measured_while_nothing_else_runs(staircase, data, monkeypatch):
    busy, before = {}, set(threading.enumerate())

    class Watching(Staircase):
        def of(self, path, spread=False):
            def cost(shape, rank):
                pools = {one for one in threading.enumerate() if "Pool" in one.name}
                busy.setdefault((path, rank is None), bool(pools - before))
                return inner(shape, rank)

            inner = super().of(path, spread)
            return cost

    monkeypatch.setattr(size, "Latency", Watching)
    run(data, ratio=0.4, budget="latency")
    assert busy and not any(busy.values())


def test_a_measured_budget(data):
    """As it is, on this machine: what is asked for is met by what was measured."""
    everything = ("ranks", "channels", "values", "groups", "layers")
    result = run(data, speedup=1.1, parts=everything)
    assert len(result.log) and result.parameters_after < result.parameters_before
    assert make("grasp-fisher", {"speedup": 1.1}).plan(Decoder(build("llama"))).parameters is None
