"""Method fwsvd: the Fisher weights by autograd, and the weighted problem by independent means."""

import pytest
import torch
from conftest import build, quick
from test_svd_llm import FAMILIES, product, ranks
from weighted import alternated, dense_weights, nudged, truncated, weighted_error

import grasp
from grasp.core.decoder import Decoder
from grasp.core.linalg import balanced
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.methods.fwsvd import FLOOR, scale_of
from grasp.stages.basis import scaled_groups
from grasp.stages.statistics import FeatureFisher

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"retain_ratio": 0.55, "storage": "pivoted", "rank_multiple": 2},
        {"ratio": 0.1, "projections": "mlp"},
    ),
}


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="fwsvd", data=data, **fields)


def fisher(model, data):
    """path -> f (in,): by plain autograd, one block after the other, in float64."""
    linears = [one for layer in Decoder(model).layers() for one in layer.linears.values()]
    model.double()
    found = {one.path: torch.zeros(one.shape[1], dtype=torch.float64) for one in linears}
    for block in range(data.num_blocks):
        ids = data.ids[block : block + 1]
        mask = None if data.mask is None else data.mask[block : block + 1]
        model.zero_grad()
        chances = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        real = torch.ones(ids.shape[1]) if mask is None else mask[0].float()
        for place in range(ids.shape[1] - 1):
            if real[place] and real[place + 1]:
                (-chances[0, place, ids[0, place + 1]]).backward(retain_graph=True)
        for one in linears:
            grad = one.oriented(one.parameter.grad)
            for row in grad:
                found[one.path] += row**2
    return found


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_the_fisher_weights_are_those_of_autograd(name, calibration):
    data = grasp.Calibration(calibration.ids[:3], "random")
    expected, decoder = fisher(build(name), data), Decoder(build(name))
    found = Resident(decoder, data).sweep([FeatureFisher(expected)])["feature_fisher"]
    for path, weights in expected.items():
        assert torch.allclose(found[path], weights, rtol=1e-3), path


def test_a_sample_is_a_block_and_padding_is_none_of_it(calibration):
    """Not the square of the summed gradient; and rubbish under the mask is not read."""
    path = "model.layers.1.mlp.up_proj"
    mask = torch.arange(20) < torch.tensor([20, 13, 2])[:, None]
    tables = []
    for pad in (0, 77):
        ids = calibration.ids[:3].where(mask, torch.tensor(pad))
        data = grasp.Calibration(ids, "random", mask=mask)
        runner = Resident(Decoder(build("llama")), data)
        tables.append(runner.sweep([FeatureFisher([path])])["feature_fisher"][path])
        expected = fisher(build("llama"), data)[path]
        assert torch.allclose(tables[-1], expected, rtol=1e-3)
    assert torch.equal(*tables)
    alone = []
    for block in range(3):
        data = grasp.Calibration(ids[block : block + 1], "random", mask=mask[block : block + 1])
        runner = Resident(Decoder(build("llama")), data)
        alone.append(runner.sweep([FeatureFisher([path])])["feature_fisher"][path])
    assert torch.allclose(sum(alone), tables[0], rtol=1e-5)


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_no_matrix_of_that_rank_is_better_in_its_norm(name, storage, calibration):
    """`sum_ij f_j (W - W')_ij^2` is what the dropped singular values of W diag(sqrt f) leave;
    alternating least squares and small nudges find nothing better, and plain truncation is worse.
    """
    result = run(calibration, name, retain_ratio=0.4, storage=storage)
    weights = dense_weights(build(name))
    every, plain_worse = fisher(build(name), calibration), 0
    assert ranks(result).keys() == weights.keys()
    for number, (path, rank) in enumerate(ranks(result).items()):
        weight, scale, kept = weights[path], every[path].sqrt(), product(result, path)
        least = float(torch.linalg.svdvals(weight * scale)[rank:].square().sum())
        error = weighted_error(weight - kept, scale)
        assert error == pytest.approx(least, rel=1e-3), path
        if number < 5:
            best = alternated(weight, scale, rank)
            assert least * (1 - 1e-3) <= best < 1.05 * least, path
            assert nudged(weight, scale, kept, rank) >= error * (1 - 1e-6), path
        plain_worse += weighted_error(weight - truncated(weight, rank), scale) > 1.002 * least
    assert plain_worse == len(weights)


