"""Method magnitude-svd: plain truncation, by an independent decomposition and by search."""

import pytest
import torch
from conftest import build
from test_svd_llm import FAMILIES, product, ranks
from weighted import alternated, dense_weights, nudged, truncated, weighted_error

import grasp
from grasp.core.decoder import Decoder
from grasp.errors import RecipeError
from grasp.methods import make

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"retain_ratio": 0.55, "storage": "pivoted", "rank_multiple": 2},
        {"ratio": 0.1, "layers": "bi", "num_layers": 2},
    ),
}


def run(data, name="llama", **fields):
    return grasp.compress(build(name), method="magnitude-svd", data=data, **fields)


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_matrix_of_that_rank_is_nearer(name, storage, calibration):
    """Eckart and Young: what the dropped singular values leave; alternating least squares and small
    nudges find nothing better.
    """
    result = run(calibration, name, retain_ratio=0.4, storage=storage)
    weights = dense_weights(build(name))
    assert ranks(result).keys() == weights.keys()
    for number, (path, rank) in enumerate(ranks(result).items()):
        weight, kept = weights[path], product(result, path)
        scale = torch.ones(weight.shape[1], dtype=torch.float64)
        least = float(torch.linalg.svdvals(weight)[rank:].square().sum())
        assert weighted_error(weight - kept, scale) == pytest.approx(least, rel=1e-4), path
        assert float((kept - truncated(weight, rank)).norm() / weight.norm()) < 1e-4, path
        if number < 5:
            assert least * (1 - 1e-3) <= alternated(weight, scale, rank) < 1.05 * least, path
            assert nudged(weight, scale, kept, rank) >= least * (1 - 1e-6), path


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_matrix_keeps_the_same_share(name, calibration):
    result = run(calibration, name, retain_ratio=0.5)
    assert ranks(result) == {
        path: int(0.5 * weight.numel() / sum(weight.shape) + 1e-9)
        for path, weight in dense_weights(build(name)).items()
    }


def test_the_text_does_not_matter(calibration):
    other = grasp.Calibration(calibration.ids[:2].flip(1), "random")
    one, two = (run(data, ratio=0.2) for data in (calibration, other))
    assert one.manifest["edits"] == two.manifest["edits"]
    assert "prediction" not in one.manifest


def test_its_plan_counts_bytes_and_passes():
    decoder = Decoder(build("llama"))
    plan = make("magnitude-svd", {"ratio": 0.2}).plan(decoder)
    linears = [one for layer in decoder.layers() for one in layer.linears.values()]
    assert (plan.forward_sweeps, plan.backward_sweeps) == (1, 0)
    assert plan.statistics_bytes == 2 * 4 * sum(min(one.shape) ** 2 for one in linears)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method magnitude-svd: say how much .*--speedup; none", {}),
        ("--ratio 0.99: cannot be reached", {"ratio": 0.99}),
        ("--score: not a flag of --method magnitude-svd", {"ratio": 0.2, "score": "random"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
