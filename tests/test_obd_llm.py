"""Method obd-llm: least loss in the metric of both sides, by independent roots; and what it is of
grasp-fisher.
"""

import pytest
import torch
from conftest import build
from test_curvature import all_paths, brute_force, damped_gram
from test_svd_llm import product, ranks
from weighted import dense_weights, nudged, truncated

import grasp
from grasp.core.decoder import Decoder
from grasp.core.fields import declared
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods import available, make
from grasp.stages.basis import GRADIENT_DAMPING, INPUT_DAMPING
from grasp.verbs.compress import predict

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"retain_ratio": 0.55, "storage": "pivoted", "rank_multiple": 2},
        {"ratio": 0.1, "layers": "bi", "num_layers": 2},
    ),
}


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="obd-llm", data=data, **fields)


def root(gram, damping):
    """A Cholesky factor of the damped gram."""
    return torch.linalg.cholesky(damped_gram(gram, damping))


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_it_is_the_truncation_whitened_on_both_sides(name, storage, calibration):
    """With Cholesky factors L of D and R of X: L' W R truncated, and both undone. The error is what
    the dropped singular values leave, half of it what is told in nats; nudges find nothing better,
    and whitening the inputs alone is worse.
    """
    result, model = run(calibration, name, retain_ratio=0.4, storage=storage), build(name)
    weights, paths = dense_weights(build(name)), all_paths(Decoder(model))
    sums = brute_force(model, calibration.ids, paths)
    assert list(ranks(result)) == paths
    worse, nats = 0, 0.0
    for number, (path, rank) in enumerate(ranks(result).items()):
        weight, (_, inputs, gradients, tokens) = weights[path], sums[path]
        right, left = (
            root(inputs / tokens, INPUT_DAMPING),
            root(gradients / tokens, GRADIENT_DAMPING),
        )

        def error(change, left=left, right=right):
            return float((left.T @ change @ right).square().sum())

        white = left.T @ weight @ right
        inner = torch.linalg.solve(left.T, truncated(white, rank))
        same = torch.linalg.solve(right.T, inner.T).T
        kept = product(result, path)
        assert float((kept - same).norm() / weight.norm()) < 1e-3, path
        least = float(torch.linalg.svdvals(white)[rank:].square().sum())
        assert error(weight - kept) == pytest.approx(least, rel=1e-3), path
        nats += least / 2
        if number < 5:
            one = torch.ones(white.shape[1], dtype=white.dtype)
            best = nudged(white, one, left.T @ kept @ right, rank)
            assert best >= least * (1 - 1e-3), path
        one_sided = torch.linalg.solve(right.T, truncated(weight @ right, rank).T).T
        worse += error(weight - one_sided) > 1.001 * least
    assert worse == len(paths)
    assert result.manifest["prediction"]["seen_rise"] == pytest.approx(nats, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_it_is_grasp_fisher_with_ranks_alone(name, storage, calibration):
    """The same edits and the same forecast, from the same sweep."""
    preset = {"parts": "ranks", "allocation": "uniform", "rounds": 1}
    found = run(calibration, name, ratio=0.2, storage=storage)
    expected = grasp.compress(
        build(name),
        method="grasp-fisher",
        data=calibration,
        ratio=0.2,
        storage=storage,
        **preset,
    )
    assert found.manifest["edits"] == expected.manifest["edits"]
    assert found.manifest["prediction"] == expected.manifest["prediction"]
    for path in ranks(found):
        assert torch.equal(product(found, path), product(expected, path)), path


def test_it_forecasts_other_sizes(calibration):
    """As each would say of itself; more is lost where more goes, and unseen text loses more."""
    found = predict(build("llama"), [0.1, 0.2, 0.3], method="obd-llm", ratio=0.2, data=calibration)
    assert 0 < found.rises[0.1] < found.rises[0.2] < found.rises[0.3]
    assert all(found.seen[ratio] < rise for ratio, rise in found.rises.items())
    told = run(calibration, ratio=0.2).manifest["prediction"]
    assert found.rises[0.2] == pytest.approx(told["loss_rise"], rel=1e-5)
    assert found.seen[0.2] == pytest.approx(told["seen_rise"], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_matrix_keeps_the_same_share(name, calibration):
    result = run(calibration, name, retain_ratio=0.5)
    assert ranks(result) == {
        path: int(0.5 * weight.numel() / sum(weight.shape) + 1e-9)
        for path, weight in dense_weights(build(name)).items()
    }


def test_one_block_has_no_halves(calibration):
    data = grasp.Calibration(calibration.ids[:1], "random")
    found = run(data, ratio=0.2).manifest["prediction"]
    assert found["loss_rise"] == found["seen_rise"] > 0


def test_it_offers_what_every_low_rank_method_does():
    """None of the flags of parts, rounds and allocations."""
    assert declared(available()["obd-llm"]).keys() == declared(available()["fwsvd"]).keys()
    for name, value in {"parts": ("ranks",), "rounds": 1, "allocation": "uniform"}.items():
        with pytest.raises(RecipeError, match=f"--{name}: not a flag of --method obd-llm"):
            make("obd-llm", {"ratio": 0.2, name: value})


def test_its_plan_counts_bytes_and_passes(calibration):
    decoder = Decoder(build("llama"))
    method = make("obd-llm", {"ratio": 0.2})
    plan = method.plan(decoder)
    squares = 4 * sum(
        min(linear.shape) ** 2 for layer in decoder.layers() for linear in layer.linears.values()
    )
    assert (plan.forward_sweeps, plan.backward_sweeps) == (0, 1)
    needed = method.needs(decoder)
    Resident(decoder, calibration).sweep(needed)
    held = sum(value.nbytes for one in needed for value in one.sums.values() if value.dim() == 2)
    assert plan.statistics_bytes == (2 * 2 + 2) * squares
    assert held <= plan.statistics_bytes - 2 * squares


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method obd-llm: say how much .*--speedup; none", {}),
        ("--ratio 0.99: cannot be reached", {"ratio": 0.99}),
        ("--basis: not a flag of --method obd-llm", {"ratio": 0.2, "basis": "plain"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