def test_the_scale_is_the_root_and_not_its_root(calibration):
    """The common mistake, f^¼, is told from f^½ in the product and in the error."""
    path, result = "model.layers.2.mlp.down_proj", run(calibration, retain_ratio=0.4)
    weight, rank = dense_weights(build("llama"))[path], ranks(result)[path]
    f = fisher(build("llama"), calibration)[path]
    right, wrong = (truncated(weight * f**power, rank) / f**power for power in (0.5, 0.25))
    found = product(result, path)
    assert float((found - right).norm() / weight.norm()) < 1e-4
    assert float((found - wrong).norm() / weight.norm()) > 1e-2
    errors = [weighted_error(weight - one, f.sqrt()) for one in (found, wrong)]
    assert errors[0] < 0.999 * errors[1]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("dead", [1, 4])
def test_dead_inputs_leave_finite_factors(shape, dead):
    """f = 0 for some inputs: the others are served as if the dead columns were not there, and all
    groups are all of W.
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    f = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1
    f[:dead] = 0
    found = scaled_groups(weight, scale_of(f), Scratch())
    for rank in range(min(shape) + 1):
        left, right = found.pair(weight, torch.arange(rank))
        assert bool(left.isfinite().all() and right.isfinite().all())
        error = weighted_error(weight - (left @ right).double(), f.sqrt())
        least = float(torch.linalg.svdvals(weight * f.sqrt())[rank:].square().sum())
        assert error == pytest.approx(least, rel=1e-4, abs=1e-8)
        shared = balanced(left, right)
        assert all(float(one.abs().sum()) < 1e2 for one in shared)
    assert torch.allclose((left @ right).double(), weight, atol=1e-4)


def test_the_floor_touches_dead_inputs_only():
    f = torch.tensor([4.0, 0.0, 1.0, 3e-9], dtype=torch.float64)
    found = scale_of(f)
    assert torch.equal(found[[0, 2, 3]], f[[0, 2, 3]].sqrt())
    assert float(found[1]) == pytest.approx((FLOOR * float(f.mean())) ** 0.5)
    assert scale_of(torch.zeros(3)).tolist() == [1, 1, 1]


def test_its_plan_counts_bytes_and_passes(calibration):
    decoder = Decoder(build("llama"))
    plan = make("fwsvd", {"ratio": 0.2}).plan(decoder)
    linears = [one for layer in decoder.layers() for one in layer.linears.values()]
    squares = sum(min(one.shape) ** 2 for one in linears)
    assert (plan.forward_sweeps, plan.backward_sweeps) == (0, 1)
    assert plan.statistics_bytes == 8 * sum(one.shape[1] for one in linears) + 2 * 4 * squares


def test_a_bfloat16_model(calibration):
    """The same ranks, and the same matrices to within its rounding."""
    wide = run(calibration, retain_ratio=0.4)
    narrow = run(calibration, model=build("llama", torch.bfloat16), retain_ratio=0.4)
    assert ranks(wide) == ranks(narrow)
    for path in ranks(wide):
        one, other = product(wide, path), product(narrow, path)
        assert float((one - other).norm() / one.norm()) < 0.1, path


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method fwsvd: say how much .*--ratio, --retain-ratio, --speedup; none", {}),
        ("--ratio 0.99: cannot be reached", {"ratio": 0.99}),
        ("--allocation: not a flag of --method fwsvd", {"ratio": 0.2, "allocation": "global"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
