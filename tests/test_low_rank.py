"""The base of the low-rank methods: a method is its metric, and what it leaves out has defaults."""

from dataclasses import dataclass

import pytest
import torch
from conftest import build

import grasp
from grasp.core.decoder import Decoder
from grasp.core.linalg import metric_groups
from grasp.core.runner import Resident
from grasp.methods.low_rank import LowRank
from grasp.stages.basis import Groups
from grasp.stages.budget import rounded_down
from grasp.stages.input_norms import InputNorms
from grasp.stages.options import options


@dataclass(frozen=True, kw_only=True)
class Scaled(LowRank):
    """Truncate W diag(||x_j||): what a method by scaled inputs (FWSVD, ASVD) needs to say."""

    name = "scaled"
    paper = ""

    def metric(self, paths, scratch):
        return [InputNorms(paths)]

    def groups(self, linear, stats, scratch):
        weight, squares = linear.weight.double(), stats["input_norms"][linear.path].square()
        if linear.is_tall:
            near, far = squares.diag(), weight.mT @ weight
        else:
            near, far = torch.eye(len(weight)).double(), (weight * squares) @ weight.mT
            weight = weight.mT
        expand, values, contract = metric_groups(near, far)
        return Groups(values.float(), scratch.hold(expand), scratch.hold(contract))


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_metric_makes_a_method(name, storage, calibration):
    method = Scaled(retain_ratio=0.4, storage=storage, projections="mlp", layers=(0, 2))
    result = grasp.compress(build(name), method=method, data=calibration)
    dense = Decoder(build(name))
    linears = dense.linears(0, ("mlp",)) + dense.linears(2, ("mlp",))
    stats = Resident(dense, calibration).sweep([InputNorms(one.path for one in linears)])
    assert [edit["path"] for edit in result.manifest["edits"]] == [one.path for one in linears]
    for linear in linears:
        pair = result.model.get_submodule(linear.path)
        norms = stats["input_norms"][linear.path]
        u, s, vh = torch.linalg.svd(linear.weight.double() * norms, full_matrices=False)
        rank = pair.rank
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank] / norms
        assert torch.allclose(pair.product().double(), expected, atol=1e-5), linear.path
    assert "prediction" not in result.manifest


@pytest.mark.parametrize("budget", ["params", "bytes"])
@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_what_rounding_down_leaves_is_planned_to_the_number(budget, storage, calibration):
    method = Scaled(retain_ratio=0.5, budget=budget, storage=storage, rank_multiple=3)
    model = build("phi3")
    planned = method.plan(Decoder(model))
    result = grasp.compress(model, method=method, data=calibration)
    assert planned.parameters == result.parameters_after
    assert {edit["rank"] % 3 for edit in result.manifest["edits"]} == {0}


def test_rounded_down():
    """`int(m n share / (m + n))`, also where that is whole; at least the least that there is."""
    shapes = {"a": (32, 48), "b": (16, 16), "c": (3, 2)}
    offers = {path: options(shape, torch.zeros(min(shape) + 1)) for path, shape in shapes.items()}
    for share in (0.0, 0.125, 0.5, 10 * 80 / (32 * 48), 0.999):
        assert rounded_down(offers, share).sizes == {
            path: int(m * n * share / (m + n) + 1e-9) for path, (m, n) in shapes.items()
        }, share
